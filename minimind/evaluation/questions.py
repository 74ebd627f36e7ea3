"""Question files, read and checked: the world's rows, short answers, multiple choice. One file may hold only one kind.

- the world's: `{"id", "domain", "language", "messages", "answer", "grader"}` and, where they apply, "tools", "chance",
  "shortcuts" and the plain "prompt" (see `world.rows.question`)
- short answer: `{"question" | "context" | "query", "answer" | "continuation"}`, judged by `short_answer`
- multiple choice: `{"question" | "query", "choices" | "options", "answer" | "gold" | "label", "passage"?}`; the
  answer is an index from 0, a letter, or the text of a choice

It does not know models: asking is `tasks`, weighing choices is `choices`.
"""

import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from minimind.data.jsonl import Problem, scan
from minimind.errors import DataError
from minimind.runtime.log import get_logger

SHORT_ANSWER = "short_answer"
"""The `grader` of short-answer questions."""

_MAX_PROBLEMS = 20
_log = get_logger("eval")
_NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)")


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A question with its possible answers."""

    id: str
    domain: str
    language: str
    question: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""


Question = dict[str, Any] | ChoiceQuestion
"""A question put to the engine (a row of the world, or a short answer in the same form), or one of choices."""


def read_questions(
    path: Path, *, graders: Collection[str] = (), on_error: Literal["raise", "skip"] = "raise"
) -> list[dict[str, Any]] | list[ChoiceQuestion]:
    """Return the questions of one file, all of one kind (that of its first row).

    `graders` are the names a world row's "grader" may have (empty: any). Raises DataError listing the malformed rows as
    `file:line: what` (with `on_error` "skip" they are logged instead), ConfigError when the file is missing.
    """
    questions: list[Any] = []
    problems: list[str] = []
    read: Callable[[Mapping[str, Any], str, str], Question | str] | None = None
    for item in scan(path):
        if isinstance(item, Problem):
            problems.append(str(item))
        else:
            row = item.data
            if read is None:
                read = _reader(row, graders)
            found = read(row, path.name.split(".")[0], f"{path.name}:{item.line}")
            if isinstance(found, str):
                problems.append(f"{path}:{item.line}: {found}")
            else:
                questions.append(found)
    if len(problems) > _MAX_PROBLEMS:
        problems[_MAX_PROBLEMS:] = [f"and {len(problems) - _MAX_PROBLEMS} more"]
    if problems and on_error == "raise":
        raise DataError("\n".join([*problems, "repair these rows, or leave them out with --on-error skip"]))
    for problem in problems:
        _log.warning("left out: %s", problem)
    if not questions:
        raise DataError(f"{path}: holds no question")
    return questions


def short_answer(
    question: dict[str, Any], text: str, reasoning: str = "", tool_calls: Sequence[dict[str, Any]] = ()
) -> bool:
    """Whether `text` is the answer: equal but for case, width, spaces and punctuation around.

    When the answer is a number, the last number in `text` must equal it. `reasoning` and `tool_calls` do not count.
    """
    del reasoning, tool_calls
    expected = str(question["answer"])
    if _NUMBER.fullmatch(expected.strip()):
        numbers = _NUMBER.findall(unicodedata.normalize("NFKC", text))
        return bool(numbers) and _value(numbers[-1]) == _value(expected.strip())
    return _plain(text) == _plain(expected)


def language_of(text: str) -> str:
    """Return "zh" when the text holds a Chinese character, else "en"."""
    return "zh" if re.search("[\u4e00-\u9fff]", text) else "en"


def _reader(
    row: Mapping[str, Any], graders: Collection[str]
) -> Callable[[Mapping[str, Any], str, str], Question | str]:
    if "choices" in row or "options" in row:
        return _choice_question
    if "grader" in row or "messages" in row:
        return lambda row, domain, where: _world_question(row, graders)  # noqa: ARG005 - one signature for the three
    return _short_question


def _world_question(row: Mapping[str, Any], graders: Collection[str]) -> Question | str:
    for name in ("id", "domain", "language", "grader"):
        if not isinstance(row.get(name), str) or not row[name]:
            return f'field "{name}": expected a text, found {row.get(name)!r}'
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        return 'field "messages": expected a list of messages that ends with the user\'s'
    if messages[-1].get("role") not in ("user", "tool"):
        return f'field "messages": the last must be the user\'s, found role {messages[-1].get("role")!r}'
    if not isinstance(row.get("answer"), str | int | float):
        return f'field "answer": expected a text, found {row.get("answer")!r}'
    if graders and row["grader"] not in graders:
        return f'field "grader": {row["grader"]!r} is not one of {", ".join(sorted(graders))}'
    if not isinstance(row.get("prompt") or "", str):
        return f'field "prompt": expected a text, found {row["prompt"]!r}'
    if not isinstance(row.get("shortcuts") or {}, dict):
        return f'field "shortcuts": expected an object of answers, found {row["shortcuts"]!r}'
    if not isinstance(row.get("chance", 0.0), int | float) or not 0 <= row.get("chance", 0.0) <= 1:
        return f'field "chance": expected a number from 0 to 1, found {row["chance"]!r}'
    return dict(row)


def _short_question(row: Mapping[str, Any], domain: str, where: str) -> Question | str:
    text = next((row[name] for name in ("question", "context", "query") if name in row), None)
    if not isinstance(text, str) or not text.strip():
        return 'expected a question: "question", "context" or "query" with a text (or the world\'s "messages")'
    is_continued = "continuation" in row
    answer = row.get("continuation") if is_continued else row.get("answer")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool) or not str(answer).strip():
        return f'field "{"continuation" if is_continued else "answer"}": expected a text, found {answer!r}'
    answer = str(answer).rpartition("####")[2].strip()  # GSM8K writes its derivation before this mark
    language = language_of(text)
    asked = f"问题：{text}\n答案：" if language == "zh" else f"Question: {text}\nAnswer:"
    return {
        "id": str(row.get("id", where)),
        "domain": str(row.get("domain", domain)),
        "language": str(row.get("language", language)),
        "messages": [{"role": "user", "content": text}],
        "prompt": text if is_continued else asked,
        "answer": answer,
        "grader": SHORT_ANSWER,
    }


def _choice_question(row: Mapping[str, Any], domain: str, where: str) -> Question | str:
    text = next((row[name] for name in ("question", "query", "context") if name in row), None)
    if not isinstance(text, str) or not text.strip():
        return 'field "question" (or "query"): expected a text'
    choices = row.get("choices", row.get("options"))
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        return f'field "choices": expected a list of at least two texts, found {choices!r}'
    name = next((name for name in ("answer", "gold", "label") if row.get(name) is not None), "answer")
    answer = _index(row.get(name), choices)
    if answer is None:
        return (
            f'field "{name}": expected an index from 0 to {len(choices) - 1}, a letter, or the text of a choice, '
            f"found {row.get(name)!r}"
        )
    passage = row.get("passage")
    return ChoiceQuestion(
        id=str(row.get("id", where)),
        domain=str(row.get("domain", domain)),
        language=str(row.get("language", language_of(text))),
        question=f"{passage}\n{text}" if isinstance(passage, str) and passage else text,
        choices=tuple(choices),
        answer=answer,
    )


def _index(answer: object, choices: list[str]) -> int | None:
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(choices) else None
    if not isinstance(answer, str):
        return None
    if choices.count(answer) == 1:
        return choices.index(answer)
    index = ord(answer) - ord("A") if len(answer) == 1 else -1
    return index if 0 <= index < len(choices) else None


def _plain(text: str) -> str:
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(words).strip(" .,:;!?\"'()。、“”‘’")


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", "").rstrip("."))
