"""Packed rows of answers that are good or bad, each by itself: the loader of KTO.

The cache keeps a bad answer with weights of -1 (`build.py`). KTO also wants to know how far the policy has moved from
its reference, measured on answers to other prompts: in each row every document hands its answer to the next one, which
leaves the row as long as it was. The policy scores those before each step, so that all micro-batches of all processes
share one estimate. It is given ways to score a batch and knows neither model nor loss.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minimind.batch import Batch
from minimind.data.collate import collate
from minimind.data.packing import PackedRows, Piece
from minimind.data.pairs import OpenReference, PairLoader, Reference, Score
from minimind.objectives.kto import IS_DESIRABLE, KL
from minimind.objectives.preference import DOCUMENTS, REF_LOG_PROBS
from minimind.objectives.sequences import sum_by_document
from minimind.runtime import distributed

MISMATCHED = "mismatched/"
"""Begins the names, in `Batch.extras`, of the tensors of the same rows with the answers handed on."""
IS_MISMATCHED = "is_mismatched"
"""`Batch.extras`: (B, M), whether a document of them answers another prompt than its own."""
_FIELDS = ("input_ids", "labels", "positions", "documents", "loss_weights")


class UnpairedLoader(PairLoader):
    """`PairLoader` for answers by themselves: the weight of a batch is their number; a step's have `kl` (B, 1)."""

    prefetch = False
    """The policy scores the batches of a step, so they are made when the step comes."""

    def __init__(self, rows: PackedRows, *, reference: OpenReference, policy: Score, **options: Any) -> None:
        """`policy` scores with the weights of the moment."""
        self.mismatched_ref_log_probs: Tensor | None = None
        super().__init__(rows, reference=reference, **options)
        self.policy = policy

    def _ask(self, reference: Reference) -> None:
        super()._ask(reference)
        self.mismatched_ref_log_probs = self._from_cache(reference, self.rows.fingerprint, mismatched)

    def micro_batches(self, step: int) -> Sequence[Batch]:
        """Return this rank's micro-batches of a step, `kl` estimated on all of them together."""
        return with_kl(super().micro_batches(step), self.policy)

    def _batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        batch = super()._batch(rows)
        most = batch.extras[DOCUMENTS].shape[1]
        batch.extras[IS_DESIRABLE] = sum_by_document(batch.loss_weights, batch.documents, most) >= 0
        batch.loss_weights = batch.loss_weights.abs()
        handed_on = [hand_on(self.rows.row(int(index))) for index in rows]
        other = collate([row for row, _ in handed_on] or [[]], self.rows.row_length, self.pad_id)
        batch.extras |= {MISMATCHED + name: cast("Tensor", getattr(other, name)) for name in _FIELDS}
        is_mismatched = torch.zeros(len(batch.input_ids), most, dtype=torch.bool)
        for row, (_, changed) in enumerate(handed_on):
            is_mismatched[row, : len(changed)] = torch.tensor(changed)
        batch.extras[IS_MISMATCHED] = is_mismatched
        if self.mismatched_ref_log_probs is not None:
            batch.extras[MISMATCHED + REF_LOG_PROBS] = self.look_up(self.mismatched_ref_log_probs, batch)
        return batch


def hand_on(row: Sequence[Piece]) -> tuple[list[Piece], list[bool]]:
    """Return (each prompt with the answer of the document before it, whether that answered another prompt)."""
    starts = [int(np.argmax(piece.loss_weights != 0)) for piece in row]
    made: list[Piece] = []
    changed: list[bool] = []
    for index, (piece, start) in enumerate(zip(row, starts, strict=True)):
        giver, begin = row[index - 1], starts[index - 1]
        ids = np.concatenate((piece.ids[:start], giver.ids[begin:]))
        weights = np.abs(np.concatenate((piece.loss_weights[:start], giver.loss_weights[begin:])))
        made.append(Piece(ids, weights))
        changed.append(not np.array_equal(piece.ids[:start], giver.ids[:begin]))
    return made, changed


def mismatched(batch: Batch) -> Batch:
    """Return the same rows with the answers handed on, as `document_log_probs` takes them."""
    fields = {name: batch.extras[MISMATCHED + name] for name in _FIELDS}
    return Batch(**fields, weight=0.0, extras={DOCUMENTS: batch.extras[DOCUMENTS]})


def with_kl(batches: Sequence[Batch], policy: Score) -> Sequence[Batch]:
    """Return the batches with one `kl` (B, 1) for all of them and all processes: max(0, mean of log p - log p_ref).

    The mean is over the documents whose answer came from another prompt; without any it is 0.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        counts = batch.extras[IS_MISMATCHED]
        if counts.any():
            ratios = policy(mismatched(batch)).cpu() - batch.extras[MISMATCHED + REF_LOG_PROBS]
            sums += torch.stack((ratios[counts].double().sum(), counts.sum().double()))
    total, count = distributed.all_reduce_sum(sums).tolist()
    for batch in batches:
        batch.extras[KL] = torch.full((len(batch.input_ids), 1), max(0.0, total / count) if count else 0.0)
    return batches
