"""Supervised fine-tuning: learn to answer. The same loss as pretraining, on the assistant's tokens only.

    loss = - sum_t w_t log p(x_t | x_<t) / sum_t w_t      w_t = 1 in the assistant's turns (end included), else 0

The weights are made while a conversation is rendered (`tokenizer/chat.py`), message by message.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.config import parse
from minimind.stages.base import TrainingConfig, start
from minimind.stages.supervised import train
from minimind.training.config import OptimConfig

if TYPE_CHECKING:
    from minimind.training.loop import FitResult


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Fine-tune a model on conversations: --init-from RUN --data FILE ..."""

    out: Path = Path("runs/sft")
    """Directory of the run: configuration, metrics, samples, checkpoints."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5, weight_decay=0.0))
    """Optimizer and schedule."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = super().problems()
        if self.init_from is None:
            found.append("init_from: fine-tuning starts from a pretrained model; give --init-from RUN")
        return found


def run(config: Config) -> "FitResult":
    """Train as `config` says (or go on with the run in `config.out`) and return what came of it."""
    from minimind.objectives.cross_entropy import cross_entropy

    model, tokenizer = start(config)
    return train(config, "conversation", model, tokenizer, cross_entropy)


def main(argv: Sequence[str]) -> None:
    """`minimind sft`."""
    run(parse(Config, argv, command="sft"))
