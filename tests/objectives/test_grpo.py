import math

import pytest
import torch
from torch import Tensor

from minimind.batch import PAD_DOCUMENT, Batch, Output
from minimind.objectives.grpo import MAX_LOG_RATIO, Variant, grpo
from minimind.objectives.logprobs import learned_log_probs, token_log_probs_and_entropy

VOCAB, WIDTH = 23, 8
CHOSEN = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 0]], dtype=torch.float32)
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, PAD_DOCUMENT], [0, 0, 0, 0, 0, 0, 0, PAD_DOCUMENT]])


def make(loss_weights: Tensor = CHOSEN, seed: int = 0, **extras: Tensor) -> tuple[Output, Batch]:
    """Return a random policy on two packed rows, three answers in all; `old_log_probs` are its own."""
    torch.manual_seed(seed)
    output = Output(
        torch.randn(2, 8, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH, requires_grad=True), torch.zeros(())
    )
    labels = torch.randint(VOCAB, (2, 8))
    batch = Batch(labels, labels, labels * 0, DOCUMENTS, loss_weights, float(loss_weights.sum()))
    own, _ = learned_log_probs(output, batch)
    batch.extras = {"old_log_probs": own.detach(), "advantages": torch.randn(2, 8), **extras}
    return output, batch


def policy(log_ratios: list[float], advantages: list[float]) -> tuple[Output, Batch]:
    """Return one row of one answer whose tokens have these log ratios."""
    output, _ = make()
    output = Output(output.hidden[:1, : len(log_ratios)], output.head, output.aux_loss)
    labels = torch.arange(len(log_ratios))[None]
    weights = torch.ones(1, len(log_ratios))
    batch = Batch(labels, labels, labels, labels * 0, weights, float(weights.sum()))
    own, _ = learned_log_probs(output, batch)
    batch.extras = {
        "old_log_probs": own.detach() - torch.tensor([log_ratios]),
        "advantages": torch.tensor([advantages]),
    }
    return output, batch


def gradient(loss: Tensor, output: Output) -> Tensor:
    return torch.autograd.grad(loss, output.hidden)[0]


def test_learned_log_probs_are_those_of_all_tokens_where_something_is_learned():
    output, batch = make()
    every, entropy = token_log_probs_and_entropy(output.hidden, output.head, batch.labels, temperature=0.7)
    found, found_entropy = learned_log_probs(output, batch, temperature=0.7)
    is_learned = batch.loss_weights != 0
    torch.testing.assert_close(found, torch.where(is_learned, every, 0.0))
    torch.testing.assert_close(found_entropy, torch.where(is_learned, entropy, 0.0))
    upstream = torch.randn(2, 8)
    want = gradient((every * upstream * is_learned).sum(), output)
    torch.testing.assert_close(gradient((found * upstream).sum(), output), want)


@pytest.mark.parametrize("variant", ["grpo", "gspo", "cispo"])
def test_policy_equal_to_old_has_ratio_one_and_the_policy_gradient(variant: Variant):
    advantages = torch.tensor([[2.0], [-1.0]]).expand(2, 8)
    output, batch = make(advantages=advantages)
    loss, metrics = grpo(output, batch, variant=variant)
    mean = {name: float(value) / batch.weight for name, value in metrics.items()}
    assert mean["ratio"] == pytest.approx(1, abs=1e-6)
    assert mean["approx_kl"] == pytest.approx(0, abs=1e-12)
    assert mean["clip_low"] == mean["clip_high"] == 0
    assert mean["loss_weight"] == 1
    log_probs, _ = learned_log_probs(output, batch)
    want = gradient(-(advantages * log_probs * CHOSEN).sum(), output)
    # A sequence's ratio has the mean of the log-probabilities, once for each token: their sum again.
    torch.testing.assert_close(gradient(loss, output), want, rtol=1e-5, atol=1e-6)


def test_equal_rewards_move_nothing():
    output, batch = make(advantages=torch.zeros(2, 8))
    loss, _ = grpo(output, batch)
    assert loss == 0
    assert (gradient(loss, output) == 0).all()


def test_the_clipped_surrogate_by_hand():
    """Ratios 0.5, 1, 1.5 with A = 1 and -1: -min(r A, clip(r, 0.8, 1.28) A)."""
    ratios, signs = [0.5, 1.0, 1.5] * 2, [1.0] * 3 + [-1.0] * 3
    output, batch = policy([math.log(r) for r in ratios], signs)
    loss, metrics = grpo(output, batch, clip_low=0.2, clip_high=0.28)
    want = [-0.5, -1.0, -1.28, 0.8, 1.0, 1.5]
    assert float(loss.detach()) == pytest.approx(sum(want), rel=1e-5)
    assert float(metrics["policy_loss"]) == pytest.approx(sum(want), rel=1e-5)
    assert float(metrics["clip_low"]) == float(metrics["clip_high"]) == 1  # r 0.5 with A < 0, r 1.5 with A > 0
    assert float(metrics["ratio"]) == pytest.approx(6.0)
    assert float(metrics["approx_kl"]) == pytest.approx(2 * sum(r - 1 - math.log(r) for r in (0.5, 1.0, 1.5)), rel=1e-5)
    moves = gradient(loss, output)[0].abs().sum(-1) > 0
    assert moves.tolist() == [True, True, False, False, True, True]


def test_cispo_by_hand():
    """-stop_gradient(clip(r)) A log pi: a token beyond the clip still moves, with the factor at the bound."""
    output, batch = policy([math.log(0.5), 0.0, math.log(3.0)], [1.0, -2.0, 1.0])
    loss, metrics = grpo(output, batch, clip_low=1.0, clip_high=1.0, variant="cispo")
    log_probs, _ = learned_log_probs(output, batch)
    factors = torch.tensor([[0.5 * 1, 1.0 * -2, 2.0 * 1]])
    torch.testing.assert_close(loss, -(factors * log_probs).sum())
    torch.testing.assert_close(gradient(loss, output), gradient(-(factors * log_probs).sum(), output))
    assert float(metrics["clip_high"]) == 1
    assert float(metrics["clip_low"]) == 0  # clip_low 1 is no bound


def test_gspo_has_one_ratio_for_each_sequence():
    """Three answers of 3, 2 and 5 tokens; the log ratio of each is the mean over its own tokens only."""
    shift = torch.tensor([[9.0, 0.3, 0.0, 0.0, 9.0, -0.2, 0.0, 9.0], [9.0, 9.0, 1.0, 0.0, 0.0, 0.0, 0.0, 9.0]])
    output, batch = make(advantages=torch.ones(2, 8))
    batch.extras["old_log_probs"] = batch.extras["old_log_probs"] - shift
    loss, metrics = grpo(output, batch, clip_low=0.15, clip_high=0.15, variant="gspo")
    ratios = math.exp(0.1), math.exp(-0.1), math.exp(0.2)
    assert float(metrics["ratio"]) == pytest.approx(3 * ratios[0] + 2 * ratios[1] + 5 * ratios[2], rel=1e-5)
    assert float(loss.detach()) == pytest.approx(-(3 * ratios[0] + 2 * ratios[1] + 5 * 1.15), rel=1e-5)
    assert float(metrics["clip_high"]) == 5
    moved = gradient(loss, output).abs().sum(-1) > 0
    assert moved.tolist() == [[False, True, True, True, False, True, True, False], [False] * 8]


def test_the_kl_is_k3_and_pulls_towards_the_reference():
    ref = torch.full((2, 8), -2.0)
    output, batch = make(advantages=torch.zeros(2, 8), ref_log_probs=ref)
    loss, metrics = grpo(output, batch, beta=0.02)
    log_probs, _ = learned_log_probs(output, batch)
    difference = ref - log_probs
    want = ((difference.exp() - 1 - difference) * CHOSEN).sum()
    torch.testing.assert_close(metrics["kl"], want.detach())
    torch.testing.assert_close(loss, 0.02 * want)
    without, logged = grpo(output, batch)
    assert without == 0
    torch.testing.assert_close(logged["kl"], want.detach())


def test_the_kl_to_itself_is_zero():
    output, batch = make()
    batch.extras["ref_log_probs"] = batch.extras["old_log_probs"]
    _, metrics = grpo(output, batch, beta=1.0)
    assert float(metrics["kl"]) == pytest.approx(0, abs=1e-6)


def test_rollouts_of_another_engine_are_corrected_and_capped():
    """min(pi_old / pi_rollout, 2): an engine that found the tokens 1.5 times, 4 times and half as likely."""
    output, batch = policy([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    found = torch.tensor([[1.5, 4.0, 0.5]]).log()
    batch.extras["rollout_log_probs"] = batch.extras["old_log_probs"] - found
    loss, metrics = grpo(output, batch, importance_cap=2.0)
    assert float(metrics["importance"]) == pytest.approx(1.5 + 2.0 + 0.5)
    assert float(loss.detach()) == pytest.approx(-4.0)


def test_temperature_is_that_of_the_rollout():
    output, batch = make()
    own, _ = learned_log_probs(output, batch, temperature=0.6)
    batch.extras["old_log_probs"] = own.detach()
    _, metrics = grpo(output, batch, temperature=0.6)
    assert float(metrics["approx_kl"]) == pytest.approx(0, abs=1e-9)
    _, metrics = grpo(output, batch)
    assert float(metrics["approx_kl"]) > 0.01


def test_aggregation_lies_in_the_weights():
    """Token mean, sequence mean and fixed length are the same sum with other loss_weights."""
    output, batch = make(old_log_probs=torch.full((2, 8), -3.0))
    per_token = gradient_free_losses(output, batch)
    lengths = torch.tensor([[3.0] * 4 + [2.0] * 4, [5.0] * 8])
    batch.loss_weights, batch.weight = CHOSEN / lengths, 3.0
    loss, metrics = grpo(output, batch)
    sequences = [per_token[0, 1:4].mean(), per_token[0, 5:7].mean(), per_token[1, 2:7].mean()]
    torch.testing.assert_close(loss.detach() / batch.weight, torch.stack(sequences).mean())
    torch.testing.assert_close(metrics["loss_weight"] / batch.weight, torch.ones(()))
    batch.loss_weights, batch.weight = CHOSEN, 3 * 16.0
    loss, metrics = grpo(output, batch)
    torch.testing.assert_close(loss.detach() / batch.weight, per_token.sum() / 48)
    torch.testing.assert_close(metrics["loss_weight"] / batch.weight, torch.tensor(10 / 48))


def gradient_free_losses(output: Output, batch: Batch) -> Tensor:
    log_probs, _ = learned_log_probs(output, batch)
    ratio, advantages = (log_probs - batch.extras["old_log_probs"]).exp(), batch.extras["advantages"]
    return (-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * CHOSEN).detach()


@pytest.mark.parametrize("variant", ["grpo", "gspo", "cispo"])
def test_split_into_micro_batches_sums_to_the_whole(variant: Variant):
    output, batch = make(old_log_probs=torch.full((2, 8), -3.0), ref_log_probs=torch.full((2, 8), -2.5))
    whole = grpo(output, batch, beta=0.1, variant=variant)
    parts = []
    for row in range(2):
        names = ("input_ids", "labels", "positions", "documents", "loss_weights")
        part = Batch(
            **{name: getattr(batch, name)[row : row + 1] for name in names},
            weight=float(batch.loss_weights[row].sum()),
            extras={name: value[row : row + 1] for name, value in batch.extras.items()},
        )
        parts.append(
            grpo(Output(output.hidden[row : row + 1], output.head, output.aux_loss), part, beta=0.1, variant=variant)
        )
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    for name, value in whole[1].items():
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], value)


@pytest.mark.parametrize("variant", ["grpo", "gspo", "cispo"])
def test_what_stands_where_nothing_is_learned_does_not_matter(variant: Variant):
    output, batch = make(old_log_probs=torch.full((2, 8), -3.0), ref_log_probs=torch.full((2, 8), -2.5))
    batch.extras["rollout_log_probs"] = batch.extras["old_log_probs"] + 0.1
    want, want_metrics = grpo(output, batch, beta=0.1, variant=variant)
    want_gradient = gradient(want, output)
    for name, value in batch.extras.items():
        batch.extras[name] = torch.where(CHOSEN > 0, value, torch.nan)
    found, metrics = grpo(output, batch, beta=0.1, variant=variant)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(gradient(found, output), want_gradient)
    for name, value in want_metrics.items():
        torch.testing.assert_close(metrics[name], value)


@pytest.mark.parametrize("variant", ["grpo", "gspo", "cispo"])
def test_a_batch_in_which_all_is_masked_is_zero_with_zero_gradients(variant: Variant):
    output, batch = make(torch.zeros(2, 8), ref_log_probs=torch.zeros(2, 8))
    loss, metrics = grpo(output, batch, beta=0.1, variant=variant)
    loss.backward()
    assert loss == 0
    assert all(value == 0 for value in metrics.values())
    assert output.hidden.grad is not None
    assert output.head.grad is not None
    assert (output.hidden.grad == 0).all()
    assert (output.head.grad == 0).all()


@pytest.mark.parametrize("variant", ["grpo", "gspo", "cispo"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_ratio_beyond_all_bounds_stays_finite(variant: Variant, sign: float):
    output, batch = policy([300.0, -300.0, 0.0], [sign, sign, sign])
    batch.extras["ref_log_probs"] = batch.extras["old_log_probs"] + 200.0
    loss, metrics = grpo(output, batch, beta=1e-6, variant=variant)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient(loss, output)).all()
    assert all(torch.isfinite(value) for value in metrics.values())
    assert math.exp(MAX_LOG_RATIO) > 1e8  # far outside any clip


def test_metrics_carry_no_gradient():
    output, batch = make(ref_log_probs=torch.zeros(2, 8), rollout_log_probs=torch.zeros(2, 8))
    _, metrics = grpo(output, batch, beta=0.1)
    assert not any(value.requires_grad for value in metrics.values())
