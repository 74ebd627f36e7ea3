"""`Layout`: who may see whom in one forward, worked out once and used by every layer.

Three cases: rows that are one causal sequence, rows of packed documents (padding is a document of its own), and a
cache. It knows token indices only, neither heads nor values.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from minimind.batch import PAD_DOCUMENT
from minimind.errors import ConfigError
from minimind.model.block_attention import Buckets, buckets_of, rows_as_documents, spans_of
from minimind.model.cache import CacheAccess, KVCache
from minimind.native import kernels

Kernel = Literal["dense", "native", "blocks", "varlen"]
"""dense: SDPA, under a mask where rows are packed. native: `kernels.attention` (CPU). blocks: `block_attention` (CPU
without a C++ compiler, or under torch.compile). varlen: flash attention (CUDA)."""


_HAS_VARLEN = find_spec("torch.nn.attention.varlen") is not None
"""torch's flash attention over documents of unequal length; importing it costs a second that only a GPU should pay."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Who sees whom. Exactly one of `is_causal` (plain causal rows), `spans`, `buckets`, `lengths` and a mask says it;
    none of them means that every query sees every key (one new token against a cache)."""

    is_causal: bool = False
    mask: Bool[Tensor, "rows 1 T S"] | None = None
    """Query t sees key s where `mask[b, 0, t, s]`; no row is empty."""
    spans: Int[Tensor, " documents_and_one"] | None = None
    """0, then where each document ends in the flat batch."""
    buckets: Buckets | None = None
    lengths: "Lengths | None" = None
    access: CacheAccess | None = None
    """Where keys and values are kept between forwards."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Documents as consecutive stretches of the flat batch, for flash attention."""

    ends: Int[Tensor, " documents_and_one"]
    """0, then where each document ends; int32."""
    longest: int


def pick_kernel(
    device: torch.device, dtype: torch.dtype, length: int, head_dim: int, *, is_packed: bool, dropout: float
) -> Kernel:
    """Return the fastest attention without a cache for these tensors (measured on CPU; see `block_attention`)."""
    if dropout:
        return "dense"
    if device.type == "cpu":
        if kernels.takes_heads_of(head_dim) and kernels.usable(device, dtype):
            return "native"
        return "blocks" if is_packed or dtype != torch.float32 or length >= 320 else "dense"
    is_half = dtype in (torch.bfloat16, torch.float16)
    if not is_packed or not is_half or device.type != "cuda" or not _HAS_VARLEN:
        return "dense"
    # Counting the documents waits for the device once per forward, which a compiled graph cannot.
    has_flash = torch.cuda.get_device_capability(device) >= (8, 0) and not torch.compiler.is_compiling()
    return "varlen" if has_flash else "dense"


def causal(shape: tuple[int, int], kernel: Kernel) -> Layout:
    """Return the layout of B rows of T tokens that are one sequence each."""
    if kernel == "native":
        return Layout(spans=torch.arange(shape[0] + 1) * shape[1])
    return Layout(buckets=rows_as_documents(*shape)) if kernel == "blocks" else Layout(is_causal=True)


def packed(documents: Int[Tensor, "B T"], kernel: Kernel) -> Layout:
    """Return the layout of rows that hold documents one after the other: causal inside each.

    A document is a run of equal numbers. Padding is a document too: it sees only padding, and everything stays finite.
    """
    if kernel == "native":
        return Layout(spans=spans_of(documents))
    if kernel == "blocks":
        return Layout(buckets=buckets_of(documents))
    if kernel == "varlen":
        starts = first_tokens(documents).flatten().nonzero()[:, 0]
        ends = torch.cat((starts, starts.new_tensor([documents.numel()]))).int()
        return Layout(lengths=Lengths(ends, int(ends.diff().max())))
    runs = first_tokens(documents).cumsum(1)  # (B, T)
    order = torch.arange(documents.shape[1], device=documents.device)
    mask = (runs[:, :, None] == runs[:, None, :]) & (order[:, None] >= order[None, :])  # (B, T, T)
    return Layout(mask=mask[:, None])


def first_tokens(documents: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Return True where a new document (a run of equal numbers) begins."""
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return is_first


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
        if start == 0:  # the first tokens of an empty cache see only themselves
            return Layout(is_causal=True, access=access), order[None]
        # One new token sees everything that is there, so it needs no mask.
        mask = None if length == 1 else (torch.arange(start + length, device=device) <= order[:, None])[None, None]
        return Layout(mask=mask, access=access), order[None]
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
    return Layout(mask=mask, access=access), positions


def documents_of_mask(
    attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"],
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Return (documents, positions) of rows padded left or right: one document, counted from its first real token."""
    real = attention_mask.bool()
    documents = torch.where(real, 0, PAD_DOCUMENT)
    return documents, torch.where(real, real.cumsum(1) - 1, -1)


def positions_in_documents(documents: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return each token's position inside its run of equal document numbers, from 0."""
    order = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return order - torch.where(first_tokens(documents), order, 0).cummax(1).values
