"""Questions put to a model and graded: question rows -> prompts -> engine -> answers -> one `Score` per group.

A group is a domain in one language. Beside its accuracy stand the 95 % interval, what chance gives, and what the best
shortcut gives (the answers of a rule that understands nothing, graded alike). It does not know what the domains are,
how an answer is judged (a grader is passed in), nor how a model is loaded.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch

from minimind.data import text as document
from minimind.data.conversation import read_turns
from minimind.data.messages import Reader
from minimind.errors import DataError
from minimind.evaluation.intervals import newcombe_interval, wilson_interval
from minimind.inference.chat import parse
from minimind.inference.engine import Engine
from minimind.inference.request import Completion
from minimind.inference.sampling import SamplingParams
from minimind.model.transformer import Transformer
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.chat import Conversation, render_batch

Form = Literal["chat", "completion"]

MAX_TOKENS: dict[Form, int] = {"chat": 256, "completion": 128}
"""The most tokens of an answer, by form, unless told otherwise."""


class Grader(Protocol):
    """Judges one answer; the question is the row."""

    def __call__(
        self, question: dict[str, Any], text: str, reasoning: str = "", tool_calls: Sequence[dict[str, Any]] = (), /
    ) -> bool:
        """Return whether the answer is right."""
        ...


@dataclass(frozen=True)
class Score:
    """How many questions of one domain and language were answered correctly, and what that is to be compared with."""

    domain: str
    language: str
    form: Form
    n: int
    correct: int
    accuracy: float
    low: float
    """Lower end of Wilson's 95 % interval."""
    high: float
    """Upper end of it."""
    chance: float
    """Mean probability of a right answer by guessing."""
    shortcut: str
    """Name of the shortcut that scores best, "" if the questions name none."""
    shortcut_accuracy: float
    seconds: float
    """Share of the wall time, by tokens."""


@dataclass(frozen=True, slots=True)
class Record:
    """One question with its answer, for reports and for finding out what went wrong."""

    id: str
    domain: str
    language: str
    form: Form
    prompt: str
    output: str
    """What the model wrote, as text with its control tokens, without the one that ended it."""
    answer: str
    correct: bool


@dataclass(slots=True)
class Tally:
    """Counts of one group, on the way to a `Score`."""

    n: int = 0
    correct: int = 0
    chance: float = 0.0
    shortcuts: dict[str, int] = field(default_factory=dict[str, int])
    num_tokens: int = 0

    def score(self, domain: str, language: str, form: Form, seconds: float) -> Score:
        """Return the finished `Score`."""
        low, high = wilson_interval(self.correct, self.n)
        shortcut, hits = max(self.shortcuts.items(), key=lambda item: item[1], default=("", 0))
        return Score(
            domain=domain,
            language=language,
            form=form,
            n=self.n,
            correct=self.correct,
            accuracy=self.correct / self.n,
            low=low,
            high=high,
            chance=self.chance / self.n,
            shortcut=shortcut,
            shortcut_accuracy=hits / self.n,
            seconds=seconds,
        )


def ask(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: Sequence[dict[str, Any]],
    *,
    form: Form,
    grader: Grader,
    max_tokens: int | None = None,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    enable_thinking: bool | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    on_record: Callable[[Record], object] | None = None,
) -> list[Score]:
    """Put every question to the model and return one score per (domain, language), in order of appearance.

    Form "chat" renders the messages and tools and lets the model write its turn; "completion" continues the plain
    `prompt` to the end of the line (for a base model; questions without one are left out). With a temperature, question
    i is sampled with `seed + i`. Raises DataError for a prompt too long for the model, or one that cannot be rendered.
    """
    if form == "completion":
        questions = [question for question in questions if question.get("prompt")]
    if not questions:
        return []
    start = time.perf_counter()
    params = SamplingParams(
        temperature=temperature, stop_ids=stop_ids(tokenizer, form), max_tokens=max_tokens or MAX_TOKENS[form]
    )
    prompts = prompts_ids(tokenizer, questions, form, enable_thinking=enable_thinking)
    limit = model.config.max_position_embeddings
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts[longest]) >= limit:
        raise DataError(
            f"question {questions[longest]['id']}: the prompt has {len(prompts[longest])} tokens and the model "
            f"{limit} positions: leave this question out or take a model with more"
        )
    engine = Engine(
        model,
        max_batch_size=min(batch_size, len(prompts)),
        max_length=min(limit, len(prompts[longest]) + params.max_tokens),
        dtype=dtype,
    )
    each = [replace(params, seed=seed + i) for i in range(len(prompts))] if temperature else params
    tallies: dict[tuple[str, str], Tally] = {}
    for question, prompt, completion in zip(questions, prompts, engine.generate(prompts, each), strict=True):
        output = answer_text(tokenizer, completion, form)
        if form == "chat":
            said = parse(output, in_reasoning=enable_thinking is True)
            correct = grader(question, said.content, said.reasoning, said.tool_calls)
        else:
            correct = grader(question, output)
        tally = tallies.setdefault((question["domain"], question["language"]), Tally())
        tally.n += 1
        tally.correct += correct
        tally.chance += question.get("chance", 0.0)
        tally.num_tokens += len(prompt) + len(completion.ids)
        shortcuts: Mapping[str, str] = question.get("shortcuts") or {}
        for name, shortcut_answer in shortcuts.items():
            tally.shortcuts[name] = tally.shortcuts.get(name, 0) + grader(question, shortcut_answer)
        if on_record:
            on_record(
                Record(
                    id=str(question["id"]),
                    domain=question["domain"],
                    language=question["language"],
                    form=form,
                    prompt=tokenizer.decode(prompt),
                    output=output,
                    answer=str(question["answer"]),
                    correct=correct,
                )
            )
    return scores_of(tallies, form, time.perf_counter() - start)


def scores_of(tallies: Mapping[tuple[str, str], Tally], form: Form, seconds: float) -> list[Score]:
    """Return the score of each (domain, language), the wall time shared out by tokens."""
    total = sum(tally.num_tokens for tally in tallies.values())
    return [tally.score(*key, form, seconds * tally.num_tokens / total) for key, tally in tallies.items()]


def prompts_ids(
    tokenizer: Tokenizer,
    questions: Sequence[dict[str, Any]],
    form: Form,
    *,
    enable_thinking: bool | None = None,
) -> list[list[int]]:
    """Return the ids that the model continues: the rendered chat up to the assistant's turn, or a document's start.

    Messages and tools are read as training reads them, so that a question looks as its like did there.
    """
    if form == "completion":
        return [document.prompt_ids(tokenizer, question["prompt"]) for question in questions]
    conversations: list[Conversation] = []
    for question in questions:
        reader = Reader()
        _, read = read_turns(question, reader, "messages")
        if reader.problems:
            raise DataError(f"question {question['id']}: {'; '.join(reader.problems)}")
        conversations.append(Conversation(read.messages, read.tools, True, enable_thinking))
    return [example.ids for example in render_batch(tokenizer, conversations)]


def stop_ids(tokenizer: Tokenizer, form: Form) -> tuple[int, ...]:
    """Return the tokens that end an answer: end of turn or text, and in a completion every token with a line end."""
    ends = {tokenizer.eos_id, tokenizer.pad_id}
    if form == "completion":
        ends |= {i for i in range(tokenizer.vocab_size) if b"\n" in tokenizer.decode_bytes([i])}
    return tuple(sorted(ends))


def answer_text(tokenizer: Tokenizer, completion: Completion, form: Form) -> str:
    """Return what was written, control tokens kept for the parser, without the token that ended it.

    A completion is cut at its first line end; what stood before it inside the last token counts.
    """
    ids = completion.ids
    if ids and ids[-1] in (tokenizer.eos_id, tokenizer.pad_id):
        ids = ids[:-1]
    text = tokenizer.decode(ids)
    return text.partition("\n")[0] if form == "completion" else text


def overall(scores: Sequence[Score]) -> Score:
    """Return all `scores` (at least one, of one form) pooled: every question counts once, shortcuts at their best."""
    n, correct = sum(score.n for score in scores), sum(score.correct for score in scores)
    low, high = wilson_interval(correct, n)
    return Score(
        domain="overall",
        language="all",
        form=scores[0].form,
        n=n,
        correct=correct,
        accuracy=correct / n,
        low=low,
        high=high,
        chance=sum(score.chance * score.n for score in scores) / n,
        shortcut="best of each" if any(score.shortcut for score in scores) else "",
        shortcut_accuracy=sum(score.shortcut_accuracy * score.n for score in scores) / n,
        seconds=sum(score.seconds for score in scores),
    )


def separated(before: Score, after: Score) -> bool:
    """Whether the two 95 % intervals do not overlap: a change that is not luck, whichever way it went."""
    return before.high < after.low or after.high < before.low


def gain_interval(before: Score, after: Score) -> tuple[float, float]:
    """Return the 95 % interval of the gain in accuracy, after - before (Newcombe)."""
    return newcombe_interval(before.correct, before.n, after.correct, after.n)
