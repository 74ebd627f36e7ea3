"""Single-stream policy optimization: one answer a prompt, compared with what was expected of that prompt.

    A = r - p, normalised over the rollout      p = alpha / (alpha + beta) of the prompt's tracker, before this answer
    loss = -min(ratio A, clip(ratio, 0.8, 1.28) A) + beta KL         for each token that the policy chose

SPO (arXiv 2509.13232). No group is sampled only to be compared, and none is wasted when all its answers are alike. The
tracker (`rl/baseline.py`) is in the checkpoint; `--baseline global` is the single tracker of MiniMind's own SPO.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from minimind.config import parse
from minimind.stages.base import start
from minimind.stages.reinforcement import train
from minimind.stages.rollouts import ReinforcementConfig

if TYPE_CHECKING:
    from minimind.rl.experience import Algorithm
    from minimind.rl.trajectory import Meter
    from minimind.training.loop import FitResult


@dataclass(frozen=True)
class Config(ReinforcementConfig):
    """Learn from rewards with one answer a prompt: --init-from RUN --data PROMPTS --rewards NAME ..."""

    out: Path = Path("runs/spo")
    """Directory of the run: configuration, metrics, samples, checkpoints."""
    prompts: int = 128
    """Prompts of a rollout, over all processes."""
    samples: int = 1
    """Answers sampled for each prompt: always one."""
    baseline: Literal["prompt", "global"] = "prompt"
    """What rewards are compared with: each prompt's own expectation, or one for all prompts (historical)."""
    offline_samples: int = 0
    """Answers to every prompt with which the trackers begin (8 in the paper); 0 begins in the middle."""
    lowest_reward: float = 0.0
    """Reward that the tracker takes for 0; the global one has -3."""
    highest_reward: float = 1.0
    """Reward that the tracker takes for 1; the global one has 3."""
    rho_min: float = 0.875
    """The least that is kept of what a prompt's tracker knows when it learns."""
    rho_max: float = 0.96
    """The most."""
    clip_low: float = 0.2
    """How far below 1 the ratio counts."""
    clip_high: float = 0.28
    """How far above 1 the ratio counts."""
    beta: float = 0.0
    """Weight of the KL to the policy started from; 0 keeps no copy of it."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = super().problems()
        if self.samples != 1:
            found.append(f"samples = {self.samples}: a single stream has 1 (for groups there is minimind grpo)")
        names = ("offline_samples", "clip_low", "clip_high", "beta")
        values = [(name, getattr(self, name)) for name in names]
        found += [f"{name} = {value}: must not be negative" for name, value in values if not value >= 0]
        if not 0 <= self.rho_min <= self.rho_max < 1:
            found.append(f"rho_min = {self.rho_min}, rho_max = {self.rho_max}: 0 <= rho_min <= rho_max < 1 is needed")
        if not self.lowest_reward < self.highest_reward:
            found.append(f"lowest_reward = {self.lowest_reward}: must be below highest_reward = {self.highest_reward}")
        if self.baseline == "global" and self.offline_samples:
            found.append(f"offline_samples = {self.offline_samples}: only the trackers of prompts begin with samples")
        return found


def run(config: Config) -> "FitResult":
    """Train as `config` says (or go on with the run in `config.out`) and return what came of it."""
    from minimind.objectives.grpo import grpo
    from minimind.rl.baseline import GlobalTracker, PromptTracker
    from minimind.rl.credit import Reference, Streams

    policy, tokenizer = start(config)
    frozen = deepcopy(policy) if config.beta else None

    def make_algorithm(meter: "Meter", num_prompts: int) -> "Algorithm":
        size = (num_prompts, config.prompts)
        if config.baseline == "global":
            tracker = GlobalTracker(*size, seed=config.seed)
        else:
            tracker = PromptTracker(
                *size,
                seed=config.seed,
                rho_min=config.rho_min,
                rho_max=config.rho_max,
                lowest=config.lowest_reward,
                highest=config.highest_reward,
            )
        reference = Reference(frozen.to(meter.device), meter, config.temperature) if frozen else None
        return Streams(
            tracker,
            reference,
            policy=policy,
            meter=meter,
            temperature=config.temperature,
            num_prompts=num_prompts,
            offline_samples=config.offline_samples,
            seed=config.seed,
        )

    return train(
        config,
        policy,
        policy,
        tokenizer,
        objective=partial(
            grpo,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            beta=config.beta,
            temperature=config.temperature,
        ),
        make_algorithm=make_algorithm,
    )


def main(argv: Sequence[str]) -> None:
    """`minimind spo`."""
    run(parse(Config, argv, command="spo"))
