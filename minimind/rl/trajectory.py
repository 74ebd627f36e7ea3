"""`Trajectory`: a sample with its reward and its numbers token by token; and many of them as packed rows, and back.

Rows live in memory only: a rollout is packed by best fit into rows of the length that wastes least. It knows no
algorithm, only who stands where.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minimind.batch import Batch, Output
from minimind.data.collate import Annotated, collate_annotated
from minimind.data.packing import best_fit
from minimind.rl.rollout import Sample
from minimind.runtime.device import autocast

LENGTHS = tuple(sorted({64, *(128 << power for power in range(12)), *(192 << power for power in range(12))}))
"""Of rows: powers of two and what lies halfway: few shapes, since oneDNN keeps a product for each new one."""


@dataclass(slots=True)
class Trajectory:
    """What one sample was worth, and what is known about each of its tokens."""

    sample: Sample
    reward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict[str, float])
    """Reward by name, before its weight."""
    is_masked: bool = False
    """Its reward could not be had: it counts nowhere, neither in the loss nor in the means."""
    is_learned: bool = True
    """Whether it counts in the loss."""
    counts: dict[str, float] = field(default_factory=dict[str, float])
    """What else there is to tell about it: name -> number (an agent's turns and calls)."""
    drift: float | None = None
    """How far the policy has moved since it last answered this prompt (SPO); None where it had not."""
    tokens: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """Name -> a number for each of `sample.ids`: advantages, ref_log_probs, old_values, ..."""

    @property
    def num_slots(self) -> int:
        """Input tokens of a row that it takes."""
        return len(self.sample.prompt_ids) + len(self.sample.ids) - 1

    def document(self, loss_weight: float) -> Annotated:
        """Return prompt and answer as one document; each chosen token weighs `loss_weight`."""
        sample, before = self.sample, [0.0] * len(self.sample.prompt_ids)
        # What was told at the rollout stands for both, unless the policy's own were computed here (rl.remote).
        extras = {"old_log_probs": sample.log_probs, "rollout_log_probs": sample.log_probs, **self.tokens}
        return Annotated(
            [*sample.prompt_ids, *sample.ids],
            [*before, *(loss_weight * chosen for chosen in sample.mask)],
            {name: [*before, *values] for name, values in extras.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-able values, exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Trajectory":
        """Return what `to_json` was called on."""
        fields: dict[str, Any] = {**saved, "sample": Sample(**saved["sample"])}
        return cls(**fields)


def plan_rows(sizes: Sequence[int], row_length: int) -> tuple[list[list[int]], int]:
    """Return (which units stand in each row, the rows' length): the plan with the fewest slots in all.

    Rows have one of `LENGTHS`, at most `row_length` or what the longest unit needs. Every unit stands in some row.
    """
    if not sizes:
        return [], LENGTHS[0]
    units = np.asarray(sizes, dtype=np.int64)
    shortest = next(length for length in LENGTHS if length >= units.max())
    lengths = [length for length in LENGTHS if shortest <= length <= max(row_length, shortest)]
    plans = [(best_fit(units, length), length) for length in lengths]
    row_of_unit, length = min(plans, key=lambda plan: ((int(plan[0].max()) + 1) * plan[1], plan[1]))
    rows: list[list[int]] = [[] for _ in range(int(row_of_unit.max()) + 1)]
    for unit, row in enumerate(row_of_unit.tolist()):
        rows[row].append(unit)
    return rows, length


@dataclass(frozen=True, slots=True)
class Packer:
    """How trajectories become micro-batches."""

    row_length: int
    """The longest row, unless one trajectory needs more."""
    micro_batch_tokens: int
    """Slots of one forward, at least one row; 0 takes all rows at once."""
    pad_id: int

    def rows(self, documents: Sequence[Annotated]) -> tuple[list[list[int]], int, int]:
        """Return (which documents stand in each row, length of the rows, rows of one micro-batch)."""
        rows, length = plan_rows([len(document.ids) - 1 for document in documents], self.row_length)
        size = self.micro_batch_tokens // length if self.micro_batch_tokens else len(rows)
        return rows, length, max(1, size)

    def batch(self, rows: Sequence[Sequence[Annotated]], length: int, names: Sequence[str]) -> Batch:
        """Return the batch of these rows, one row of padding if there are none."""
        return collate_annotated(rows or [[]], length, self.pad_id, names)


@dataclass(frozen=True, slots=True)
class Meter:
    """Reads numbers off a model for every token of some answers, in packed rows and without gradients."""

    packer: Packer
    device: torch.device
    dtype: torch.dtype
    """Of the products, the same as in training."""

    def __call__(
        self, model: nn.Module, trajectories: Sequence[Trajectory], read: Callable[[Output, Batch], Tensor]
    ) -> list[list[float]]:
        """Return what `read` (B, T) says about each token of each answer: a number for each of `sample.ids`.

        The batches that it sees weigh 1 at every chosen token. The model is handed back in its mode.
        """
        documents = [trajectory.document(1.0) for trajectory in trajectories]
        found: list[list[float]] = [[] for _ in trajectories]
        rows, length, size = self.packer.rows(documents)
        is_training = model.training
        model.eval()
        for first in range(0, len(rows), size):
            chosen = rows[first : first + size]
            batch = self.packer.batch([[documents[unit] for unit in row] for row in chosen], length, ())
            batch = batch.to(self.device)
            with torch.no_grad(), autocast(self.device, self.dtype):
                output = model(batch.input_ids, positions=batch.positions, documents=batch.documents)
                values = read(output, batch).float().cpu()  # (B, T)
            for row, units in zip(values, chosen, strict=True):
                end = 0
                for unit in units:
                    end += trajectories[unit].num_slots
                    found[unit] = row[end - len(trajectories[unit].sample.ids) : end].tolist()
        model.train(is_training)
        return found
