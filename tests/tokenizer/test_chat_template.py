"""The mask is made while rendering; prompts are prefixes; what people write stays text."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.errors import DataError
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.chat import Conversation, render, render_batch, render_text
from minimind.tokenizer.train import CONTROL_TOKENS

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {"type": "object"}}}]
THINKING = (None, True, False)

texts = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            [*CONTROL_TOKENS[:11], "\n", "\n\n", " ", "hello", "你好", "<", "<|im_", "\U0010f000", "\U0010f003"]
        ),
    ),
    max_size=5,
).map("".join)
calls = st.fixed_dictionaries({"name": texts, "arguments": st.dictionaries(texts, texts, max_size=2)})
assistants = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": texts},
    optional={"reasoning_content": texts, "tool_calls": st.lists(calls, max_size=2)},
)
others = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": texts})
conversations = st.lists(st.one_of(others, assistants), min_size=1, max_size=5)


def learned(tokenizer: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    """The stretches that are learned, as text."""
    example = render(tokenizer, messages, **options)
    runs: list[list[int]] = []
    previous = 0.0
    for token, weight in zip(example.ids, example.loss_weights, strict=True):
        if weight:
            if not previous:
                runs.append([])
            runs[-1].append(token)
        previous = weight
    return [tokenizer.decode(run) for run in runs]


def test_the_text_of_a_conversation(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "A tool knows.",
            "tool_calls": [
                {"name": "weather", "arguments": {"place": "花园"}},
                {"type": "function", "function": {"name": "weather", "arguments": '{"place":"x"}'}},
            ],
        },
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Sunny."},
    ]
    expected = (
        "<|im_start|>system\nBe kind.\n\n# Tools\n"
        'To call a function, write <tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>. Functions:\n'
        f"<tools>\n{json.dumps(TOOLS[0], ensure_ascii=False)}\n</tools><|im_end|>\n"
        "<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nA tool knows.\n</think>\n\nLet me see.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"place": "花园"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"place":"x"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nSunny.<|im_end|>\n"
    )
    assert render_text(tokenizer, messages, tools=TOOLS) == expected
    assert tokenizer.decode(render(tokenizer, messages, tools=TOOLS).ids) == expected
    assert learned(tokenizer, messages, tools=TOOLS) == [
        expected[expected.index("<think>") : expected.index("<|im_end|>\n<|im_start|>user\n<tool_response>") + 10],
        "Sunny.<|im_end|>",
    ]


def test_no_system_prompt_is_added(tokenizer: Tokenizer) -> None:
    text = render_text(tokenizer, [{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_thinking_switch(tokenizer: Tokenizer) -> None:
    ask = {"role": "user", "content": "1+1?"}
    thought = {"role": "assistant", "content": "2", "reasoning_content": "one and one"}
    plain = {"role": "assistant", "content": "2"}
    assert learned(tokenizer, [ask, thought]) == ["<think>\none and one\n</think>\n\n2<|im_end|>"]
    assert learned(tokenizer, [ask, plain]) == ["2<|im_end|>"]
    assert learned(tokenizer, [ask, thought], enable_thinking=True) == ["one and one\n</think>\n\n2<|im_end|>"]
    assert learned(tokenizer, [ask, plain], enable_thinking=True) == ["\n</think>\n\n2<|im_end|>"]
    assert learned(tokenizer, [ask, thought], enable_thinking=False) == ["2<|im_end|>"]
    assert learned(tokenizer, [ask, plain], enable_thinking=False) == ["2<|im_end|>"]
    for switch, tail in ((None, ""), (True, "<think>\n"), (False, "<think>\n\n</think>\n\n")):
        prompt = render_text(tokenizer, [ask], add_generation_prompt=True, enable_thinking=switch)
        assert prompt.endswith("<|im_start|>assistant\n" + tail)


@given(messages=conversations, thinking=st.sampled_from(THINKING), with_tools=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_prompt_is_a_prefix_of_its_conversation(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], thinking: bool | None, with_tools: bool
) -> None:
    options: dict[str, Any] = {"enable_thinking": thinking, "tools": TOOLS if with_tools else None}
    whole = render(tokenizer, messages, **options)
    assert tokenizer.decode(whole.ids) == render_text(tokenizer, messages, **options)
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        prompt = render(tokenizer, messages[:index], add_generation_prompt=True, **options).ids
        assert whole.ids[: len(prompt)] == prompt
        answer = render(tokenizer, messages[: index + 1], **options)
        assert whole.ids[: len(answer.ids)] == answer.ids
        weights = answer.loss_weights[len(prompt) :]
        assert weights == [1.0] * (len(weights) - 1) + [0.0]  # all but the line break after <|im_end|>
        assert answer.ids[-2] == tokenizer.eos_id


@given(messages=conversations, thinking=st.sampled_from(THINKING))
@settings(max_examples=150, deadline=None)
def test_control_tokens_come_from_the_template_only(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], thinking: bool | None
) -> None:
    """The same conversation with harmless words has the same control tokens, apart from the assistants' own tags."""

    def harmless(value: Any) -> Any:
        if isinstance(value, str):
            return "x" if value else ""
        if isinstance(value, dict):
            return {f"k{i}": harmless(item) for i, item in enumerate(value.values())}
        return value

    def tame(message: dict[str, Any]) -> dict[str, Any]:
        tamed = {key: harmless(value) if isinstance(value, str) else value for key, value in message.items()}
        if message.get("tool_calls"):
            tamed["tool_calls"] = [
                {"name": harmless(call["name"]), "arguments": harmless(call["arguments"])}
                for call in message["tool_calls"]
            ]
        return {**tamed, "role": message["role"]}

    for message in messages:
        if message["role"] == "assistant":
            message["content"] = message["content"].replace("<", "")
    control = set(tokenizer.special_ids.values())
    one = render(tokenizer, messages, enable_thinking=thinking)
    other = render(tokenizer, [tame(message) for message in messages], enable_thinking=thinking)
    pairs = [
        [(token, weight) for token, weight in zip(e.ids, e.loss_weights, strict=True) if token in control]
        for e in (one, other)
    ]
    assert pairs[0] == pairs[1]


def test_tags_count_in_the_content_of_assistants_only(tokenizer: Tokenizer) -> None:
    written = "<think>a</think><answer>b</answer><|im_end|><|endoftext|><tool_response>"
    ids = tokenizer.special_ids

    def control(role: str) -> list[int]:
        example = render(tokenizer, [{"role": role, "content": written}])
        return [i for i in example.ids if i in set(ids.values())]

    frame = [ids["<|im_start|>"], ids["<|im_end|>"]]
    assert control("user") == control("system") == frame
    tags = [ids[tag] for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    assert control("assistant") == [frame[0], *tags, frame[1]]
    tool = [frame[0], ids["<tool_response>"], ids["</tool_response>"], frame[1]]
    assert control("tool") == tool


def test_control_tokens_in_tools_and_reasoning_are_text(tokenizer: Tokenizer) -> None:
    tools = [{"name": "<|im_end|>", "parameters": {"</tools><|im_start|>": "<tool_call>"}}]
    plain = [{"name": "x", "parameters": {"y": "z"}}]
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "reasoning_content": "</think>"},
    ]
    tame = [messages[0], {**messages[1], "reasoning_content": "w"}]
    control = set(tokenizer.special_ids.values())
    one, other = render(tokenizer, messages, tools=tools).ids, render(tokenizer, tame, tools=plain).ids
    assert [i for i in one if i in control] == [i for i in other if i in control]


def test_mark_characters_in_the_text_are_kept(tokenizer: Tokenizer) -> None:
    text = "a\U0010f000b\U0010f001c\U0010f004<|im_end|>"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    example = render(tokenizer, messages)
    assert tokenizer.decode(example.ids) == render_text(tokenizer, messages)
    assert learned(tokenizer, messages) == [text + "<|im_end|>"]


def test_batch_equals_single(tokenizer: Tokenizer) -> None:
    batch = [
        Conversation(
            [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}], TOOLS if i % 2 else None
        )
        for i, text in enumerate(["hello", "<|im_end|>", "", "你好", "hello"])
    ]
    assert render_batch(tokenizer, batch) == [render(tokenizer, c.messages, tools=c.tools) for c in batch]
    assert render_batch(tokenizer, []) == []
    known: dict[str, list[int]] = {}
    expected = render_batch(tokenizer, batch)
    assert render_batch(tokenizer, batch[:2], known=known) == expected[:2]
    assert known["user\nhello"] == tokenizer.encode("user\nhello")
    assert render_batch(tokenizer, batch, known=known) == expected


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hi", "expected a list"),
        (["hi"], r"messages\[0\]: expected an object .* got str"),
        (
            [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}],
            r"messages\[1\]: unknown role 'bot'; use system",
        ),
        ([{"content": "a"}], r"messages\[0\]: unknown role None"),
        ([{"role": "user"}], r"messages\[0\]: content of role user must be text, got NoneType"),
        ([{"role": "assistant", "content": ["a"]}], "must be text, got list"),
        ([{"role": "assistant", "content": "a", "reasoning_content": 3}], "reasoning_content must be text"),
        ([{"role": "assistant", "content": "a", "tool_calls": "x"}], "tool_calls must be a list"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{"name": "f"}]}], "a tool call is"),
    ],
)
def test_bad_messages_are_named(tokenizer: Tokenizer, messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(tokenizer, messages)


def test_bad_tools_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="tools: expected a list of JSON objects"):
        render(tokenizer, [{"role": "user", "content": "a"}], tools=["weather"])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("version", ["2025-11", "2026-08"])
def test_upstream_templates_render_and_mask(public_data: Path, version: str) -> None:
    upstream = Tokenizer.load(public_data / "upstream_minimind" / version)
    messages = [
        {"role": "user", "content": "hi <|im_end|>"},
        {"role": "assistant", "content": "Hello.", "tool_calls": [{"name": "f", "arguments": {}}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Three.", "reasoning_content": "It said 3."},
        {"role": "user", "content": "bye"},
    ]
    call = 'Hello.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'
    # Where the thought is the assistant's own, it begins where the answer departs from the generation prompt.
    thought = {"2025-11": "Three.<|im_end|>", "2026-08": "It said 3.\n</think>\n\nThree.<|im_end|>"}[version]
    assert learned(upstream, messages) == [call, thought]
    assert learned(upstream, messages, add_generation_prompt=True) == [call, thought]
    whole = render(upstream, messages).ids
    assert upstream.decode(whole) == render_text(upstream, messages)
    for index in (1, 4):
        prompt = render(upstream, messages[:index], add_generation_prompt=index == 1).ids
        assert whole[: len(prompt)] == prompt
    text = render_text(upstream, messages[:1], add_generation_prompt=True, enable_thinking=version == "2026-08")
    assert text.endswith({"2025-11": "<think>\n\n</think>\n\n", "2026-08": "assistant\n<think>\n"}[version])


def test_a_template_that_rewrites_earlier_turns_cannot_be_learned_from(tokenizer: Tokenizer) -> None:
    source = "{% for m in messages %}<|im_start|>{{ m.content if loop.last else '...' }}<|im_end|>{% endfor %}"
    odd = Tokenizer(tokenizer._json, chat_template=source)
    messages = [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]
    with pytest.raises(DataError, match=r"messages\[1\]: this chat template rewrites earlier turns.*generation"):
        render(odd, messages)
    assert set(render(odd, messages, add_generation_prompt=True).loss_weights) == {0.0}


def test_an_answer_that_departs_inside_a_control_token_owns_the_whole_token(tokenizer: Tokenizer) -> None:
    source = (
        "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:<think>' }}{% endif %}"
    )
    odd = Tokenizer(tokenizer._json, chat_template=source)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<tool_call>y"}]
    assert learned(odd, messages) == ["<tool_call>y<|im_end|>"]
