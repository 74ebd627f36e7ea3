"""Pretraining: predict the next token of plain text. The first stage; everything later builds on what it learns here.

    loss = - sum_t log p(x_t | x_<t) / number of tokens

Documents are packed into rows; attention and positions stay inside a document (`data/packing.py`, `model/layout.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.config import parse
from minimind.errors import ConfigError
from minimind.model.config import ModelConfig
from minimind.stages.base import TrainingConfig, start
from minimind.stages.supervised import train

if TYPE_CHECKING:
    from minimind.model.transformer import Transformer
    from minimind.tokenizer.bpe import Tokenizer
    from minimind.training.loop import FitResult


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Pretrain a model on text: --data FILE ... --tokenizer DIR [--model.preset NAME]."""

    out: Path = Path("runs/pretrain")
    """Directory of the run: configuration, metrics, samples, checkpoints."""
    tokenizer: Path | None = None
    """Directory of a tokenizer (`minimind train-tokenizer` writes one); with --init-from the model's own is kept."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig.from_preset("small"))
    """Shape of a new model; the vocabulary size is the tokenizer's."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = super().problems()
        if (self.tokenizer is None) == (self.init_from is None):
            found.append(
                "give --tokenizer DIR for a new model, or --init-from RUN to train one further with its own tokenizer; "
                f"now tokenizer = {self.tokenizer} and init_from = {self.init_from}"
            )
        return found


def run(config: Config) -> "FitResult":
    """Train as `config` says (or go on with the run in `config.out`) and return what came of it."""
    from minimind.objectives.cross_entropy import cross_entropy

    model, tokenizer = start(config) if config.init_from else new_model(config)
    return train(config, "pretrain", model, tokenizer, cross_entropy)


def new_model(config: Config) -> "tuple[Transformer, Tokenizer]":
    """Return a freshly initialised model of `config.model`, its vocabulary that of the tokenizer, and the tokenizer."""
    from minimind.model.transformer import Transformer
    from minimind.runtime.seed import seed_all
    from minimind.tokenizer.bpe import Tokenizer

    if config.tokenizer is None:
        raise ConfigError("tokenizer: a new model needs one; give --tokenizer DIR")
    tokenizer = Tokenizer.load(config.tokenizer)
    shape = replace(
        config.model,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    seed_all(config.seed)
    return Transformer(shape), tokenizer


def main(argv: Sequence[str]) -> None:
    """`minimind pretrain`."""
    run(parse(Config, argv, command="pretrain"))
