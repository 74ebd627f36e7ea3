"""Preference rows -> `Preference`: a prompt with a chosen and a rejected answer.

Layouts: `chosen` and `rejected` as whole conversations, as messages beside `conversations` or `messages`, or as strings
beside `prompt` (or `instruction` and `input`). Unpaired rows (`messages` and `label`, KTO) are read, but no pair can be
made of them. It knows nothing of tokens (budget.py).
"""

import json
from dataclasses import dataclass
from typing import Any, cast

from minimind.data.conversation import TURN_FIELDS, read_turns
from minimind.data.messages import Message, Reader, check_order, is_empty_turn


@dataclass(slots=True)
class Preference:
    """A prompt that ends with a user's (or tool's) turn and the answers to it; an unpaired row lacks one side."""

    prompt: list[Message]
    chosen: list[Message] | None
    rejected: list[Message] | None
    tools: list[dict[str, Any]] | None = None


def read(data: dict[str, Any]) -> tuple[Preference, list[str]]:
    """Return the preference of a row and the list of the row's problems."""
    reader = Reader()
    if "chosen" not in data and "rejected" not in data and "label" in data:
        name, conversation = read_turns(data, reader)
        start = _answer_start(conversation.messages)
        answer = conversation.messages[start:]
        sides = (None, answer) if conversation.disliked else (answer, None)
        found = Preference(conversation.messages[:start], *sides, tools=conversation.tools)
        _check(found, name, reader)
        return found, reader.problems
    missing = [side for side in ("chosen", "rejected") if side not in data]
    if missing:
        reader.complain(missing[0], 'is missing, expected "chosen" and "rejected"')
        return Preference([], None, None), reader.problems
    prompt, tools = _prompt(data, reader)
    chosen = _side(data["chosen"], "chosen", reader)
    rejected = _side(data["rejected"], "rejected", reader)
    if not prompt:  # both sides are whole conversations that begin alike
        common = 0
        while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
            common += 1
        common = min(common, _answer_start(chosen), _answer_start(rejected))
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    elif chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    found = Preference(prompt, chosen, rejected, tools)
    if not reader.problems:
        _check(found, "chosen/rejected", reader)
    return found, reader.problems


def _prompt(data: dict[str, Any], reader: Reader) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Return the turns that stand beside chosen and rejected (maybe none) and the tools."""
    context = {key: data[key] for key in ("system", "tools") if key in data}
    if any(key in data for key in TURN_FIELDS):
        _, conversation = read_turns({key: value for key, value in data.items() if key != "label"}, reader)
        return conversation.messages, conversation.tools
    question = data.get("prompt", data.get("question", data.get("instruction")))
    if question is None:
        return [], reader.tools(context.get("tools"), "tools")
    if isinstance(question, list):
        _, conversation = read_turns({"prompt": question, **context}, reader, "prompt")
        return conversation.messages, conversation.tools
    text = reader.text(question, "prompt", expected="a string or a list of messages")
    extra = data.get("input")
    if isinstance(extra, str) and extra:
        text = f"{text}\n{extra}"
    _, conversation = read_turns({"messages": [{"role": "user", "content": text}], **context}, reader)
    return conversation.messages, conversation.tools


def _side(value: object, name: str, reader: Reader) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": reader.text(value, name)}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        reader.complain(name, "expected a string, a message or a list of messages")
        return []
    return reader.messages(cast(list[Any], value), name).messages


def _answer_start(messages: list[Message]) -> int:
    """Return where the last answer begins: after the last user turn."""
    return max((i + 1 for i, message in enumerate(messages) if message["role"] == "user"), default=0)


def _check(found: Preference, name: str, reader: Reader) -> None:
    if not any(message["role"] == "user" for message in found.prompt):
        reader.complain(name, "no user turn comes before the answers, expected a prompt that both share")
        return
    for side, answer in (("chosen", found.chosen), ("rejected", found.rejected)):
        if answer is None:
            continue
        if not answer or answer[-1]["role"] != "assistant":
            reader.complain(side, "does not end with an assistant turn, expected an answer")
        elif all(is_empty_turn(message) for message in answer):
            reader.complain(side, "is empty, expected an answer")
        else:
            check_order([*found.prompt, *answer], side, reader.problems)
    if found.chosen is not None and found.chosen == found.rejected:
        reader.complain("chosen", "is equal to rejected: nothing to prefer")


def unpaired(found: Preference) -> list[str]:
    """Return the problem of a row that has only one side."""
    if found.chosen is None or found.rejected is None:
        return ["label: one answer with a label, expected a pair: chosen and rejected (dpo --loss kto takes it)"]
    return []


def content_key(found: Preference) -> str:
    """Return text that is equal for rows with one prompt, so that a prompt is on one side of the split only."""
    return json.dumps([found.prompt, found.tools], ensure_ascii=False, sort_keys=True)
