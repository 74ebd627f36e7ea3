"""The text side of reinforcement learning: prompts are put to the live policy, answers are read and judged.

What a sample is as text, only this file knows: `Experience` sees ids and numbers. A tool agent plays in its own way
(several turns) and overrides `play` and `answer`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from minimind.data.order import share
from minimind.inference.sampling import SamplingParams
from minimind.rl.experience import summary
from minimind.rl.prompts import PromptSet
from minimind.rl.rewards import Rewards
from minimind.rl.rollout import Backend, Sample, rollout
from minimind.rl.scoring import Answer, read_answer
from minimind.rl.trajectory import Trajectory
from minimind.runtime import distributed
from minimind.tokenizer.bpe import Tokenizer


class Player:
    """Plays, reads and judges the prompts of one set."""

    def __init__(
        self,
        backend: Callable[[], Backend],
        prompts: PromptSet,
        tokenizer: Tokenizer,
        rewards: Rewards,
        *,
        params: SamplingParams,
        enable_thinking: bool | None = None,
    ) -> None:
        """`backend` returns who decodes, the same at every call; `params` without seed and stop ids."""
        self.prompts, self.tokenizer, self.rewards = prompts, tokenizer, rewards
        self.params = replace(params, stop_ids=(tokenizer.eos_id, tokenizer.pad_id))
        self.backend, self._opening = backend, "<think>\n" if enable_thinking is True else ""

    def play(self, indices: Sequence[int], seeds: Sequence[int], *, is_greedy: bool = False) -> list[Sample]:
        """Return samples of the prompts `indices`, as many of each as there are seeds for, side by side."""
        if not indices:
            return []
        return rollout(
            self.backend(),
            [self.prompts.ids[index] for index in indices],
            samples_per_prompt=len(seeds) // len(indices),
            params=replace(self.params, temperature=0.0) if is_greedy else self.params,
            seeds=seeds,
            prompt_indices=indices,
        )

    def answer(self, sample: Sample) -> Answer:
        """Return what a sample says, as rewards see it."""
        return read_answer(
            self._opening + self.text(sample), num_tokens=sample.num_chosen, is_truncated=sample.is_truncated
        )

    def text(self, sample: Sample) -> str:
        """Return what follows the prompt, as it was written, without the token that ended it."""
        is_ended = bool(sample.ids) and sample.ids[-1] in self.params.stop_ids
        return self.tokenizer.decode(sample.ids[:-1] if is_ended else sample.ids)

    def judge(self, samples: Sequence[Sample]) -> list[Trajectory]:
        """Return the samples with their rewards; one whose reward could not be had is masked."""
        scores = self.rewards.score([(self.prompts.prompts[one.prompt_index], self.answer(one)) for one in samples])
        return [
            Trajectory(sample, total, {name: values[i] for name, values in scores.parts.items()}, is_masked=is_masked)
            for i, (sample, total, is_masked) in enumerate(zip(samples, scores.total, scores.is_masked, strict=True))
        ]

    def validate(self, count: int) -> dict[str, float]:
        """Return the mean reward, and of each part, of greedy answers to the first `count` prompts, over all ranks."""
        indices = list(range(min(count, len(self.prompts))))
        own = indices[share(len(indices), distributed.rank(), distributed.world_size())]
        mine = self.judge(self.play(own, [0] * len(own), is_greedy=True))
        every = [one for part in distributed.all_gather_object(mine) for one in part]
        return {f"val_{name}": value for name, value in summary(every, samples=1).items()}

    def show(self, trajectory: Trajectory) -> dict[str, Any]:
        """Return a sample as a row for people."""
        sample = trajectory.sample
        return {
            "prompt": self.tokenizer.decode(sample.prompt_ids),
            "output": self.tokenizer.decode(sample.ids),
            "reward": None if trajectory.is_masked else trajectory.reward,
            "parts": trajectory.parts,
        }
