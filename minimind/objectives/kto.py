"""KTO (arXiv 2402.01306): answers that are desirable or not, each by itself, without pairs.

    r(y) = log p(y | x) - log p_ref(y | x)
    z0   = max(0, mean of log p(y' | x) - log p_ref(y' | x)), y' the answer to another prompt; no gradient
    desirable      w_d * (1 - sigmoid(beta * (r(y) - z0)))
    undesirable    w_u * (1 - sigmoid(beta * (z0 - r(y))))

z0 estimates how far the policy has moved from its reference; it is the same for all answers of a step
(`data/unpaired.py` says which y' and makes it). The sum is over answers; the loop divides by their number.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from minimind.batch import Batch, Output
from minimind.objectives.preference import DOCUMENTS, REF_LOG_PROBS, document_log_probs

IS_DESIRABLE = "is_desirable"
"""`Batch.extras`: (B, M), whether each document's answer is a good one."""
KL = "kl"
"""`Batch.extras`: (B, 1), z0."""


def kto(
    output: Output,
    batch: Batch,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return the sums of KTO over the documents of the micro-batch.

    Metrics: kl: z0; desirable: 1 for a good answer; signed_reward: beta * r of a good answer, -beta * r of a bad one;
    reward_accuracy: 1 where a good answer has r > z0, a bad one r < z0.
    """
    is_there, is_desirable = batch.extras[DOCUMENTS] >= 0, batch.extras[IS_DESIRABLE]
    sign = torch.where(is_desirable, 1.0, -1.0)  # (B, M)
    weights = torch.where(is_desirable, desirable_weight, undesirable_weight)
    ratios = document_log_probs(output, batch) - batch.extras[REF_LOG_PROBS]
    gain = sign * (ratios - batch.extras[KL])
    losses = weights * torch.sigmoid(-beta * gain)  # 1 - sigmoid(x), without cancellation
    metrics = {
        "kl": batch.extras[KL].expand_as(sign),
        "desirable": is_desirable.float(),
        "signed_reward": beta * sign * ratios,
        "reward_accuracy": (gain > 0).float(),
    }
    return (losses * is_there).sum(), {name: (value.detach() * is_there).sum() for name, value in metrics.items()}
