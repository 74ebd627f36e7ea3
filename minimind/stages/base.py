"""What every training stage shares: its flags, and the model it starts from.

A stage is one page: a `Config`, the data, the model, the objective, the loop. Heavy imports happen inside functions, so
that `--help` needs no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from minimind.data.config import DataConfig
from minimind.errors import ConfigError
from minimind.training.config import LoopConfig, OptimConfig

if TYPE_CHECKING:
    from minimind.model.transformer import Transformer
    from minimind.tokenizer.bpe import Tokenizer
    from minimind.training.run import RunDirectory


_NOT_NEGATIVE = (
    *("steps", "epochs", "batch_tokens", "micro_batch_tokens", "seed"),
    *("save_every", "eval_every", "eval_tokens", "sample_every"),
)


@dataclass(frozen=True)
class TrainingConfig:
    """Flags that every training stage has."""

    init_from: Path | None = None
    """Start from this run, checkpoint directory or Transformers directory."""
    out: Path = Path("runs/run")
    """Directory of the run: configuration, metrics, samples, checkpoints."""
    seed: int = 0
    """Seed of weights, data order and sampling; the same seed gives the same run."""
    device: str = "auto"
    """cpu, cuda, cuda:N, mps, or auto (the best at hand)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the matrix products; weights and optimizer state stay float32."""
    steps: int = 0
    """Optimizer steps; 0 counts them from `epochs`."""
    epochs: float = 1.0
    """Passes over the data, where `steps` is 0."""
    batch_tokens: int = 16384
    """Tokens of one optimizer step over all micro-batches and processes (a multiple of the row length)."""
    micro_batch_tokens: int = 0
    """Tokens of one forward pass on one process; 0 takes the whole share at once. Changes memory, never numbers."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints kept."""
    eval_every: int = 500
    """Steps between validations; before the first and after the last step always."""
    eval_tokens: int = 1_000_000
    """Tokens of one validation at most."""
    sample_every: int = 500
    """Steps between samples on fixed prompts; 0 takes none."""
    log_every: int = 10
    """Steps between lines of the log."""
    resume: bool = True
    """Continue the run in `out` from its newest good checkpoint."""
    fresh: bool = False
    """Start again: earlier checkpoints in `out` are moved aside."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trackers: tuple[Literal["wandb", "swanlab", "tensorboard"], ...] = ()
    """Where metrics go besides metrics.jsonl; a failing tracker never stops a run."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training data."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = [
            f"{name} = {getattr(self, name)}: must not be negative"
            for name in _NOT_NEGATIVE
            if not getattr(self, name) >= 0
        ]
        if self.log_every < 1:
            found.append(f"log_every = {self.log_every}: at least 1")
        if self.steps == 0 and self.epochs == 0:
            found.append("steps = 0 and epochs = 0: nothing to train; give --steps or --epochs")
        if not self.data.files:
            found.append("data: no training file; give --data FILE (or `minimind world --out DIR` writes some)")
        if self.keep < 2:
            found.append(f"keep = {self.keep}: at least 2, so that a checkpoint is good at all times")
        return found


def start(config: TrainingConfig) -> tuple["Transformer", "Tokenizer"]:
    """Return the model and the tokenizer that `config.init_from` names, float32, and say what was inherited.

    Of a LoRA run: its base with the adapter merged, a plain model again.
    """
    from minimind.checkpoint import load
    from minimind.model.adapters import merge_lora
    from minimind.runtime.log import get_logger

    if config.init_from is None:
        raise ConfigError("init_from: this stage starts from a trained model; give --init-from RUN")
    model, tokenizer = load(config.init_from)
    if merge_lora(model):
        get_logger("start").info("%s is an adapter: merged into its base", config.init_from)
    trained = model.config.original_max_position_embeddings
    get_logger("start").info(
        "from %s: model %s, %d layers of %d, vocabulary %d, context %s",
        *(config.init_from, model.config.describe(), model.config.num_hidden_layers, model.config.hidden_size),
        *(tokenizer.vocab_size, trained or "unknown"),
    )
    return model, tokenizer


def loop_config(config: TrainingConfig, steps: int) -> LoopConfig:
    """Return the loop's settings for a run of so many steps."""
    return LoopConfig(steps=steps, dtype=config.dtype, **{name: getattr(config, name) for name in _SAME_NAME})


_SAME_NAME = ("save_every", "eval_every", "log_every", "sample_every", "keep", "device", "compile", "seed", "trackers")


def begin(run: "RunDirectory", config: TrainingConfig, fingerprints: dict[str, str]) -> Callable[[], None]:
    """Move an earlier run aside where that is asked for; return what describes this one, called after its first step.

    Called when the data are known to be good. A run to go on with keeps its description until a step was really made.
    """
    from minimind.checkpoint import checkpoints_of
    from minimind.config import to_toml

    if config.fresh or not config.resume:
        run.start_afresh()

    @cache
    def describe() -> None:
        run.write_config(to_toml(config))
        run.write_environment(fingerprints)

    if not checkpoints_of(run.path):
        describe()
    return describe
