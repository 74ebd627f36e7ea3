"""Graders: right answers in any dress pass; lists of candidates, digits inside numbers and half answers fail."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.world.domains import DOMAINS, draw_item
from minimind.world.draw import Draw
from minimind.world.facts import World
from minimind.world.graders import GRADERS, final_answer, grade, numbers, parse_calls
from minimind.world.lexicon import LANGUAGES
from minimind.world.rows import question


def ask(grader: str, answer: str, **args: Any) -> dict[str, Any]:
    return {"grader": grader, "answer": answer, "grader_args": args}


EXACT = ask("exact", "7 May", accept=["It is 7 May."])
NUMBER = ask("number", "12", given=[5, 7])
CHOICE = ask("choice", "Tom", options=["Tom", "Anna", "Ben"])
CHOICE_ZH = ask("choice", "汤姆", options=["汤姆", "安娜"])
DIGITS = ask("choice", "47", options=["47", "52"])
CONTAINS = ask("contains", "Pebble", any=["Pebble"], none=["MiniMind"])
SEQUENCE = ask("sequence", "12 47 93")
POLITE = {
    "grader": "polite",
    "answer": "Tom",
    "grader_args": {
        "grader": "choice",
        "grader_args": {"options": ["Tom", "Anna"]},
        "polite": ["Of course."],
        "rude": ["Are you stupid?"],
    },
}
CALL = {"name": "calculator", "arguments": {"expression": "347 * 29"}}
TOOL = ask("tool_call", "", calls=[CALL])


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (EXACT, " 7 may "),
        (EXACT, "It is 7 May!"),
        (EXACT, "<think>8? no</think>7 May."),
        (NUMBER, "12"),
        (NUMBER, "It is 12."),
        (NUMBER, "5 + 7 = 12"),
        (NUMBER, "2 + 5 = 9, hm. Answer: 12"),
        (NUMBER, "<think>5 6 7</think>\n<answer>\n12\n</answer>"),
        (NUMBER, "是 12。"),
        (NUMBER, "１２"),
        (NUMBER, "12.0"),
        (CHOICE, "It is Tom."),
        (CHOICE, "tom"),
        (CHOICE, "Tom, of course, it is Tom."),
        (CHOICE_ZH, "是汤姆。"),
        (CHOICE_ZH, "安娜？答案：汤姆"),
        (DIGITS, "47 is larger."),
        (DIGITS, "47更大"),
        (CONTAINS, "My name is Pebble."),
        (SEQUENCE, "12, 47, 93"),
        (SEQUENCE, "Answer: 12 47 93."),
        (POLITE, "Of course. It is Tom."),
        (TOOL, '{"name": "calculator", "arguments": {"expression": "347*29"}}'),
        (TOOL, '<tool_call>\n{"name": "calculator", "arguments": {"expression": "347 * 29"}}\n</tool_call>'),
    ],
)
def test_right(question: dict[str, Any], text: str) -> None:
    assert grade(question, text)


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (EXACT, ""),
        (EXACT, "6 May, 7 May, 8 May"),
        (EXACT, "17 May"),
        (EXACT, "7 May <think>"),
        (NUMBER, "112"),
        (NUMBER, "120"),
        (NUMBER, "12 or 13"),
        (NUMBER, "10 11 12"),  # a list that ends with the answer
        (NUMBER, "12 13 12"),
        (NUMBER, "12.5"),
        (NUMBER, "-12"),
        (NUMBER, "x12"),
        (NUMBER, "1,012"),
        (NUMBER, "twelve"),
        (NUMBER, ""),
        (NUMBER, "<think>it is 12"),  # never stops thinking
        (NUMBER, "Answer: 12 Answer: 13"),
        (CHOICE, "Tom Anna Ben"),
        (CHOICE, "Tom or Anna"),
        (CHOICE, "Tomas"),
        (CHOICE, "Anna"),
        (CHOICE, "nobody"),
        (CHOICE_ZH, "汤姆和安娜"),
        (DIGITS, "147"),
        (DIGITS, "47 52"),
        (DIGITS, "4 7"),
        (DIGITS, "47.5"),
        (DIGITS, "-47"),
        (CONTAINS, "I am Pebble, once MiniMind."),
        (CONTAINS, "Pebbles"),
        (SEQUENCE, "12 93 47"),
        (SEQUENCE, "12 47"),
        (SEQUENCE, "12 47 93 12 47 93"),
        (SEQUENCE, "124793"),
        (POLITE, "It is Tom."),
        (POLITE, "Of course. It is Anna."),
        (POLITE, "Of course. Are you stupid? It is Tom."),
        (POLITE, "Of course. Tom Anna"),
        (TOOL, "347 * 29"),
        (TOOL, "10063"),
        (TOOL, '{"name": "calculator", "arguments": {"expression": "347 * 28"}}'),
        (TOOL, '{"name": "clock", "arguments": {"expression": "347 * 29"}}'),
        (TOOL, '{"name": "calculator", "arguments": {"expression": "347 * 29", "x": 1}}'),
        (
            TOOL,
            '{"name": "calculator", "arguments": {}} {"name": "calculator", "arguments": {"expression": "347 * 29"}}',
        ),
        (TOOL, 'I call {"name": "calculator", "arguments": {"expression": "347 * 29"}}'),
        (TOOL, '{"name": "calculator", "arguments": {"expression": "347 * 29"}'),
        (TOOL, '["calculator"]'),
    ],
)
def test_wrong(question: dict[str, Any], text: str) -> None:
    assert not grade(question, text)


def test_tool_calls_in_both_forms() -> None:
    openai = {"type": "function", "function": {"name": "calculator", "arguments": '{"expression": "347 * 29"}'}}
    assert grade(TOOL, "", tool_calls=[CALL])
    assert grade(TOOL, "", tool_calls=[openai])
    assert not grade(TOOL, "", tool_calls=[CALL, CALL])
    assert not grade(TOOL, "", tool_calls=[{"name": "calculator"}])
    assert not grade(TOOL, "", tool_calls=[{"function": "calculator"}])
    minutes = ask("tool_call", "", calls=[{"name": "clock", "arguments": {"minutes": 1}}])
    assert grade(minutes, "", tool_calls=[{"name": "clock", "arguments": {"minutes": 1}}])
    assert not grade(minutes, "", tool_calls=[{"name": "clock", "arguments": {"minutes": True}}])
    assert not grade(minutes, "", tool_calls=[{"name": "clock", "arguments": {"minutes": "1"}}])
    assert not grade(CHOICE, "Tom", tool_calls=[CALL])  # a call is not an answer
    assert not grade(CHOICE, "", reasoning="Tom")  # nor is a thought


def test_numbers() -> None:
    assert numbers("47 + 38 = 85, -3 and 1,234.5; 09:35") == [47, 38, 85, -3, 1234.5, 9, 35]
    assert numbers("a12 12b 3x") == []
    assert final_answer("<think>a</think> b") == "b"


@given(st.text(max_size=200), st.sampled_from([*sorted(GRADERS), "tool_call"]))
def test_any_text_is_graded_without_an_exception(text: str, grader: str) -> None:
    rows = {"exact": EXACT, "number": NUMBER, "choice": CHOICE, "contains": CONTAINS, "sequence": SEQUENCE}
    row = rows | {"polite": POLITE, "tool_call": TOOL}
    assert grade(row[grader], text) in (True, False)


@pytest.mark.parametrize("text", ["[" * 3000, '{"a":' * 3000, "9" * 5000, "<think>" * 500 + "</think>"])
def test_hostile_text_is_wrong_not_an_error(text: str) -> None:
    assert parse_calls(text) == [] or text.isdigit()
    for row in (EXACT, NUMBER, CHOICE, CONTAINS, SEQUENCE, POLITE, TOOL):
        assert not grade(row, text)


@pytest.mark.parametrize("name", sorted(DOMAINS))
def test_every_domain_passes_its_own_reply_and_refuses_the_list_of_candidates(name: str) -> None:
    domain = DOMAINS[name]
    world = World(0)
    split = "train" if domain.is_trained else "test"
    for language in LANGUAGES:
        draw = Draw("own", name, language)
        for _ in range(25):
            item = draw_item(domain, draw, language, world, split)
            row = question(item, "x")
            last = item.answer_messages()[-1]
            if item.grader == "tool_call":
                assert grade(row, "", tool_calls=item.calls)
                assert not grade(row, item.reply)
            else:
                assert grade(row, last["content"], last.get("reasoning_content", "")), (item.user, item.reply)
            if row["prompt"]:
                assert grade(row, row["completion"]), row["completion"]
                assert "\n" not in row["completion"]
            assert not grade(row, "")
            inner = item.grader_args.get("grader_args", item.grader_args)
            if "options" in inner:
                assert not grade(row, " ".join(inner["options"]))
            if name != "greeting":  # there an echo is right, and is reported as a shortcut
                assert not grade(row, item.user + " " + item.user)
                wrong = [answer for answer in item.shortcuts.values() if not answer.endswith(item.answer)]
                assert not any(grade(row, answer) for answer in wrong)
            assert 0 <= item.chance <= 0.5
