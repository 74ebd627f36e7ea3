"""Conversation rows of any common layout -> `Conversation`.

Layouts: `conversations` or `messages` (OpenAI, upstream MiniMind, ShareGPT, LLaMA-Factory), Alpaca's instruction,
input, output and history, `prompt` and `response`, and KdConv's alternating speakers.
It knows nothing of tokens and budgets.
"""

import json
from typing import Any, cast

from minimind.data.messages import Conversation, Message, Reader, check_order, is_empty_turn

TURN_FIELDS = ("messages", "conversations", "conversation")
LAYOUTS = "messages, conversations, instruction + output, or prompt + response"


def read(data: dict[str, Any]) -> tuple[Conversation, list[str]]:
    """Return the conversation of a row, ending with its last answer, and the list of the row's problems."""
    reader = Reader()
    name, conversation = read_turns(data, reader)
    if reader.problems:
        return conversation, reader.problems
    check_order(conversation.messages, name, reader.problems)
    if not any(message["role"] == "assistant" for message in conversation.messages):
        reader.complain(name, "has no assistant turn, expected at least one answer to learn")
    messages = conversation.messages
    while messages and (messages[-1]["role"] != "assistant" or is_empty_turn(messages[-1])):
        messages.pop()
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and is_empty_turn(message):
            reader.complain(name, f"turn {i + 1}, an answer, is empty, expected content or tool_calls")
    return conversation, reader.problems


def read_turns(data: dict[str, Any], reader: Reader, field: str = "") -> tuple[str, Conversation]:
    """Return (field name, conversation) of a row in any layout, without judging the order of its turns.

    `field` names the field that holds the messages where it has another name than usual.
    """
    name = field or next((key for key in TURN_FIELDS if key in data), "")
    if name:
        value = data[name]
        if (
            isinstance(value, list)
            and value
            and all(isinstance(m, dict) and "message" in m for m in cast(list[Any], value))
        ):
            conversation = _alternating(cast(list[dict[str, Any]], value), name, reader)
        else:
            conversation = reader.messages(value, name)
    elif "instruction" in data:
        name, conversation = "instruction", _alpaca(data, reader)
    elif "prompt" in data and ("response" in data or "completion" in data):
        answer = "response" if "response" in data else "completion"
        name, conversation = "prompt", _pair(data["prompt"], data[answer], "prompt", answer, reader)
    else:
        keys = ", ".join(list(data)[:8]) or "nothing"
        reader.complain("row", f"has no conversation (its fields are {keys}), expected {LAYOUTS}")
        return "row", Conversation([])
    _system_and_tools(data, conversation, reader)
    if "label" in data and name in ("messages", "conversations"):
        if isinstance(data["label"], bool):
            conversation.disliked = not data["label"]
        else:
            reader.complain("label", "expected true or false")
    return name, conversation


def _system_and_tools(data: dict[str, Any], conversation: Conversation, reader: Reader) -> None:
    if data.get("tools") is not None:
        conversation.tools = reader.tools(data["tools"], "tools") or conversation.tools
    system = data.get("system")
    if system is None or system == "":
        return
    if conversation.messages and conversation.messages[0]["role"] == "system":
        reader.complain("system", "is given beside a system turn, expected one of the two")
    else:
        conversation.messages.insert(0, {"role": "system", "content": reader.text(system, "system")})


def _pair(question: object, answer: object, question_name: str, answer_name: str, reader: Reader) -> Conversation:
    turns = [
        {"role": "user", "content": reader.text(question, question_name)},
        {"role": "assistant", "content": reader.text(answer, answer_name)},
    ]
    return Conversation(turns)


def _alternating(turns: list[dict[str, Any]], name: str, reader: Reader) -> Conversation:
    """KdConv: two speakers in turns, the first asks."""
    roles = ("user", "assistant")
    return Conversation(
        [
            {"role": roles[i % 2], "content": reader.text(turn["message"], f"{name}[{i}].message")}
            for i, turn in enumerate(turns)
        ]
    )


def _alpaca(data: dict[str, Any], reader: Reader) -> Conversation:
    answer_key = next((key for key in ("output", "response") if key in data), None)
    if answer_key is None:
        reader.complain("output", "is missing, expected the answer beside instruction")
        return Conversation([])
    instruction = reader.text(data["instruction"], "instruction")
    extra = reader.text(data["input"], "input") if data.get("input") is not None else ""
    question = "\n".join(part for part in (instruction, extra) if part)
    conversation = _pair(question, data[answer_key], "instruction", answer_key, reader)
    history = data.get("history") or []
    if not isinstance(history, list):
        reader.complain("history", "expected a list of [question, answer]")
        return conversation
    earlier: list[Message] = []
    for i, pair in enumerate(cast(list[Any], history)):
        if not isinstance(pair, list) or len(cast(list[Any], pair)) != 2:
            reader.complain(f"history[{i}]", "expected [question, answer]")
            continue
        earlier += _pair(pair[0], pair[1], f"history[{i}][0]", f"history[{i}][1]", reader).messages
    conversation.messages[:0] = earlier
    return conversation


def content_key(conversation: Conversation) -> str:
    """Return text that is equal for equal conversations: what the split into training and validation hashes."""
    return json.dumps([conversation.messages, conversation.tools], ensure_ascii=False, sort_keys=True)
