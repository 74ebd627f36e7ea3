"""Sums over the sequences of packed rows: what pairs, groups and sequence ratios are made of. It knows no algorithm."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minimind.batch import PAD_DOCUMENT


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
