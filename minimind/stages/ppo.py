"""Proximal policy optimization: a critic says what each state is worth, and the policy moves a little at a time.

    A_t = sum_k (gamma lambda)^k (r_(t+k) + gamma v_(t+k+1) - v_(t+k)), whitened over the rollout
    loss = -min(ratio A, clip(ratio, 1 - c, 1 + c) A) + 0.5 max((v - R)^2, (clipped v - R)^2) + beta KL

PPO (arXiv 1707.06347) with GAE (1506.02438). The critic is a model of its own with its own learning rate; the reward
comes at the last token, and v is the value of the state before a token.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind.config import parse
from minimind.errors import CheckpointError
from minimind.stages.base import start
from minimind.stages.reinforcement import train
from minimind.stages.rollouts import ReinforcementConfig

if TYPE_CHECKING:
    from minimind.model.heads import ScalarModel
    from minimind.model.transformer import Transformer
    from minimind.rl.experience import Algorithm, Experience
    from minimind.rl.trajectory import Meter
    from minimind.tokenizer.bpe import Tokenizer
    from minimind.training.loop import FitResult


@dataclass(frozen=True)
class Config(ReinforcementConfig):
    """Learn from rewards with a critic: --init-from RUN --data PROMPTS --rewards NAME ..."""

    out: Path = Path("runs/ppo")
    """Directory of the run: configuration, metrics, samples, checkpoints."""
    samples: int = 1
    """Answers sampled for each prompt."""
    prompts: int = 64
    """Prompts of a rollout, over all processes."""
    rollout_epochs: int = 2
    """Passes over each rollout before the next is sampled."""
    minibatches: int = 2
    """Optimizer steps of a pass."""
    critic_from: Path | None = None
    """Reward model that the critic starts from; without one, the policy with a new scalar head."""
    critic_lr: float = 5e-5
    """Highest learning rate of the critic; with Muon its rates stand to the policy's as this does to optim.lr."""
    gamma: float = 1.0
    """Discount of later rewards, by token."""
    gae_lambda: float = 0.95
    """How far ahead advantages look: 1 to the end (no bias), 0 one token (no variance)."""
    clip: float = 0.2
    """How far from 1 the ratio counts."""
    value_clip: float = 0.2
    """How far a value may move from that of the rollout; 0 sets no limit."""
    value_coefficient: float = 0.5
    """Weight of the critic's loss."""
    beta: float = 0.0
    """Weight of the KL to the policy started from; 0 keeps no copy of it."""
    max_kl: float = 0.05
    """A rollout is left early once approx_kl of a step is above this; 0 never leaves."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = super().problems()
        names = ("critic_lr", "clip", "value_clip", "value_coefficient", "beta", "max_kl")
        values = [(name, getattr(self, name)) for name in names]
        found += [f"{name} = {value}: must not be negative" for name, value in values if not value >= 0]
        shares = {"gamma": self.gamma, "gae_lambda": self.gae_lambda}
        found += [
            f"{name} = {value}: must lie between 0 and 1" for name, value in shares.items() if not 0 <= value <= 1
        ]
        if not self.optim.lr > 0:
            found.append(f"optim.lr = {self.optim.lr}: above 0; the critic's rate is counted from it")
        return found


def run(config: Config) -> "FitResult":
    """Train as `config` says (or go on with the run in `config.out`) and return what came of it."""
    from minimind.model.critic import ActorCritic
    from minimind.objectives.ppo import ppo
    from minimind.rl.credit import Critic, Reference
    from minimind.rl.experience import PromptOrder

    policy, tokenizer = start(config)
    frozen = deepcopy(policy) if config.beta else None
    model = ActorCritic(policy, _critic(config, policy, tokenizer), critic_rate=config.critic_lr / config.optim.lr)

    def make_algorithm(meter: "Meter", num_prompts: int) -> "Algorithm":
        order = PromptOrder(num_prompts, config.prompts, config.seed)
        reference = Reference(frozen.to(meter.device), meter, config.temperature) if frozen else None
        numbers = {"gamma": config.gamma, "gae_lambda": config.gae_lambda}
        return Critic(order, reference, model=model.critic, meter=meter, **numbers)

    def leave_early(experience: "Experience", row: dict[str, Any]) -> None:
        if config.max_kl and row["approx_kl"] > config.max_kl:
            experience.leave_rollout()

    names = ("clip", "value_clip", "value_coefficient", "beta", "temperature")
    return train(
        config,
        model,
        policy,
        tokenizer,
        objective=partial(ppo, **{name: getattr(config, name) for name in names}),
        make_algorithm=make_algorithm,
        on_row=leave_early,
    )


def _critic(config: Config, policy: "Transformer", tokenizer: "Tokenizer") -> "ScalarModel":
    from minimind.checkpoint.loading import load_reward_model
    from minimind.model.heads import ScalarModel

    if config.critic_from is None:
        critic = ScalarModel.from_transformer(policy)
    else:
        critic, theirs = load_reward_model(config.critic_from)
        if theirs.sha256 != tokenizer.sha256:
            raise CheckpointError(
                f"critic_from: {config.critic_from} reads tokenizer {theirs.sha256[:12]}, the policy writes "
                f"{tokenizer.sha256[:12]}; train a reward model from the policy's base, or leave --critic-from out"
            )
    critic.gradient_checkpointing = config.gradient_checkpointing
    return critic


def main(argv: Sequence[str]) -> None:
    """`minimind ppo`."""
    run(parse(Config, argv, command="ppo"))
