"""From rewards to advantages: groups of samples (GRPO), values of a critic (PPO), and a common scale (SPO, PPO).

    group    A = (r - mean of its group) / (std of its group + 1e-4)               arXiv 2402.03300, section 4.1.2
    GAE      A_t = sum over k of (gamma lambda)^k d_(t+k),  d_t = r_t + gamma v_(t+1) - v_t         arXiv 1506.02438
    whiten   (x - mean) / (std + 1e-8) over everything that counts, on all ranks together

All in float64 inside, so that a mean over many numbers is one number whatever their order. Whether a reward is good is
not known here.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minimind.batch import PAD_DOCUMENT
from minimind.objectives.sequences import spread_over_tokens, sum_by_document

GROUP_EPSILON = 1e-4
WHITEN_EPSILON = 1e-8


def group_advantages(
    rewards: Float[Tensor, "P G"], is_counted: Bool[Tensor, "P G"], *, use_std: bool = True
) -> tuple[Float[Tensor, "P G"], Bool[Tensor, " P"]]:
    """Return (advantages of G samples of each of P prompts, which groups teach nothing).

    `is_counted` leaves members out of mean and std (a masked reward, a truncated answer); their advantage is 0. The std
    is that of a sample (n - 1), as in TRL. A group whose counted rewards are all equal, or that counts fewer than two,
    teaches nothing: its advantages are exactly 0. `use_std` False is r - mean, as Dr. GRPO has it (arXiv 2503.20783).
    """
    counted = is_counted.double()
    values = torch.where(is_counted, rewards.double(), 0.0)
    number = counted.sum(1, keepdim=True)
    mean = values.sum(1, keepdim=True) / number.clamp(min=1)
    deviations = (values - mean) * counted
    highest = values.masked_fill(~is_counted, -torch.inf).amax(1)
    lowest = values.masked_fill(~is_counted, torch.inf).amin(1)
    teaches_nothing = highest <= lowest  # the mean of equal numbers need not equal them, so deviations cannot tell
    if use_std:
        std = (deviations.square().sum(1, keepdim=True) / (number - 1).clamp(min=1)).sqrt()
        deviations = deviations / (std + GROUP_EPSILON)
    return torch.where(teaches_nothing[:, None], 0.0, deviations).float(), teaches_nothing


def terminal_rewards(
    rewards: Float[Tensor, "B M"], is_chosen: Bool[Tensor, "B T"], documents: Int[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Return the reward of each document at the last token of it that the policy chose, 0 elsewhere."""
    chosen = (is_chosen & (documents != PAD_DOCUMENT)).double()
    totals = sum_by_document(chosen, documents, rewards.shape[1])
    # Documents follow each other in a row, so the last chosen token is where the count reaches that of all so far.
    is_last = (chosen > 0) & (chosen.cumsum(1) == spread_over_tokens(totals.cumsum(1), documents))
    return spread_over_tokens(rewards, documents) * is_last


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    is_chosen: Bool[Tensor, "B T"],
    documents: Int[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Return (advantages, returns = advantages + values) of packed rows, 0 where the policy chose nothing.

    Time runs over the tokens that the policy chose: the state after a choice is the one before the next choice, so what
    a tool has answered in between is no step and its value is not looked at. After the last choice the value is 0.
    `values[b, t]` is that of the state before the token (see `objectives.ppo`).
    """
    rewards, values = rewards.double(), values.double()
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        if t + 1 < values.shape[1]:
            is_same = documents[:, t] == documents[:, t + 1]
            next_value, next_advantage = next_value * is_same, next_advantage * is_same
        chosen = is_chosen[:, t]
        error = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = error + gamma * gae_lambda * next_advantage
        next_value = torch.where(chosen, values[:, t], next_value)
        next_advantage = torch.where(chosen, advantage, next_advantage)
        advantages[:, t] = torch.where(chosen, advantage, 0.0)
    returns = torch.where(is_chosen, advantages + values, 0.0)
    return advantages.float(), returns.float()


def whiten(
    values: Tensor, is_counted: Tensor, *, all_reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Tensor:
    """Return (values - mean) / (std + 1e-8) where `is_counted` (same shape, bool), 0 elsewhere.

    Mean and std (of n, not n - 1) are over everything counted; `all_reduce_sum` adds a tensor up over all ranks. With
    nothing counted, or all of it equal, the result is exactly 0.
    """
    counted = torch.where(is_counted, values.double(), 0.0)
    number, total = all_reduce_sum(torch.stack((is_counted.sum().double(), counted.sum())))
    mean = total / number.clamp(min=1)
    deviations = torch.where(is_counted, counted - mean, 0.0)
    (squares,) = all_reduce_sum(deviations.square().sum()[None])
    std = (squares / number.clamp(min=1)).sqrt()
    if std <= 1e-12 * mean.abs():  # equal numbers, but for the rounding of their mean
        return torch.zeros_like(values)
    return (deviations / (std + WHITEN_EPSILON)).to(values.dtype)
