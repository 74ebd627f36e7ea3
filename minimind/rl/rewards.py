"""Text -> number: the rewards by name, models and functions of the user's as rewards, and their weighted sum.

A reward is written "name" or "name=weight":

    grade, exact_answer, contains_gt, format, tags, length, repetition, valid_calls     the functions of this file
    model:PATH, transformers:PATH                   a reward model's score, at most 3 either way
    model-mixed:PATH, transformers-mixed:PATH       0.4 of the score of all that was written + 0.6 of the <answer>'s
    my_rewards.py:function, package.module:function     function(prompt, answer) -> number, in a process of its own

    total = sum of weight times reward

Every part is kept. A part that raises, hangs or is no finite number masks its sample, which is left out of the loss and
counted. How an answer came about, and what is done with its reward, is not known here.
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from minimind.data.messages import Message
from minimind.data.prompt import Prompt
from minimind.errors import ConfigError, DataError
from minimind.rl.scoring import Answer, Reward, RewardFault, UserFunction
from minimind.rl.tools import problem_with
from minimind.runtime.log import get_logger
from minimind.world import graders

Scorer = Callable[[Sequence[list[Message]]], Sequence[float]]
"""A reward model: conversations that end with an answer -> one score each; NaN where it has none."""

MODEL_LIMIT = 3.0
"""A reward model's score is cut to +-3 (historical)."""
MIXED_WEIGHT = 0.6
"""Of the answer's score in the mixed form; the rest is the score of all that was written (historical)."""
MAX_HANGS = 3
"""After so many hangs one after the other a user's function is not asked again in the same rollout."""

_log = get_logger("rewards")

_FORM = re.compile(r"<think>(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# A Chinese text has no spaces: each of its characters is a token here, or a whole clause would be one.
_TOKENS = re.compile(r"[㐀-鿿]|[^\W㐀-鿿]+|[^\w\s]")


def grade(prompt: Prompt, answer: Answer) -> float:
    """1 when the world's grader of the row (`grader`, `grader_args`, `answer`) finds the answer right, else 0."""
    return float(graders.grade(prompt.fields, answer.text, answer.reasoning, answer.tool_calls))


def exact_answer(prompt: Prompt, answer: Answer) -> float:
    """1 when the final answer equals the row's `answer`, but for case, outer punctuation and white space; else 0.

    Two numbers are equal when their values are ("1,200" and "1200"). The final answer is what `graders.final_answer`
    finds: after the thought, inside <answer>, or after "Answer:".
    """
    wanted, said = str(prompt.answer), graders.final_answer(answer.text)
    if said and graders.normalise(said) == graders.normalise(wanted):
        return 1.0
    numbers = _number(said), _number(wanted)
    return float(numbers[0] is not None and numbers[0] == numbers[1])


def contains_gt(prompt: Prompt, answer: Answer) -> float:
    """The share of the values in the row's `gt` that the final answer mentions, as whole words or equal numbers."""
    said = graders.final_answer(answer.text)
    numbers = graders.numbers(said)
    found = [graders.mentions(said, value) or _number(value) in numbers for value in prompt.gt]
    return sum(found) / len(found)


def format(prompt: Prompt, answer: Answer) -> float:  # noqa: A001 - the name users know it by
    """0.5 when all that was written is `<think>..</think><answer>..</answer>`, each tag once, else 0 (historical).

    Deviation: white space around and between the two is free, the historical one wanted exact line breaks
    (test_named_rewards_by_hand).
    """
    del prompt
    found = _FORM.fullmatch(answer.written.strip())
    return 0.5 if found and all(answer.written.count(tag) == 1 for tag in _TAGS) else 0.0


def tags(prompt: Prompt, answer: Answer) -> float:
    """0.25 for each of <think>, </think>, <answer>, </answer> that was written exactly once (historical)."""
    del prompt
    return 0.25 * sum(answer.written.count(tag) == 1 for tag in _TAGS)


def length(prompt: Prompt, answer: Answer) -> float:
    """0.5 when what was written has 20 to 800 characters, outer white space not counted, else -0.5 (historical)."""
    del prompt
    return 0.5 if 20 <= len(answer.written.strip()) <= 800 else -0.5


def repetition(prompt: Prompt, answer: Answer) -> float:
    """-min(0.5, share of repeated 3-grams) of what was written: 0 without repetition, -0.5 from half on (historical).

    share = (3-grams - different 3-grams) / 3-grams, over words, single marks and single Chinese characters. Deviation:
    the historical one took a Chinese clause as one word and saw no repetition inside it (test_named_rewards_by_hand).
    """
    del prompt
    tokens = _TOKENS.findall(answer.written.lower())
    grams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return -min(0.5, (len(grams) - len(set(grams))) / len(grams)) if grams else 0.0


def valid_calls(prompt: Prompt, answer: Answer) -> float:
    """The share of tool calls, of all turns, that name a tool of the prompt and fit its schema; 0 without a call.

    A <tool_call> whose text could not be read counts as a call that does not.
    """
    tools = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in prompt.tools or []}
    turns = [message for message in answer.messages if message["role"] == "assistant"]
    calls = [call.get("function", call) for turn in turns for call in turn.get("tool_calls", ())]
    unread = sum(str(turn["content"]).count("<tool_call>") for turn in turns)
    valid = sum(call["name"] in tools and not problem_with(call["arguments"], tools[call["name"]]) for call in calls)
    return valid / (len(calls) + unread) if calls or unread else 0.0


def _number(text: str) -> float | None:
    """Return the number that the text is, None when it is anything else."""
    found = graders.numbers(text)
    is_alone = re.fullmatch(r"-?[\d,]+(\.\d+)?", graders.normalise(text)) is not None
    return found[0] if is_alone and len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class _Named:
    function: Reward
    needs: str = ""
    """What a prompt must have for it."""


REWARDS: dict[str, _Named] = {
    "grade": _Named(grade, "grader"),
    "exact_answer": _Named(exact_answer, "answer"),
    "contains_gt": _Named(contains_gt, "gt"),
    "format": _Named(format),
    "tags": _Named(tags),
    "length": _Named(length),
    "repetition": _Named(repetition),
    "valid_calls": _Named(valid_calls, "tools"),
}

MODELS = ("model", "transformers", "model-mixed", "transformers-mixed")


def _has(prompt: Prompt, needed: str) -> bool:
    if needed == "grader":
        grader = prompt.fields.get("grader")
        return grader == "tool_call" or (grader in graders.GRADERS and "answer" in prompt.fields)
    return getattr(prompt, needed) not in (None, [])


@dataclass(frozen=True, slots=True)
class Scores:
    """The rewards of S answers."""

    total: list[float]
    """(S,) weighted sums; 0 where masked."""
    parts: dict[str, list[float]]
    """(S,) of each reward, without its weight; NaN where it could not be had."""
    is_masked: list[bool]
    """(S,) some part could not be had."""
    faults: dict[str, int]
    """In how many samples each reward could not be had."""


_Pairs = Sequence[tuple[Prompt, Answer]]


@dataclass(frozen=True, slots=True)
class _Part:
    name: str
    weight: float
    score: Callable[[_Pairs], list[float | RewardFault]]
    needs: str = ""
    close: Callable[[], None] = lambda: None


class Rewards:
    """The rewards of a run, by their names and weights, ready to score answers.

    `scorer_of(kind, path)` makes the model behind "model:PATH" and "transformers:PATH"; it comes from the stage, which
    knows devices. ConfigError with everything that is wrong with the names, before any training.
    """

    def __init__(
        self, specs: Sequence[str], *, scorer_of: Callable[[str, str], Scorer] | None = None, seconds: float = 10.0
    ) -> None:
        """Read the names, start the functions, load the models. `seconds`: the limit of each call of a function."""
        problems: list[str] = [] if specs else ["name at least one"]
        self._parts: list[_Part] = []
        self._warned: set[tuple[str, str]] = set()
        for spec in specs:
            try:
                self._parts.append(_part(spec, scorer_of, seconds))
            except ConfigError as error:
                problems.append(str(error))
        names = Counter(part.name for part in self._parts)
        problems += [f"{name} is named {count} times" for name, count in names.items() if count > 1]
        if problems:
            self.close()
            raise ConfigError("rewards: " + "; ".join(problems))

    @property
    def names(self) -> list[str]:
        """Names of the parts, as they are logged."""
        return [part.name for part in self._parts]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise DataError when prompts lack what a reward compares with."""
        for part in self._parts:
            lacking = [i for i, prompt in enumerate(prompts) if part.needs and not _has(prompt, part.needs)]
            if lacking:
                raise DataError(
                    f"reward {part.name} needs {part.needs!r}, and {len(lacking)} of {len(prompts)} prompts have none "
                    f"that it knows (the first is number {lacking[0] + 1}); add it to the rows or name another reward"
                )

    def score(self, pairs: _Pairs) -> Scores:
        """Return the rewards of (prompt, answer) pairs. Nothing that a reward does is raised; what fails is masked."""
        total = [0.0] * len(pairs)
        is_masked = [False] * len(pairs)
        parts: dict[str, list[float]] = {}
        faults: dict[str, int] = {}
        for part in self._parts:
            found = [self._number_of(part, value) for value in part.score(pairs)]
            faults[part.name] = found.count(None)
            parts[part.name] = [math.nan if value is None else value for value in found]
            total = [so_far + part.weight * (value or 0.0) for so_far, value in zip(total, found, strict=True)]
            is_masked = [masked or value is None for masked, value in zip(is_masked, found, strict=True)]
        total = [0.0 if masked else value for value, masked in zip(total, is_masked, strict=True)]
        return Scores(total, parts, is_masked, faults)

    def close(self) -> None:
        """End the processes of the users' functions."""
        for part in self._parts:
            part.close()

    def _number_of(self, part: _Part, value: float | RewardFault) -> float | None:
        if not isinstance(value, RewardFault) and not math.isfinite(value):
            value = RewardFault("no number", f"it is {value}")
        if isinstance(value, RewardFault):
            if (part.name, value.kind) not in self._warned:
                _log.warning("reward %s %s; such samples are masked and counted", part.name, value)
            self._warned.add((part.name, value.kind))
            return None
        return float(value)


def _part(spec: str, scorer_of: Callable[[str, str], Scorer] | None, seconds: float) -> _Part:
    """Return the part that a "name" or "name=weight" describes. ConfigError."""
    name, separator, number = spec.rpartition("=")
    name, weight = (name, _weight(spec, number)) if separator else (spec, 1.0)
    if name in REWARDS:
        return _Part(name, weight, _one_by_one(REWARDS[name].function), REWARDS[name].needs)
    kind, separator, path = name.partition(":")
    if kind in MODELS and separator:
        if scorer_of is None:
            raise ConfigError(f"{name}: no reward model can be loaded here")
        return _Part(kind, weight, _by_model(scorer_of(kind.removesuffix("-mixed"), path), kind.endswith("-mixed")))
    source, separator, function = name.rpartition(":")
    if not (separator and source and function):
        near = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(REWARDS)}"
        raise ConfigError(f"{name!r} is no reward; {hint}; besides, model:PATH and file.py:function")
    user = UserFunction(name, seconds=seconds)
    return _Part(function, weight, _one_by_one(user), close=user.close)


def _weight(spec: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ConfigError(f"{spec!r}: the weight {number!r} is no number")
    return weight


def _one_by_one(function: Reward) -> Callable[[_Pairs], list[float | RewardFault]]:
    def score(pairs: _Pairs) -> list[float | RewardFault]:
        found: list[float | RewardFault] = []
        for prompt, answer in pairs:
            last = found[-MAX_HANGS:]
            if len(last) == MAX_HANGS and all(isinstance(one, RewardFault) and one.kind == "hung" for one in last):
                found.append(RewardFault("hung", f"not asked again, after {MAX_HANGS} hangs"))
                continue
            try:
                found.append(function(prompt, answer))
            except RewardFault as fault:
                found.append(fault)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is one masked sample
                found.append(RewardFault("raised", f"{type(error).__name__}: {error}"))
        return found

    return score


def _by_model(scorer: Scorer, is_mixed: bool) -> Callable[[_Pairs], list[float | RewardFault]]:
    """Return the cut score of each conversation; mixed: 0.4 of it + 0.6 of that of the <answer>, where there is one."""

    def score(pairs: _Pairs) -> list[float | RewardFault]:
        try:
            found = _clipped(scorer([[*prompt.messages, *answer.messages] for prompt, answer in pairs]))
            short = {i: _ANSWER.search(answer.written) for i, (_, answer) in enumerate(pairs)} if is_mixed else {}
            answers = {i: match[1].strip() for i, match in short.items() if match}
            if answers:
                shortened = [
                    [*pairs[i][0].messages, *pairs[i][1].messages[:-1], {"role": "assistant", "content": text}]
                    for i, text in answers.items()
                ]
                for i, value in zip(answers, _clipped(scorer(shortened)), strict=True):
                    found[i] = (1 - MIXED_WEIGHT) * found[i] + MIXED_WEIGHT * value
        except Exception as error:  # noqa: BLE001 - a model that fails masks, it does not end a run
            return [RewardFault("raised", f"{type(error).__name__}: {error}")] * len(pairs)
        return cast(list[float | RewardFault], found)

    return score


def _clipped(scores: Sequence[float]) -> list[float]:
    return [score if math.isnan(score) else max(-MODEL_LIMIT, min(MODEL_LIMIT, score)) for score in scores]
