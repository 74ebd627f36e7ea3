"""Every kernel of `kernels.cpp` against its definition in PyTorch, values and gradients, both dtypes, odd sizes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.batch import PAD_DOCUMENT
from minimind.model import layout
from minimind.model.attention import reference_attention
from minimind.model.block_attention import spans_of
from minimind.model.config import ModelConfig
from minimind.model.feed_forward import FeedForward
from minimind.model.lora import side_by_side
from minimind.model.rope import angles, rotate
from minimind.model.transformer import Transformer
from minimind.native import kernels
from minimind.objectives.cross_entropy import fused_linear_cross_entropy

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not kernels.usable(CPU, torch.float32), reason="needs a C++ compiler")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Share of the largest value: one rounding to bfloat16 is 0.4 %, and attention rounds probabilities as well."""


def assert_same(ours: Tensor, definition: Tensor, dtype: torch.dtype) -> None:
    ours, definition = ours.float(), definition.float()
    assert definition.abs().max() > 0.1  # or anything would do
    torch.testing.assert_close(ours, definition, rtol=0.0, atol=TOLERANCE[dtype] * float(definition.abs().max()))


def compare(ours: Callable[..., Tensor], definition: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Both in value and in the gradient of every input; the definition computes in float32."""
    wide = [x.detach().float().requires_grad_() for x in inputs]
    here, there = ours(*inputs), definition(*wide)
    assert_same(here.detach(), there.detach(), here.dtype)
    upstream = torch.randn_like(here)
    mine = torch.autograd.grad(here, inputs, upstream)
    theirs = torch.autograd.grad(there, wide, upstream.float())
    for own, its in zip(mine, theirs, strict=True):
        assert_same(own, its, here.dtype)


@DTYPES
@pytest.mark.parametrize("size", [5, 16, 40, 128])
def test_rms_norm(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7, size, requires_grad=True), torch.randn(size, requires_grad=True)

    def definition(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (size,), weight, 1e-5)

    compare(lambda x, weight: kernels.rms_norm(x, weight, 1e-5, dtype), definition, [x, weight])


@DTYPES
@pytest.mark.parametrize("size", [1, 16, 43])
def test_swiglu(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    gate_up = (4 * torch.randn(2, 9, 2 * size)).to(dtype).requires_grad_()

    def definition(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    compare(kernels.swiglu, definition, [gate_up])


DOCUMENTS = {
    "whole rows": torch.zeros(2, 70),
    "one token each": torch.arange(40).expand(2, 40),
    "mixed": torch.arange(13).repeat_interleave(torch.tensor([1, 2, 7, 8, 9, 15, 16, 17, 30, 64, 65, 3, 127]))[None],
    "padding": torch.tensor([[0] * 20 + [1] * 33 + [PAD_DOCUMENT] * 47, [0] * 99 + [PAD_DOCUMENT]]),
    "longer than a block": torch.zeros(1, 203),
}


@DTYPES
@pytest.mark.parametrize("case", DOCUMENTS)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 32), (4, 1, 16), (6, 2, 64)])
@pytest.mark.parametrize("has_norms", [False, True])
def test_attention(dtype: torch.dtype, case: str, heads: int, kv_heads: int, size: int, has_norms: bool) -> None:
    torch.manual_seed(0)
    documents = DOCUMENTS[case].long()
    positions = layout.positions_in_documents(documents)
    cos, sin = angles(positions, 100.0 ** -torch.linspace(0, 1, size // 2), 1.1)
    # Like what a model has: scores that neither drown in each other nor single out one key.
    qkv = torch.randn(*documents.shape, (heads + 2 * kv_heads) * size).to(dtype).requires_grad_()

    has_norms = has_norms and case != "one token each"  # where one key takes all, nothing depends on them
    norms = [torch.rand(size).add(0.5).requires_grad_() for _ in range(2)] if has_norms else []

    def ours(qkv: Tensor, *weights: Tensor) -> Tensor:
        norms = (weights[0], weights[1], 1e-5) if weights else None
        return kernels.attention(qkv, cos, sin, spans_of(documents), heads, kv_heads, norms)

    def definition(qkv: Tensor, *weights: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (-1, size)).split((heads, kv_heads, kv_heads), dim=2)
        if weights:
            q, k = (F.rms_norm(x, (size,), weight, 1e-5) for x, weight in zip((q, k), weights, strict=True))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return reference_attention(q, k, v, layout.packed(documents, "dense")).flatten(2)

    # `spans_of` cuts padding into short documents, so what padding sees is not compared.
    real = (documents != PAD_DOCUMENT)[..., None]
    compare(lambda *x: ours(*x) * real, lambda *x: definition(*x) * real, [qkv, *norms])


@DTYPES
@pytest.mark.parametrize("size", [7, 32, 1203])
def test_cross_entropy(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    logits, weights = (4 * torch.randn(50, size)).to(dtype), torch.rand(50)
    labels = torch.randint(size, (50,))
    labels[::2] = logits.float().argmax(-1)[::2]
    wide = logits.float().requires_grad_()
    want = F.cross_entropy(wide, labels, reduction="none") * weights
    (gradient,) = torch.autograd.grad(want.sum(), wide)
    untouched = logits.clone()
    losses, hits = kernels.cross_entropy_(untouched, labels, weights, needs_grad=False)
    assert torch.equal(untouched, logits)
    torch.testing.assert_close(losses, want.detach())
    assert torch.equal(hits, weights * (wide.argmax(-1) == labels))
    kernels.cross_entropy_(logits, labels, weights, needs_grad=True)
    assert_same(logits, gradient, dtype)


def test_cross_entropy_counts_the_first_of_equal_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0]] * 2)
    _, hits = kernels.cross_entropy_(logits, torch.tensor([1, 2]), torch.ones(2), needs_grad=False)
    assert hits.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_vocabulary_is_refused(label: int) -> None:
    with pytest.raises(IndexError, match="a label is outside"):
        kernels.cross_entropy_(torch.zeros(1, 3), torch.tensor([label]), torch.ones(1), needs_grad=True)


@DTYPES
def test_nan_comes_out_as_nan(dtype: torch.dtype) -> None:
    nan = torch.full((1, 48), torch.nan)
    ones = torch.ones(48)
    assert kernels.rms_norm(nan, ones, 1e-5, dtype).isnan().all()
    assert kernels.swiglu(nan.to(dtype)).isnan().all()
    losses, _ = kernels.cross_entropy_(nan.to(dtype), torch.tensor([0]), torch.ones(1), needs_grad=True)
    assert losses.isnan().all()
    angle = torch.zeros(1, 1, 1, 8)
    assert kernels.attention(nan.to(dtype)[None], angle, angle, torch.tensor([0, 1]), 1, 1).isnan().all()


SHAPE = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    intermediate_size=80,
    max_position_embeddings=256,
)
SHAPES = {
    "dense": SHAPE,
    "qk norm": replace(SHAPE, qk_norm=True),
    "moe": replace(SHAPE, use_moe=True, moe_intermediate_size=32),
}


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_packed", [True, False])
def test_a_model_trains_the_same_with_and_without(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: str, is_packed: bool
) -> None:
    torch.manual_seed(0)
    model = Transformer(SHAPES[shape])
    ids = torch.randint(97, (2, 100))
    documents = DOCUMENTS["padding"] if is_packed else None
    weights = torch.rand(200) * (torch.ones(200) if documents is None else (documents != PAD_DOCUMENT).flatten())

    def outcome() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(ids, documents=documents)
            loss, _ = fused_linear_cross_entropy(output.hidden.flatten(0, 1), output.head, ids.flatten(), weights)
        (loss + output.aux_loss).backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    native = outcome()
    monkeypatch.setattr(kernels, "usable", lambda *_: False)
    plain = outcome()
    assert len(native) == len(plain) == 1 + len(list(model.parameters()))
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(native, plain, strict=True))  # two paths ran
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for ours, theirs in zip(native, plain, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_wrapped_layers_are_called_themselves() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
            return 2 * super().forward(input)

    torch.manual_seed(0)
    block, x = FeedForward(16, 32), torch.randn(3, 16)
    plain = side_by_side(x, block.gate_proj, block.up_proj)
    doubled = Doubled(16, 32, bias=False)
    doubled.weight = block.up_proj.weight
    mixed = side_by_side(x, block.gate_proj, doubled)
    torch.testing.assert_close(mixed, torch.cat((plain[:, :32], 2 * plain[:, 32:]), dim=-1))


def test_other_devices_and_dtypes_are_left_to_pytorch() -> None:
    assert not kernels.usable(CPU, torch.float32, torch.float64)
    assert not kernels.usable(CPU, torch.float16)
    assert not kernels.usable(torch.device("meta"), torch.float32)


@DTYPES
def test_the_number_of_threads_changes_no_bit_but_of_the_norms_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    documents = DOCUMENTS["padding"]
    x, weight = torch.randn(200, 96, requires_grad=True), torch.rand(96, requires_grad=True)
    angle = torch.rand(1, 100, 1, 8)
    norms = torch.rand(2, 16, requires_grad=True)

    def outcome() -> list[Tensor]:
        normed = kernels.rms_norm(x, weight, 1e-5, dtype)
        gated = kernels.swiglu(torch.cat((normed, normed), dim=-1)).view(2, 100, 96)
        attended = kernels.attention(gated, angle, angle, spans_of(documents), 4, 1, (norms[0], norms[1], 1e-5))
        logits = attended.detach().flatten(0, 1).clone()
        losses, _ = kernels.cross_entropy_(logits, torch.arange(200) % 64, torch.ones(200), needs_grad=True)
        grads = torch.autograd.grad(attended, (weight, norms, x), logits.view_as(attended))
        return [*grads, attended.detach(), losses, logits]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = outcome()
        torch.set_num_threads(3)
        together = [outcome() for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    for results in together:
        assert all(torch.equal(one, other) for one, other in zip(results, together[0], strict=True))
        assert all(torch.equal(one, other) for one, other in zip(results[1:], alone[1:], strict=True))
        assert_same(results[0], alone[0], torch.float32)
