"""Answers read in pieces, cut anywhere; reading is the inverse of rendering."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.errors import ConfigError
from minimind.inference.chat import ChatDelta, StreamParser, parse
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.chat import render
from minimind.tokenizer.train import train

CALL = {"name": "calculator", "arguments": {"expression": "1+2", "语言": ["中", 3]}}


def call_text(call: object = CALL) -> str:
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def streamed(pieces: Sequence[str], **options: Any) -> tuple[ChatDelta, list[ChatDelta]]:
    parser = StreamParser(**options)
    deltas = [*(parser.push(piece) for piece in pieces), parser.flush()]
    return sum(deltas, ChatDelta()), deltas


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ChatDelta()),
        ("Hi.\n", ChatDelta("Hi.\n")),
        ("<think>\nhm\n</think>\n\nHi", ChatDelta("Hi", "hm")),
        ("<think>\n\n</think>\n\nHi", ChatDelta("Hi")),
        ("<think>a\n\nb</think>Hi", ChatDelta("Hi", "a\n\nb")),
        ("<think>\n\n\n</think>\n\n\nHi", ChatDelta("\nHi", "\n")),
        ("<think>\nnever closed\n", ChatDelta("", "never closed\n")),
        ("a<think>b</think>c", ChatDelta("ac", "b")),
        ("stray</think> tag", ChatDelta("stray</think> tag")),
        ("<think>a<tool_call>b</tool_call></think>c", ChatDelta("c", "a<tool_call>b</tool_call>")),
        (call_text(), ChatDelta(tool_calls=(CALL,))),
        (f"See:\n{call_text()}\n{call_text()}", ChatDelta("See:", tool_calls=(CALL, CALL))),
        (f"{call_text()}\nDone", ChatDelta("Done", tool_calls=(CALL,))),
        (call_text({**CALL, "arguments": json.dumps(CALL["arguments"])}), ChatDelta(tool_calls=(CALL,))),
        (f"<think>\nx\n</think>\n\n{call_text()}", ChatDelta("", "x", (CALL,))),
        ("a\n<tool_call>\n{oops}\n</tool_call>\nb", ChatDelta("a\n<tool_call>\n{oops}\n</tool_call>\nb")),
        ("a\n<tool_call>\n{", ChatDelta("a\n<tool_call>\n{")),
        ("<tool_call>[1]</tool_call>", ChatDelta("<tool_call>[1]</tool_call>")),
        (
            '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
            ChatDelta('<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
        ),
        ('<tool_call>{"name": "a"}</tool_call>', ChatDelta('<tool_call>{"name": "a"}</tool_call>')),
        (
            '<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>',
            ChatDelta('<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>'),
        ),
        ("<tool_call>" + "[" * 50_000 + "</tool_call>", ChatDelta("<tool_call>" + "[" * 50_000 + "</tool_call>")),
        ("<answer>3</answer>", ChatDelta("<answer>3</answer>")),
        ("half a <tool_cal", ChatDelta("half a <tool_cal")),
    ],
)
def test_parse(text: str, expected: ChatDelta) -> None:
    assert parse(text) == expected
    if len(text) < 500:
        assert streamed(list(text))[0] == expected


def test_reasoning_opened_by_the_prompt() -> None:
    assert parse("hm\n</think>\n\nHi", in_reasoning=True) == ChatDelta("Hi", "hm")
    assert parse("\n</think>\n\nHi", in_reasoning=True, finish_reason="stop") == ChatDelta(
        "Hi", "", finish_reason="stop"
    )


pieces_of_text = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "<think>",
                "</think>",
                "<tool_call>",
                "</tool_call>",
                "\n",
                "\n\n",
                "<",
                "STOP",
                "ST",
                "OP",
                call_text()[11:-12],
                "{",
            ]
        ),
        st.text(max_size=4),
    ),
    max_size=10,
)


@given(
    pieces=pieces_of_text,
    cuts=st.lists(st.integers(0, 200)),
    stop=st.sampled_from([(), ("STOP",), ("STOP", "TO"), ("\n", "OP<")]),
)
@settings(max_examples=300, deadline=None)
def test_any_cut_gives_the_same_answer(pieces: list[str], cuts: list[int], stop: tuple[str, ...]) -> None:
    text = "".join(pieces)
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    whole = parse(text, stop=stop)
    assert streamed(pieces, stop=stop)[0] == whole
    assert streamed([text[a:b] for a, b in itertools.pairwise(borders)], stop=stop)[0] == whole
    assert streamed(list(text), stop=stop)[0] == whole


@given(pieces=pieces_of_text)
@settings(deadline=None)
def test_nothing_is_lost_without_tags(pieces: list[str]) -> None:
    text = "".join(pieces).replace("<think>", "").replace("<tool_call>", "")
    if "<think>" not in text and "<tool_call>" not in text:
        assert parse(text) == ChatDelta(text)


@given(pieces=pieces_of_text)
@settings(deadline=None)
def test_stop_strings_never_leak(pieces: list[str]) -> None:
    text = "".join(pieces).replace("<", "(")
    answer, deltas = streamed(pieces=list(text), stop=["STOP"])
    assert answer.content == text.partition("STOP")[0]
    assert "STOP" not in "".join(delta.content for delta in deltas)


def test_half_tags_are_held_back() -> None:
    parser = StreamParser()
    seen = [parser.push(piece).content for piece in ("Hi", "\n", "<tool", "_", "box>")]
    assert seen == ["Hi", "", "", "", "\n<tool_box>"]
    parser = StreamParser()
    assert [parser.push(character) for character in "<think>"] == [ChatDelta()] * 7
    assert parser.push("so") == ChatDelta(reasoning="so")
    assert parser.push("\n</thi") == ChatDelta()
    assert parser.push("nk>\n\nA") == ChatDelta("A")


def test_bad_stop_strings() -> None:
    for stop in ([""], "STOP"):
        with pytest.raises(ConfigError, match="stop: expected a list of texts"):
            StreamParser(stop=stop)


# -- parse is the inverse of rendering ---------------------------------------------------------------------------------

plain = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="<"), max_size=12)
no_nan = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**6), 10**6), plain),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(plain, inner, max_size=2)),
    max_leaves=4,
)
calls = st.fixed_dictionaries({"name": plain, "arguments": st.dictionaries(plain, no_nan, max_size=3)})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["The red ball is in the garden. How are you? 1 + 2 = 3 红色的球在花园里。你好！"] * 20, 360)


@given(content=plain, reasoning=plain, tool_calls=st.lists(calls, max_size=2), thinking=st.sampled_from([None, True]))
@settings(deadline=None)
def test_parse_inverts_render(
    tokenizer: Tokenizer, content: str, reasoning: str, tool_calls: list[dict[str, Any]], thinking: bool | None
) -> None:
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": tool_calls}
    messages = [{"role": "user", "content": "?"}, message]
    example = render(tokenizer, messages, enable_thinking=thinking)
    learned = [token for token, weight in zip(example.ids, example.loss_weights, strict=True) if weight]
    text = tokenizer.decode(learned[:-1])
    assert parse(text, in_reasoning=thinking is True) == ChatDelta(content, reasoning, tuple(tool_calls))
