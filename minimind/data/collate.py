"""Rows of documents -> `Batch`. The only place that shifts: labels[t] is the token after input_ids[t], same document.

It knows neither where rows come from nor what is learned from them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from minimind.batch import PAD_DOCUMENT, Batch


class Document(Protocol):
    """`Example` or `Piece`: ids and the weight of predicting each of them."""

    @property
    def ids(self) -> "Sequence[int] | np.ndarray[tuple[int], np.dtype[np.integer]]": ...  # noqa: D102
    @property
    def loss_weights(self) -> "Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float32]]": ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Annotated:
    """A document in memory with more numbers for each of its tokens: what reinforcement learning knows about them."""

    ids: Sequence[int]
    loss_weights: Sequence[float]
    extras: Mapping[str, Sequence[float]]
    """Name -> a number for each of `ids`, about predicting it, like `loss_weights`."""


def collate(rows: Sequence[Sequence[Document]], row_length: int, pad_id: int) -> Batch:
    """Return the Batch of B = len(rows) rows and T = `row_length` positions; `weight` is the sum of `loss_weights`.

    A document of n tokens fills n - 1 positions: ids[0..n-2] as inputs, ids[1..n-1] as labels with their weights. The
    rest of a row is padding: `pad_id`, document PAD_DOCUMENT, weight 0. ValueError when a row's documents do not fit.
    """
    shape = (len(rows), row_length)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.zeros(shape, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    documents = np.full(shape, PAD_DOCUMENT, dtype=np.int64)
    loss_weights = np.zeros(shape, dtype=np.float32)
    for b, row in enumerate(rows):
        start = 0
        for d, document in enumerate(row):
            end = start + len(document.ids) - 1
            if end > row_length:
                raise ValueError(f"row {b}: documents need {end} positions or more, the row has {row_length}")
            input_ids[b, start:end] = document.ids[:-1]
            labels[b, start:end] = document.ids[1:]
            positions[b, start:end] = np.arange(end - start)
            documents[b, start:end] = d
            loss_weights[b, start:end] = document.loss_weights[1:]
            start = end
    return Batch(
        input_ids=torch.from_numpy(input_ids),  # (B, T)
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        documents=torch.from_numpy(documents),
        loss_weights=torch.from_numpy(loss_weights),
        weight=float(loss_weights.sum(dtype=np.float64)),
    )


def collate_annotated(rows: Sequence[Sequence[Annotated]], row_length: int, pad_id: int, names: Sequence[str]) -> Batch:
    """Return the Batch of `collate` with the numbers called `names` in `extras`, (B, T), aligned with `labels`.

    They are 0 at padding. KeyError when a document does not have one of them.
    """
    batch = collate(rows, row_length, pad_id)
    for name in names:
        values = np.zeros((len(rows), row_length), dtype=np.float32)
        for b, row in enumerate(rows):
            start = 0
            for document in row:
                end = start + len(document.ids) - 1
                values[b, start:end] = document.extras[name][1:]
                start = end
        batch.extras[name] = torch.from_numpy(values)  # (B, T)
    return batch
