"""The nouns of the journey: `Example` -> `Batch` -> `Output`. Every floor knows them; they know nobody.

There is one masking mechanism in the whole system: `loss_weights`. 0 ignores a token, 1 learns it, more emphasises it.
"""

from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

PAD_DOCUMENT = -1
"""Value of `Batch.documents` at padding: such a position attends to nothing that matters and is attended by nothing."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised document, not shifted: `loss_weights[i]` is the weight of *predicting* `ids[i]`."""

    ids: list[int]
    loss_weights: list[float]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.loss_weights):
            raise ValueError(f"Example: {len(self.ids)} ids but {len(self.loss_weights)} loss_weights")


@dataclass(slots=True)
class Batch:
    """One micro-batch of B rows and T positions, already shifted: `labels[b, t]` is the token after `input_ids[b, t]`.

    A row holds one or more documents one after the other (packing), then padding. Attention stays inside a document.
    """

    input_ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    """The next token of the same document; 0 where `loss_weights` is 0 because there is none."""
    positions: Int[Tensor, "B T"]
    """Position inside the document, from 0; 0 at padding."""
    documents: Int[Tensor, "B T"]
    """Number of the document inside its row, from 0, ascending; `PAD_DOCUMENT` at padding."""
    loss_weights: Float[Tensor, "B T"]
    """Weight of predicting `labels[b, t]`."""
    weight: float
    """What the loss averages over in this micro-batch (here: the sum of `loss_weights`); known before the forward."""
    extras: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Tensors of one objective only (old_log_probs, advantages, ...); first axis B unless the objective says else."""

    @property
    def num_tokens(self) -> int:
        """Number of real (not padding) input tokens."""
        return int((self.documents != PAD_DOCUMENT).sum())

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
        moved["extras"] = {name: value.to(device, non_blocking=True) for name, value in self.extras.items()}
        return Batch(**moved)


@dataclass(slots=True)
class Output:
    """What the model returns. Logits are computed only when read, so that training never holds (B, T, V)."""

    hidden: Float[Tensor, "B T D"]
    """Final hidden states, after the last norm (of the positions kept, see `logits_to_keep`)."""
    head: Float[Tensor, "V D"]
    """Weight of the output projection (the embedding's when tied)."""
    aux_loss: Float[Tensor, ""]
    """MoE balance loss, mean over the MoE layers, already times alpha; 0 for a dense model."""
    loss: Float[Tensor, ""] | None = None
    """Mean cross-entropy plus `aux_loss`, when `labels` were given to the model."""
    values: Float[Tensor, "B T"] | None = None
    """Output of a scalar head, where the model has one."""

    @property
    def logits(self) -> Float[Tensor, "B T V"]:
        """`hidden @ head.T`, computed on each read."""
        return self.hidden @ self.head.to(self.hidden.dtype).T
