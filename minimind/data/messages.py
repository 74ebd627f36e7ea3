"""Messages of any common shape -> one canonical shape: what all kinds of conversation rows share.

Canonical: `{"role": "system"|"user"|"assistant"|"tool", "content", "reasoning_content"?, "tool_calls"?: [...]}`
with tool calls and tools in OpenAI's form, arguments as objects. Every complaint names the field and what was expected.
It knows nothing of files, tokens or budgets.
"""

import json
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

from minimind.data.rows import json_type

Message = dict[str, Any]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
    "function_call": "function_call", "tool_call": "function_call",
}  # fmt: skip
"""Roles of OpenAI's, ShareGPT's, LLaMA-Factory's and upstream's data -> ours ("function_call" is an assistant's)."""

_EXPECTED_ROLES = "system, user, assistant or tool"
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("reasoning", "thinking")


@dataclass(slots=True)
class Conversation:
    """Canonical messages and the tools offered (None: none were)."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    disliked: bool = False
    """The row says that its answer is a bad one (`label: false` of KTO data): nothing to imitate."""


@dataclass(slots=True)
class Reader:
    """Collects the problems of one row while its fields are read."""

    problems: list[str] = field(default_factory=list[str])

    def complain(self, name: str, what: str) -> None:
        """Note one problem: `name` is the path of the field."""
        self.problems.append(f"{name}: {what}")

    def text(self, value: object, name: str, *, expected: str = "a string") -> str:
        """Return `value` when it is a string without NUL; complain and return "" otherwise."""
        if not isinstance(value, str):
            self.complain(name, f"is {json_type(value)}, expected {expected}")
            return ""
        if "\0" in value:
            self.complain(name, f"holds the character NUL (U+0000) at place {value.index(chr(0)) + 1}, expected text")
        return value

    def parsed(self, value: object, name: str, expected: str) -> object:
        """Return `value`, parsed when it is a string of JSON; None (with a complaint) when it does not parse."""
        if not isinstance(value, str):
            return value
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError as error:
            self.complain(name, f"is a string that is not valid JSON ({error}), expected {expected}")
            return None

    def tools(self, value: object, name: str) -> list[dict[str, Any]] | None:
        """Return tools in OpenAI's form from a list or a string of JSON; None when there are none."""
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        parsed = self.parsed(value, name, "a list of tools")
        if parsed is None:
            return None
        if not isinstance(parsed, list):
            self.complain(name, f"is {json_type(parsed)}, expected a list of tools")
            return None
        tools: list[dict[str, Any]] = []
        for i, tool in enumerate(cast(list[Any], parsed)):
            function = cast(dict[str, Any], tool).get("function", tool) if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                self.complain(
                    f"{name}[{i}]", 'expected {"type": "function", "function": {"name": ..., "parameters": ...}}'
                )
            elif "function" in tool:
                tools.append({"type": "function", **cast(dict[str, Any], tool)})
            else:
                tools.append({"type": "function", "function": function})
        return tools or None

    def tool_calls(self, value: object, name: str) -> list[dict[str, Any]]:
        """Return tool calls in OpenAI's form, arguments as objects, from a list, one object or a string of JSON."""
        if value is None or (isinstance(value, str) and not value.strip()):
            return []
        parsed = self.parsed(value, name, "a list of tool calls")
        if parsed is None:
            return []
        if not isinstance(parsed, list):
            parsed = [parsed]
        calls: list[dict[str, Any]] = []
        for i, call in enumerate(cast(list[Any], parsed)):
            where = f"{name}[{i}]"
            if isinstance(call, str):
                call = self.parsed(call, where, "a tool call")
            function = cast(dict[str, Any], call).get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
                self.complain(where, 'expected a tool call {"name": ..., "arguments": {...}}')
                continue
            arguments = function.get("arguments", function.get("parameters", {}))
            if isinstance(arguments, str):
                arguments = self.parsed(arguments or "{}", f"{where}.arguments", "an object")
                if arguments is None:
                    continue
            if not isinstance(arguments, dict):
                self.complain(f"{where}.arguments", f"is {json_type(arguments)}, expected an object")
                continue
            calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
        return calls

    def messages(self, value: object, name: str) -> Conversation:
        """Return canonical messages (and the tools that stand inside messages); order is checked by `check_order`."""
        conversation = Conversation([])
        if not isinstance(value, list):
            self.complain(name, f"is {json_type(value)}, expected a list of messages")
            return conversation
        if not value:
            self.complain(name, "is empty, expected at least one message")
        for i, raw in enumerate(cast(list[Any], value)):
            where = f"{name}[{i}]"
            if not isinstance(raw, dict):
                self.complain(where, f'is {json_type(raw)}, expected an object {{"role", "content"}}')
                continue
            raw = cast(dict[str, Any], raw)
            if raw.get("tools") is not None:
                conversation.tools = self.tools(raw["tools"], f"{where}.tools") or conversation.tools
            if message := self._message(raw, where):
                self._append(conversation.messages, message)
        return conversation

    @staticmethod
    def _append(messages: list[Message], message: Message) -> None:
        # ShareGPT writes an answer and the call that follows it as two turns; it is one turn of the assistant.
        if message.pop("continues", False) and messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).extend(message.get("tool_calls", []))
        else:
            messages.append(message)

    def _message(self, raw: dict[str, Any], where: str) -> Message | None:
        role_key = "role" if "role" in raw else "from"
        role = raw.get(role_key)
        if role is None:
            return self.complain(where, f'has no "role", expected {_EXPECTED_ROLES}')
        role = ROLES.get(role) if isinstance(role, str) else None
        if role is None:
            shown = json.dumps(raw[role_key], ensure_ascii=False)
            return self.complain(f"{where}.{role_key}", f"{shown[:60]} is unknown, expected {_EXPECTED_ROLES}")
        content_key = next((key for key in ("content", "value") if key in raw), None)
        if role == "function_call":
            if content_key is None:
                return self.complain(where, 'has no "value", expected the tool call')
            calls = self.tool_calls(raw[content_key], f"{where}.{content_key}")
            return {"role": "assistant", "content": "", "tool_calls": calls, "continues": True}
        message: Message = {"role": role, "content": ""}
        calls = self.tool_calls(raw.get("tool_calls"), f"{where}.tool_calls") if role == "assistant" else []
        if role == "assistant" and isinstance(raw.get("function_call"), dict):
            calls += self.tool_calls(raw["function_call"], f"{where}.function_call")
        has_calls = bool(raw.get("tool_calls") or raw.get("function_call"))
        if content_key is None or raw[content_key] is None:
            if not (role == "assistant" and has_calls):
                found = "has no content" if content_key is None else f"{content_key} is null"
                return self.complain(where, f"{found}, expected a string")
        elif isinstance(raw[content_key], list):
            self._parts(raw[content_key], f"{where}.{content_key}", message, calls)
        else:
            message["content"] = self.text(raw[content_key], f"{where}.{content_key}")
        for key in ("reasoning_content", "reasoning"):
            if role == "assistant" and raw.get(key) is not None:
                message["reasoning_content"] = self.text(raw[key], f"{where}.{key}")
                break
        if message.get("reasoning_content") == "":
            del message["reasoning_content"]
        if calls:
            message["tool_calls"] = calls
        return message

    def _parts(self, parts: list[Any], where: str, message: Message, calls: list[dict[str, Any]]) -> None:
        """Read content given as a list of typed parts into `message` and `calls`."""
        texts: list[str] = []
        reasoning: list[str] = []
        for i, part in enumerate(parts):
            name = f"{where}[{i}]"
            kind = cast(dict[str, Any], part).get("type") if isinstance(part, dict) else None
            if kind is None:
                self.complain(name, 'expected a part {"type": "text", "text": ...}')
                continue
            value = next((part[key] for key in ("value", "text", kind) if key in part), None)
            if kind in _TEXT_PARTS:
                texts.append(self.text(value, name))
            elif kind in _REASONING_PARTS and message["role"] == "assistant":
                reasoning.append(self.text(value, name))
            elif kind == "tool_call" and message["role"] == "assistant":
                calls += self.tool_calls(value, name)
            else:
                self.complain(
                    f"{name}.type", f"{kind!r} is not possible in a turn of the {message['role']}, expected text"
                )
        message["content"] = "\n".join(texts)
        if reasoning:
            message["reasoning_content"] = "\n".join(reasoning)


def check_order(messages: list[Message], name: str, problems: list[str]) -> None:
    """Add what is wrong with the order: system only first, user and assistant in turns, tools after their call."""
    previous = ""
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "system" and i > 0:
            problems.append(f"{name}: turn {i + 1} is a system turn, expected it only as the first")
            continue
        if role == "assistant" and previous == "":
            problems.append(f"{name}: the first turn is the assistant's, expected the user's")
        elif role == "user" and previous == "user":
            problems.append(f"{name}: turns {i} and {i + 1} are both the user's, expected the assistant's between them")
        elif role == "assistant" and previous == "assistant":
            problems.append(f"{name}: turns {i} and {i + 1} are both the assistant's, expected the user's between them")
        elif role == "tool" and previous != "tool" and not (i > 0 and messages[i - 1].get("tool_calls")):
            problems.append(
                f"{name}: turn {i + 1} is a tool's answer, expected an assistant turn with tool_calls before it"
            )
        previous = role if role != "system" else previous


def is_empty_turn(message: Message) -> bool:
    """Return whether nothing is said: no content, reasoning or tool call."""
    return not (message["content"].strip() or message.get("reasoning_content", "").strip() or message.get("tool_calls"))
