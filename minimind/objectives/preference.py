"""What every preference loss stands on: the log-probability of each document, and pairs of documents side by side.

Document 2k of a packed row is the chosen side of a pair, 2k + 1 the rejected one (`data/pairs.py`). It knows no loss.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from minimind.batch import Batch, Output
from minimind.objectives.fused_log_probs import fused_log_probs
from minimind.objectives.sequences import on_learned_tokens, sum_by_document

DOCUMENTS = "document_ids"
"""`Batch.extras`: (B, M), the number of each document in its data set, -1 where the row has none."""
REF_LOG_PROBS = "ref_log_probs"
"""`Batch.extras`: (B, M), log-probability of each document under the frozen reference."""


def document_log_probs(output: Output, batch: Batch) -> Float[Tensor, "B M"]:
    """Return the sum of log p over the learned tokens of each document; 0 where a row has no such document."""

    def of_tokens(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (fused_log_probs(hidden, head, labels),)

    (log_probs,) = on_learned_tokens(output, batch, of_tokens)
    return sum_by_document(log_probs, batch.documents, batch.extras[DOCUMENTS].shape[1])


def lengths(batch: Batch) -> Float[Tensor, "B M"]:
    """Return the number of learned tokens of each document; 1 where a row has no such document."""
    is_learned = (batch.loss_weights != 0).float()
    return sum_by_document(is_learned, batch.documents, batch.extras[DOCUMENTS].shape[1]).clamp(min=1)


@dataclass(frozen=True, slots=True)
class Sides:
    """The two sides of K pairs a row, from numbers of 2 K documents."""

    chosen: Float[Tensor, "B K"]
    rejected: Float[Tensor, "B K"]

    @classmethod
    def of(cls, values: Float[Tensor, "B M"]) -> "Sides":
        """Return the values of the even documents beside those of the odd ones."""
        return cls(values[:, 0::2], values[:, 1::2])

    @property
    def margin(self) -> Float[Tensor, "B K"]:
        """Chosen less rejected."""
        return self.chosen - self.rejected


def is_pair(batch: Batch) -> Bool[Tensor, "B K"]:
    """Return where a row has a pair."""
    return batch.extras[DOCUMENTS][:, 0::2] >= 0


def summed(
    batch: Batch, losses: Float[Tensor, "B K"], rewards: Sides, **more: Tensor
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return (sum of `losses`, sums of the metrics) over the pairs; `more` are further (B, K) metrics by name.

    chosen_reward, rejected_reward; reward_margin: the first less the second; reward_accuracy: 1 where it is above 0.
    """
    there = is_pair(batch)
    metrics = {
        "chosen_reward": rewards.chosen,
        "rejected_reward": rewards.rejected,
        "reward_margin": rewards.margin,
        "reward_accuracy": (rewards.margin > 0).float(),
        **more,
    }
    return (losses * there).sum(), {name: (value.detach() * there).sum() for name, value in metrics.items()}


def logistic(margin: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Return -log sigmoid(margin): how unlikely the preference is in the model of Bradley and Terry."""
    return -F.logsigmoid(margin)
