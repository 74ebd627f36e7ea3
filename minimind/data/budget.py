"""Conversations and pairs -> `Example`s within a budget of tokens, never silently shorter than they were.

Whole turns are left out before anything is cut: the system message and the newest turns stay. The mask comes from the
chat template alone. It is given a `render` and knows neither tokenizer nor files.
"""

from collections.abc import Callable
from typing import Any

from minimind.batch import Example
from minimind.data.messages import Conversation, Message
from minimind.data.preference import Preference

Render = Callable[[list[Message], list[dict[str, Any]] | None], Example]
"""(messages, tools) -> ids and loss weights."""


def _turn_starts(messages: list[Message]) -> tuple[int, list[int]]:
    """Return (number of leading system messages, index of every user message): where older turns may be left out."""
    lead = 1 if messages and messages[0]["role"] == "system" else 0
    return lead, [i for i, message in enumerate(messages) if message["role"] == "user"]


def fit_conversation(
    conversation: Conversation, render: Render, max_length: int, rendered: Example | None = None
) -> tuple[Example | None, str]:
    """Return (the example within `max_length` tokens, what was done to fit it); `rendered` is the whole, if at hand.

    "" nothing; "truncated": the oldest turns were left out, the system message and the newest stay; "cut": the newest
    turn alone is too long, so its later steps are left out, or its answer ends at the budget (without the end token);
    "too_long": not even the beginning of an answer fits, the example is None.
    """
    messages, tools = conversation.messages, conversation.tools
    example = render(messages, tools) if rendered is None else rendered
    if len(example.ids) <= max_length:
        return example, ""
    lead, starts = _turn_starts(messages)
    low, high = 1, len(starts) - 1  # how many of the oldest turns to leave out: the fewest that fit
    best: Example | None = None
    while low <= high:
        middle = (low + high) // 2
        candidate = render(messages[:lead] + messages[starts[middle] :], tools)
        if len(candidate.ids) <= max_length:
            best, high = candidate, middle - 1
        else:
            low = middle + 1
    if best is not None:
        return best, "truncated"
    newest = messages[:lead] + messages[starts[-1] if starts else lead :]
    answers = [i for i, message in enumerate(newest) if message["role"] == "assistant"]
    for end in reversed(answers[:-1]):
        candidate = render(newest[: end + 1], tools)
        if len(candidate.ids) <= max_length:
            return candidate, "cut"
    shortest = render(newest[: answers[0] + 1], tools)
    ids, weights = shortest.ids[:max_length], shortest.loss_weights[:max_length]
    return (Example(ids, weights), "cut") if any(weights[1:]) else (None, "too_long")


def fit_pair(found: Preference, render: Render, max_length: int) -> tuple[list[Example] | None, str]:
    """Return ([chosen, rejected] or the one side there is, what was done), within `max_length` tokens, both alike.

    Turns of the prompt are left out until the longer side fits ("truncated"); then answers end at the budget ("cut"). A
    pair of which nothing can be compared within the budget is "too_long" and None.
    """
    lead, starts = _turn_starts(found.prompt)
    sides = [side for side in (found.chosen, found.rejected) if side is not None]
    pair: list[Example] = []
    for dropped in range(max(len(starts), 1)):
        prompt = found.prompt if dropped == 0 else found.prompt[:lead] + found.prompt[starts[dropped] :]
        pair = [_answer_only(render(prompt + side, found.tools), prompt) for side in sides]
        if all(len(example.ids) <= max_length for example in pair):
            return pair, "truncated" if dropped else ""
    cut = [Example(example.ids[:max_length], example.loss_weights[:max_length]) for example in pair]
    if (len(cut) == 2 and cut[0].ids == cut[1].ids) or not all(any(example.loss_weights[1:]) for example in cut):
        return None, "too_long"
    return cut, "cut"


def _answer_only(example: Example, prompt: list[Message]) -> Example:
    """Return the example with weight 0 on the spans of the prompt's own assistant turns (one span a turn)."""
    spans = sum(message["role"] == "assistant" for message in prompt)
    weights = list(example.loss_weights)
    position = 0
    for _ in range(spans):
        while position < len(weights) and weights[position] == 0:
            position += 1
        while position < len(weights) and weights[position] != 0:
            weights[position] = 0.0
            position += 1
    return Example(example.ids, weights)
