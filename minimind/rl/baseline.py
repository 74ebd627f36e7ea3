"""What reward to expect of a prompt: the trackers of Single-stream Policy Optimization (SPO, arXiv 2509.13232).

`PromptTracker` keeps a Beta distribution for each prompt, of rewards mapped to [0, 1]:

    at first      alpha = N0 (sum r + 0.5) / (n + 1),  beta = N0 (sum (1 - r) + 0.5) / (n + 1),  N0 = 1 / (1 - rho_min)
    expectation   p = alpha / (alpha + beta)
    advantage     A = r - p, then (A - mean) / std over the whole rollout
    afterwards    alpha <- rho alpha + r,  beta <- rho beta + 1 - r,  rho = clip(2^(-D / 0.06), rho_min, rho_max)
    drawing       without replacement, with weight sqrt(p (1 - p)) + 0.05

D is how far the policy has moved since it last answered the prompt: the mean |log pi_now - log pi_then| over the tokens
of that answer, which is kept for it. `GlobalTracker` is the historical one: a single Beta for all prompts.

Both are functions of what they are told, the same on every rank, and their state is plain JSON, exact to the bit.
How rewards come about and how the policy is asked is not known here.
"""

import base64
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch

from minimind.data.order import global_rows
from minimind.errors import CheckpointError
from minimind.objectives.advantages import whiten
from minimind.rl.rollout import Sample

HALF_LIFE = 0.06
"""Of old rewards: the D at which they count half."""
WEIGHT_FLOOR = 0.05
"""Of drawing: no prompt is given up."""


class Baseline(Protocol):
    """What SPO needs of a tracker."""

    def choose(self, rollout: int) -> list[int]:
        """Return the prompts of a rollout, in order."""
        ...

    def last(self, prompt: int) -> Sample | None:
        """Return the newest answer to a prompt, if one is kept."""
        ...

    def credit(
        self,
        samples: Sequence[Sample],
        rewards: Sequence[float],
        is_masked: Sequence[bool],
        drifts: Sequence[float | None],
    ) -> list[float]:
        """Return the advantages of all samples of a rollout, over all ranks, and then learn from their rewards."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return what is to be logged after `credit`."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, JSON-able."""
        ...

    def load_state(self, saved: dict[str, Any]) -> None:
        """Go on where `state` was called."""
        ...


class PromptTracker:
    """The expectation of each prompt by itself, and which prompts are worth asking."""

    def __init__(
        self,
        num_prompts: int,
        per_rollout: int,
        *,
        seed: int,
        rho_min: float = 0.875,
        rho_max: float = 0.96,
        lowest: float = 0.0,
        highest: float = 1.0,
    ) -> None:
        """Expect the middle of every prompt. Rewards from `lowest` to `highest` are mapped to [0, 1], others cut."""
        self._per_rollout, self._seed = per_rollout, seed
        self._rho_min, self._rho_max, self._lowest, self._highest = rho_min, rho_max, lowest, highest
        self._alphas, self._betas = ([0.5 / (1 - rho_min)] * num_prompts for _ in range(2))
        self._last: dict[int, Sample] = {}
        self._metrics: dict[str, float] = {}

    def start(self, prompt: int, rewards: Sequence[float], newest: Sample | None = None) -> None:
        """Begin with the rewards of n offline samples of a prompt; `newest` of them is what the first D looks at."""
        mapped, size = [self._map(reward) for reward in rewards], 1 / (1 - self._rho_min)
        good, bad = math.fsum(mapped), math.fsum(1 - reward for reward in mapped)
        self._alphas[prompt] = size * (good + 0.5) / (len(mapped) + 1)
        self._betas[prompt] = size * (bad + 0.5) / (len(mapped) + 1)
        if newest is not None:
            self._last[prompt] = newest

    def expected(self, prompt: int) -> float:
        """Return p, the expectation of a mapped reward."""
        return self._alphas[prompt] / (self._alphas[prompt] + self._betas[prompt])

    def last(self, prompt: int) -> Sample | None:
        """Return the newest answer to a prompt, whose log-probabilities of now give its D (`drift`)."""
        return self._last.get(prompt)

    def weights(self) -> list[float]:
        """Return the weight of each prompt in the draw."""
        expected = map(self.expected, range(len(self._alphas)))
        return [math.sqrt(p * (1 - p)) + WEIGHT_FLOOR for p in expected]

    def choose(self, rollout: int) -> list[int]:
        """Return the prompts of a rollout: a function of the seed, its number and the weights of now.

        Each prompt is drawn once before any is drawn again.
        """
        weights = self.weights()
        found: list[int] = []
        for again in range(-(-self._per_rollout // len(weights))):
            found += draw_without_replacement(weights, f"{self._seed} {rollout} {again}")
        return found[: self._per_rollout]

    def credit(
        self,
        samples: Sequence[Sample],
        rewards: Sequence[float],
        is_masked: Sequence[bool],
        drifts: Sequence[float | None],
    ) -> list[float]:
        """Return the advantages of all samples of a rollout, over all ranks, and then learn from their rewards.

        Masked ones get 0 and teach nothing. Deviation: where there is no newest answer there is no D, and such a prompt
        forgets its prior with rho_min (test_a_first_answer_forgets_the_prior_as_fast_as_it_may).
        """
        mapped = [self._map(reward) for reward in rewards]
        expected = [self.expected(sample.prompt_index) for sample in samples]
        counted = [i for i, masked in enumerate(is_masked) if not masked]
        rhos: list[float] = []
        for i in counted:
            drift, prompt = drifts[i], samples[i].prompt_index
            rho = self._rho_min if drift is None else decay(drift, self._rho_min, self._rho_max)
            self._alphas[prompt] = rho * self._alphas[prompt] + mapped[i]
            self._betas[prompt] = rho * self._betas[prompt] + (1 - mapped[i])
            self._last[prompt] = samples[i]
            rhos.append(rho)
        self._metrics = {
            "baseline": _mean([expected[i] for i in counted]),
            "baseline_error": _mean([abs(mapped[i] - expected[i]) for i in counted]),
            "rho": _mean(rhos),
            "drift": _mean([drift for i in counted if (drift := drifts[i]) is not None]),
        }
        errors = torch.tensor([r - p for r, p in zip(mapped, expected, strict=True)], dtype=torch.float64)
        return whiten(errors, ~torch.tensor(is_masked, dtype=torch.bool)).tolist()

    def metrics(self) -> dict[str, float]:
        """Return means over the rollout: `baseline` p, `baseline_error` |r - p| (r mapped), `rho`, `drift` D."""
        return dict(self._metrics)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, JSON-able."""
        return {
            "kind": "prompt",
            "alphas": list(self._alphas),
            "betas": list(self._betas),
            "last": {str(prompt): _to_json(sample) for prompt, sample in sorted(self._last.items())},
            "metrics": self._metrics,
        }

    def load_state(self, saved: dict[str, Any]) -> None:
        """Go on where `state` was called. CheckpointError for the state of another tracker."""
        _check(saved, "prompt")
        if len(saved["alphas"]) != len(self._alphas):
            raise CheckpointError(
                f"the tracker in the checkpoint knows {len(saved['alphas'])} prompts, the data {len(self._alphas)}: "
                "restore it, or start over with --fresh"
            )
        self._alphas, self._betas, self._metrics = list(saved["alphas"]), list(saved["betas"]), dict(saved["metrics"])
        self._last = {int(prompt): _from_json(int(prompt), sample) for prompt, sample in saved["last"].items()}

    def _map(self, reward: float) -> float:
        return min(1.0, max(0.0, (reward - self._lowest) / (self._highest - self._lowest)))


class GlobalTracker:
    """One expectation for all prompts, as MiniMind's SPO had it; every prompt is asked once an epoch.

    Rewards are mapped from +-3, alpha = beta = 1 at first, A = r - (6 p - 3) cut to +-5 and not normalised; rho lies in
    [0.5, 0.96], is 0.9 at first, and its D is how far the mean log-probability of a rollout moved since the last one.
    """

    SCALE, LIMIT, FIRST_RHO, RHO_MIN, RHO_MAX = 3.0, 5.0, 0.9, 0.5, 0.96

    def __init__(self, num_prompts: int, per_rollout: int, *, seed: int) -> None:
        """Expect the middle."""
        self._num_prompts, self._per_rollout, self._seed = num_prompts, per_rollout, seed
        self._alpha = self._beta = 0.5 / (1 - self.RHO_MIN)
        self._mean_log_prob: float | None = None
        self._metrics: dict[str, float] = {}

    def expected(self) -> float:
        """Return p, the expectation of a mapped reward."""
        return self._alpha / (self._alpha + self._beta)

    def last(self, prompt: int) -> Sample | None:
        """Return None: no answer is kept."""
        del prompt

    def choose(self, rollout: int) -> list[int]:
        """Return the prompts of a rollout: every prompt once an epoch, in an order that is a function of the seed."""
        return global_rows(rollout, self._per_rollout, self._num_prompts, self._seed).tolist()

    def credit(
        self,
        samples: Sequence[Sample],
        rewards: Sequence[float],
        is_masked: Sequence[bool],
        drifts: Sequence[float | None],
    ) -> list[float]:
        """Return the advantages of all samples of a rollout, over all ranks, and then learn from their rewards."""
        del drifts
        expected = self.expected()
        baseline = 2 * self.SCALE * expected - self.SCALE
        advantages = [
            0.0 if masked else max(-self.LIMIT, min(self.LIMIT, reward - baseline))
            for reward, masked in zip(rewards, is_masked, strict=True)
        ]
        counted = [i for i, masked in enumerate(is_masked) if not masked]
        log_probs = [log_prob for i in counted for log_prob in _chosen(samples[i])]
        if not log_probs:
            return advantages
        mean_log_prob, rho, drift = _mean(log_probs), self.FIRST_RHO, 0.0
        if self._mean_log_prob is not None:
            drift = abs(mean_log_prob - self._mean_log_prob)
            rho = decay(drift, self.RHO_MIN, self.RHO_MAX)
        mapped = [(rewards[i] + self.SCALE) / (2 * self.SCALE) for i in counted]
        self._alpha = rho * self._alpha + _mean(mapped)
        self._beta = rho * self._beta + (1 - _mean(mapped))
        self._mean_log_prob = mean_log_prob
        error = _mean([abs(reward - expected) for reward in mapped])
        self._metrics = {"baseline": expected, "baseline_error": error, "rho": rho, "drift": drift}
        return advantages

    def metrics(self) -> dict[str, float]:
        """Return those of `PromptTracker`."""
        return dict(self._metrics)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, JSON-able."""
        values = {"alpha": self._alpha, "beta": self._beta, "mean_log_prob": self._mean_log_prob}
        return {"kind": "global", **values, "metrics": self._metrics}

    def load_state(self, saved: dict[str, Any]) -> None:
        """Go on where `state` was called. CheckpointError for the state of another tracker."""
        _check(saved, "global")
        self._alpha, self._beta, self._mean_log_prob = saved["alpha"], saved["beta"], saved["mean_log_prob"]
        self._metrics = dict(saved["metrics"])


def decay(drift: float, rho_min: float, rho_max: float) -> float:
    """Return rho = 2^(-D / 0.06), cut to [rho_min, rho_max]: the farther the policy moved, the faster it forgets."""
    return max(rho_min, min(rho_max, 2 ** (-drift / HALF_LIFE)))


def drift_of(sample: Sample, log_probs_now: Sequence[float]) -> float | None:
    """Return D, the mean |log pi_now - log pi_then| over the tokens the policy chose; None when it chose none."""
    changes = [
        abs(now - then)
        for now, then, chosen in zip(log_probs_now, sample.log_probs, sample.mask, strict=True)
        if chosen
    ]
    return _mean(changes) if changes else None


def draw_without_replacement(weights: Sequence[float], name: str) -> list[int]:
    """Return all places, in an order drawn by weight and decided by `name` alone.

    An exponential race: place i arrives at -ln(u_i) / weight_i, so the first k are k draws without replacement
    (Efraimidis and Spirakis, 2006). `random.Random` of a text is the same on every machine and version.
    """
    uniform = random.Random(name)  # noqa: S311 - no secret
    arrivals = [-math.log(1 - uniform.random()) / weight for weight in weights]
    return sorted(range(len(weights)), key=lambda place: (arrivals[place], place))


def _chosen(sample: Sample) -> Iterator[float]:
    return (log_prob for log_prob, chosen in zip(sample.log_probs, sample.mask, strict=True) if chosen)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _check(saved: dict[str, Any], kind: Literal["prompt", "global"]) -> None:
    if saved.get("kind") != kind:
        raise CheckpointError(
            f"the tracker in the checkpoint is {saved.get('kind')!r}, this run's is {kind!r}; "
            f"give --baseline {saved.get('kind')}, or start over with --fresh"
        )


_DTYPES = {"prompt_ids": "<i4", "ids": "<i4", "mask": "u1", "log_probs": "<f8"}


def _to_json(sample: Sample) -> dict[str, str]:
    """Return the numbers of a sample as base64: short, and exact to the bit."""
    packed = {name: np.asarray(getattr(sample, name), dtype=dtype).tobytes() for name, dtype in _DTYPES.items()}
    return {name: base64.b64encode(data).decode("ascii") for name, data in packed.items()} | {
        "finish_reason": sample.finish_reason
    }


def _from_json(prompt: int, saved: dict[str, str]) -> Sample:
    found = {
        name: np.frombuffer(base64.b64decode(saved[name]), dtype=dtype).tolist() for name, dtype in _DTYPES.items()
    }
    return Sample(prompt, **found, finish_reason=saved["finish_reason"])
