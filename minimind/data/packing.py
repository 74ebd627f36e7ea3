"""Documents -> rows of equal capacity: deterministic best fit within bounded windows, planned once and mapped.

A document of n tokens takes n - 1 slots of a row, because the shift from inputs to labels happens inside the document;
so no label ever comes from a neighbour. A pretraining document longer than a row is cut in pieces that overlap by one
token: every label is predicted exactly once. Documents that belong together (a preference pair) stay in one row.

Best fit, longest first: each unit goes to the row with the least room that still holds it, else opens a new one. Units
of one length are placed together, so the work grows with the number of different lengths and not of documents
(Johnson et al. 1974: best-fit decreasing needs at most 11/9 of the fewest rows).

It plans where tokens go and never looks at them; collate.py makes tensors.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from minimind.data.build import write_folder
from minimind.data.dataset import TokenDataset, lock, map_file
from minimind.errors import ConfigError, DataError

PLAN_VERSION = 1
Mode = Literal["packed", "padded"]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of one: like `Example`, in arrays of the cache."""

    ids: npt.NDArray[np.integer]
    loss_weights: npt.NDArray[np.float32]


class PackedRows:
    """A plan, memory-mapped: which pieces of the dataset's tokens stand in which row."""

    def __init__(self, dataset: TokenDataset, folder: Path) -> None:
        """Map a finished plan of `dataset`."""
        try:
            meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: not a packing plan ({error}); delete it, it will be made again") from None
        self.dataset = dataset
        self.fingerprint: str = meta["fingerprint"]
        self.row_length: int = meta["row_length"]
        self.num_rows: int = meta["num_rows"]
        self.num_pieces: int = meta["num_pieces"]
        self.num_slots: int = meta["num_slots"]
        """Slots that hold an input token, of `num_rows * row_length`."""
        self.starts = map_file(folder / "starts.bin", np.dtype(np.int64), self.num_pieces)
        """First token of each piece, counted over all documents laid end to end."""
        self.lengths = map_file(folder / "lengths.bin", np.dtype(np.int32), self.num_pieces)
        """Tokens of each piece (one more than its slots)."""
        self.row_offsets = map_file(folder / "rows.bin", np.dtype(np.int64), self.num_rows + 1)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.num_rows

    @property
    def fill_rate(self) -> float:
        """Share of the slots that hold a token."""
        return self.num_slots / max(1, self.num_rows * self.row_length)

    def row(self, index: int) -> list[Piece]:
        """Return the pieces of one row, in the order of the documents."""
        first, last = int(self.row_offsets[index]), int(self.row_offsets[index + 1])
        return [Piece(*self.dataset.slice(int(self.starts[i]), int(self.lengths[i]))) for i in range(first, last)]


def pack(dataset: TokenDataset, row_length: int, *, window: int = 131_072, mode: Mode = "packed") -> PackedRows:
    """Return the rows of `row_length` slots that hold every label of `dataset` exactly once.

    `window`: documents that are packed together, which bounds memory; the plan is a function of (dataset, arguments)
    and cached beside the dataset. Raises ConfigError when a document that may not be cut is longer than a row.
    """
    if row_length < 1 or window < 1:
        raise ConfigError(f"row_length {row_length} and pack_window {window} must be at least 1")
    group = dataset.documents_per_row
    if dataset.kind != "pretrain" and group * (dataset.longest - 1) > row_length:
        raise ConfigError(
            f"data.row_length is {row_length}, but {dataset.folder} holds documents of {dataset.longest} tokens"
            f"{' in pairs' if group == 2 else ''}; prepare them with a max_length of {row_length // group + 1}"
        )
    options: dict[str, Any] = {
        "plan_version": PLAN_VERSION, "dataset": dataset.fingerprint,
        "row_length": row_length, "window": window, "mode": mode,
    }  # fmt: skip
    fingerprint = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
    folder = dataset.folder.with_name(f"rows-{fingerprint[:32]}")
    with lock(folder):
        if not (folder / "meta.json").is_file():
            write_folder(folder, lambda target: _write_plan(target, dataset, options, fingerprint))
    return PackedRows(dataset, folder)


def _write_plan(target: Path, dataset: TokenDataset, options: dict[str, Any], fingerprint: str) -> None:
    num_rows = num_pieces = num_slots = 0
    row_length: int = options["row_length"]
    with (
        (target / "starts.bin").open("wb") as starts_file,
        (target / "lengths.bin").open("wb") as lengths_file,
        (target / "rows.bin").open("wb") as rows_file,
    ):
        rows_file.write(np.int64(0).tobytes())
        for starts, slots in _windows(dataset, row_length, options["window"]):
            group = dataset.documents_per_row
            units = slots.reshape(-1, group).sum(axis=1)
            if options["mode"] == "packed":
                row_of_unit = best_fit(units, row_length)
            else:
                row_of_unit = np.arange(len(units), dtype=np.int64)
            row_of_piece = np.repeat(row_of_unit, group)
            order = np.argsort(row_of_piece, kind="stable")
            starts_file.write(starts[order].tobytes())
            lengths_file.write((slots[order] + 1).astype(np.int32).tobytes())
            rows_file.write((num_pieces + np.cumsum(np.bincount(row_of_piece))).astype(np.int64).tobytes())
            num_rows += int(row_of_unit.max()) + 1
            num_pieces += len(starts)
            num_slots += int(slots.sum())
    meta = options | {
        "fingerprint": fingerprint, "num_rows": num_rows, "num_pieces": num_pieces, "num_slots": num_slots
    }  # fmt: skip
    (target / "meta.json").write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n")


def _windows(dataset: TokenDataset, row_length: int, window: int) -> Iterator[tuple[I64, I64]]:
    """Yield (first token, slots) of the pieces of one window of documents after the other; no window is empty."""
    group = dataset.documents_per_row
    window = max(group, window - window % group)
    for first in range(0, dataset.num_documents, window):
        bounds = np.asarray(dataset.offsets[first : first + window + 1])
        starts, slots = cut(bounds[:-1], np.diff(bounds) - 1, row_length)
        if len(starts):
            yield starts, slots


def cut(starts: I64, slots: I64, row_length: int) -> tuple[I64, I64]:
    """Return (first tokens, slots) of pieces of at most `row_length` slots; piece k of a document starts k rows later.

    A piece of s slots covers s + 1 tokens, so the last token of a piece is the first of the next: each label once.
    """
    counts = -(-slots // row_length)
    number = np.arange(int(counts.sum())) - np.repeat(
        np.cumsum(counts) - counts, counts
    )  # of the piece in its document
    rest = np.repeat(slots, counts) - number * row_length
    return np.repeat(starts, counts) + number * row_length, np.minimum(rest, row_length)


def best_fit(sizes: I64, capacity: int) -> I64:
    """Return the row of each unit by best-fit decreasing; rows are numbered from 0, units of one size keep their order.

    Placing c units of size s in rows with room r >= s (smallest r first) fills each row with r // s of them, because a
    row just used has the least room that still holds another. So all of them are placed at once.
    """
    if len(sizes) and (int(sizes.min()) < 1 or int(sizes.max()) > capacity):
        raise ValueError(f"unit sizes {int(sizes.min())}..{int(sizes.max())} must be in 1..{capacity}")
    row_of_unit = np.empty(len(sizes), dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    rooms: dict[int, list[I64]] = {}  # room left -> rows, in the order in which they came to it
    num_rows = done = 0
    for size, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        units = order[done : done + count]
        done += count
        for room in sorted(room for room in rooms if room >= size):
            per_row = room // size
            rows = np.concatenate(rooms.pop(room))
            used = min(len(rows), -(-len(units) // per_row))
            if used < len(rows):
                rooms[room] = [rows[used:]]
            units = _place(units, rows[:used], room, size, per_row, rooms, row_of_unit)
            if not len(units):
                break
        if len(units):
            per_row = capacity // size
            used = -(-len(units) // per_row)
            fresh = np.arange(num_rows, num_rows + used)
            num_rows += used
            _place(units, fresh, capacity, size, per_row, rooms, row_of_unit)
    return row_of_unit


def _place(
    units: I64, rows: I64, room: int, size: int, per_row: int, rooms: dict[int, list[I64]], row_of_unit: I64
) -> I64:
    """Put units into rows with `room` left, `per_row` each (the last may get fewer); return the units left over."""
    placed = min(len(units), len(rows) * per_row)
    row_of_unit[units[:placed]] = np.repeat(rows, per_row)[:placed]
    full, rest = divmod(placed, per_row)
    for part, used in ((rows[:full], per_row), (rows[full : full + 1], rest)):
        left = room - used * size
        if used and left and len(part):
            rooms.setdefault(left, []).append(part)
    return units[placed:]
