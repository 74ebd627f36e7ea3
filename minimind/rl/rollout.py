"""Prompts -> `Sample`s: what the policy chose, token by token, and how likely it found each choice then.

The policy is asked through a `Backend`: our engine with the live weights, or one that talks to another machine. Sampled
ids are kept as they are and never made again from text. It knows neither text nor rewards.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from minimind.errors import ConfigError
from minimind.inference.request import Completion
from minimind.inference.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with everything that followed it."""

    prompt_index: int
    """Which prompt of the data set."""
    prompt_ids: list[int]
    ids: list[int]
    """Everything after the prompt: what the policy chose, the end of its turn included, and what it was told."""
    mask: list[int]
    """1 where the policy chose the token, 0 where it was told (an observation of the tool agent)."""
    log_probs: list[float]
    """Behaviour log-probability of each chosen token, in nats, at the temperature it was sampled with; else 0."""
    finish_reason: str
    """"stop": it ended; "length": it was cut off."""

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.mask) == len(self.log_probs):
            raise ValueError(f"Sample: {len(self.ids)} ids, {len(self.mask)} in mask, {len(self.log_probs)} log_probs")

    @property
    def num_chosen(self) -> int:
        """Number of tokens that the policy chose."""
        return sum(self.mask)

    @property
    def is_truncated(self) -> bool:
        """Whether the answer was cut off by its budget."""
        return self.finish_reason == "length"


class Backend(Protocol):
    """Whoever decodes: `inference.engine.Engine` is one."""

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
        """Return the answer to each prompt, in order, with log-probabilities where the parameters ask for them."""
        ...


def rollout(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    *,
    samples_per_prompt: int,
    params: SamplingParams,
    seeds: Sequence[int],
    prompt_indices: Sequence[int] | None = None,
) -> list[Sample]:
    """Return `samples_per_prompt` samples of each prompt, those of one prompt side by side.

    `seeds`: one for each sample, in the same order, so that a rollout made again is the same. `prompt_indices` are
    noted in the samples (default: places in `prompts`). Raises ConfigError for a filter or a penalty: with them the
    samples would not come from the policy whose log-probabilities are noted. (Greedy ones note those of temperature 1.)
    """
    if params.top_k or params.top_p < 1 or params.min_p or params.repetition_penalty != 1:
        raise ConfigError(f"rollout: samples must come from the policy itself, without filters or penalty: {params}")
    if len(seeds) != len(prompts) * samples_per_prompt:
        raise ConfigError(f"rollout: {len(prompts)} prompts x {samples_per_prompt} samples but {len(seeds)} seeds")
    indices = range(len(prompts)) if prompt_indices is None else prompt_indices
    asked = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    owners = [index for index in indices for _ in range(samples_per_prompt)]
    answers = backend.generate(asked, [replace(params, seed=seed, logprobs=True) for seed in seeds])
    return [
        Sample(owner, list(prompt), answer.ids, [1] * len(answer.ids), answer.log_probs, answer.finish_reason)
        for owner, prompt, answer in zip(owners, asked, answers, strict=True)
    ]


def seed_of(*names: int | str) -> int:
    """Return a seed that belongs to `names` alone (run seed, rollout, place, ...): 62 bits of their hash."""
    digest = hashlib.blake2b(" ".join(map(str, names)).encode(), digest_size=8, person=b"minimind rollout"[:16])
    return int.from_bytes(digest.digest(), "little") >> 2
