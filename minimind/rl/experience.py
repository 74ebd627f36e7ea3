"""Experience: the `BatchSource` of reinforcement learning. Prompts -> samples of the live policy -> rewards -> batches.

A rollout is played, judged and credited once, on all ranks together, and then learned in `epochs` passes of
`minibatches` optimizer steps each. Every rank holds the whole rollout, so what a step learns is the same whatever the
number of processes, and rows are shared out as the loader of the supervised stages does.

What a rollout is, is a function of (seed, number of the rollout, weights, state of the algorithm): one that was cut off
is played again with the same ids. In the middle of one, a checkpoint holds its trajectories. It knows no text: playing,
judging and crediting are passed in.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from minimind.batch import Batch
from minimind.data.order import ORDER_VERSION, epoch_key, global_rows, permute, share
from minimind.errors import ConfigError, DataError
from minimind.rl.rollout import Sample, seed_of
from minimind.rl.trajectory import Packer, Trajectory
from minimind.runtime import distributed

Aggregation = Literal["token", "sequence", "fixed"]

Play = Callable[[Sequence[int], Sequence[int]], list[Sample]]
"""(prompt indices, a seed for each sample wanted) -> samples: equally many of each prompt, side by side."""
Judge = Callable[[Sequence[Sample]], list[Trajectory]]
"""Samples -> the same with their rewards."""


class Algorithm(Protocol):
    """What tells GRPO, PPO and SPO apart: which prompts are asked, what is measured, how rewards become advantages."""

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of the numbers for each token that the objective reads besides `old_log_probs`."""
        ...

    def begin(self, play: Play, judge: Judge) -> None:
        """Do what is to be done once, before the first rollout of a run."""
        ...

    def choose(self, rollout: int, /) -> list[int]:
        """Return the prompts of a rollout, in order; the same on every rank."""
        ...

    def measure(self, trajectories: Sequence[Trajectory]) -> None:
        """Add what the weights of now say about this rank's own trajectories."""
        ...

    def credit(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Add the advantages to all of a rollout, the same on every rank; return numbers for the log."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what it remembers between rollouts, JSON-able."""
        ...

    def load_state(self, saved: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of a rollout and how it is learned."""

    prompts: int
    """Prompts of a rollout, over all ranks."""
    samples: int
    """Samples of each prompt."""
    max_tokens: int
    """The most tokens that the policy chooses in a sample: the divisor of `fixed`."""
    epochs: int = 1
    """Passes over a rollout."""
    minibatches: int = 1
    """Optimizer steps of a pass."""
    aggregation: Aggregation = "token"
    """What counts equally: every token of the step, every sequence, or every token over `max_tokens` a sequence."""
    mask_truncated: bool = False
    """Leave samples that were cut off out of the loss (their rewards still count for the others' advantages)."""
    drop_equal_groups: bool = False
    """Leave out the prompts all of whose samples have the same reward: they have nothing to teach (DAPO)."""
    seed: int = 0

    @property
    def updates(self) -> int:
        """Optimizer steps of a rollout."""
        return self.epochs * self.minibatches


class PromptOrder:
    """Every prompt once an epoch, in an order that is a function of the seed."""

    def __init__(self, num_prompts: int, prompts_per_rollout: int, seed: int) -> None:
        self._arguments = prompts_per_rollout, num_prompts, seed

    def __call__(self, rollout: int) -> list[int]:
        """Return the prompts of a rollout."""
        return global_rows(rollout, *self._arguments).tolist()


class Experience:
    """The `BatchSource` of the stages of reinforcement learning."""

    prefetch = False
    """What the policy says depends on its weights of now."""

    def __init__(
        self,
        plan: Plan,
        *,
        play: Play,
        judge: Judge,
        algorithm: Algorithm,
        packer: Packer,
        identity: Mapping[str, str],
    ) -> None:
        """`identity`: fingerprints of what a resumed run must find unchanged (prompts, reference, ...)."""
        self.plan, self._play, self._judge, self._algorithm = plan, play, judge, algorithm
        self._packer, self._identity = packer, dict(identity)
        self.step = 0
        """Optimizer steps that the policy has made."""
        self.rollout = -1
        """Number of the rollout at hand."""
        self.trajectories: list[Trajectory] = []
        """All of it, on every rank."""
        self._done = plan.updates
        """Optimizer steps that the rollout at hand was used for."""
        self._numbers: dict[str, float] = {}

    def micro_batches(self, step: int) -> Sequence[Batch]:
        """Return this rank's micro-batches of the next optimizer step, after playing a rollout when one is due."""
        self.step = step  # how far it is in its rollout, it knows itself: one may be left early
        if self._done >= self.plan.updates:
            self._make_rollout(self.rollout + 1)
        epoch, part = divmod(self._done, self.plan.minibatches)
        batches = list(self._split(self._minibatch(epoch, part)))
        self._done += 1
        return batches

    def numbers(self) -> dict[str, float]:
        """Return what is to be told about the rollout at hand, beside the numbers of the step."""
        return dict(self._numbers)

    def shown(self, count: int = 4) -> list[Trajectory]:
        """Return the first sample of some prompts of the rollout at hand; none before the first one."""
        return self.trajectories[:: self.plan.samples][:count]

    def leave_rollout(self) -> None:
        """Learn no more from the rollout at hand: the next step plays another. Every rank must call it alike."""
        self._done = self.plan.updates

    def _make_rollout(self, number: int) -> None:
        start = time.perf_counter()
        if number == 0:
            self._algorithm.begin(self._play, self._judge)
        indices = self._algorithm.choose(number)
        own = share(len(indices), distributed.rank(), distributed.world_size())
        places = range(len(indices))[own]
        seeds = [seed_of(self.plan.seed, number, place, k) for place in places for k in range(self.plan.samples)]
        samples = self._play(indices[own], seeds)
        seconds = time.perf_counter() - start
        mine = self._judge(samples)
        self._algorithm.measure(mine)
        every = [one for part in distributed.all_gather_object(mine) for one in part]
        numbers = self._algorithm.credit(every)
        self._leave_out(every)
        self.rollout, self.trajectories, self._done = number, every, 0
        self._numbers = {**summary(every, self.plan.samples), **numbers}
        self._numbers |= {"rollout": number, "rollout_seconds": seconds}

    def _leave_out(self, trajectories: Sequence[Trajectory]) -> None:
        """Mark what the loss must not see."""
        for group in groups_of(trajectories, self.plan.samples):
            is_equal = self.plan.drop_equal_groups and is_zero_spread(group)
            for one in group:
                is_cut = self.plan.mask_truncated and one.sample.is_truncated
                one.is_learned = not (one.is_masked or is_equal or is_cut) and one.sample.num_chosen > 0

    def _minibatch(self, epoch: int, part: int) -> list[Trajectory]:
        """Return what one optimizer step learns: each trajectory once a pass, in parts that differ by one at most."""
        learned = [one for one in self.trajectories if one.is_learned]
        chosen = share(len(learned), part, self.plan.minibatches)
        if self.plan.minibatches == 1 or not learned:
            return learned[chosen]
        key = epoch_key(seed_of("minibatch", self.plan.seed), self.rollout * self.plan.epochs + epoch)
        return [learned[i] for i in permute(np.arange(len(learned))[chosen], len(learned), key).tolist()]

    def _split(self, trajectories: Sequence[Trajectory]) -> Iterator[Batch]:
        """Yield this rank's micro-batches: as many on every rank, rows of padding where it has fewer than others."""
        weighed = [self._weigh(one) for one in trajectories]
        documents = [one.document(weight) for one, (weight, _) in zip(trajectories, weighed, strict=True)]
        names = ("old_log_probs", *self._algorithm.extras)
        rows, length, size = self._packer.rows(documents)
        largest = -(-len(rows) // distributed.world_size())
        own = rows[share(len(rows), distributed.rank(), distributed.world_size())]
        for first in range(0, max(largest, 1), size):
            chosen = own[first : first + size]
            batch = self._packer.batch([[documents[unit] for unit in row] for row in chosen], length, names)
            batch.weight = sum(weighed[unit][1] for row in chosen for unit in row)
            yield batch

    def _weigh(self, trajectory: Trajectory) -> tuple[float, float]:
        """Return (loss weight of each of its tokens, what it adds to the divisor of the step)."""
        num_chosen = trajectory.sample.num_chosen
        if self.plan.aggregation == "token":
            return 1.0, float(num_chosen)
        return (1.0 / num_chosen, 1.0) if self.plan.aggregation == "sequence" else (1.0, float(self.plan.max_tokens))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; the trajectories too, while their rollout is in use."""
        is_in_use = self._done < self.plan.updates
        return {
            "settings": self._settings(),
            "identity": self._identity,
            "rollout": self.rollout,
            "done": self._done,
            "trajectories": [one.to_json() for one in self.trajectories] if is_in_use else [],
            "numbers": self._numbers,
            "algorithm": self._algorithm.state(),
        }

    def load_state(self, saved: dict[str, Any]) -> None:
        """Go on where `state` was called."""
        self.rollout, self._done, self._numbers = saved["rollout"], saved["done"], saved["numbers"]
        self.trajectories = [Trajectory.from_json(one) for one in saved["trajectories"]]
        self._algorithm.load_state(saved["algorithm"])

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raise when a saved state is of other prompts (DataError) or of rollouts of another kind (ConfigError)."""
        if "identity" not in saved:
            raise ConfigError("the run here was made by another kind of stage; give another --out, or --fresh")
        for name, here in self._identity.items():
            if (then := saved["identity"].get(name)) != here:
                raise DataError(
                    f"the {name} changed since the checkpoint: its fingerprint was\n  {then}\nand is\n  {here}\n"
                    "restore it, or start over with --fresh, or begin a new run with --init-from this checkpoint"
                )
        settings = self._settings()
        changed = [
            f"{name} was {saved['settings'].get(name)} and is {value}"
            for name, value in settings.items()
            if saved["settings"].get(name) != value
        ]
        if changed:
            raise ConfigError(
                f"cannot resume with other rollouts: {'; '.join(changed)}; use the old values, or --fresh to start over"
            )

    def _settings(self) -> dict[str, Any]:
        names = ("prompts", "samples", "max_tokens", "epochs", "minibatches", "seed")
        return {name: getattr(self.plan, name) for name in names} | {"order_version": ORDER_VERSION}


def groups_of(trajectories: Sequence[Trajectory], samples: int) -> list[Sequence[Trajectory]]:
    """Return the samples of each prompt."""
    return [trajectories[first : first + samples] for first in range(0, len(trajectories), samples)]


def is_zero_spread(group: Sequence[Trajectory]) -> bool:
    """Whether all rewards of a group that are known are equal."""
    return len({one.reward for one in group if not one.is_masked}) <= 1


def summary(trajectories: Sequence[Trajectory], samples: int) -> dict[str, float]:
    """Return the numbers that every rollout has: rewards by part, lengths, what could not be used."""
    count = max(1, len(trajectories))
    rewards = np.array([one.reward for one in trajectories if not one.is_masked] or [0.0])
    lengths = [one.sample.num_chosen for one in trajectories]
    numbers = {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "reward_masked": sum(one.is_masked for one in trajectories) / count,
        "answer_tokens": sum(lengths) / count,
        "truncated": sum(one.sample.is_truncated for one in trajectories) / count,
        "generated_tokens": float(sum(lengths)),
    }
    for name in sorted({name for one in trajectories for name in one.counts}):
        numbers[name] = sum(one.counts[name] for one in trajectories) / count
    for name in sorted({name for one in trajectories for name in one.parts}):
        values = np.array([one.parts[name] for one in trajectories])
        known = values[np.isfinite(values)]
        numbers |= {f"reward/{name}": float(known.mean()) if len(known) else 0.0}
        numbers |= {f"reward_faults/{name}": float(len(values) - len(known))}
    if samples > 1:
        groups = groups_of(trajectories, samples)
        numbers["zero_spread_groups"] = sum(map(is_zero_spread, groups)) / max(1, len(groups))
    return numbers
