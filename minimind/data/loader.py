"""Packed rows -> the micro-batches of any optimizer step, for any rank: a pure function, so resuming is a cursor.

The global batch of a step is `order.global_rows(step, ...)`; ranks take consecutive shares of it, micro-batches
consecutive shares of those. So a step holds the same rows whatever the world size, micro-batch or history. No state.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minimind.batch import Batch
from minimind.data.collate import collate
from minimind.data.order import ORDER_VERSION, global_rows, share
from minimind.data.packing import PackedRows
from minimind.errors import ConfigError, DataError


class Loader:
    """The `BatchSource` of supervised stages."""

    prefetch = True
    """`micro_batches` may be called ahead of time from another thread."""

    def __init__(
        self,
        rows: PackedRows,
        *,
        batch_rows: int,
        micro_rows: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pad_id: int = 0,
        emphasis: Mapping[int, float] | None = None,
    ) -> None:
        """`batch_rows`: rows of the global batch of a step, over all ranks; `micro_rows`: rows of one forward at most.

        `emphasis`: token id -> factor on its weight where training has it to predict; 0 stays 0. Not in `all_batches`.

        ConfigError for impossible numbers, DataError when there are no rows.
        """
        if batch_rows < 1 or micro_rows < 1:
            raise ConfigError(f"batch_rows is {batch_rows} and micro_rows is {micro_rows}, expected at least 1")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is outside 0..{world_size - 1}")
        if not len(rows):
            raise DataError(f"{rows.dataset.folder}: no rows to train on; the data set has no document with a label")
        self.rows = rows
        self.batch_rows, self.micro_rows = batch_rows, micro_rows
        self.seed, self.rank, self.world_size, self.pad_id = seed, rank, world_size, pad_id
        self.emphasis = dict(emphasis or {})

    @property
    def num_rows(self) -> int:
        """Number of rows of one epoch."""
        return self.rows.num_rows

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that visit every row at least once (the last may reach into the next epoch)."""
        return -(-self.num_rows // self.batch_rows)

    @property
    def tokens_per_step(self) -> float:
        """Input tokens of a global batch, on average."""
        return self.batch_rows * self.rows.row_length * self.rows.fill_rate

    def micro_batches(self, step: int) -> Sequence[Batch]:
        """Return this rank's micro-batches of optimizer step `step` (0-based): as many on every rank.

        A rank with fewer rows than others gets padding of weight 0 in place of its missing micro-batches.
        """
        batches = self._split(global_rows(step, self.batch_rows, self.num_rows, self.seed))
        return [emphasised(batch, self.emphasis) for batch in batches]

    def all_batches(self) -> Iterator[Batch]:
        """Yield this rank's share of all rows, each on one rank and once: for validation, in constant memory."""
        size = self.micro_rows * self.world_size
        for first in range(0, self.num_rows, size):
            yield from self._split(np.arange(first, min(first + size, self.num_rows)))

    def _split(self, rows: npt.NDArray[np.int64]) -> Iterator[Batch]:
        largest = -(-len(rows) // self.world_size)
        own = rows[share(len(rows), self.rank, self.world_size)]
        for first in range(0, largest, self.micro_rows):
            yield self._batch(own[first : first + self.micro_rows])

    def _batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Return the micro-batch of these rows; one row of padding for none."""
        chosen = [self.rows.row(int(index)) for index in rows]
        return collate(chosen or [[]], self.rows.row_length, self.pad_id)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that a resumed run can tell that it sees the same samples."""
        state: dict[str, Any] = {
            "fingerprint": self.rows.fingerprint,
            "num_rows": self.num_rows,
            "row_length": self.rows.row_length,
            "batch_rows": self.batch_rows,
            "seed": self.seed,
            "order_version": ORDER_VERSION,
        }
        if self.emphasis:
            state["emphasis"] = {str(token): factor for token, factor in self.emphasis.items()}
        return state

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raise when a saved state means other samples: DataError for other data, ConfigError for other settings."""
        state = self.state()
        if saved.get("row_length", self.rows.row_length) == self.rows.row_length and (
            saved.get("fingerprint") != state["fingerprint"]
        ):
            raise DataError(
                "the training data changed since the checkpoint: it was made from data with fingerprint\n"
                f"  {saved.get('fingerprint')}\nnow the files (with tokenizer and data options) give\n"
                f"  {state['fingerprint']}\n"
                "restore the files, or start over with --fresh, or begin a new run with --init-from this checkpoint"
            )
        changed = [
            f"{key} was {saved.get(key)} and is {state.get(key)}"
            for key in (state | saved)
            if key != "fingerprint" and saved.get(key) != state.get(key)
        ]
        if changed:
            raise ConfigError(
                f"cannot resume with other batches: {'; '.join(changed)}; use the old values, or --fresh to start over"
            )


def emphasised(batch: Batch, emphasis: Mapping[int, float]) -> Batch:
    """Return `batch` with the weight of predicting each token in `emphasis` times its factor, and the weight of all."""
    if not emphasis:
        return batch
    loss_weights = batch.loss_weights.clone()
    for token, factor in emphasis.items():
        loss_weights[batch.labels == token] *= factor
    return replace(batch, loss_weights=loss_weights, weight=float(loss_weights.sum(dtype=torch.float64)))
