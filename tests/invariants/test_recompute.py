"""Gradient checkpointing changes memory and no bit of loss or gradient."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minimind.batch import PAD_DOCUMENT
from minimind.model.config import ModelConfig
from minimind.model.transformer import Transformer
from minimind.objectives.cross_entropy import fused_linear_cross_entropy

SHAPE = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=48,
    max_position_embeddings=64,
    qk_norm=True,
)
SHAPES = {
    "dense": SHAPE,
    "moe": replace(SHAPE, qk_norm=False, use_moe=True, moe_intermediate_size=32),
    "dropout": replace(SHAPE, dropout=0.3),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_packed", [True, False])
def test_recomputed_activations_are_the_same_bits(shape: str, dtype: torch.dtype, is_packed: bool) -> None:
    torch.manual_seed(0)
    model = Transformer(SHAPES[shape])
    ids = torch.randint(61, (2, 40))
    documents = torch.tensor([[0] * 25 + [1] * 15, [0] * 7 + [1] * 20 + [PAD_DOCUMENT] * 13]) if is_packed else None

    def outcome(*, recompute: bool) -> tuple[list[Tensor], int]:
        model.gradient_checkpointing = recompute
        model.zero_grad()
        torch.manual_seed(1)
        kept: list[int] = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.nbytes), x)[1], lambda x: x),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            output = model(ids, documents=documents)
            hidden = output.hidden.flatten(0, 1)
            loss, _ = fused_linear_cross_entropy(hidden, output.head, ids.flatten(), torch.ones(80))
        (loss + output.aux_loss).backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], sum(kept)

    plain, most = outcome(recompute=False)
    again, least = outcome(recompute=True)
    assert len(plain) == len(again) == 1 + len(list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert least < most / 2
