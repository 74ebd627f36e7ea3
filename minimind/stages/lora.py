"""LoRA: fine-tune thin adapters beside frozen weights. The loss of supervised fine-tuning, a hundredth of the weights.

    y = W x + (alpha / R) B A dropout(x)        W frozen; A (R, in) and B (out, R) trained

What is saved is the adapter alone, as PEFT has it; the base stays where it is, and is named by its hash.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.config import parse
from minimind.errors import ConfigError
from minimind.model.adapter_config import LoraConfig
from minimind.stages.base import TrainingConfig, start
from minimind.stages.supervised import train
from minimind.training.config import OptimConfig

if TYPE_CHECKING:
    from minimind.training.loop import FitResult


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Train an adapter for a model on conversations: --init-from RUN --data FILE ..."""

    out: Path = Path("runs/lora")
    """Directory of the run: configuration, metrics, samples, checkpoints."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapter."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-4, weight_decay=0.0))
    """Optimizer and schedule."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = super().problems()
        if self.init_from is None:
            found.append("init_from: an adapter is for a model; give --init-from RUN")
        return found


def run(config: Config) -> "FitResult":
    """Train as `config` says (or go on with the run in `config.out`) and return what came of it."""
    from minimind.checkpoint import base_directory, base_of, check_same_adapter, is_adapter, read_adapter, resolve
    from minimind.model.adapters import LoraModel
    from minimind.objectives.cross_entropy import cross_entropy
    from minimind.runtime.log import get_logger
    from minimind.runtime.seed import seed_all

    assert config.init_from is not None  # `problems` has seen to it
    directory = resolve(config.init_from)
    if is_adapter(directory):
        below = base_directory(read_adapter(directory))
        raise ConfigError(f"init_from: {config.init_from} is an adapter itself; give its base, --init-from {below}")
    model, tokenizer = start(config)
    base = base_of(model, directory, config.out / "checkpoints" / "step")
    seed_all(config.seed)
    trained = LoraModel(model, config.lora, base)
    if config.resume and not config.fresh:
        check_same_adapter(config.out, trained)
    share = trained.num_trained / sum(p.numel() for p in trained.parameters())
    get_logger("start").info("adapter of rank %d: %.1f %% of the weights", config.lora.rank, 100 * share)
    return train(config, "conversation", model, tokenizer, cross_entropy, trained=trained)


def main(argv: Sequence[str]) -> None:
    """`minimind lora`."""
    run(parse(Config, argv, command="lora"))
