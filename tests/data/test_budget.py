"""Budgets: whole turns go first, the system message and the newest turns stay, nothing is shortened without a count."""

from typing import Any

import pytest

from minimind.batch import Example
from minimind.data import conversation, preference
from minimind.data.budget import fit_conversation, fit_pair
from minimind.data.messages import Conversation
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.chat import render

from .conftest import turns


@pytest.fixture
def draw(tokenizer: Tokenizer) -> Any:
    return lambda messages, tools: render(tokenizer, messages, tools=tools)


def talk(*contents: str, system: str = "") -> Conversation:
    found, problems = conversation.read(turns(*contents, system=system))
    assert problems == []
    return found


def test_what_fits_is_left_alone(draw: Any) -> None:
    found = talk("the dog", "the cat", "the ball", "the river")
    whole = draw(found.messages, None)
    assert fit_conversation(found, draw, len(whole.ids)) == (whole, "")
    assert fit_conversation(found, draw, len(whole.ids), whole) == (whole, "")


def test_the_oldest_turns_go_and_system_and_newest_stay(draw: Any) -> None:
    contents = [f"{word} {i}" for i in range(6) for word in ("the dog", "the cat")]
    found = talk(*contents, system="a little girl")
    for dropped in range(1, 6):
        kept = talk(*contents[2 * dropped :], system="a little girl")
        expected = draw(kept.messages, None)
        for spare in (0, 1):  # with room for a little more, but not for another turn
            assert fit_conversation(found, draw, len(expected.ids) + spare) == (expected, "truncated")


def test_tokens_are_counted_not_characters(draw: Any) -> None:
    # equal numbers of characters, very different numbers of tokens
    found = talk("犇" * 20, "the cat", "the ball " * 2, "the river")
    long, short = draw(found.messages[:2], None), draw(found.messages[2:], None)
    assert len(long.ids) > len(short.ids)
    example, outcome = fit_conversation(found, draw, len(short.ids))
    assert (example, outcome) == (short, "truncated")


def test_a_tool_conversation_keeps_whole_steps(draw: Any) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "the dog"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "the ball " * 40},
        {"role": "assistant", "content": "the cat"},
    ]
    first = draw(messages[:2], None)
    assert fit_conversation(Conversation(messages), draw, len(first.ids) + 5) == (first, "cut")


def test_an_answer_longer_than_the_budget_is_cut_and_said_so(draw: Any) -> None:
    found = talk("the dog", "the cat sat on the mat " * 10)
    whole = draw(found.messages, None)
    example, outcome = fit_conversation(found, draw, 30)
    assert outcome == "cut"
    assert example == Example(whole.ids[:30], whole.loss_weights[:30])
    assert example is not None
    assert example.loss_weights[-1] > 0


def test_a_question_longer_than_the_budget_leaves_nothing(draw: Any) -> None:
    assert fit_conversation(talk("the dog " * 50, "the cat"), draw, 30) == (None, "too_long")


def pair(prompt: list[str], chosen: str, rejected: str) -> preference.Preference:
    messages = turns(*prompt)["conversations"]
    found, problems = preference.read({"prompt": messages, "chosen": chosen, "rejected": rejected})
    assert problems == []
    return found


def test_pairs_learn_their_answers_only(draw: Any, tokenizer: Tokenizer) -> None:
    fitted, outcome = fit_pair(pair(["the dog", "the cat", "the ball"], "the river", "the mat"), draw, 200)
    assert outcome == ""
    assert fitted is not None
    for example, answer in zip(fitted, ("the river", "the mat"), strict=True):
        learned = [token for token, weight in zip(example.ids, example.loss_weights, strict=True) if weight > 0]
        assert tokenizer.decode(learned) == f"{answer}<|im_end|>"
        assert "the cat" in tokenizer.decode(example.ids)


def test_both_sides_of_a_pair_are_treated_alike(draw: Any) -> None:
    found = pair(["the dog " * 5, "the cat", "the ball"], "the river " * 8, "the mat")
    short = pair(["the ball"], "the river " * 8, "the mat")
    both = [draw(short.prompt + side, None) for side in (short.chosen, short.rejected) if side is not None]
    # the rejected side would fit with the whole prompt, the chosen one does not: the prompt is shortened for both
    assert fit_pair(found, draw, len(both[0].ids)) == (both, "truncated")
    cut, outcome = fit_pair(found, draw, len(both[0].ids) - 4)
    assert outcome == "cut"
    assert cut == [Example(e.ids[: len(both[0].ids) - 4], e.loss_weights[: len(both[0].ids) - 4]) for e in both]
    assert fit_pair(pair(["the dog " * 60], "a", "b"), draw, 30) == (None, "too_long")
    assert fit_pair(pair(["the dog"], "the cat " * 30 + "a", "the cat " * 30 + "b"), draw, 30) == (None, "too_long")
