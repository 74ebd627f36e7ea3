"""Preference losses on sums known by hand: values, metrics, gradients, and rows that are not full."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from minimind.batch import Batch, Output
from minimind.objectives import dpo, kto
from minimind.objectives.preference import DOCUMENTS, REF_LOG_PROBS, document_log_probs, lengths

LOG_2 = math.log(2)
DOCS = torch.tensor([[0, 0, 1, 1, 1, 2, 3, 3], [0, 0, 0, 1, 1, 1, -1, -1]])
"""Two pairs, then one and padding."""
LEARNED = torch.tensor([[0, 1, 0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1, 0, 0]])
IDS = torch.tensor([[4, 5, 0, 1], [2, 3, -1, -1]])
COUNTS = torch.tensor([[1.0, 2.0, 1.0, 2.0], [2.0, 1.0, 1.0, 1.0]])


def example(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Output, Batch, Tensor]:
    """Random hidden states and head, the batch over them, and each document's log-probability worked out plainly."""
    torch.manual_seed(seed)
    hidden = torch.randn(2, 8, 6, dtype=dtype, requires_grad=True)
    head = torch.randn(11, 6, dtype=dtype, requires_grad=True)
    labels = torch.randint(11, (2, 8))
    batch = Batch(labels, labels, torch.zeros_like(labels), DOCS, LEARNED.float(), weight=3.0)
    batch.extras[DOCUMENTS] = IDS
    log_probs = (hidden @ head.T).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    rows = [[(log_probs[b] * LEARNED[b])[DOCS[b] == m].sum() for m in range(4)] for b in range(2)]
    sums = torch.stack([torch.stack(row) for row in rows])
    return Output(hidden, head, torch.zeros(())), batch, sums


def with_reference(batch: Batch, ref: Tensor) -> Batch:
    batch.extras[REF_LOG_PROBS] = ref.detach()
    return batch


def test_the_log_probability_of_a_document_is_the_sum_over_its_learned_tokens() -> None:
    output, batch, sums = example()
    torch.testing.assert_close(document_log_probs(output, batch), sums)
    assert torch.equal(lengths(batch), COUNTS)


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_policy_equal_to_its_reference_gives_log_2_for_each_pair(seed: int, averaged: bool) -> None:
    output, batch, _ = example(seed)
    with_reference(batch, document_log_probs(output, batch))
    loss, metrics = dpo.dpo(output, batch, beta=0.7, length_averaged=averaged)
    assert float(loss.detach()) == pytest.approx(3 * LOG_2, rel=1e-7)
    for name in ("chosen_reward", "rejected_reward", "reward_margin", "reward_accuracy"):
        assert float(metrics[name]) == 0.0


def by_pair(values: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) of the three pairs."""
    flat = torch.cat((values[0], values[1, :2]))
    return flat[0::2], flat[1::2]


def expected_dpo(sums: Tensor, ref: Tensor, beta: float) -> Tensor:
    chosen, rejected = by_pair(beta * (sums - ref))
    return torch.log(1 + torch.exp(rejected - chosen)).sum()


def expected_rpo(sums: Tensor, ref: Tensor, beta: float) -> Tensor:
    return expected_dpo(sums, ref, beta) - 0.5 * by_pair(sums / COUNTS)[0].sum()


def expected_averaged(sums: Tensor, ref: Tensor, beta: float) -> Tensor:
    return expected_dpo(sums / COUNTS, ref / COUNTS, beta)


def expected_ipo(sums: Tensor, ref: Tensor, beta: float) -> Tensor:
    chosen, rejected = by_pair((sums - ref) / COUNTS)
    return ((chosen - rejected - 0.5 / beta) ** 2).sum()


def expected_simpo(sums: Tensor, ref: Tensor, beta: float) -> Tensor:
    chosen, rejected = by_pair(sums / COUNTS)
    return torch.log(1 + torch.exp(0.4 - beta * (chosen - rejected))).sum()


def expected_orpo(sums: Tensor, ref: Tensor, beta: float) -> Tensor:
    chosen, rejected = by_pair(sums / COUNTS)
    odds = [means.exp() / (1 - means.exp()) for means in (chosen, rejected)]
    return (-chosen - beta * torch.log(odds[0] / (odds[0] + odds[1]))).sum()


LOSSES: dict[str, tuple[Callable[..., Any], Callable[[Tensor, Tensor, float], Tensor]]] = {
    "dpo": (dpo.dpo, expected_dpo),
    "rpo": (partial(dpo.dpo, nll_weight=0.5), expected_rpo),
    "averaged": (partial(dpo.dpo, length_averaged=True), expected_averaged),
    "ipo": (dpo.ipo, expected_ipo),
    "simpo": (partial(dpo.simpo, gamma=0.4), expected_simpo),
    "orpo": (dpo.orpo, expected_orpo),
}


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_the_definition(name: str) -> None:
    ours, definition = LOSSES[name]
    output, batch, sums = example()
    ref = sums.detach() + torch.tensor([[0.5, -1.0, 2.0, 0.3], [-0.4, 0.8, 0.0, 0.0]])
    loss, _ = ours(output, with_reference(batch, ref), beta=0.6)
    expected = definition(sums, ref, 0.6)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    given = [output.hidden, output.head]
    for found, wanted in zip(torch.autograd.grad(loss, given), torch.autograd.grad(expected, given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert found.abs().max() > 1e-3


def test_the_metrics_by_hand() -> None:
    output, batch, sums = example()
    chosen, rejected = by_pair(sums.detach())
    ratios = torch.tensor([[1.0, 3.0, 2.0, -2.0], [0.5, 0.6, 0.0, 0.0]])  # worse, better, worse
    _, metrics = dpo.dpo(output, with_reference(batch, sums.detach() - ratios), beta=0.1)
    found = {name: float(value) for name, value in metrics.items()}
    assert found == {
        "chosen_reward": pytest.approx(0.35, abs=1e-6),
        "rejected_reward": pytest.approx(0.16, abs=1e-6),
        "reward_margin": pytest.approx(0.19, abs=1e-6),
        "reward_accuracy": 1.0,
        "chosen_log_prob": pytest.approx(float(chosen.sum()), rel=1e-5),
        "rejected_log_prob": pytest.approx(float(rejected.sum()), rel=1e-5),
    }
    assert not any(value.requires_grad for value in metrics.values())


def test_the_direction_of_the_gradient() -> None:
    # One step against the gradient makes the chosen answers likelier and the rejected ones less likely.
    output, batch, sums = example()
    loss, _ = dpo.dpo(output, with_reference(batch, sums), beta=0.5)
    (gradient,) = torch.autograd.grad(loss, [output.hidden])
    moved = Output(output.hidden - 0.05 * gradient, output.head, output.aux_loss)
    chosen, rejected = by_pair(document_log_probs(moved, batch) - sums)
    assert (chosen > 0).all()
    assert (rejected < 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_micro_batch_of_padding_weighs_nothing_and_keeps_its_graph(name: str) -> None:
    ours, _ = LOSSES[name]
    output, batch, _ = example()
    batch.documents = torch.full_like(DOCS, -1)
    batch.loss_weights = torch.zeros_like(batch.loss_weights)
    batch.extras = {DOCUMENTS: torch.full((2, 2), -1), REF_LOG_PROBS: torch.zeros(2, 2)}
    loss, metrics = ours(output, batch)
    assert float(loss.detach()) == 0.0
    assert all(float(value) == 0.0 for value in metrics.values())
    (gradient,) = torch.autograd.grad(loss, [output.hidden])
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_orpo_near_certainty_is_finite() -> None:
    for value in (-1e-9, -1e-5, -0.6931, -0.6932, -40.0):
        x = torch.tensor([[value]], requires_grad=True)
        found = dpo._log_one_minus_exp(x)
        expected = math.log(-math.expm1(min(value, -1e-6)))
        assert float(found.detach()) == pytest.approx(expected, rel=1e-4, abs=1e-12)
        (gradient,) = torch.autograd.grad(found.sum(), [x])
        assert torch.isfinite(gradient).all()


# --- KTO --------------------------------------------------------------------------------------------------------------


def single(sums: Tensor, batch: Batch, ratios: list[list[float]], kl: float) -> Batch:
    batch.extras |= {
        REF_LOG_PROBS: sums.detach() - torch.tensor(ratios),
        kto.IS_DESIRABLE: torch.tensor([[True, False, True, True], [False, True, True, True]]),
        kto.KL: torch.full((2, 1), kl),
    }
    return batch


def test_kto_by_hand() -> None:
    output, batch, sums = example()
    ratios = [[2.0, -1.0, 0.5, 3.0], [1.0, 0.0, 9.0, 9.0]]  # the last two are of documents that are not there
    loss, metrics = kto.kto(
        output, single(sums, batch, ratios, 1.5), beta=0.4, desirable_weight=1.2, undesirable_weight=0.7
    )

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    good = sum(1 - sigmoid(0.4 * (r - 1.5)) for r in (2.0, 0.5, 3.0, 0.0))
    bad = sum(1 - sigmoid(0.4 * (1.5 - r)) for r in (-1.0, 1.0))
    assert float(loss.detach()) == pytest.approx(1.2 * good + 0.7 * bad, rel=1e-5)
    found = {name: float(value) for name, value in metrics.items()}
    assert found == {
        "kl": pytest.approx(6 * 1.5),
        "desirable": 4.0,
        "signed_reward": pytest.approx(0.4 * (2.0 + 1.0 + 0.5 + 3.0 - 1.0 + 0.0), rel=1e-4),
        "reward_accuracy": 4.0,  # 2 and 3 are above 1.5; -1 and 1 below
    }


def test_kto_of_a_policy_equal_to_its_reference_is_one_half_each() -> None:
    output, batch, _ = example()
    none = [[0.0] * 4] * 2
    loss, _ = kto.kto(output, single(document_log_probs(output, batch), batch, none, 0.0))
    assert float(loss.detach()) == pytest.approx(6 * 0.5, rel=1e-7)
