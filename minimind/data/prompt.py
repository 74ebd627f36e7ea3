"""Prompt rows for reinforcement learning -> `Prompt`: what to answer, and what a reward may compare the answer with.

Layouts: a conversation that ends with the user's turn or an answer to be replaced (`[..., {"role": "assistant",
"content": ""}]`), or `prompt` (text or messages) beside `answer`; tool RL has `tools` and `gt` (the values a right
answer holds) too. It knows neither rewards nor tokens; what else a row holds is kept in `fields` for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from minimind.data.conversation import TURN_FIELDS, read_turns
from minimind.data.jsonl import scan
from minimind.data.messages import Message, Reader, check_order, is_empty_turn
from minimind.data.rows import Problem, Row, json_type
from minimind.errors import DataError


@dataclass(slots=True)
class Prompt:
    """One prompt, ending with a turn that wants an answer."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    answer: str | None = None
    """The reference answer, where the row has one."""
    gt: list[str] = field(default_factory=list[str])
    """Values that a right final answer holds (tool RL)."""
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    """The row as it stands in the file: id, grader, ..."""
    place: str = ""
    """`file:line` of the row, for messages."""


def read(data: dict[str, Any], *, needs_tools: bool = False) -> tuple[Prompt, list[str]]:
    """Return the prompt of a row and the list of the row's problems; `needs_tools`: a row of tool RL."""
    reader = Reader()
    question = next((key for key in ("prompt", "question") if key in data), "")
    if question and not any(key in data for key in TURN_FIELDS):
        value = data[question]
        if not isinstance(value, list):
            text = reader.text(value, question, expected="a string or a list of messages")
            value = [{"role": "user", "content": text}]
        turns = {question: value, **{key: data[key] for key in ("system", "tools") if key in data}}
    else:
        question, turns = "", {key: value for key, value in data.items() if key != "label"}
    name, conversation = read_turns(turns, reader, question)
    prompt = Prompt(conversation.messages, conversation.tools, fields=data)
    if reader.problems:
        return prompt, reader.problems
    if prompt.messages and prompt.messages[-1]["role"] == "assistant":
        last = prompt.messages.pop()
        prompt.answer = None if is_empty_turn(last) else last["content"]
    check_order(prompt.messages, name, reader.problems)
    if not prompt.messages or prompt.messages[-1]["role"] not in ("user", "tool"):
        reader.complain(name, "has no turn of the user at its end, expected a question to answer")
    if data.get("answer") is not None:
        prompt.answer = _value(data["answer"], "answer", reader)
    if data.get("gt") is not None:
        values = cast(list[Any], data["gt"]) if isinstance(data["gt"], list) else [data["gt"]]
        prompt.gt = [_value(value, f"gt[{i}]", reader) for i, value in enumerate(values)]
    if needs_tools and not prompt.tools:
        reader.complain("tools", "is missing, expected the tools that may be called")
    if needs_tools and not prompt.gt:
        reader.complain("gt", "is missing, expected the values that a right answer holds")
    return prompt, reader.problems


def _value(value: object, name: str, reader: Reader) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        reader.complain(name, f"is {json_type(value)}, expected a string or a number")
        return ""
    return reader.text(value, name)


def load(
    files: Sequence[Path], *, needs_tools: bool = False, on_error: str = "raise"
) -> tuple[list[Prompt], dict[str, int]]:
    """Return (all prompts of the files, in memory; counts of rows, prompts and skipped rows).

    DataError at the first bad row (`file:line: what`) unless `on_error` is "skip", and when no prompt is left.
    """
    prompts: list[Prompt] = []
    report = {"rows": 0, "prompts": 0, "skipped": 0}
    for file in files:
        for item in scan(file):
            report["rows"] += 1
            prompt, problem = _prompt_or_problem(item, needs_tools)
            if prompt is not None:
                prompts.append(prompt)
            elif on_error == "raise" or (isinstance(item, Problem) and item.fatal):
                raise DataError(f"{problem}\nmend it, or leave bad rows out: --data.on-error skip")
            else:
                report["skipped"] += 1
    report["prompts"] = len(prompts)
    if not prompts:
        raise DataError(f"{', '.join(map(str, files))}: no prompt in {report['rows']} rows")
    return prompts, report


def _prompt_or_problem(item: Row | Problem, needs_tools: bool) -> tuple[Prompt | None, Problem | None]:
    if isinstance(item, Problem):
        return None, item
    prompt, problems = read(item.data, needs_tools=needs_tools)
    prompt.place = f"{item.file}:{item.line}"
    return (None, Problem(item.file, item.line, "; ".join(problems))) if problems else (prompt, None)
