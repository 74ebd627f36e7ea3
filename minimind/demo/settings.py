"""What one version of the demo spends and what is asked of it: budgets, targets, the settings of its small models."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from minimind.model.config import ModelConfig

STAGES = ("pretrain", "sft", "lora", "reason", "dpo", "distill", "grpo", "ppo", "spo", "agent")
"""Every stage of the demo, in its order."""
FIRST = ("pretrain", "sft")
"""What all others start from."""


@dataclass(frozen=True)
class Config:
    """The whole pipeline on a small invented world: every stage, questioned before and after, and a report."""

    quick: bool = False
    """A few minutes: shows that everything runs, not what can be learned."""
    full: bool = False
    """Much longer: what this small model can learn."""
    stages: tuple[str, ...] = FIRST
    """The stages to run: pretrain, sft, lora, reason, dpo, distill, grpo, ppo, spo, agent, or all. The first two, from
    which all others start, are run too, or taken up where they are done."""
    out: Path = Path("runs/demo")
    """Directory for the world, the runs, results.json and report.html. An interrupted demo goes on where it was."""
    seed: int = 0
    """Seed of the world, of the weights and of the order of the data."""
    device: str = "auto"
    """cpu, cuda, cuda:N, mps, or auto."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = ["quick and full: choose one of them"] if self.quick and self.full else []
        unknown = [name for name in self.stages if name not in (*STAGES, "all")]
        if unknown:
            found.append(f"stages: {', '.join(unknown)}: not one of {', '.join(STAGES)}, all")
        return found


@dataclass(frozen=True)
class Budget:
    """What one version of the demo spends. Training is counted in tokens, so a slow machine changes no result."""

    world: Literal["quick", "demo", "full"]
    pretrain_tokens: int
    sft_tokens: int
    lora_tokens: int
    reason_tokens: int
    manners_tokens: int
    """Both sides of the pairs, heard before one is preferred."""
    dpo_tokens: int
    distill_tokens: int
    early_tokens: int
    """Fine-tuning that is stopped early, for the chapters that learn from rewards."""
    later_tokens: int
    """Their control: so much more of it."""
    agent_tokens: int
    """The tool agent's control: so much more still."""
    rollouts: int
    """Rounds of answers in each of those chapters."""
    questions: int
    """Held-out questions asked for each domain and language."""


_TINY = 40_960
QUICK = Budget(
    "quick",
    pretrain_tokens=400_000,
    sft_tokens=400_000,
    lora_tokens=_TINY,
    reason_tokens=_TINY,
    manners_tokens=_TINY,
    dpo_tokens=_TINY,
    distill_tokens=_TINY,
    early_tokens=_TINY,
    later_tokens=_TINY,
    agent_tokens=_TINY,
    rollouts=4,
    questions=8,
)
STANDARD = Budget(
    "demo",
    pretrain_tokens=2_000_000,
    sft_tokens=6_500_000,
    lora_tokens=600_000,
    reason_tokens=1_000_000,
    manners_tokens=250_000,
    dpo_tokens=200_000,
    distill_tokens=1_000_000,
    early_tokens=700_000,
    later_tokens=600_000,
    agent_tokens=600_000,
    rollouts=50,
    questions=50,
)
FULL = Budget(
    "full",
    pretrain_tokens=4_000_000,
    sft_tokens=20_000_000,
    lora_tokens=2_000_000,
    reason_tokens=4_000_000,
    manners_tokens=500_000,
    dpo_tokens=1_000_000,
    distill_tokens=4_000_000,
    early_tokens=700_000,
    later_tokens=2_400_000,
    agent_tokens=2_400_000,
    rollouts=200,
    questions=100,
)

VOCAB_SIZE = 1600
LONGEST_TOKEN = 8  # bytes: two Chinese characters, so that words stay words
TOKENIZER_ROWS = 20_000
ROW_LENGTH = 512
BATCH_TOKENS = 1024
MUON_LR, LR = 4e-3, 2e-3

LORA: dict[str, Any] = {"rank": 8, "alpha": 16.0}
LORA_OPTIM: dict[str, Any] = {"name": "adamw", "lr": 2e-3}
REPLAY_ROWS = 1_800
"""Rows of the fine-tuning file that the adapter sees again beside as many new ones."""
DPO: dict[str, Any] = {"beta": 0.3, "nll_weight": 1.0}
MANNERS_OPTIM: dict[str, Any] = {"muon_lr": 1e-3, "lr": 5e-4}
DPO_OPTIM: dict[str, Any] = {"muon_lr": 3e-4, "lr": 1e-4}

ANSWER_TOKENS = 112
"""The longest answer of the world, a sum with its steps, fits."""
GRPO: dict[str, Any] = {"prompts": 32, "samples": 8, "variant": "dapo"}
PPO: dict[str, Any] = {"prompts": 256, "samples": 1, "rollout_epochs": 1, "minibatches": 2, "critic_lr": 1e-3}
SPO: dict[str, Any] = {"prompts": 256}
AGENT: dict[str, Any] = {"prompts": 16, "samples": 8, "variant": "dapo"}
AGENT_SHARED: dict[str, Any] = {"rewards": ("grade", "valid_calls=0.2")}
RL_OPTIM: dict[str, Any] = {
    "name": "muon",
    "muon_lr": 1e-3,
    "lr": 3e-4,
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup_steps": 5,
}

TARGETS = {
    **dict.fromkeys(("weather", "clock", "memory"), 0.95),
    **dict.fromkeys(("facts", "who-one"), 0.85),
    **dict.fromkeys(("sums", "counting", "compare"), 0.80),
    "who-two": 0.75,  # 15 points over the best shortcut
    "calculator": 0.70,
}
"""Held-out accuracy wanted after fine-tuning; a domain that is not named must leave its score before behind."""


def demo_model() -> "ModelConfig":
    """Return the shape of the demo's model: about a million weights."""
    from minimind.model.config import ModelConfig

    return ModelConfig.from_preset("demo")


def student_model() -> "ModelConfig":
    """Return the shape of the student that learns from the demo's model: a quarter of its weights."""
    return replace(demo_model(), hidden_size=64, num_hidden_layers=3)


def taught(stage: str) -> set[str]:
    """Return the domains that are asked after a stage: those that its data show, and new wordings of them."""
    from minimind.world.domains import DOMAINS, MIXTURE

    asked = {name for name, domain in DOMAINS.items() if name in MIXTURE[stage] or not domain.is_trained}
    return {name for name in asked if DOMAINS[name].set == "main"} if stage in ("pretrain", "sft") else asked


def training(
    config: Config, run: str, tokens: int, files: Sequence[Path] = (), held_out: str = "", **changes: Any
) -> dict[str, Any]:
    """Return the settings that training stages share: small batches and Muon, see docs/decisions.md.

    The run is called `run` and trains on `files`, validated on the world's held-out rows of `held_out` (default for
    both: the world's files of that name); `changes` are settings of the optimizer.
    """
    from minimind.data.config import DataConfig
    from minimind.training.config import OptimConfig

    world, steps = config.out / "world", max(1, tokens // BATCH_TOKENS)
    optim: dict[str, Any] = {
        "name": "muon",
        "muon_lr": MUON_LR,
        "lr": LR,
        "weight_decay": 0.0,
        "warmup_steps": min(50, steps // 10),
        "min_lr_ratio": 0.02,
    }
    return {
        "out": config.out / run,
        "seed": config.seed,
        "device": config.device,
        "steps": steps,
        "batch_tokens": BATCH_TOKENS,
        "save_every": max(1, steps // 4),
        "eval_every": max(1, steps // 8),
        "sample_every": max(1, steps // 4),
        "log_every": 20,
        "data": DataConfig(
            files=tuple(files) or (world / f"{run}.jsonl",),
            validation=(world / f"{held_out or run}-validation.jsonl",),
            row_length=ROW_LENGTH,
            cache_dir=config.out / "cache",
        ),
        "optim": OptimConfig(**(optim | changes)),
    }
