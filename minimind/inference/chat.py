"""The text side of inference: a model's words into thoughts, answer and tool calls.

`StreamParser` reads what the chat template makes a model write (`<think>`, `<tool_call>`), however the text is cut
into pieces. How ids are chosen (`inference.engine`), what a conversation is (`inference.session`) and how it looks on a
screen (`inference.terminal`) are not known here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from minimind.errors import ConfigError

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class ChatDelta:
    """What became known of an answer, or (added up) all of it."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """`{"name", "arguments"}`, arguments an object. Text that is no such call comes as content, unchanged."""
    finish_reason: FinishReason | None = None
    """Set at the end of each answer: "stop", "length", "cancelled", or "tool_calls" when it ended with calls."""
    tool_results: tuple[dict[str, Any], ...] = ()
    """`{"name", "content"}` of calls that were run, in order."""

    def __bool__(self) -> bool:
        """Whether there is anything in it."""
        return self != _NOTHING

    def __add__(self, later: "ChatDelta") -> "ChatDelta":
        """Return both, one after the other."""
        return ChatDelta(
            self.content + later.content,
            self.reasoning + later.reasoning,
            self.tool_calls + later.tool_calls,
            later.finish_reason or self.finish_reason,
            self.tool_results + later.tool_results,
        )

    def message(self) -> dict[str, Any]:
        """Return it as the assistant's message, as data files and the chat template have it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message


_NOTHING = ChatDelta()


_OPEN_THOUGHT, _CLOSE_THOUGHT = "<think>", "</think>"
_OPEN_CALL, _CLOSE_CALL = "<tool_call>", "</tool_call>"

_State = Literal["content", "reasoning", "call"]
# The template puts a line break before these two; with it they are one pattern, so that it is no part of the text.
_TAGS: dict[_State, tuple[str, ...]] = {
    "content": (f"\n{_OPEN_CALL}", _OPEN_CALL, _OPEN_THOUGHT),
    "reasoning": (f"\n{_CLOSE_THOUGHT}", _CLOSE_THOUGHT),
    "call": (_CLOSE_CALL,),
}


class StreamParser:
    """Splits an answer that comes in pieces: `push` each, add up what it returns, end with `flush`.

    The sum does not depend on where the pieces are cut, and equals `parse` of the whole. Half a tag or half a stop
    string is never let out; a complete one is not let out either, except a tag that is not at its place (`</think>`
    without a thought), which is text like any other. `stop`: the answer ends before the first of these strings;
    `stopped` tells. `in_reasoning`: the prompt has already opened the thought.
    """

    def __init__(self, *, stop: Sequence[str] = (), in_reasoning: bool = False) -> None:
        """Start before the first piece. ConfigError for an empty stop string."""
        if isinstance(stop, str) or not all(stop):
            raise ConfigError(f"stop: expected a list of texts, none of them empty, got {stop!r}.")
        self.stopped = False
        self._stop = tuple(stop)
        self._unstopped = ""  # not yet known to be free of stop strings
        self._text = ""  # not yet known to be free of tags
        self._state: _State = "reasoning" if in_reasoning else "content"
        self._breaks_to_skip = 0
        self._call = ""  # an open tool call, its opening tag first
        self._found = _NOTHING

    def push(self, text: str) -> ChatDelta:
        """Return what became certain with this piece, maybe nothing."""
        if self.stopped:
            return _NOTHING
        self._unstopped += text
        safe, match = _find(self._unstopped, self._stop)
        self._text += self._unstopped[:safe]
        self._unstopped = self._unstopped[safe:]
        if match:
            self.stopped = True
            self._unstopped = ""
        self._read(is_end=self.stopped)
        return self._take()

    def flush(self, finish_reason: FinishReason | None = None) -> ChatDelta:
        """Return what was held back, and close the answer."""
        if not self.stopped:
            safe, match = _find(self._unstopped, self._stop, is_end=True)
            self._text += self._unstopped[:safe]
            self.stopped = bool(match)
            self._unstopped = ""
        self._read(is_end=True)
        if self._state == "call":  # never closed: text, after all
            self._found += ChatDelta(content=self._call)
            self._call, self._state = "", "content"
        return replace(self._take(), finish_reason=finish_reason)

    def _take(self) -> ChatDelta:
        found, self._found = self._found, _NOTHING
        return found

    def _read(self, *, is_end: bool) -> None:
        while self._text:
            while self._breaks_to_skip and self._text.startswith("\n"):
                self._text = self._text[1:]
                self._breaks_to_skip -= 1
            if not self._text:
                return
            self._breaks_to_skip = 0
            safe, tag = _find(self._text, _TAGS[self._state], is_end=is_end)
            self._emit(self._text[:safe])
            self._text = self._text[safe + len(tag) :]
            if not tag:
                return
            self._enter(tag)

    def _emit(self, text: str) -> None:
        if self._state == "call":
            self._call += text
        elif text:
            self._found += ChatDelta(content=text) if self._state == "content" else ChatDelta(reasoning=text)

    def _enter(self, tag: str) -> None:
        if tag == _OPEN_THOUGHT:
            self._state, self._breaks_to_skip = "reasoning", 1
        elif tag.endswith(_CLOSE_THOUGHT):
            self._state, self._breaks_to_skip = "content", 2
        elif tag.endswith(_OPEN_CALL):
            self._state, self._call = "call", tag
        else:
            call = _tool_call(self._call.strip("\n").removeprefix(_OPEN_CALL))
            if call is None:
                self._found += ChatDelta(content=self._call + tag)
            else:
                self._found += ChatDelta(tool_calls=(call,))
                self._breaks_to_skip = 1
            self._state, self._call = "content", ""


def parse(
    text: str, *, stop: Sequence[str] = (), in_reasoning: bool = False, finish_reason: FinishReason | None = None
) -> ChatDelta:
    """Return a whole answer (without the token that ended it) as content, reasoning and tool calls."""
    parser = StreamParser(stop=stop, in_reasoning=in_reasoning)
    return parser.push(text) + parser.flush(finish_reason)


def _find(text: str, patterns: Sequence[str], *, is_end: bool = False) -> tuple[int, str]:
    """Return where `text` stops being free of `patterns`, and the pattern there; "" where one has only begun.

    The earliest beginning counts, so the answer is the same however the text was cut.
    """
    starts = [(text.find(pattern), pattern) for pattern in patterns]
    place, found = min(((start, pattern) for start, pattern in starts if start >= 0), default=(len(text), ""))
    if not is_end and patterns:
        longest = max(map(len, patterns)) - 1
        for start in range(max(0, len(text) - longest), place):
            if any(pattern.startswith(text[start:]) for pattern in patterns):
                return start, ""
    return place, found


def _tool_call(text: str) -> dict[str, Any] | None:
    """Return `{"name", "arguments"}` of the JSON in a tool call, or None if it is no call."""
    try:
        call: Any = json.loads(text, parse_constant=_refuse_constant)
        arguments: Any = call["arguments"]
        if isinstance(arguments, str):  # OpenAI's form: the object as a text
            arguments = json.loads(arguments, parse_constant=_refuse_constant)
        name: Any = call["name"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return {"name": name, "arguments": cast(dict[str, Any], arguments)}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
