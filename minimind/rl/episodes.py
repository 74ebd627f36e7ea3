"""Answers in several turns: the policy speaks, its tool calls are run, it reads the replies and speaks again.

All episodes of a rollout advance together, one turn of each at a time. The ids that were sampled are kept as they are:
between two turns stand the ids of what the template writes there (the end of the line, the replies, the opening of the
next turn), so that the whole is what rendering the conversation gives wherever the model's text survives a round trip
(test_ids_are_those_of_the_rendered_conversation). Who decodes and who runs tools is passed in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from minimind.data.messages import Message
from minimind.data.prompt import Prompt, read
from minimind.errors import ConfigError, DataError
from minimind.inference.chat import parse
from minimind.inference.engine import Engine
from minimind.inference.sampling import SamplingParams
from minimind.model.transformer import Transformer
from minimind.rl.rollout import Backend, Sample, seed_of
from minimind.rl.scoring import Answer, read_answer
from minimind.rl.tools import UNREADABLE, Reply, Schema, Toolbox
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.chat import Conversation, render_batch

_OPEN_CALL = "<tool_call>"


class Tools(Protocol):
    """Whoever runs calls: a `tools.Toolbox` is one."""

    def run(self, call: Mapping[str, Any], offered: Sequence[Schema]) -> Reply:
        """Return the reply to `{"name", "arguments"}`; errors too come back as one."""
        ...

    def forget_hangs(self) -> None:
        """Begin a rollout."""
        ...


@dataclass(slots=True)
class Episode:
    """One prompt with everything that followed it, as ids and as messages."""

    prompt: Prompt
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list[int])
    """Everything after the prompt."""
    mask: list[int] = field(default_factory=list[int])
    """1 where the policy chose the token, 0 where it was told."""
    log_probs: list[float] = field(default_factory=list[float])
    finish_reason: str = ""
    """"" while it goes on; "stop": the policy ended it, or its turns are used up; "length": it was cut off."""
    messages: list[Message] = field(default_factory=list[Message])
    """Everything after the prompt: the assistant's turns and the tools' replies."""
    written: str = ""
    """The last turn as it was written, without the token that ended it."""
    num_turns: int = 0
    num_calls: int = 0
    num_failed_calls: int = 0
    """Calls that could not be read, or whose reply is an error."""

    @property
    def num_chosen(self) -> int:
        """Number of tokens that the policy chose."""
        return sum(self.mask)

    @property
    def answer(self) -> Answer:
        """What it says, as rewards see it: the text is that of the last turn."""
        is_truncated = self.finish_reason == "length"
        before = self.messages[:-1]
        return read_answer(self.written, num_tokens=self.num_chosen, is_truncated=is_truncated, before=before)

    def sample(self, prompt_index: int) -> Sample:
        """Return it as what training needs."""
        return Sample(prompt_index, self.prompt_ids, self.ids, self.mask, self.log_probs, self.finish_reason)


@dataclass(frozen=True, slots=True)
class Rules:
    """How long an episode may go on, and how its turns are read."""

    max_length: int
    """Tokens of the whole: prompt, turns and replies."""
    max_turns: int = 3
    """Turns of the policy; calls in the last one are not run."""
    observation_tokens: int = 256
    """Tokens of all the replies of an episode, with what the template writes around them."""
    enable_thinking: bool | None = None
    """As the prompts were rendered with."""


def play(
    backend: Backend,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[Sequence[int]],
    tools: Tools,
    rules: Rules,
    *,
    params: SamplingParams,
    seeds: Sequence[int],
) -> list[Episode]:
    """Return the episode of each prompt, in order (repeat a prompt for several).

    `params.max_tokens` is what the policy may choose in all turns together; `seeds`, one for each episode, make a turn
    a function of (seed, number of the turn). An episode that runs out of tokens, or has no room for a reply, ends with
    "length"; a reply without room for a turn after it is left out. ConfigError for a template that cannot go on after a
    tool's reply.
    """
    tools.forget_hangs()
    params = replace(params, stop_ids=(tokenizer.eos_id, tokenizer.pad_id), logprobs=True)
    episodes = [Episode(prompt, list(ids)) for prompt, ids in zip(prompts, prompt_ids, strict=True)]
    going = list(zip(episodes, seeds, strict=True))
    for turn in range(rules.max_turns):
        if not going:
            break
        contexts = [[*one.prompt_ids, *one.ids] for one, _ in going]
        limits = [
            min(params.max_tokens - one.num_chosen, rules.max_length - len(context))
            for (one, _), context in zip(going, contexts, strict=True)
        ]
        turns = [
            replace(params, seed=seed_of(seed, turn), max_tokens=limit)
            for (_, seed), limit in zip(going, limits, strict=True)
        ]
        for (one, _), said in zip(going, backend.generate(contexts, turns), strict=True):
            one.ids += said.ids
            one.mask += [1] * len(said.ids)
            one.log_probs += said.log_probs
            one.finish_reason = said.finish_reason
            _hear(one, tokenizer, said.ids, rules.enable_thinking is True)
        calling = [one for one in going if one[0].finish_reason == "stop" and _has_calls(one[0])]
        going = [] if turn + 1 == rules.max_turns else calling
        _reply([one for one, _ in going], tokenizer, tools, rules, params.max_tokens)
        going = [one for one in going if not one[0].finish_reason]
    return episodes


def _hear(episode: Episode, tokenizer: Tokenizer, ids: Sequence[int], in_reasoning: bool) -> None:
    """Add the turn that `ids` are to the messages."""
    is_ended = bool(ids) and ids[-1] in (tokenizer.eos_id, tokenizer.pad_id)
    episode.written = ("<think>\n" if in_reasoning else "") + tokenizer.decode(ids[:-1] if is_ended else ids)
    said = parse(episode.written)
    episode.messages.append(said.message())
    episode.num_turns += 1
    episode.num_calls += len(said.tool_calls) + said.content.count(_OPEN_CALL)


def _has_calls(episode: Episode) -> bool:
    """Whether the last turn calls a tool, or tries to."""
    said = episode.messages[-1]
    return bool(said.get("tool_calls")) or _OPEN_CALL in said["content"]


def _reply(episodes: Sequence[Episode], tokenizer: Tokenizer, tools: Tools, rules: Rules, max_tokens: int) -> None:
    """Run the calls of each last turn and add the replies, or end the episode where they have no room."""
    replies = [_run(one, tools) for one in episodes]
    for one, messages, ids in zip(
        episodes, replies, _ids_between(tokenizer, episodes, replies, rules.enable_thinking), strict=True
    ):
        num_told = len(one.ids) - one.num_chosen + len(ids)
        has_room = len(one.prompt_ids) + len(one.ids) + len(ids) < rules.max_length
        if not has_room or num_told > rules.observation_tokens or one.num_chosen >= max_tokens:
            one.finish_reason = "length"
            continue
        one.finish_reason = ""
        one.messages += messages
        one.ids += ids
        one.mask += [0] * len(ids)
        one.log_probs += [0.0] * len(ids)


def _run(episode: Episode, tools: Tools) -> list[Message]:
    """Return the tools' replies to the last turn: those to calls that could be read, then one for each other."""
    said = episode.messages[-1]
    found = [(call["name"], tools.run(call, episode.prompt.tools or [])) for call in said.get("tool_calls", ())]
    found += [("", UNREADABLE)] * said["content"].count(_OPEN_CALL)
    episode.num_failed_calls += sum(reply.is_error for _, reply in found)
    return [{"role": "tool", "name": name, "content": reply.text} for name, reply in found]


def _ids_between(
    tokenizer: Tokenizer,
    episodes: Sequence[Episode],
    replies: Sequence[list[Message]],
    enable_thinking: bool | None,
) -> list[list[int]]:
    """Return, for each episode, the ids from the end of its last turn to the beginning of the next.

    The template is asked with that turn alone: what stands before it does not show in what follows it.
    """
    asked = [
        Conversation([{"role": "user", "content": ""}, one.messages[-1], *messages], None, True, enable_thinking)
        for one, messages in zip(episodes, replies, strict=True)
    ]
    found: list[list[int]] = []
    for example in render_batch(tokenizer, asked):
        ends = [i for i, weight in enumerate(example.loss_weights) if weight]
        if not ends or ends[-1] - ends[0] != len(ends) - 1 or example.ids[ends[-1]] != tokenizer.eos_id:
            raise ConfigError(
                "this tokenizer's chat template rewrites a turn once a tool has replied, so what was sampled cannot be "
                "kept; an agent needs one that only adds to it, as ours does"
            )
        found.append(example.ids[ends[-1] + 1 :])
    return found


# -- an agent put to the test ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Solution:
    """One row put to an agent, and what came of it."""

    row: dict[str, Any]
    """The row as it stands in the file."""
    output: str
    """Everything that followed the prompt, as text with its control tokens."""
    answer: Answer
    is_correct: bool
    num_turns: int
    num_calls: int
    num_failed_calls: int
    is_truncated: bool


def solve(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Sequence[dict[str, Any]],
    *,
    grader: Callable[[Prompt, Answer], float],
    tools: Tools | None = None,
    max_turns: int = 3,
    max_tokens: int = 256,
    observation_tokens: int = 256,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    enable_thinking: bool | None = None,
) -> list[Solution]:
    """Return what the model makes of agent rows `{"conversations", "tools", "gt"}` greedily, and whether it is right.

    `grader` is a reward (rl/rewards): 1 is right. DataError for a bad row, or one whose prompt leaves no room.
    """
    prompts: list[Prompt] = []
    for number, row in enumerate(rows, start=1):
        prompt, problems = read(row, needs_tools=True)
        if problems:
            raise DataError(f"agent row {number}: {'; '.join(problems)}")
        prompts.append(prompt)
    if not prompts:
        return []
    asked = [Conversation(prompt.messages, prompt.tools, True, enable_thinking) for prompt in prompts]
    ids = [example.ids for example in render_batch(tokenizer, asked)]
    longest = max(map(len, ids))
    length = min(model.config.max_position_embeddings, longest + max_tokens + observation_tokens)
    if longest >= length:
        number = 1 + next(i for i, one in enumerate(ids) if len(one) == longest)
        raise DataError(f"agent row {number}: the prompt has {longest} tokens, the model {length} positions")
    engine = Engine(model, max_batch_size=min(batch_size, len(prompts)), max_length=length, dtype=dtype)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    rules = Rules(length, max_turns, observation_tokens, enable_thinking)
    seeds = [0] * len(prompts)
    episodes = play(engine, tokenizer, prompts, ids, tools or Toolbox(), rules, params=params, seeds=seeds)
    return [
        Solution(
            row,
            tokenizer.decode(one.ids),
            one.answer,
            grader(one.prompt, one.answer) == 1.0,
            one.num_turns,
            one.num_calls,
            one.num_failed_calls,
            one.finish_reason == "length",
        )
        for row, one in zip(rows, episodes, strict=True)
    ]
