"""On-policy distillation: the student answers prompts, the teacher says of each of its tokens what it would have said.

The machinery is that of reinforcement learning (`reinforcement.py`), without advantages: rewards are watched only. The
loss is the stage's divergence on the tokens that the student chose; the sampling itself is not differentiated (GKD,
arXiv 2306.13649, section 3).
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from minimind.data.order import share
from minimind.rl.credit import Stateless
from minimind.rl.experience import PromptOrder
from minimind.rl.player import Player
from minimind.rl.rollout import seed_of
from minimind.rl.trajectory import Meter, Packer, Trajectory
from minimind.runtime import distributed
from minimind.runtime.device import autocast, pick_device, pick_dtype
from minimind.stages.base import TrainingConfig
from minimind.stages.lessons import check_same_teacher, distance
from minimind.stages.reinforcement import ROW_LENGTH, train
from minimind.stages.rollouts import ReinforcementConfig
from minimind.stages.teacher import Teacher

if TYPE_CHECKING:
    from minimind.model.transformer import Transformer
    from minimind.stages.distill import Config
    from minimind.tokenizer.bpe import Tokenizer
    from minimind.training.loop import FitResult
    from minimind.training.step import Objective


def train_on_policy(
    config: "Config", model: "Transformer", tokenizer: "Tokenizer", teacher: Teacher, objective: "Objective"
) -> "FitResult":
    """Run the one loop on the student's own answers with `objective`; returns what the loop returns.

    Raises CheckpointError for a run that another teacher began, and what reinforcement learning raises.
    """
    how = config.answers
    flags = {one.name: getattr(config, one.name) for one in fields(TrainingConfig)}
    flags |= {"batch_tokens": 0, "micro_batch_tokens": config.micro_batch_tokens or config.batch_tokens}
    flags |= {name: getattr(how, name) for name in ("prompts", "samples", "temperature", "max_tokens", "thinking")}
    rollouts = ReinforcementConfig(**flags, generation_rows=how.rows, rewards=how.watch)
    packer = Packer(config.data.row_length or ROW_LENGTH, rollouts.micro_batch_tokens, tokenizer.pad_id)
    dtype = pick_dtype(config.dtype, pick_device(config.device), num_parameters=model.config.num_parameters()[0])

    def measure(trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Return how far the student is from the teacher on these answers of this rank and those of all others."""
        documents = [one.document(1.0) for one in trajectories]
        rows, length, size = packer.rows(documents)
        chosen = (rows[first : first + size] for first in range(0, len(rows), size))
        batches = (packer.batch([[documents[i] for i in row] for row in part], length, ()) for part in chosen)
        return distance(model, teacher, batches, autocast=autocast(pick_device(config.device), dtype))

    class Examiner(Player):
        """A player that validates by the distance to the teacher, too."""

        def validate(self, count: int) -> dict[str, float]:
            indices = list(range(min(count, len(self.prompts))))
            own = indices[share(len(indices), distributed.rank(), distributed.world_size())]
            samples = self.play(own, [seed_of("validation", config.seed, index) for index in own])
            return super().validate(count) | measure([Trajectory(sample) for sample in samples])

    def make_algorithm(meter: Meter, num_prompts: int) -> Watched:
        del meter  # nothing is measured but the loss
        return Watched(PromptOrder(num_prompts, how.prompts, config.seed), teacher)

    return train(
        *(rollouts, model, model, tokenizer),
        objective=objective,
        make_algorithm=make_algorithm,
        make_player=Examiner,
    )


class Watched(Stateless):
    """The algorithm that gives no credit: what is learned is the teacher's. A resumed run must have the same one."""

    extras = ()

    def __init__(self, choose: PromptOrder, teacher: Teacher) -> None:
        super().__init__(choose, None)
        self._teacher = teacher

    def credit(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Return nothing."""
        del trajectories
        return {}

    def state(self) -> dict[str, Any]:
        """Return which teacher it is."""
        return {"teacher_sha256": self._teacher.sha256}

    def load_state(self, saved: dict[str, Any]) -> None:
        """Raise CheckpointError for another."""
        check_same_teacher(self._teacher, saved)
