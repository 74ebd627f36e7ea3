"""The policy losses of the GRPO family: one clipped surrogate, its sequence and its stop-gradient form, and the KL.

For each token that the policy chose, with A its advantage and r = pi(x) / pi_old(x):

    grpo    -min(r A, clip(r, 1 - low, 1 + high) A)             PPO's surrogate; GRPO, arXiv 2402.03300, equation 3
    gspo    the same with r = exp(mean over the sequence of log pi - log pi_old)     GSPO, arXiv 2507.18071
    cispo   -stop_gradient(clip(r, 1 - low, 1 + high)) A log pi             MiniMax-M1, arXiv 2506.13585
    KL      + beta (exp(d) - 1 - d),  d = log pi_ref - log pi      k3 of KL(pi || pi_ref), joschu.net/blog/kl-approx

The loss is the sum over tokens of `Batch.loss_weights` times this. How tokens, sequences and lengths are averaged is
thus no matter of the objective: it lies in `loss_weights` and `weight`. DAPO (arXiv 2503.14476) is `grpo` with
clip_high 0.28 and a token mean, Dr. GRPO (arXiv 2503.20783) a fixed length and advantages without the std, SPO's policy
loss (arXiv 2509.13232) `grpo` with clip_high 0.28. Where advantages come from is not known here.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from minimind.batch import Batch, Output
from minimind.objectives.logprobs import learned_log_probs
from minimind.objectives.sequences import num_documents, spread_over_tokens, sum_by_document

Variant = Literal["grpo", "gspo", "cispo"]

MAX_LOG_RATIO = 20.0
"""Deviation: |log ratio| is cut here, far outside any clip, so that no exp overflows: inf times a gradient of 0 is NaN
(test_a_ratio_beyond_all_bounds_stays_finite)."""


def grpo(
    output: Output,
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    temperature: float = 1.0,
    variant: Variant = "grpo",
    importance_cap: float = 2.0,
    use_unbiased_kl: bool = False,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return (sum of loss_weights times the loss of each token, metrics).

    `batch.extras` (B, T): `advantages`; `old_log_probs` of the behaviour policy; `ref_log_probs` when `beta` is above 0
    (with them alone the KL is only logged). What they hold where `loss_weights` is 0 does not matter. `temperature` is
    the rollout's. Where `rollout_log_probs` are given too (the log-probabilities of an engine that is not the trainer),
    each policy loss is multiplied by min(exp(old_log_probs - rollout_log_probs), `importance_cap`), truncated
    importance sampling. `clip_low` 1 is no lower bound, as MiniMax-M1 has it. `use_unbiased_kl` multiplies the KL by r,
    so that its gradient is that of KL(pi || pi_ref) whatever policy the tokens are from (DeepSeek-V3.2, 2512.02556).

    Metrics are detached sums of loss_weights times: `policy_loss`; `ratio` r; `clip_low` [r < 1 - low and A < 0] and
    `clip_high` [r > 1 + high and A > 0], where the gradient vanishes (cispo: for either sign of A, where the factor is
    cut); `approx_kl` r - 1 - log r, k3 of KL(pi_old || pi); `entropy` of the policy in nats; `kl` k3 of
    KL(pi || pi_ref); `importance` the truncated factor; `loss_weight` 1, less after division when the length is fixed.
    """
    given = learned_extras(batch)
    old_log_probs, advantages = given["old_log_probs"], given["advantages"]
    log_probs, entropy = learned_log_probs(output, batch, temperature=temperature)
    log_ratio = log_probs - old_log_probs
    if variant == "gspo":
        log_ratio = mean_over_sequence(log_ratio, batch)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    if variant == "cispo":
        losses = -clipped.detach() * advantages * log_probs
    else:
        losses = -torch.minimum(ratio * advantages, clipped * advantages)
    metrics: dict[str, Tensor] = {}
    if "rollout_log_probs" in given:
        log_mismatch = old_log_probs - given["rollout_log_probs"]
        importance = log_mismatch.exp().clamp(max=importance_cap)
        losses = losses * importance
        metrics["importance"] = importance
    metrics |= {"policy_loss": losses, "ratio": ratio, "approx_kl": torch.expm1(log_ratio) - log_ratio}
    if beta or "ref_log_probs" in given:
        kl = k3(log_probs, given["ref_log_probs"]) * (ratio if use_unbiased_kl else 1.0)
        metrics["kl"] = kl
        losses = losses + beta * kl
    is_any_sign = torch.full_like(ratio, variant == "cispo", dtype=torch.bool)
    metrics["clip_low"] = (ratio < 1 - clip_low) & ((advantages < 0) | is_any_sign)
    metrics["clip_high"] = (ratio > 1 + clip_high) & ((advantages > 0) | is_any_sign)
    metrics |= {"entropy": entropy, "loss_weight": torch.ones_like(ratio)}
    return weighted_sum(losses, batch), {name: weighted_sum(value.detach(), batch) for name, value in metrics.items()}


def learned_extras(batch: Batch) -> dict[str, Float[Tensor, "B T"]]:
    """Return `batch.extras` with 0 wherever nothing is learned, whatever stands there, be it NaN."""
    return {name: torch.where(batch.loss_weights != 0, value, 0.0) for name, value in batch.extras.items()}


def k3(log_probs: Float[Tensor, "B T"], ref_log_probs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Return exp(d) - 1 - d, d = log pi_ref - log pi: never negative, and over tokens of pi its mean is the KL."""
    difference = (ref_log_probs - log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(difference) - difference


def mean_over_sequence(values: Float[Tensor, "B T"], batch: Batch) -> Float[Tensor, "B T"]:
    """Return at each learned token the mean of `values` over the learned tokens of its document, 0 elsewhere."""
    is_learned = (batch.loss_weights != 0).to(values.dtype)
    count = num_documents(batch.documents)
    sums = sum_by_document(values * is_learned, batch.documents, count)
    lengths = sum_by_document(is_learned, batch.documents, count)
    return spread_over_tokens(sums / lengths.clamp(min=1), batch.documents) * is_learned


def weighted_sum(values: Tensor, batch: Batch) -> Float[Tensor, ""]:
    """Return the sum of loss_weights times `values`."""
    return (values * batch.loss_weights).sum()
