"""Conversations to ids: one rendering of the chat template gives the text, the ids and the loss mask.

It knows messages and the template, not where messages come from (`data`), and it never reads a model's answer back
(`inference.chat`).

What people, tools and system prompts write can never become a control token: before rendering every control token in
it is broken up by a mark character, which is taken out again before that stretch is encoded as plain text. In the
`content` of an assistant the tags in `ASSISTANT_TAGS` are honoured, because that is how a model writes them.
Deviation: `apply_chat_template` of Transformers encodes such hostile text as control tokens; the rendered text is the
same, the ids differ (tests/parity/test_rendering.py::test_hostile_text). For all other text both agree.

The mask is made while rendering: the template's `{% generation %}` marks the assistant's turn, its `<|im_end|>`
included. For a template without such marks (those of upstream MiniMind) a turn is what rendering the messages up to and
including it adds to the prompt for it; ids are never searched.

The text is cut where each assistant's turn begins and encoded piece by piece, so the ids of a prompt are always a
prefix of the ids of the conversation that continues it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from minimind.batch import Example
from minimind.errors import DataError
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.template import CompiledTemplate, compile_template

ROLES = ("system", "user", "assistant", "tool")
ASSISTANT_TAGS = frozenset(("<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>"))
"""Tags an assistant's `content` may write as single tokens."""

Message = Mapping[str, Any]
"""`{"role", "content", "reasoning_content"?, "tool_calls"?}`."""


_LEARNED, _GIVEN = [1.0], [0.0]


@dataclass(frozen=True)
class Conversation:
    """The arguments of one rendering, for `render_batch`."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = False
    enable_thinking: bool | None = None


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
) -> Example:
    """Return ids and loss weights of a conversation: 1 on what the assistant writes, its `<|im_end|>` included, else 0.

    `enable_thinking`: None, the model decides (thoughts are rendered where a message has some); True, every answer
    starts with a thought (`<think>` and its line break belong to the prompt); False, with an empty one that belongs to
    the prompt, and thoughts of the messages are left out.
    DataError names the message at fault, CheckpointError a template that cannot be used.
    """
    return render_batch(tokenizer, [Conversation(messages, tools, add_generation_prompt, enable_thinking)])[0]


def render_batch(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], *, known: dict[str, list[int]] | None = None
) -> list[Example]:
    """Return `render` of each conversation; their text is encoded together, on all processors.

    `known` holds the ids of stretches of plain text from one call to the next; whoever gives it keeps it small.
    """
    split = [list(_pieces(tokenizer, conversation)) for conversation in conversations]
    known = {} if known is None else known
    texts = dict.fromkeys(text for pieces in split for text, is_control, _ in pieces if not is_control)
    new = [text for text in texts if text not in known]
    known.update(zip(new, tokenizer.encode_batch(new) if len(new) > 1 else map(tokenizer.encode, new), strict=True))
    examples: list[Example] = []
    for pieces in split:
        ids: list[int] = []
        weights: list[float] = []
        for text, is_control, is_learned in pieces:
            if is_control:
                ids.append(tokenizer.special_ids[text])
            else:
                ids += known[text]
            weights += (_LEARNED if is_learned else _GIVEN) * (len(ids) - len(weights))
        examples.append(Example(ids, weights))
    return examples


def render_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
) -> str:
    """Return the text of a conversation, the same that Transformers renders from this template."""
    conversation = Conversation(messages, tools, add_generation_prompt, enable_thinking)
    _check(conversation)
    return compile_template(tokenizer.chat_template).render(_variables(conversation))


# -- marks: characters of a private area that the conversation at hand does not use ------------------------------------


@dataclass(frozen=True)
class _Marks:
    escape: str
    """After each character of a control token that is only text."""
    start: str
    end: str
    """Around what the assistant writes."""


_MARKS = [_Marks(*map(chr, range(first, first + 3))) for first in range(0x10F000, 0x10FF00, 3)]


class _MarkInTextError(Exception):
    """The conversation itself uses a mark character; take other marks."""


def _pieces(tokenizer: Tokenizer, conversation: Conversation) -> Iterator[tuple[str, bool, bool]]:
    """Yield (text, is a control token, is learned) in order."""
    _check(conversation)
    template = compile_template(tokenizer.chat_template)
    for marks in _MARKS:
        try:
            text = _render_marked(tokenizer, template, conversation, marks)
            break
        except _MarkInTextError:
            continue
    else:
        raise DataError("the conversation uses the whole private area U+10F000..U+10FEFF; leave some of it free.")
    is_learned = False
    for part in _splitter(tuple(tokenizer.special_ids), marks).split(text):
        if part == marks.start:
            is_learned = True
        elif part == marks.end:
            is_learned = False
        elif part in tokenizer.special_ids:
            yield part, True, is_learned
        elif part := part.replace(marks.escape, ""):
            yield part, False, is_learned


@lru_cache(maxsize=64)
def _splitter(control_tokens: tuple[str, ...], marks: _Marks) -> re.Pattern[str]:
    return re.compile(f"({marks.start}|{marks.end}|{_alternatives(control_tokens)})")


@lru_cache(maxsize=64)
def _finder(control_tokens: tuple[str, ...], honoured: frozenset[str]) -> re.Pattern[str]:
    return re.compile(_alternatives(tuple(token for token in control_tokens if token not in honoured)))


def _alternatives(control_tokens: tuple[str, ...]) -> str:
    longest_first = sorted(control_tokens, key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or "(?!)"


def _render_marked(tokenizer: Tokenizer, template: CompiledTemplate, conversation: Conversation, marks: _Marks) -> str:
    control = tuple(tokenizer.special_ids)
    everywhere, in_answers = _finder(control, frozenset()), _finder(control, ASSISTANT_TAGS)

    def escape(value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            if not value.isascii() and (marks.escape in value or marks.start in value or marks.end in value):
                raise _MarkInTextError
            return pattern.sub(lambda found: "".join(c + marks.escape for c in found.group()), value)
        if isinstance(value, Mapping):
            return {
                escape(key, everywhere): escape(item, pattern) for key, item in cast(Mapping[Any, Any], value).items()
            }
        if isinstance(value, list | tuple):
            return [escape(item, pattern) for item in cast(Sequence[Any], value)]
        return value

    messages = [
        {
            key: escape(value, in_answers if key == "content" and message["role"] == "assistant" else everywhere)
            for key, value in message.items()
        }
        for message in conversation.messages
    ]
    safe = Conversation(
        messages,
        escape(conversation.tools, everywhere),
        conversation.add_generation_prompt,
        conversation.enable_thinking,
    )
    if template.has_generation_marks:
        return template.render(_variables(safe), (marks.start, marks.end))
    return _mark_by_prefixes(tokenizer, template, safe, marks)


def _mark_by_prefixes(
    tokenizer: Tokenizer, template: CompiledTemplate, conversation: Conversation, marks: _Marks
) -> str:
    """Return the marked text of a template that does not say what the assistant wrote."""

    def text_of(count: int, add_generation_prompt: bool) -> str:
        messages = conversation.messages[:count]
        part = Conversation(messages, conversation.tools, add_generation_prompt, conversation.enable_thinking)
        return template.render(_variables(part))

    text = text_of(len(conversation.messages), conversation.add_generation_prompt)
    splitter = _splitter(tuple(tokenizer.special_ids), marks)
    turn_end = tokenizer.id_to_token(tokenizer.eos_id)
    marked, done = "", 0
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        prompt = text_of(index, True) if index else ""
        after = text_of(index + 1, False)
        if not text.startswith(after):
            if conversation.add_generation_prompt:
                continue  # a prompt teaches nothing; its ids need no marks in a template that rewrites earlier turns
            raise DataError(
                f"messages[{index}]: this chat template rewrites earlier turns, so what the assistant wrote cannot be "
                "told apart. Put {% generation %} ... {% endgeneration %} around it in chat_template.jinja."
            )
        start = max(done, _shared(prompt, after))
        # Where the answer departs from the prompt inside a control token, the whole token is the assistant's.
        start = next(
            (found.start() for found in splitter.finditer(after) if found.start() < start < found.end()), start
        )
        end = after.rfind(turn_end, start)
        end = len(after) if end < 0 else end + len(turn_end)
        marked += text[done:start] + marks.start + text[start:end] + marks.end
        done = end
    return marked + text[done:]


def _shared(one: str, other: str) -> int:
    """Return the length of the longest common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _variables(conversation: Conversation) -> dict[str, Any]:
    variables: dict[str, Any] = {
        "messages": list(conversation.messages),
        "tools": list(conversation.tools) if conversation.tools else None,
        "add_generation_prompt": conversation.add_generation_prompt,
    }
    if conversation.enable_thinking is not None:
        # The second name is that of upstream's template of 2026.
        variables |= {"enable_thinking": conversation.enable_thinking, "open_thinking": conversation.enable_thinking}
    return variables


def _check(conversation: Conversation) -> None:
    messages = conversation.messages
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DataError("messages: expected a list of at least one message.")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DataError(f'{where}: expected an object {{"role", "content"}}, got {type(message).__name__}.')
        role = message.get("role")
        if role not in ROLES:
            raise DataError(f"{where}: unknown role {role!r}; use {', '.join(ROLES[:-1])} or {ROLES[-1]}.")
        optional = role == "assistant"
        if not isinstance(message.get("content"), str) and not (optional and message.get("content") is None):
            raise DataError(
                f"{where}: content of role {role} must be text, got {type(message.get('content')).__name__}."
            )
        if not isinstance(message.get("reasoning_content") or "", str):
            raise DataError(f"{where}: reasoning_content must be text.")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise DataError(f"{where}: tool_calls must be a list.")
        for call in cast(Sequence[Any], calls):
            _check_call(call, where)
    tools = conversation.tools
    if tools is not None and (isinstance(tools, str) or not all(isinstance(tool, Mapping) for tool in tools)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DataError("tools: expected a list of JSON objects, one for each function.")


def _check_call(call: Any, where: str) -> None:
    function = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or "arguments" not in function:
        raise DataError(f'{where}: a tool call is {{"name": text, "arguments": object}}, got {call!r:.80}.')
