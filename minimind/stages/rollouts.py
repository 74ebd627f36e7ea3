"""The flags that every stage of reinforcement learning has."""

from dataclasses import dataclass, field
from typing import Literal

from minimind.rl.config import RolloutConfig
from minimind.stages.base import TrainingConfig
from minimind.training.config import OptimConfig

_NOT_POSITIVE = ("prompts", "samples", "max_tokens", "rollout_epochs", "minibatches", "generation_rows")


@dataclass(frozen=True)
class ReinforcementConfig(TrainingConfig):
    """Flags that every stage of reinforcement learning has."""

    prompts: int = 16
    """Prompts of a rollout, over all processes."""
    samples: int = 8
    """Answers sampled for each prompt."""
    temperature: float = 1.0
    """Of the sampling; nothing is cut off the distribution (no top-k, no top-p)."""
    max_tokens: int = 256
    """The most tokens of an answer."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether answers begin with a thought: the model decides (auto), always (on), never (off)."""
    rewards: tuple[str, ...] = ("exact_answer",)
    """What is rewarded, NAME or NAME=WEIGHT each: grade, exact_answer, contains_gt, format, tags, length, repetition,
    valid_calls, model:PATH, transformers:PATH, or FILE.py:FUNCTION of your own."""
    rollout_epochs: int = 1
    """Passes over each rollout before the next is sampled."""
    minibatches: int = 1
    """Optimizer steps of a pass."""
    mask_truncated: bool = False
    """Leave answers that were cut off out of the loss."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Who samples the answers."""
    generation_rows: int = 128
    """Answers that are generated side by side."""
    batch_tokens: int = 0
    """Not used here: `prompts` and `samples` make the size of a step."""
    micro_batch_tokens: int = 8192
    """Tokens of one forward pass on one process. Changes memory, never numbers."""
    eval_every: int = 50
    """Steps between validations (greedy answers to held-out prompts); at the beginning and at the end always."""
    eval_tokens: int = 32768
    """Tokens that may be generated in one validation: it asks eval_tokens / max_tokens prompts."""
    sample_every: int = 50
    """Steps after which some answers of the rollout are kept with their rewards in samples.jsonl; 0 keeps none."""
    save_every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    log_every: int = 1
    """Steps between lines of the log."""
    compile: Literal["auto", "on", "off"] = "off"
    """torch.compile: the shapes change from rollout to rollout, so it rarely pays."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-5, weight_decay=0.0, beta2=0.99, schedule="constant")
    )
    """Optimizer and schedule."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = super().problems()
        found += [f"{name} = {getattr(self, name)}: at least 1" for name in _NOT_POSITIVE if getattr(self, name) < 1]
        if self.init_from is None:
            found.append("init_from: reinforcement learning starts from a model that answers; give --init-from RUN")
        if not self.temperature > 0:
            found.append(f"temperature = {self.temperature}: above 0, for a policy must explore")
        if self.batch_tokens:
            found.append(f"batch_tokens = {self.batch_tokens}: not used here; give --prompts and --samples")
        if not self.rewards:
            found.append("rewards: give at least one, for example --rewards exact_answer")
        return found
