"""The tool agent as a `Player`: episodes of several turns instead of single answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from minimind.rl.episodes import Episode, Rules, play
from minimind.rl.player import Player
from minimind.rl.rollout import Sample
from minimind.rl.scoring import Answer
from minimind.rl.tools import Toolbox
from minimind.rl.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Played(Sample):
    """A sample that still knows what was said."""

    episode: Episode


class AgentPlayer(Player):
    """Plays prompts that offer tools: up to `max_turns` turns of the policy, calls run in between."""

    def __init__(self, *what: Any, tools: Toolbox, max_turns: int, observation_tokens: int, **more: Any) -> None:
        """Take what `Player` takes, and who runs calls. DataError for a prompt that offers a tool nobody runs."""
        super().__init__(*what, **more)
        for prompt in self.prompts.prompts:
            tools.check(prompt.tools or [], prompt.place)
        self._tools = tools
        length = self.prompts.longest + self.params.max_tokens + observation_tokens
        self._rules = Rules(length, max_turns, observation_tokens, more.get("enable_thinking"))

    def play(self, indices: Sequence[int], seeds: Sequence[int], *, is_greedy: bool = False) -> list[Sample]:
        """Return episodes of the prompts `indices`, as many of each as there are seeds for, side by side."""
        if not indices:
            return []
        owners = [index for index in indices for _ in range(len(seeds) // len(indices))]
        episodes = play(
            self.backend(),
            self.tokenizer,
            [self.prompts.prompts[index] for index in owners],
            [self.prompts.ids[index] for index in owners],
            self._tools,
            self._rules,
            params=replace(self.params, temperature=0.0) if is_greedy else self.params,
            seeds=seeds,
        )
        return [
            Played(owner, one.prompt_ids, one.ids, one.mask, one.log_probs, one.finish_reason, one)
            for owner, one in zip(owners, episodes, strict=True)
        ]

    def answer(self, sample: Sample) -> Answer:
        """Return what a sample that was just played says."""
        assert isinstance(sample, Played)
        return sample.episode.answer

    def judge(self, samples: Sequence[Sample]) -> list[Trajectory]:
        """Return the samples, as plain ones, with their rewards and counts of turns and calls."""
        trajectories = super().judge(samples)
        for one in trajectories:
            assert isinstance(one.sample, Played)
            episode = one.sample.episode
            one.counts = {
                "turns": episode.num_turns,
                "calls": episode.num_calls,
                "failed_calls": episode.num_failed_calls,
            }
            one.sample = episode.sample(one.sample.prompt_index)
        return trajectories
