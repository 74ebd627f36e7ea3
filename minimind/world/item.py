"""`Item`: one question about the world with everything that is known of it. Every format is a rendering of an Item.

An Item knows its conversation, its answer, its steps, how it is graded, what a shortcut would answer and what it cost
to draw. It deliberately does not know files, mixtures or splits.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from minimind.world.draw import Draw, Split, split_of
from minimind.world.facts import World
from minimind.world.lexicon import Language
from minimind.world.tools import TOOLS, run_tool

Message = dict[str, Any]
QuestionSet = Literal["main", "reason", "preference", "agent", "lora-identity", "lora-trade"]

ASK = {"en": "Q:", "zh": "问："}
REPLY = {"en": "A:", "zh": "答："}
TOOL = {"en": "T:", "zh": "工具："}
ANSWER = {"en": "Answer:", "zh": "答案："}
"""The marks of the plain form, in which a base model is asked. A completion ends at its first line break."""


@dataclass(slots=True)
class Item:
    """One question, its answer, and all that is needed to render and grade it."""

    domain: str
    language: Language
    keys: tuple[str, ...]
    """Names of the contents: the first is asked, the others are given away by the text. They decide the split."""
    user: str
    """The last turn of the user, a story before its question included."""
    answer: str
    """What the grader compares with."""
    reply: str
    """What a good assistant says at the end."""
    reasoning: str = ""
    """Steps that lead to the answer; each can be checked."""
    before: tuple[tuple[str, str], ...] = ()
    """Earlier (user, assistant) turns."""
    tools: tuple[str, ...] = ()
    """Names of the tools offered."""
    calls: tuple[dict[str, Any], ...] = ()
    """The calls a good assistant makes one after the other: {"name", "arguments"}."""
    grader: str = "exact"
    grader_args: dict[str, Any] = field(default_factory=dict[str, Any])
    chance: float = 0.0
    """Probability that a blind guess among the plausible answers is right."""
    shortcuts: dict[str, str] = field(default_factory=dict[str, str])
    """Answers of strategies that do not understand the question."""
    bits: float = 0.0
    """-log2 of the probability of the choices that made this item, given its domain and language."""

    def prompt_messages(self) -> list[Message]:
        """Return the messages up to the user's last turn; tools are no message but `tool_schemas(self.tools)`."""
        messages: list[Message] = []
        for asked, replied in self.before:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": replied})
        messages.append({"role": "user", "content": self.user})
        return messages

    def answer_messages(self) -> list[Message]:
        """Return the good assistant's turns after the prompt: calls, tool results, the reply."""
        messages: list[Message] = []
        for call in self.calls:
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": run_tool(call["name"], call["arguments"])})
        last: Message = {"role": "assistant", "content": self.reply}
        if self.reasoning:
            last["reasoning_content"] = self.reasoning
        messages.append(last)
        return messages

    def plain_prompt(self) -> str:
        """Return the plain text that a base model continues."""
        ask, reply = ASK[self.language], REPLY[self.language]
        gap = " " if self.language == "en" else ""
        lines: list[str] = []
        for asked, replied in self.before:
            lines += [f"{ask}{gap}{asked}", f"{reply}{gap}{replied}"]
        return "\n".join([*lines, f"{ask}{gap}{self.user}", reply])

    def plain_completion(self) -> str:
        """Return the expected continuation: a tool call where one is wanted, else steps and reply; one line."""
        gap = " " if self.language == "en" else ""
        if self.calls:
            return gap + call_text(self.calls[0])
        if self.reasoning:
            return f"{gap}{self.reasoning}{gap}{ANSWER[self.language]}{gap}{self.reply}"
        return gap + self.reply

    def plain_text(self) -> str:
        """Return the whole exchange: `plain_prompt` + `plain_completion`, then tool results and the reply."""
        lines = [self.plain_prompt() + self.plain_completion()]
        gap = " " if self.language == "en" else ""
        for number, call in enumerate(self.calls):
            lines.append(f"{TOOL[self.language]}{gap}{run_tool(call['name'], call['arguments'])}")
            said = call_text(self.calls[number + 1]) if number + 1 < len(self.calls) else self.reply
            lines.append(f"{REPLY[self.language]}{gap}{said}")
        return "\n".join(lines)


def call_text(call: dict[str, Any]) -> str:
    """Return a tool call as the JSON text that a chat template shows."""
    return json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)


def tool_schemas(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the JSON schemas of the named tools."""
    return [TOOLS[name].schema for name in names]


@dataclass(frozen=True, slots=True)
class Domain:
    """One kind of question: how to draw it and what its accuracy means."""

    name: str
    make: Callable[[Draw, Language, World], Item]
    """Draws one item; the caller redraws until its keys lie in the wanted split."""
    about: str
    held_out: str
    """What of a test question is never seen in training."""
    weak: str
    """What a strategy without understanding gets, and why."""
    set: QuestionSet = "main"
    is_exact: bool = True
    """Different choices give different texts, so that `Item.bits` is exactly -log2 p of the text."""
    split: Callable[[str], Split] = split_of
    """The split of a key; small domains hold out a larger share."""
    is_trained: bool = True
    """False: there are only validation and test questions."""
