"""Preference losses on pairs: DPO (arXiv 2305.18290), IPO (2310.12036), SimPO (2405.14734), ORPO (2403.07691).

    r(y) = beta * [log p(y | x) - log p_ref(y | x)]           summed over the tokens of the answer y
    DPO    -log sigmoid(r(chosen) - r(rejected))            [- w log p(chosen | x) / |chosen|: RPO, 2404.19733]
    IPO    (h - 1 / (2 beta))^2                   h = [r(chosen) / |chosen| - r(rejected) / |rejected|] / beta
    SimPO  -log sigmoid(beta * [m(chosen) - m(rejected)] - gamma)                        m(y) = log p(y | x) / |y|
    ORPO   -m(chosen) - beta * log sigmoid(o(chosen) - o(rejected))                      o = m - log(1 - exp m)

Each is a sum over the pairs of a micro-batch; the loop divides by the number of pairs. KTO needs no pairs: kto.py.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from minimind.batch import Batch, Output
from minimind.objectives.preference import REF_LOG_PROBS, Sides, document_log_probs, is_pair, lengths, logistic, summed

Sums = tuple[Float[Tensor, ""], dict[str, Tensor]]
"""(sum of the losses, sums of the metrics: those of `preference.summed`, chosen_log_prob and rejected_log_prob)."""


def dpo(
    output: Output, batch: Batch, *, beta: float = 0.1, length_averaged: bool = False, nll_weight: float = 0.0
) -> Sums:
    """Return the sums of DPO; with `length_averaged`, r(y) is divided by the number of tokens of y.

    A policy equal to its reference gives log 2 for each pair, whatever the pair. `nll_weight` adds fine-tuning on the
    chosen side (metric chosen_nll), so that a pair cannot be told apart by making both of its sides unlikely.
    """
    log_probs = document_log_probs(output, batch)  # (B, M)
    rewards = beta * (log_probs - batch.extras[REF_LOG_PROBS])
    if length_averaged:
        rewards = rewards / lengths(batch)
    sides = Sides.of(rewards)
    losses, metrics = logistic(sides.margin), _log_probs(log_probs)
    if nll_weight:
        metrics["chosen_nll"] = -Sides.of(log_probs / lengths(batch)).chosen
        losses = losses + nll_weight * metrics["chosen_nll"]
    return summed(batch, losses, sides, **metrics)


def ipo(output: Output, batch: Batch, *, beta: float = 0.1) -> Sums:
    """Return the sums of IPO; the rewards among the metrics are those of DPO, length-averaged.

    Deviation: equation 17 of the paper sums over tokens, so that its target depends on the length; this averages, as
    TRL does by the word of the authors (tests/parity/test_trl_dpo.py::test_ipo).
    """
    log_probs = document_log_probs(output, batch)
    ratios = Sides.of((log_probs - batch.extras[REF_LOG_PROBS]) / lengths(batch))
    losses = (ratios.margin - 1 / (2 * beta)) ** 2
    return summed(batch, losses, Sides(beta * ratios.chosen, beta * ratios.rejected), **_log_probs(log_probs))


def simpo(output: Output, batch: Batch, *, beta: float = 2.0, gamma: float = 1.0) -> Sums:
    """Return the sums of SimPO, which needs no reference: the reward is beta times the mean log-probability."""
    log_probs = document_log_probs(output, batch)
    sides = Sides.of(beta * log_probs / lengths(batch))
    return summed(batch, logistic(sides.margin - gamma), sides, **_log_probs(log_probs))


def orpo(output: Output, batch: Batch, *, beta: float = 0.1) -> Sums:
    """Return the sums of ORPO, which needs no reference: fine-tuning on the chosen side, and the ratio of odds.

    Metric chosen_nll: -m(chosen); the rewards are beta * m.
    Deviation: TRL learns the prompt too; here, as in the paper, the answer (tests/parity/test_trl_dpo.py::test_orpo).
    """
    log_probs = document_log_probs(output, batch)
    there = is_pair(batch).repeat_interleave(2, dim=1)  # (B, M)
    means = torch.where(there, log_probs / lengths(batch), -1.0)  # 0 would have infinite odds, and NaN as gradient
    odds = Sides.of(means - _log_one_minus_exp(means))
    sides = Sides.of(means)
    losses = beta * logistic(odds.margin) - sides.chosen
    rewards = Sides(beta * sides.chosen, beta * sides.rejected)
    return summed(batch, losses, rewards, chosen_nll=-sides.chosen, **_log_probs(log_probs))


def _log_probs(log_probs: Float[Tensor, "B M"]) -> dict[str, Tensor]:
    sides = Sides.of(log_probs)
    return {"chosen_log_prob": sides.chosen, "rejected_log_prob": sides.rejected}


def _log_one_minus_exp(x: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """Return log(1 - exp x) for x < 0, exact near 0 and far from it; an answer of probability 1 counts as just below.

    The two forms meet at -log 2 (Maechler, "Accurately computing log(1 - exp(-|a|))", 2012).
    """
    x = x.clamp(max=-1e-6)
    is_near = x > -0.6931472
    near = torch.where(is_near, x, -0.5)
    far = torch.where(is_near, -1.0, x)
    return torch.where(is_near, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))
