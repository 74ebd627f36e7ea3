"""Group relative policy optimization and its family: answers to one prompt are compared with each other.

    A = (r - mean of the group) / (std of the group + 1e-4)
    loss = -min(ratio A, clip(ratio, 1 - low, 1 + high) A) + beta KL        for each token that the policy chose

GRPO (arXiv 2402.03300), DAPO (2503.14476), Dr. GRPO (2503.20783), GSPO (2507.18071) and CISPO (2506.13585) are settings
of the same few numbers: `--variant` sets them, and each can be given by itself.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minimind.config import parse
from minimind.stages.base import start
from minimind.stages.reinforcement import train
from minimind.stages.rollouts import ReinforcementConfig

if TYPE_CHECKING:
    from minimind.rl.experience import Algorithm
    from minimind.rl.trajectory import Meter
    from minimind.training.loop import FitResult

Variant = Literal["grpo", "dapo", "dr-grpo", "gspo", "cispo"]


@dataclass(frozen=True)
class Preset:
    """The numbers in which the members of the family differ."""

    ratio: Literal["token", "sequence", "stop-gradient"] = "token"
    aggregation: Literal["token", "sequence", "fixed"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    use_std: bool = True
    drop_equal_groups: bool = False
    beta: float = 0.0


PRESETS: dict[Variant, Preset] = {
    "grpo": Preset(beta=0.02),
    "dapo": Preset(clip_high=0.28, drop_equal_groups=True),
    "dr-grpo": Preset(aggregation="fixed", use_std=False),
    "gspo": Preset(ratio="sequence", aggregation="sequence", clip_low=3e-4, clip_high=4e-4),
    "cispo": Preset(ratio="stop-gradient", clip_low=1.0, clip_high=4.0),
}
OBJECTIVES = {"token": "grpo", "sequence": "gspo", "stop-gradient": "cispo"}


@dataclass(frozen=True)
class Config(ReinforcementConfig):
    """Learn from rewards by comparing answers: --init-from RUN --data PROMPTS --rewards NAME ..."""

    out: Path = Path("runs/grpo")
    """Directory of the run: configuration, metrics, samples, checkpoints."""
    variant: Variant = "grpo"
    """Member of the family: sets what the seven flags below leave open."""
    ratio: Literal["token", "sequence", "stop-gradient"] | None = None
    """What is clipped: each token's ratio, the sequence's (GSPO), or a factor without gradient (CISPO)."""
    aggregation: Literal["token", "sequence", "fixed"] | None = None
    """What counts equally: each token, each answer (historical), or each token over max_tokens an answer (Dr. GRPO)."""
    clip_low: float | None = None
    """How far below 1 the ratio counts."""
    clip_high: float | None = None
    """How far above 1 the ratio counts."""
    use_std: bool | None = None
    """Divide a group's advantages by their standard deviation."""
    drop_equal_groups: bool | None = None
    """Leave out prompts all of whose answers have one reward (DAPO)."""
    beta: float | None = None
    """Weight of the KL to the policy started from, of which 0 keeps no copy."""

    @property
    def preset(self) -> Preset:
        """The numbers of the variant, overridden by those that were given."""
        given = {one.name: getattr(self, one.name) for one in fields(Preset) if getattr(self, one.name) is not None}
        return Preset(**{**vars(PRESETS[self.variant]), **given})

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = super().problems()
        if self.samples < 2:
            found.append(f"samples = {self.samples}: a group needs at least 2 (for one a prompt there is minimind spo)")
        numbers = ("clip_low", "clip_high", "beta")
        values = [(name, getattr(self.preset, name)) for name in numbers]
        found += [f"{name} = {value}: must not be negative" for name, value in values if not value >= 0]
        return found


def run(config: Config, **how: Any) -> "FitResult":
    """Train as `config` says (or go on with the run in `config.out`); return what came of it. `how`: as in `train`."""
    from minimind.objectives.grpo import grpo
    from minimind.rl.credit import Groups, Reference
    from minimind.rl.experience import PromptOrder

    model, tokenizer = start(config)
    preset = config.preset
    frozen = deepcopy(model) if preset.beta else None

    def make_algorithm(meter: "Meter", num_prompts: int) -> "Algorithm":
        order = PromptOrder(num_prompts, config.prompts, config.seed)
        reference = Reference(frozen.to(meter.device), meter, config.temperature) if frozen else None
        return Groups(order, reference, samples=config.samples, use_std=preset.use_std)

    numbers: dict[str, Any] = {"clip_low": preset.clip_low, "clip_high": preset.clip_high, "beta": preset.beta}
    return train(
        config,
        model,
        model,
        tokenizer,
        objective=partial(grpo, **numbers, temperature=config.temperature, variant=OBJECTIVES[preset.ratio]),
        make_algorithm=make_algorithm,
        aggregation=preset.aggregation,
        drop_equal_groups=preset.drop_equal_groups,
        **how,
    )


def main(argv: Sequence[str]) -> None:
    """`minimind grpo`."""
    run(parse(Config, argv, command="grpo"))
