"""`Layout`: who may see whom in one forward, worked out once and used by every layer.

Three cases: rows that are one causal sequence, rows of packed documents (padding is a document of its own), and a
cache. It knows token indices only, neither heads nor values.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from minimind.batch import PAD_DOCUMENT
from minimind.errors import ConfigError
from minimind.model.cache import CacheAccess, KVCache


@dataclass(frozen=True, slots=True)
class Layout:
    """Causal without mask when `mask` is None, else key s is seen by query t where `mask[b, 0, t, s]`."""

    is_causal: bool
    """Plain causal rows (only with `mask` None)."""
    mask: Bool[Tensor, "rows 1 T S"] | None = None
    documents: Int[Tensor, "B T"] | None = None
    access: CacheAccess | None = None


def causal() -> Layout:
    """Return the layout of rows that are one sequence each."""
    return Layout(is_causal=True)


def packed(documents: Int[Tensor, "B T"]) -> Layout:
    """Return the layout of rows that hold documents one after the other: causal inside each.

    Padding sees the padding before it, so that no row of the mask is empty and everything stays finite.
    """
    length = documents.shape[1]
    order = torch.arange(length, device=documents.device)
    before = order[:, None] >= order[None, :]  # (T, T)
    mask = (documents[:, :, None] == documents[:, None, :]) & before  # (B, T, T)
    return Layout(is_causal=False, mask=mask[:, None], documents=documents)


def cached(
    cache: KVCache,
    shape: tuple[int, int],
    positions: Int[Tensor, "B T"] | None,
    cache_rows: Int[Tensor, " B"] | None,
) -> tuple[Layout, Int[Tensor, "rows T"]]:
    """Return (layout, positions) of a forward of `shape` (B, T) against a cache, and reserve the slots.

    Positions of -1 are padding. ConfigError when rows or positions do not fit, before anything is written.
    """
    batch, length = shape
    device = cache.keys.device
    num_rows = batch if cache_rows is None else cache_rows.shape[0]
    if (cache_rows is None and batch != cache.batch_size) or num_rows != batch:
        raise ConfigError(
            f"KVCache of {cache.batch_size} rows used with a batch of {batch}"
            f"{'' if cache_rows is None else f' and {num_rows} cache_rows'}; pass cache_rows, one per batch row"
        )
    if positions is None and cache_rows is None:
        start = cache.extent
        cache.reserve(start + length)
        order = torch.arange(start, start + length, device=device)
        access = CacheAccess(cache, start)
        if start == 0:
            return Layout(is_causal=True, access=access), order[None]
        # One new token sees everything that is there, so it needs no mask.
        mask = None if length == 1 else (torch.arange(start + length, device=device) <= order[:, None])[None, None]
        return Layout(is_causal=False, mask=mask, access=access), order[None]
    if positions is None:
        positions = torch.arange(cache.extent, cache.extent + length, device=device).expand(batch, -1)
    if positions.is_cuda or torch.compiler.is_compiling():
        # Reading the values would wait for the device. Rows are filled in order, so none passes extent + T.
        cache.extent = min(cache.extent + length, cache.max_length)
    else:
        cache.reserve(int(positions.max()) + 1)
    slots = torch.where(positions < 0, cache.max_length, positions)
    positions = positions.clamp(min=0)
    mask = (torch.arange(cache.extent, device=device) <= positions[:, :, None])[:, None]  # (B, 1, T, S)
    access = CacheAccess(cache, slots=slots, rows=cache_rows)
    return Layout(is_causal=False, mask=mask, access=access), positions


def documents_of_mask(attention_mask: Int[Tensor, "B T"]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Return (documents, positions) of rows padded left or right: one document, counted from its first real token."""
    real = attention_mask.bool()
    documents = torch.where(real, 0, PAD_DOCUMENT)
    return documents, torch.where(real, real.cumsum(1) - 1, -1)


def positions_in_documents(documents: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return each token's position inside its run of equal document numbers, from 0."""
    order = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return order - torch.where(is_first, order, 0).cummax(1).values
