"""Every fast path of `attend` against the definition: softmax over the allowed keys, written out."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minimind.model import block_attention as blocks
from minimind.model import layout
from minimind.model.attention import attend
from minimind.model.block_attention import block_attention, buckets_of, rows_as_documents


def by_definition(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[3])
    order = torch.arange(q.shape[1])
    allowed = (documents[:, :, None] == documents[:, None, :]) & (order[:, None] >= order)
    probabilities = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", probabilities, v)


def random_documents(batch: int, length: int, mean: int, padding: int) -> Tensor:
    rows: list[Tensor] = []
    for _ in range(batch):
        lengths = torch.randint(1, 2 * mean, (length,))
        row = torch.arange(length).repeat_interleave(lengths)[: length - padding]
        rows.append(torch.cat((row, torch.full((padding,), -1))))
    return torch.stack(rows)


Three = tuple[Tensor, Tensor, Tensor]


def tensors(batch: int, length: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype = torch.float32) -> Three:
    q, k, v = (torch.randn(batch, length, n, size, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def converted(qkv: Three, to: torch.dtype, device: str = "cpu") -> Three:
    q, k, v = (tensor.detach().to(device, to).requires_grad_() for tensor in qkv)
    return q, k, v


def outcome(function: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: Three, upstream: Tensor) -> list[Tensor]:
    for tensor in qkv:
        tensor.grad = None
    output = function(*qkv)
    output.backward(upstream.to(output.dtype))
    return [output.detach(), *(tensor.grad for tensor in qkv if tensor.grad is not None)]


CASES = {  # batch, length, heads, kv heads, head size, mean document (0: whole rows), padding
    "rows": (2, 200, 4, 2, 8, 0, 0),
    "one kv head": (3, 70, 6, 1, 8, 0, 0),
    "short documents": (3, 150, 4, 4, 8, 9, 0),
    "mixed lengths and padding": (2, 210, 4, 2, 6, 60, 37),
    "single tokens": (2, 9, 2, 2, 4, 1, 0),
    "one token": (1, 1, 2, 1, 4, 0, 0),
    "only padding": (2, 20, 2, 1, 4, 1, 20),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scores", [1 << 20, 300])
def test_blocks_equal_the_definition(monkeypatch: pytest.MonkeyPatch, name: str, scores: int):
    monkeypatch.setattr(blocks, "SCORES", scores)
    torch.manual_seed(0)
    batch, length, heads, kv_heads, size, mean, padding = CASES[name]
    qkv = tensors(batch, length, heads, kv_heads, size)
    if mean:
        documents = random_documents(batch, length, mean, padding)
        buckets = buckets_of(documents)
    else:
        documents, buckets = torch.zeros(batch, length, dtype=torch.long), rows_as_documents(batch, length)
    # In blocks, padding sees less of the padding before it; what it computes is nobody's business.
    upstream = torch.randn(batch, length, heads, size) * (documents >= 0)[:, :, None, None]
    ours = outcome(lambda q, k, v: block_attention(q, k, v, buckets), qkv, upstream)
    theirs = outcome(lambda q, k, v: by_definition(q, k, v, documents), qkv, upstream)
    assert len(ours) == len(theirs) == 4
    torch.testing.assert_close(ours[0][documents >= 0], theirs[0][documents >= 0])
    for mine, wanted in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)
    assert all(torch.isfinite(tensor).all() for tensor in ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_in_half_precision_are_as_good_as_sdpa(dtype: torch.dtype):
    torch.manual_seed(0)
    documents = random_documents(2, 160, 50, 10)
    qkv = tensors(2, 160, 4, 2, 32, dtype)
    upstream = torch.randn(2, 160, 4, 32) * (documents >= 0)[:, :, None, None]
    exact = outcome(lambda q, k, v: by_definition(q, k, v, documents), converted(qkv, torch.float32), upstream)
    errors: dict[str, list[Tensor]] = {}
    for name, arranged in (("sdpa", layout.packed(documents, "dense")), ("blocks", layout.packed(documents, "blocks"))):
        results = outcome(lambda q, k, v, to=arranged: attend(q, k, v, to), qkv, upstream)
        real = (documents >= 0)[:, :, None, None]
        errors[name] = [((a - b) * real).norm() / (b * real).norm() for a, b in zip(results, exact, strict=True)]
        assert all(tensor.dtype == dtype for tensor in results)
    for ours, theirs in zip(errors["blocks"], errors["sdpa"], strict=True):
        assert ours < 2 * theirs + 1e-3


def test_dense_layout_equals_the_definition():
    torch.manual_seed(0)
    documents = random_documents(2, 40, 9, 5)
    qkv = tensors(2, 40, 4, 2, 8)
    output = attend(*qkv, layout.packed(documents, "dense"))
    torch.testing.assert_close(output, by_definition(*qkv, documents))
    output = attend(*qkv, layout.causal((2, 40), "dense"))
    torch.testing.assert_close(output, by_definition(*qkv, torch.zeros(2, 40)))


def test_a_document_number_used_twice_is_two_documents_on_every_path():
    torch.manual_seed(0)
    documents = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0]])
    qkv = tensors(1, 8, 2, 2, 4)
    want = by_definition(*qkv, torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]]))
    for kernel in ("dense", "blocks"):
        torch.testing.assert_close(attend(*qkv, layout.packed(documents, kernel)), want)


def test_memory_for_the_backward_is_linear_in_length():
    qkv = tensors(1, 300, 2, 2, 8)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        block_attention(*qkv, rows_as_documents(1, 300))
    assert max(saved) <= qkv[0].numel()


def test_gradient_of_the_operator_is_the_numerical_one():
    torch.manual_seed(0)
    buckets = buckets_of(torch.tensor([[0, 0, 0, 1, 1, -1]]))
    qkv = tensors(1, 6, 2, 1, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: block_attention(q, k, v, buckets)[:, :5], qkv)


def test_the_operator_is_registered_correctly():
    buckets = buckets_of(random_documents(2, 20, 5, 3))
    tensors_of = (buckets.shapes, buckets.gather, buckets.is_real, buckets.scatter)
    torch.library.opcheck(torch.ops.minimind.block_attention.default, (*tensors(2, 20, 2, 1, 4), *tensors_of))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_over_documents_equals_the_definition():
    torch.manual_seed(0)
    documents = random_documents(2, 200, 60, 20).cuda()
    qkv = converted(tensors(2, 200, 4, 2, 64), torch.bfloat16, "cuda")
    upstream = torch.randn(2, 200, 4, 64, device="cuda") * (documents >= 0)[:, :, None, None]
    arranged = layout.packed(documents, "varlen")
    ours = outcome(lambda q, k, v: attend(q, k, v, arranged), qkv, upstream)
    theirs = outcome(lambda q, k, v: by_definition(q, k, v, documents), converted(qkv, torch.float32, "cuda"), upstream)
    for mine, wanted in zip(ours[1:], theirs[1:], strict=True):
        assert (mine.float() - wanted).norm() / wanted.norm() < 0.02
