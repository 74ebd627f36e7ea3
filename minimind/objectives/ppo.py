"""Proximal policy optimization (arXiv 1707.06347, equations 7 and 9): the clipped losses of policy and critic.

    loss = -min(r A, clip(r, 1 - clip, 1 + clip) A) + c max((v - R)^2, (v_old + clip(v - v_old, -w, w) - R)^2) + beta KL

for each token that the policy chose. v is the value of the state *before* that token: labels are shifted, so it is
`output.values[b, t]` at the place that predicts `labels[b, t]`. Advantages A and returns R are made by
`objectives.advantages`; the policy's part is `objectives.grpo` with both bounds equal.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from minimind.batch import Batch, Output
from minimind.objectives.grpo import grpo, learned_extras, weighted_sum


def ppo(
    output: Output,
    batch: Batch,
    *,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coefficient: float = 0.5,
    beta: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return (sum of loss_weights times the loss of each token, metrics). ValueError when the model has no values.

    `batch.extras` (B, T): those of `grpo`, `old_values` (of the critic at the rollout) and `returns`. `value_clip` 0
    leaves the values unclipped.

    Metrics: those of `grpo`, and detached sums of loss_weights times: `value_loss`, the maximum above without c;
    `value_clip` [|v - v_old| > w]; `value` v; `return` R.
    """
    if output.values is None:
        raise ValueError("ppo: the model has no values, it needs a critic")
    policy_loss, metrics = grpo(
        output, batch, clip_low=clip, clip_high=clip, beta=beta, temperature=temperature, variant="grpo"
    )
    given = learned_extras(batch)
    values, returns, old_values = output.values.float(), given["returns"], given["old_values"]
    change = values - old_values
    losses = (values - returns).square()
    if value_clip:
        losses = torch.maximum(losses, (old_values + change.clamp(-value_clip, value_clip) - returns).square())
    value_loss = weighted_sum(losses, batch)
    is_clipped = change.abs() > (value_clip or torch.inf)
    parts = {"value_loss": losses, "value": values, "return": returns, "value_clip": is_clipped}
    metrics |= {name: weighted_sum(part.detach(), batch) for name, part in parts.items()}
    return policy_loss + value_coefficient * value_loss, metrics
