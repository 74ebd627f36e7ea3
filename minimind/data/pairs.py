"""Packed rows of answers that are compared with a frozen reference: the loader of preference learning.

The weight of a batch is its number of pairs. What the reference thinks of each document never changes, so it is
computed once for the whole data set and kept beside it; a training step then costs one forward and one backward, and
the reference is not in memory. It is given a way to score a batch and knows neither model nor loss.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minimind.batch import Batch
from minimind.data.loader import Loader
from minimind.data.packing import PackedRows
from minimind.errors import CheckpointError, ConfigError
from minimind.objectives.preference import DOCUMENTS, REF_LOG_PROBS
from minimind.runtime import distributed
from minimind.runtime.integrity import fsync, read_tensors
from minimind.runtime.log import get_logger

CACHE_VERSION = 2
"""Part of the cache's name: of everything that decides its numbers besides data, reference and precision."""
SAY_EVERY = 10.0
"""Seconds between lines about the progress of the reference."""

Score = Callable[[Batch], Tensor]
"""Returns (B, M), the log-probability of each document of a batch, float32, without gradient, on any device."""


class Reference(NamedTuple):
    """A frozen model as a data set sees it."""

    weights: str
    """sha256 of them."""
    precision: str
    """In which it computes."""
    score: Score


OpenReference = Callable[[], Reference]
"""Called when the reference is needed; what it opens is dropped after use."""

_log = get_logger(__name__)


class PairLoader(Loader):
    """`Loader` for rows of pairs: adds `document_ids` and, where there is a reference, `ref_log_probs`, both (B, M)."""

    def __init__(self, rows: PackedRows, *, reference: OpenReference | None = None, **options: Any) -> None:
        """`options` are those of `Loader`. With a `reference` its log-probabilities are read, or computed now."""
        super().__init__(rows, **options)
        self.documents_of_unit = rows.dataset.documents_per_row
        self.reference = ""
        """sha256 of the weights of the reference; empty where there is none."""
        self.ref_log_probs: Tensor | None = None
        if reference is not None:
            self._ask(reference())

    def _ask(self, reference: Reference) -> None:
        self.reference = reference.weights
        self.ref_log_probs = self._from_cache(reference, self.rows.dataset.fingerprint, lambda batch: batch)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: also which reference it is."""
        return super().state() | {"reference": self.reference}

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raise as `Loader` does, and ConfigError for another reference."""
        before = saved.get("reference", "")
        if before != self.reference:
            raise ConfigError(
                f"the run was made with another reference: its weights were {before[:12] or 'none'}, now "
                f"{self.reference[:12] or 'none'}; give the same --init-from and --reference, or --fresh to start over"
            )
        super().check_state(saved)

    def _batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        batch = super()._batch(rows)
        held = [self._documents(int(index)) for index in rows]
        most = max([self.documents_of_unit, *map(len, held)])
        ids = np.full((len(batch.input_ids), most), -1, dtype=np.int64)
        for row, documents in enumerate(held):
            ids[row, : len(documents)] = documents
        batch.weight = float(sum(map(len, held)) // self.documents_of_unit)
        batch.extras[DOCUMENTS] = torch.from_numpy(ids)  # (B, M)
        if self.ref_log_probs is not None:
            batch.extras[REF_LOG_PROBS] = self.look_up(self.ref_log_probs, batch)
        return batch

    @staticmethod
    def look_up(numbers: Tensor, batch: Batch) -> Tensor:
        """Return the number of each document of a batch, (B, M), from those of the whole data set; 0 for none."""
        ids = batch.extras[DOCUMENTS]
        return torch.where(ids >= 0, numbers[ids.clamp(min=0)], 0.0)

    def _documents(self, row: int) -> npt.NDArray[np.int64]:
        """Return the numbers, in the data set, of the documents of a row."""
        first, last = int(self.rows.row_offsets[row]), int(self.rows.row_offsets[row + 1])
        return np.searchsorted(self.rows.dataset.offsets, self.rows.starts[first:last], side="right") - 1

    def _from_cache(self, reference: Reference, data: str, part: Callable[[Batch], Batch]) -> Tensor:
        """Return what the reference says about `part` of every batch, by document of the data set, (num_documents,).

        `data` is the fingerprint of what is scored. The main process reads or writes the file, each computes a share.
        """
        names = [CACHE_VERSION, reference.weights, reference.precision, data]
        key = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        path = self.rows.dataset.folder.with_name(f"reference-{key[:32]}.safetensors")
        found = distributed.broadcast_object(_read(path, len(self.rows.dataset)) if distributed.is_main() else None)
        if found is not None:
            return found
        numbers = torch.zeros(len(self.rows.dataset))
        started = said = time.monotonic()
        done = 0
        for batch in self.all_batches():
            ids = batch.extras[DOCUMENTS]
            is_there = ids >= 0
            numbers[ids[is_there]] = reference.score(part(batch)).to("cpu", torch.float32)[is_there]
            done += int(is_there.any(dim=1).sum()) * self.world_size
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                _log.info("reference log-probabilities: about %d of %d rows", min(done, self.num_rows), self.num_rows)
        distributed.all_reduce_sum(numbers)  # every document is in one process's share, 0 in the others
        seconds = time.monotonic() - started
        _log.info("reference log-probabilities of %d documents in %.1f s: %s", len(numbers), seconds, path)
        if distributed.is_main():
            _write(path, numbers)
        return numbers


def _read(path: Path, count: int) -> Tensor | None:
    """Return the numbers in a cache file; None when it is not there, or not whole."""
    if not path.exists():
        return None
    try:
        numbers = read_tensors(path).get("log_probs", torch.empty(0))
    except CheckpointError as error:
        _log.warning("%s; it is computed again", error)
        return None
    return numbers if numbers.shape == (count,) else None


def _write(path: Path, numbers: Tensor) -> None:
    """Write a cache file, by one rename; a disk that cannot take it costs the next run the time, not this one."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        save_file({"log_probs": numbers}, temporary)
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        _log.warning("%s: cannot be written (%s); a resumed run will compute it again", path, error)
