"""The sequences of packed rows: sums over them, and what only their learned tokens cost. It knows no algorithm."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minimind.batch import PAD_DOCUMENT, Batch, Output

ROUND = 128
"""The number of learned tokens is filled up to a multiple of this, for the reason told in `cross_entropy.ROUND`."""


def num_documents(documents: Int[Tensor, "B T"]) -> int:
    """Return M, the most documents that a row holds (at least 1)."""
    return max(1, int(documents.max()) + 1) if documents.numel() else 1


def sum_by_document(
    values: Float[Tensor, "B T"], documents: Int[Tensor, "B T"], num_documents: int
) -> Float[Tensor, "B M"]:
    """Return the sum of `values` over each document of each row, M = `num_documents`; padding counts nowhere.

    Differentiable in `values`. A document that a row does not have sums to 0.
    """
    is_real = documents != PAD_DOCUMENT
    sums = torch.zeros(values.shape[0], num_documents, dtype=values.dtype, device=values.device)
    return sums.scatter_add(1, documents.clamp(min=0), values * is_real)


def spread_over_tokens(values: Float[Tensor, "B M"], documents: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Return the value of its document at each token, 0 at padding: the other way round."""
    is_real = documents != PAD_DOCUMENT
    return values.gather(1, documents.clamp(min=0)) * is_real


def on_learned_tokens(
    output: Output, batch: Batch, of_tokens: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Return what `of_tokens(hidden (n, D), head, labels (n))` returns, (n) each, as (B, T): 0 at unlearned tokens.

    So prompts, observations and padding cost no product with the head and get no gradient.
    """
    learned = batch.loss_weights.flatten().nonzero()[:, 0]
    size = -(-max(learned.numel(), 1) // ROUND) * ROUND
    rows = F.pad(learned, (0, size - learned.numel()))  # (n,), filled up with position 0, whose result is thrown away
    found = of_tokens(output.hidden.flatten(0, 1)[rows], output.head, batch.labels.flatten()[rows])
    spread = batch.loss_weights.new_zeros(batch.labels.numel(), dtype=torch.float32)
    return tuple(spread.index_put((learned,), values[: learned.numel()]).view_as(batch.labels) for values in found)
