from dataclasses import replace

import pytest
import torch

from minimind.model.config import PRESETS
from minimind.model.moe import MixtureOfExperts, balance_loss, experts, reference_experts, route
from minimind.model.transformer import Transformer

TINY = replace(
    PRESETS["moe"], vocab_size=50, hidden_size=32, num_hidden_layers=2, moe_intermediate_size=16, initializer_range=0.1
)


def tensors(num_experts: int = 5, padding: bool = False):
    torch.manual_seed(0)
    x = torch.randn(40, 24, requires_grad=True)
    gate_up = torch.randn(num_experts, 32, 24, requires_grad=True)
    down = torch.randn(num_experts, 24, 16, requires_grad=True)
    logits = torch.randn(40, num_experts)
    logits[:, 3] = -50  # an expert that nobody visits
    real = torch.rand(40) > 0.3 if padding else None
    return x, gate_up, down, logits.requires_grad_(), real


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("num_chosen", [1, 2, 4])
def test_grouped_path_equals_the_plain_loop(padding: bool, num_chosen: int):
    x, gate_up, down, logits, real = tensors(padding=padding)
    results = []
    for function in (experts, reference_experts):
        for tensor in (x, gate_up, down, logits):
            tensor.grad = None
        routing, _ = route(logits, num_chosen, normalise=num_chosen > 1, real=real)
        output = function(x, routing, gate_up, down)
        output.square().sum().backward()
        results.append((output, x.grad, gate_up.grad, down.grad, logits.grad))
    for ours, theirs in zip(*results, strict=True):  # sums of thousands that cancel: judged by the largest
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6 * float(theirs.detach().abs().max()))
    output, x_grad, gate_up_grad, *_ = results[0]
    if num_chosen < 4:
        assert (gate_up_grad[3] == 0).all()  # a gradient of zeros, not none: what DDP waits for
    if real is not None:
        assert (output[~real] == 0).all()
        assert (x_grad[~real] == 0).all()


def test_all_tokens_padding_is_zero_and_finite():
    x, gate_up, down, logits, _ = tensors()
    routing, probabilities = route(logits, 2, normalise=True, real=torch.zeros(40, dtype=torch.bool))
    output = experts(x, routing, gate_up, down)
    loss = balance_loss(routing, probabilities, 4, per_row=True)
    (output.sum() + loss).backward()
    assert (output == 0).all()
    assert loss == 0
    for tensor in (x, gate_up, down, logits):
        assert tensor.grad is not None
        assert (tensor.grad == 0).all()


def test_renormalised_weights_sum_to_one_and_follow_the_softmax():
    *_, logits, _ = tensors()
    routing, probabilities = route(logits, 2, normalise=True, real=None)
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(40))
    torch.testing.assert_close(routing.weights, logits.gather(1, routing.experts).softmax(1))  # softmax over the top-k
    raw, _ = route(logits, 2, normalise=False, real=None)
    torch.testing.assert_close(raw.weights, probabilities.gather(1, raw.experts))


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("num_chosen", [1, 2, 3])
def test_balance_is_one_at_uniform_load_and_e_over_k_at_collapse(per_row: bool, num_chosen: int):
    num_experts = 6
    turns = torch.arange(24)[:, None] + torch.arange(num_chosen)  # every expert equally often
    logits = torch.zeros(24, num_experts).scatter(1, turns % num_experts, 1e-4)
    routing, probabilities = route(logits, num_chosen, normalise=True, real=None)
    even = balance_loss(routing, probabilities, 2, per_row=per_row)
    torch.testing.assert_close(even, torch.ones(()), atol=1e-4, rtol=0)
    logits = torch.zeros(24, num_experts)
    logits[:, :num_chosen] = 30.0
    routing, probabilities = route(logits, num_chosen, normalise=True, real=None)
    collapsed = balance_loss(routing, probabilities, 2, per_row=per_row)
    torch.testing.assert_close(collapsed, torch.tensor(num_experts / num_chosen))


def test_balance_follows_the_equation_with_padding():
    *_, logits, real = tensors(padding=True)
    assert real is not None
    routing, probabilities = route(logits, 2, normalise=True, real=real)

    def by_definition(rows: list[slice]) -> torch.Tensor:
        total = []
        for row in rows:
            p, chosen = logits[row].softmax(1)[real[row]], logits[row].topk(2).indices[real[row]]
            frequency = torch.stack([(chosen == e).sum() / (2 * len(p)) * 5 for e in range(5)])
            total.append((frequency * p.mean(0)).sum())
        return torch.stack(total).mean()

    whole = balance_loss(routing, probabilities, 4, per_row=False)
    torch.testing.assert_close(whole, by_definition([slice(0, 40)]))
    by_row = balance_loss(routing, probabilities, 4, per_row=True)
    torch.testing.assert_close(by_row, by_definition([slice(i, i + 10) for i in range(0, 40, 10)]))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("seq_aux", [True, False])
def test_an_untrained_model_has_aux_loss_alpha_whatever_its_depth(layers: int, seq_aux: bool):
    torch.manual_seed(0)
    config = replace(
        TINY, num_hidden_layers=layers, seq_aux=seq_aux, aux_loss_alpha=0.3, initializer_range=1e-3, vocab_size=500
    )
    aux_loss = Transformer(config)(torch.randint(500, (4, 64))).aux_loss
    torch.testing.assert_close(aux_loss, torch.tensor(0.3), atol=0.003, rtol=0)


def test_router_runs_in_float32_under_autocast():
    torch.manual_seed(0)
    block = MixtureOfExperts(TINY)
    torch.nn.init.normal_(block.gate.weight)
    torch.nn.init.normal_(block.experts.gate_up_proj)
    torch.nn.init.normal_(block.experts.down_proj)
    x = torch.randn(2, 30, 32)
    _, exact = block(x, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, rounded = block(x, None)
    assert torch.equal(exact, rounded)
    assert torch.isfinite(output).all()


def test_padding_changes_nothing_for_real_tokens():
    torch.manual_seed(0)
    model = Transformer(TINY)
    ids = torch.randint(50, (2, 12))
    padded = torch.cat((ids, torch.zeros(2, 7, dtype=torch.long)), dim=1)
    mask = torch.cat((torch.ones(2, 12), torch.zeros(2, 7)), dim=1).long()
    alone, together = model(ids), model(padded, attention_mask=mask)
    torch.testing.assert_close(together.logits[:, :12], alone.logits)
    torch.testing.assert_close(together.aux_loss, alone.aux_loss)
