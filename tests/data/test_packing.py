"""Packing: every label exactly once, never across rows or documents, deterministic, dense, fast."""

import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.data.build import Kind, Writer, write_folder
from minimind.data.dataset import FORMAT_VERSION, TokenDataset
from minimind.data.packing import PackedRows, best_fit, cut, pack
from minimind.errors import ConfigError, DataError


def make_dataset(folder: Path, lengths: list[int], kind: Kind = "pretrain") -> TokenDataset:
    """A dataset whose ids count upwards through all documents, so that every token can be told apart."""

    def fill(target: Path) -> None:
        writer = Writer(target, 2**31, uniform=kind == "pretrain")
        bounds = np.cumsum([0, *lengths]).tolist()
        documents = [list(range(a, b)) for a, b in pairwise(bounds)]
        writer.add(documents, [[float(token % 3) for token in document] for document in documents])
        writer.close(
            {
                "fingerprint": str(lengths),
                "kind": kind,
                "max_length": None,
                "report": {},
                "format_version": FORMAT_VERSION,
            }
        )

    write_folder(folder / "tokens", fill)
    return TokenDataset(folder / "tokens")


def labels_of(rows: PackedRows) -> list[tuple[int, int]]:
    """(input, label) of every slot that holds a token."""
    return [
        (int(a), int(b))
        for index in range(len(rows))
        for piece in rows.row(index)
        for a, b in zip(piece.ids[:-1], piece.ids[1:], strict=True)
    ]


def expected_labels(lengths: list[int]) -> list[tuple[int, int]]:
    bounds = np.cumsum([0, *lengths]).tolist()
    return [(i, i + 1) for a, b in pairwise(bounds) for i in range(a, b - 1)]


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=40),
    row_length=st.integers(1, 24),
    window=st.integers(1, 50),
    mode=st.sampled_from(["packed", "padded"]),
)
def test_every_label_exactly_once(
    lengths: list[int], row_length: int, window: int, mode: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dataset = make_dataset(tmp_path_factory.mktemp("pack"), lengths)
    rows = pack(dataset, row_length, window=window, mode=mode)  # pyright: ignore[reportArgumentType] - drawn
    assert sorted(labels_of(rows)) == expected_labels(lengths)
    for index in range(len(rows)):
        slots = [len(piece.ids) - 1 for piece in rows.row(index)]
        assert 0 < sum(slots) <= row_length
        assert min(slots) > 0
        assert mode == "packed" or len(slots) == 1
    assert rows.num_slots == sum(lengths) - len(lengths)
    assert rows.fill_rate == rows.num_slots / (len(rows) * row_length)


def naive_best_fit(sizes: list[int], capacity: int) -> list[int]:
    """Room left in each row by the definition: longest first, each to the row with the least room that holds it."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        holding = [i for i, room in enumerate(rooms) if room >= size]
        if holding:
            rooms[min(holding, key=lambda i: rooms[i])] -= size
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


@given(sizes=st.lists(st.integers(1, 30), max_size=80), capacity=st.integers(30, 60))
def test_best_fit_is_best_fit(sizes: list[int], capacity: int) -> None:
    rows = best_fit(np.array(sizes, dtype=np.int64), capacity)
    used = np.bincount(rows, weights=sizes).astype(int) if sizes else np.zeros(0, dtype=int)
    assert sorted((capacity - used).tolist()) == naive_best_fit(sizes, capacity)
    assert set(rows.tolist()) == set(range(len(used)))


def test_pieces_of_a_long_document_overlap_by_one_token() -> None:
    # 10 tokens have 9 labels: rows of 4 slots hold labels 1-4, 5-8, 9
    starts, slots = cut(np.array([100]), np.array([9]), 4)
    assert starts.tolist() == [100, 104, 108]
    assert slots.tolist() == [4, 4, 1]


def test_the_plan_is_a_function_of_data_and_arguments(tmp_path: Path) -> None:
    lengths = np.random.Generator(np.random.PCG64(0)).integers(2, 50, 300).tolist()
    plans = []
    for name in ("a", "b"):
        rows = pack(make_dataset(tmp_path / name, lengths), 64, window=100)
        plans.append((rows.fingerprint, rows.starts.tolist(), rows.lengths.tolist(), rows.row_offsets.tolist()))
    assert plans[0] == plans[1]
    dataset = make_dataset(tmp_path / "a", lengths)
    for other in (
        pack(dataset, 63, window=100),
        pack(dataset, 64, window=99),
        pack(dataset, 64, mode="padded", window=100),
    ):
        assert other.fingerprint != plans[0][0]


def test_a_finished_plan_is_reused_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [5, 6, 7])
    rows = pack(dataset, 8)
    folder = next(tmp_path.glob("rows-*[0-9a-f]"))
    before = (folder / "meta.json").stat().st_mtime_ns
    assert pack(dataset, 8).fingerprint == rows.fingerprint
    assert (folder / "meta.json").stat().st_mtime_ns == before
    (folder / "starts.bin").write_bytes(b"123")
    with pytest.raises(DataError, match=r"starts\.bin: 3 bytes, expected 24 bytes; delete the folder"):
        pack(dataset, 8)


def test_mixed_lengths_fill_the_rows(tmp_path: Path) -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    lengths = np.clip(generator.lognormal(5, 0.9, 8_000).astype(int), 2, 512).tolist()
    dataset = make_dataset(tmp_path, lengths)
    assert pack(dataset, 512, window=2048).fill_rate > 0.99
    assert pack(dataset, 512, mode="padded").fill_rate < 0.6


def test_a_million_documents_take_seconds() -> None:
    sizes = np.clip(np.random.Generator(np.random.PCG64(2)).lognormal(5, 0.9, 1_000_000), 1, 2048).astype(np.int64)
    started = time.process_time()
    rows = best_fit(sizes, 2048)
    assert time.process_time() - started < 5  # measured: 0.3 s
    used = np.bincount(rows, weights=sizes)
    assert used.max() <= 2048
    assert used.mean() / 2048 > 0.99


def test_pairs_stay_together(tmp_path: Path) -> None:
    lengths = np.random.Generator(np.random.PCG64(3)).integers(2, 16, 60).tolist()
    dataset = make_dataset(tmp_path, lengths, "preference")
    rows = pack(dataset, 32, window=7)  # an odd window must not tear a pair
    firsts = dataset.offsets[:-1].tolist()
    seen: Counter[int] = Counter()
    for index in range(len(rows)):
        documents = [firsts.index(int(piece.ids[0])) for piece in rows.row(index)]
        assert documents[::2] == [d - 1 for d in documents[1::2]]
        assert all(d % 2 == 0 for d in documents[::2])
        seen.update(documents)
    assert seen == Counter(range(60))


def test_a_conversation_longer_than_a_row_is_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [5, 18, 7], "conversation")
    assert len(pack(dataset, 17)) > 0
    with pytest.raises(
        ConfigError, match=r"row_length is 16, but .* holds documents of 18 tokens; .* max_length of 17"
    ):
        pack(dataset, 16)
    with pytest.raises(ConfigError, match="must be at least 1"):
        pack(dataset, 0)


def test_no_documents_no_rows(tmp_path: Path) -> None:
    rows = pack(make_dataset(tmp_path, []), 16)
    assert (len(rows), rows.fill_rate) == (0, 0)
