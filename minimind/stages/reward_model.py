"""A reward model: what an answer is worth, in one number, learned from pairs of which people chose one.

    loss = -log sigmoid(r(chosen) - r(rejected) - margin) + centre * (r(chosen) + r(rejected))^2

r is a scalar head (`model/heads.py`) on the last token of prompt and answer. The checkpoint is a sequence classifier of
Transformers as it stands; `minimind.checkpoint.load_reward_model` opens it for reinforcement learning.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.config import parse
from minimind.errors import ConfigError
from minimind.stages.base import TrainingConfig, start
from minimind.stages.supervised import train
from minimind.training.config import OptimConfig

if TYPE_CHECKING:
    from minimind.tokenizer.bpe import Tokenizer
    from minimind.training.loop import FitResult


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Learn to value answers from pairs: --init-from RUN --data FILE ..."""

    out: Path = Path("runs/reward-model")
    """Directory of the run: configuration, metrics, checkpoints."""
    margin: float = 0.0
    """How much more the chosen answer should be worth; 0: as Bradley and Terry have it."""
    centre: float = 0.0
    """Weight of the square of the sum of both rewards, which keeps them near 0; 0.01 is usual, 0 lets them drift."""
    sample_every: int = 0
    """A reward model writes nothing; only 0."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5, weight_decay=0.0))
    """Optimizer and schedule."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = super().problems()
        if self.init_from is None:
            found.append("init_from: a reward model starts from a fine-tuned model; give --init-from RUN")
        if self.sample_every:
            found.append(f"sample_every = {self.sample_every}: a reward model writes nothing; leave it at 0")
        return found + [
            f"{name} = {getattr(self, name)}: must not be negative"
            for name in ("margin", "centre")
            if not getattr(self, name) >= 0
        ]


def run(config: Config) -> "FitResult":
    """Train as `config` says (or go on with the run in `config.out`) and return what came of it."""
    from minimind.data.pairs import PairLoader
    from minimind.evaluation.objective import evaluate_objective
    from minimind.model.heads import ScalarModel
    from minimind.objectives.reward import bradley_terry

    language_model, tokenizer = start(config)
    _check_end(tokenizer)
    model = ScalarModel.from_transformer(language_model)
    del language_model
    objective = partial(bradley_terry, margin=config.margin, centre=config.centre)
    measure = partial(evaluate_objective, objective=objective)
    return train(config, "preference", model, tokenizer, objective, make_loader=PairLoader, evaluate=measure)


def _check_end(tokenizer: "Tokenizer") -> None:
    """Raise ConfigError unless something follows the end token of an answer: the last token is no input of a row."""
    from minimind.tokenizer.chat import render

    turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"})
    *_, before_last, _last = render(tokenizer, turns).ids
    if before_last != tokenizer.eos_id:
        raise ConfigError(
            "the chat template writes no line break (one token) after the end token of the last answer, so its reward "
            "would be read one token early; use a template that ends a turn with it, as minimind's own does"
        )


def main(argv: Sequence[str]) -> None:
    """`minimind reward-model`."""
    run(parse(Config, argv, command="reward-model"))
