"""Who gets which credit: the algorithms behind `Experience`, each with the prompts it asks and what it measures.

`Groups` is GRPO and its family: the samples of one prompt are compared with each other. `Critic` is PPO: a value of
every state, and generalised advantages. `Streams` is SPO: one sample of a prompt is compared with what was expected of
it. The arithmetic is in `objectives.advantages` and `rl.baseline`, the policy losses are in `objectives`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minimind.batch import PAD_DOCUMENT, Batch, Output
from minimind.data.order import share
from minimind.objectives.advantages import gae, group_advantages, terminal_rewards, whiten
from minimind.objectives.logprobs import learned_log_probs
from minimind.rl.baseline import Baseline, PromptTracker, drift_of
from minimind.rl.experience import Judge, Play, groups_of
from minimind.rl.rollout import seed_of
from minimind.rl.trajectory import Meter, Trajectory
from minimind.runtime import distributed

Choose = Callable[[int], list[int]]
"""Rollout -> its prompts."""


class Reference:
    """The frozen policy that the KL is taken to, at the temperature of the rollout."""

    def __init__(self, model: nn.Module, meter: Meter, temperature: float) -> None:
        self._model, self._meter, self._temperature = (
            model.eval().requires_grad_(requires_grad=False),
            meter,
            temperature,
        )

    def measure(self, trajectories: Sequence[Trajectory]) -> None:
        """Add `ref_log_probs`."""
        read = log_probs_at(self._temperature)
        for one, found in zip(trajectories, self._meter(self._model, trajectories, read), strict=True):
            one.tokens["ref_log_probs"] = found


class Stateless:
    """An algorithm that remembers nothing, and asks every prompt once an epoch."""

    extras: tuple[str, ...] = ("advantages",)

    def __init__(self, choose: Choose, reference: Reference | None) -> None:
        self.choose, self._reference = choose, reference
        if reference:
            self.extras = (*self.extras, "ref_log_probs")

    def begin(self, play: Play, judge: Judge) -> None:
        """Do nothing."""

    def measure(self, trajectories: Sequence[Trajectory]) -> None:
        """Ask the reference, where there is one."""
        if self._reference:
            self._reference.measure(trajectories)

    def state(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state(self, saved: dict[str, Any]) -> None:
        """Take over nothing."""


class Groups(Stateless):
    """Advantages within the samples of one prompt: (reward - mean) / (std + 1e-4), or without the std."""

    def __init__(self, choose: Choose, reference: Reference | None, *, samples: int, use_std: bool) -> None:
        super().__init__(choose, reference)
        self._samples, self._use_std = samples, use_std

    def credit(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Add `advantages`, one number for all tokens of a sample."""
        groups = groups_of(trajectories, self._samples)
        rewards = torch.tensor([[one.reward for one in group] for group in groups])  # (P, G)
        is_counted = torch.tensor([[not one.is_masked for one in group] for group in groups])
        advantages, _ = group_advantages(rewards, is_counted, use_std=self._use_std)
        for one, advantage in zip(trajectories, advantages.flatten().tolist(), strict=True):
            one.tokens["advantages"] = [advantage] * len(one.sample.ids)
        return {}


class Critic(Stateless):
    """Advantages from the values of a critic: GAE over the chosen tokens, the reward at the last one, then whitened."""

    extras: tuple[str, ...] = ("advantages", "old_values", "returns")

    def __init__(
        self,
        choose: Choose,
        reference: Reference | None,
        *,
        model: nn.Module,
        meter: Meter,
        gamma: float,
        gae_lambda: float,
    ) -> None:
        super().__init__(choose, reference)
        self._model, self._meter, self._gamma, self._lambda = model, meter, gamma, gae_lambda

    def measure(self, trajectories: Sequence[Trajectory]) -> None:
        """Add `old_values`: what the critic of now says about the state before each token."""
        super().measure(trajectories)
        for one, found in zip(trajectories, self._meter(self._model, trajectories, _values), strict=True):
            one.tokens["old_values"] = found

    def credit(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Add `advantages` and `returns`, one number for each token."""
        counts = [len(one.sample.ids) for one in trajectories]
        if not any(counts):
            return {}

        def padded(rows: Sequence[Sequence[float]], fill: float) -> Tensor:
            return torch.tensor([[*row, *[fill] * (max(counts) - len(row))] for row in rows])  # (S, longest answer)

        values = padded([one.tokens["old_values"] for one in trajectories], 0.0)
        is_chosen = padded([one.sample.mask for one in trajectories], 0) > 0
        documents = padded([[0] * count for count in counts], PAD_DOCUMENT).long()
        totals = torch.tensor([[one.reward] for one in trajectories])
        rewards = terminal_rewards(totals, is_chosen, documents)
        advantages, returns = gae(rewards, values, is_chosen, documents, gamma=self._gamma, gae_lambda=self._lambda)
        is_counted = is_chosen & torch.tensor([[not one.is_masked] for one in trajectories])
        explained = _explained_variance(values[is_counted], returns[is_counted])
        advantages = whiten(advantages, is_counted)
        for one, count, a, r in zip(trajectories, counts, advantages.tolist(), returns.tolist(), strict=True):
            one.tokens |= {"advantages": a[:count], "returns": r[:count]}
        return {"explained_variance": explained}


class Streams:
    """Advantages against what a tracker expected of each prompt; prompts of which it is unsure are asked more often."""

    def __init__(
        self,
        tracker: Baseline,
        reference: Reference | None,
        *,
        policy: nn.Module,
        meter: Meter,
        temperature: float,
        num_prompts: int,
        offline_samples: int = 0,
        seed: int = 0,
    ) -> None:
        """With `offline_samples` the trackers begin with the rewards of so many answers to every prompt."""
        self._tracker, self._reference, self._policy = tracker, reference, policy
        self._meter, self._read = meter, log_probs_at(temperature)
        self._offline = num_prompts, offline_samples, seed
        self.extras: tuple[str, ...] = ("advantages", "ref_log_probs") if reference else ("advantages",)

    def begin(self, play: Play, judge: Judge) -> None:
        """Let the trackers begin with offline samples, the same on every rank."""
        num_prompts, samples, seed = self._offline
        if not samples or not isinstance(self._tracker, PromptTracker):
            return
        own = list(range(num_prompts)[share(num_prompts, distributed.rank(), distributed.world_size())])
        seeds = [seed_of("offline", seed, prompt, k) for prompt in own for k in range(samples)]
        parts = distributed.all_gather_object(judge(play(own, seeds)))
        for group in groups_of([one for part in parts for one in part], samples):
            if known := [one for one in group if not one.is_masked]:
                newest = known[-1].sample
                self._tracker.start(newest.prompt_index, [one.reward for one in known], newest)

    def choose(self, rollout: int) -> list[int]:
        """Return the tracker's choice."""
        return self._tracker.choose(rollout)

    def measure(self, trajectories: Sequence[Trajectory]) -> None:
        """Add `drift` where the prompt was answered before, and ask the reference, where there is one."""
        if self._reference:
            self._reference.measure(trajectories)
        asked = [(one, last) for one in trajectories if (last := self._tracker.last(one.sample.prompt_index))]
        now = self._meter(self._policy, [Trajectory(last) for _, last in asked], self._read)
        for (one, last), log_probs in zip(asked, now, strict=True):
            one.drift = drift_of(last, log_probs)

    def credit(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Add `advantages`, one number for all tokens of a sample, and let the tracker learn."""
        advantages = self._tracker.credit(
            [one.sample for one in trajectories],
            [one.reward for one in trajectories],
            [one.is_masked for one in trajectories],
            [one.drift for one in trajectories],
        )
        for one, advantage in zip(trajectories, advantages, strict=True):
            one.tokens["advantages"] = [advantage] * len(one.sample.ids)
        return self._tracker.metrics()

    def state(self) -> dict[str, Any]:
        """Return the tracker's."""
        return self._tracker.state()

    def load_state(self, saved: dict[str, Any]) -> None:
        """Hand it back to the tracker."""
        self._tracker.load_state(saved)


def log_probs_at(temperature: float) -> Callable[[Output, Batch], Tensor]:
    """Return what reads the log-probabilities (B, T) of the labels at a temperature off an output."""

    def read(output: Output, batch: Batch) -> Tensor:
        return learned_log_probs(output, batch, temperature=temperature)[0]

    return read


def _values(output: Output, _: Batch) -> Tensor:
    assert output.values is not None
    return output.values


def _explained_variance(values: Tensor, returns: Tensor) -> float:
    """Return 1 - var(returns - values) / var(returns): 1 for a perfect critic, 0 for one that is constant."""
    if not len(returns):
        return 0.0
    variance = returns.double().var(correction=0)
    return float(1 - (returns.double() - values.double()).var(correction=0) / variance) if variance > 0 else 0.0
