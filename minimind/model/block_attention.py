"""Causal attention on a CPU that costs what the documents cost: blocks of queries against the keys before them.

Documents of a packed row are gathered into buckets of similar length, each bucket is a handful of batched matrix
products, and the upper triangle is mostly never computed. The backward recomputes the probabilities, so memory stays
linear in T. Registered as one opaque operator: autograd, autocast and torch.compile see q, k, v and nothing inside.
It knows tokens and documents, neither rotation nor cache. The definition it must agree with is SDPA under a mask.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minimind.batch import PAD_DOCUMENT

BLOCK = 64
"""Queries per product: small enough to skip most of the masked triangle, large enough for a fast product."""

SCORES = 1 << 20
"""Scores held at one time, in elements; about what the cache of a core holds."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """The documents of a batch, gathered by length. `gather` and `scatter` are empty when rows are documents."""

    shapes: Int[Tensor, "num_buckets 2"]
    """(documents, length) of each bucket; a document shorter than its bucket's length is filled up at the end."""
    gather: Int[Tensor, " M"]
    """Token (0 .. B * T - 1) of each slot, bucket after bucket; fill-up repeats the document's last token."""
    is_real: Float[Tensor, "M 1 1"]
    """0 at fill-up slots, else 1."""
    scatter: Int[Tensor, " N"]
    """Slot of each token."""


def rows_as_documents(batch: int, length: int) -> Buckets:
    """Return the buckets of B rows that are one document each: a single one, nothing to gather."""
    nothing = torch.empty(0, dtype=torch.long)
    return Buckets(torch.tensor([[batch, length]]), nothing, torch.empty(0, 1, 1), nothing)


def spans_of(documents: Int[Tensor, "B T"]) -> Int[Tensor, " documents_and_one"]:
    """Return 0, then where each document ends in the flat batch. A document is a run of equal numbers in a row; runs of
    padding are cut every 16 tokens, so that padding costs next to nothing."""
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    is_first[:, ::16] |= documents[:, ::16] == PAD_DOCUMENT
    return torch.cat((is_first.flatten().nonzero()[:, 0], torch.tensor([documents.numel()])))


def buckets_of(documents: Int[Tensor, "B T"]) -> Buckets:
    """Return the buckets of packed rows; what a document is, `spans_of` says."""
    return Buckets(*_bucket(documents))


@torch.library.custom_op("minimind::bucket_documents", mutates_args=())
def _bucket(documents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length = documents.shape
    spans = spans_of(documents)
    lengths, order = spans.diff().sort(stable=True)
    starts = spans[order]
    # Lengths within a factor 1.5 share a bucket; its products are as long as its longest document.
    ladder = (lengths.clamp(min=16).double() / 16).log().div(math.log(1.5)).ceil().long()
    sizes = ladder.unique_consecutive(return_counts=True)[1].tolist()
    shapes: list[list[int]] = []
    gathered: list[Tensor] = []
    filled: list[Tensor] = []
    for first, size, count in zip(starts.split(sizes), lengths.split(sizes), sizes, strict=True):
        longest = int(size[-1])
        order = torch.arange(longest)
        shapes.append([count, longest])
        gathered.append(first[:, None] + order.minimum(size[:, None] - 1))  # (documents, longest)
        filled.append(order >= size[:, None])
    gather = torch.cat([tokens.flatten() for tokens in gathered])
    is_real = ~torch.cat([fill.flatten() for fill in filled])
    scatter = torch.empty(batch * length, dtype=torch.long)
    scatter[gather[is_real]] = is_real.nonzero()[:, 0]
    return torch.tensor(shapes), gather, is_real.float()[:, None, None], scatter


@_bucket.register_fake
def _(documents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_buckets, num_slots = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    empty = documents.new_empty
    return (
        empty((num_buckets, 2)),
        empty((num_slots,)),
        empty((num_slots, 1, 1), dtype=torch.float32),
        empty((documents.numel(),)),
    )


def block_attention(
    q: Float[Tensor, "B T H Dh"], k: Float[Tensor, "B T K Dh"], v: Float[Tensor, "B T K Dh"], buckets: Buckets
) -> Float[Tensor, "B T H Dh"]:
    """Return softmax(q k^T / sqrt(Dh)) v, causal inside each document of `buckets`. One dtype for q, k and v; in half
    precision scores are rounded to it before the float32 softmax, as a matrix product under autocast rounds them."""
    return _attend(q, k, v, buckets.shapes, buckets.gather, buckets.is_real, buckets.scatter)


@torch.library.custom_op("minimind::block_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shapes: Tensor,
    gather: Tensor,
    is_real: Tensor,  # noqa: ARG001 - the backward's, which sees what the forward was given
    scatter: Tensor,
) -> Tensor:
    num_kv_heads = k.shape[2]
    slots_q, slots_k, slots_v = (_to_slots(x, gather) for x in (q, k, v))
    pieces: list[Tensor] = []
    start = 0
    for count, length in shapes.tolist():
        end = start + count * length
        queries, keys, values = (_heads_first(x[start:end], count, num_kv_heads) for x in (slots_q, slots_k, slots_v))
        output = torch.empty_like(queries)
        for rows, block, seen, mask in _blocks(queries, keys):
            output[rows, block] = _probabilities(queries[rows, block], keys[rows, :seen], mask) @ values[rows, :seen]
        pieces.append(_tokens_first(output, count, q.shape[2]))
        start = end
    return _from_slots(pieces, scatter, q.shape)


@torch.library.custom_op("minimind::block_attention_backward", mutates_args=())
def _attend_backward(
    upstream: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shapes: Tensor,
    gather: Tensor,
    is_real: Tensor,
    scatter: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    num_kv_heads, scale = k.shape[2], 1 / math.sqrt(q.shape[3])
    wide = torch.promote_types(q.dtype, torch.float32)
    slots_q, slots_k, slots_v, slots_up = (_to_slots(x, gather) for x in (q, k, v, upstream))
    if is_real.numel():
        slots_up = slots_up * is_real.to(slots_up.dtype)  # fill-up repeats a token and must not count it twice
    pieces: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    start = 0
    for count, length in shapes.tolist():
        end = start + count * length
        queries, keys, values, ups = (
            _heads_first(x[start:end], count, num_kv_heads) for x in (slots_q, slots_k, slots_v, slots_up)
        )
        grad_q = torch.empty_like(queries)
        grad_k, grad_v = (torch.zeros_like(keys, dtype=wide) for _ in range(2))
        for rows, block, seen, mask in _blocks(queries, keys):
            query, key, up = queries[rows, block], keys[rows, :seen], ups[rows, block]
            probabilities = _probabilities(query, key, mask)
            _accumulate(grad_v[rows, :seen], probabilities.mT, up, 1.0)
            grad_p = up @ values[rows, :seen].mT
            grad_s = torch.ops.aten._softmax_backward_data(grad_p, probabilities, -1, probabilities.dtype)
            grad_q[rows, block] = _scaled_product(grad_s, key, scale)
            _accumulate(grad_k[rows, :seen], grad_s.mT, query, scale)
        for piece, grad in zip(pieces, (grad_q, grad_k, grad_v), strict=True):
            piece.append(_tokens_first(grad.to(q.dtype), count, q.shape[2] if grad is grad_q else num_kv_heads))
        start = end
    grad_q, grad_k, grad_v = (_from_slots(piece, scatter, x.shape) for piece, x in zip(pieces, (q, k, v), strict=True))
    return grad_q, grad_k, grad_v


def _blocks(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice, int, Tensor]]:
    """Yield (rows, block of queries, keys seen, mask of the last keys) so that SCORES scores exist at one time."""
    num_rows, length, _ = keys.shape
    group = queries.shape[1] // length
    for first in range(0, length, BLOCK):
        seen = min(first + BLOCK, length)
        order = torch.arange(first, seen)
        mask = (order[None, :] > order[:, None]).repeat_interleave(group, 0)  # (queries, keys of this block)
        step = max(1, SCORES // (mask.shape[0] * seen))
        for row in range(0, num_rows, step):
            yield slice(row, row + step), slice(first * group, seen * group), seen, mask


def _probabilities(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """Return softmax of the scaled scores, masked in the last columns: what lies before them is seen by all."""
    scores = _scaled_product(queries, keys.mT, 1 / math.sqrt(queries.shape[-1]))
    scores[:, :, -mask.shape[1] :].masked_fill_(mask, -math.inf)
    return scores.softmax(-1)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scale)  # one pass instead of two


def _accumulate(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add scale * left @ right to the wider `total`, in place."""
    if left.dtype == total.dtype:
        total.baddbmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)


def _to_slots(x: Tensor, gather: Tensor) -> Tensor:
    flat = x.flatten(0, 1)  # (N, heads, Dh)
    return flat.index_select(0, gather) if gather.numel() else flat


def _from_slots(pieces: list[Tensor], scatter: Tensor, shape: torch.Size) -> Tensor:
    slots = pieces[0] if len(pieces) == 1 else torch.cat(pieces)  # (M, heads, Dh)
    return (slots.index_select(0, scatter) if scatter.numel() else slots).reshape(shape)


def _heads_first(slots: Tensor, count: int, num_kv_heads: int) -> Tensor:
    """(count * L, heads, Dh) -> (count * K, L * G, Dh): the G queries of one key head lie side by side."""
    size = slots.shape[-1]
    split = slots.reshape(count, -1, num_kv_heads, slots.shape[1] // num_kv_heads, size)  # (count, L, K, G, Dh)
    return split.transpose(1, 2).reshape(count * num_kv_heads, -1, size)


def _tokens_first(x: Tensor, count: int, num_heads: int) -> Tensor:
    """The inverse of `_heads_first`."""
    num_kv_heads, size = x.shape[0] // count, x.shape[-1]
    split = x.view(count, num_kv_heads, -1, num_heads // num_kv_heads, size)  # (count, K, L, G, Dh)
    return split.transpose(1, 2).reshape(-1, num_heads, size)


@_attend.register_fake
def _(q: Tensor, *_: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@_attend_backward.register_fake
def _(_upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001 - torch's signature
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_backward(upstream, *ctx.saved_tensors), None, None, None, None


_attend.register_autograd(_differentiate, setup_context=_remember)
