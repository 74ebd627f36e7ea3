import pytest
import torch

from minimind.batch import Batch, Output
from minimind.objectives.grpo import grpo
from minimind.objectives.logprobs import learned_log_probs
from minimind.objectives.ppo import ppo


def make(values: list[float], old_values: list[float], returns: list[float], chosen: list[float] | None = None):
    torch.manual_seed(0)
    count = len(values)
    output = Output(
        torch.randn(1, count, 8, requires_grad=True),
        torch.randn(11, 8, requires_grad=True),
        torch.zeros(()),
        values=torch.tensor([values], requires_grad=True),
    )
    labels = torch.arange(count)[None]
    weights = torch.tensor([chosen or [1.0] * count])
    batch = Batch(labels, labels, labels, labels * 0, weights, float(weights.sum()))
    old, _ = learned_log_probs(output, batch)
    batch.extras = {
        "old_log_probs": old.detach() + 0.05,
        "advantages": torch.linspace(-1, 1, count)[None],
        "old_values": torch.tensor([old_values]),
        "returns": torch.tensor([returns]),
    }
    return output, batch


def test_policy_part_is_the_clipped_surrogate():
    output, batch = make([0.5, 1.0], [0.5, 1.0], [0.5, 1.0])
    loss, metrics = ppo(output, batch, clip=0.1)
    want, want_metrics = grpo(output, batch, clip_low=0.1, clip_high=0.1)
    torch.testing.assert_close(loss, want)  # the critic is right: it adds nothing
    assert metrics["value_loss"] == 0
    assert all(torch.equal(metrics[name], value) for name, value in want_metrics.items())


def test_value_loss_by_hand():
    """v - R and, with v held within 0.2 of v_old, the same again; the larger square counts."""
    output, batch = make([1.0, 0.1, 0.0, 1.0], [0.0, 0.0, 0.0, 1.5], [2.0, 1.0, 0.0, 0.5])
    #        v - R              -1         -0.9      0            0.5
    #        clipped v - R   0.2-2=-1.8  0.1-1=-0.9  0        1.3-0.5=0.8
    want = [1.8**2, 0.9**2, 0.0, 0.8**2]
    _, metrics = ppo(output, batch)
    assert float(metrics["value_loss"]) == pytest.approx(sum(want), rel=1e-6)
    assert float(metrics["value_clip"]) == 2
    assert float(metrics["value"]) == pytest.approx(2.1)
    assert float(metrics["return"]) == pytest.approx(3.5)
    loss, _ = ppo(output, batch, value_coefficient=0.5)
    policy, _ = grpo(output, batch)
    assert float((loss - policy).detach()) == pytest.approx(0.5 * sum(want), rel=1e-5)
    assert output.values is not None
    (grad,) = torch.autograd.grad(loss, output.values)
    # Where the clipped value is the worse one it is held, so that token moves nothing; else c * 2 (v - R).
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.5 * 2 * -0.9, 0.0, 0.0]]))


def test_value_clip_of_zero_is_the_plain_square():
    output, batch = make([1.0, 0.1], [0.0, 0.0], [2.0, 1.0])
    _, metrics = ppo(output, batch, value_clip=0.0)
    assert float(metrics["value_loss"]) == pytest.approx(1.0 + 0.81)
    assert metrics["value_clip"] == 0


def test_only_chosen_tokens_count():
    output, batch = make([1.0, 0.1, 5.0], [0.0, 0.0, 0.0], [2.0, 1.0, 9.0], chosen=[1.0, 1.0, 0.0])
    batch.extras["returns"][0, 2] = torch.nan
    loss, metrics = ppo(output, batch, value_clip=0.0)
    assert float(metrics["value_loss"]) == pytest.approx(1.81)
    loss.backward()
    assert output.values is not None
    assert output.values.grad is not None
    assert output.values.grad[0, 2] == 0
    assert torch.isfinite(output.values.grad).all()


def test_a_model_without_a_critic_is_refused():
    output, batch = make([1.0], [1.0], [1.0])
    output.values = None
    with pytest.raises(ValueError, match="needs a critic"):
        ppo(output, batch)
