"""Conversations kept as ids: with a fake engine that says what it is told, token by token."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest

from minimind.errors import ConfigError
from minimind.inference.chat import ChatDelta
from minimind.inference.sampling import SamplingParams
from minimind.inference.session import ChatSession
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.chat import render, render_text
from minimind.tokenizer.train import train

CALL = {"name": "calculator", "arguments": {"expression": "1+2", "语言": ["中", 3]}}


def call_text(call: object = CALL) -> str:
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["The red ball is in the garden. How are you? 1 + 2 = 3 红色的球在花园里。你好！"] * 20, 360)


class Event(NamedTuple):
    request_id: int
    token_id: int
    log_prob: float | None
    finish_reason: str | None


class ScriptedEngine:
    """Says what it is told, token by token, and remembers what it was asked."""

    def __init__(self, tokenizer: Tokenizer, answers: list[str | list[int]], max_length: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.answers = answers
        self.max_length = max_length
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []
        self.closed = 0

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams | None = None) -> Iterator[Any]:
        assert params is not None
        self.prompts.append(list(prompt_ids))
        self.params.append(params)
        answer = self.answers.pop(0)
        ids = self.tokenizer.encode(answer, allow_special=True) if isinstance(answer, str) else answer
        try:
            for count, token in enumerate(ids, 1):
                reason = "stop" if token in params.stop_ids else "length" if count == params.max_tokens else None
                yield Event(0, token, None, reason)
                if reason:
                    return
        finally:
            self.closed += 1


def talk(session: ChatSession, text: str) -> list[ChatDelta]:
    return list(session.send(text))


def test_a_conversation(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["<think>\nA greeting.\n</think>\n\n你好！<|im_end|>", "Bye.<|im_end|>"])
    session = ChatSession(engine, tokenizer, system="Be kind.", sampling=SamplingParams(seed=7, max_tokens=99))
    deltas = talk(session, "Hello")
    assert len(deltas) > 5
    assert sum(deltas, ChatDelta()) == ChatDelta("你好！", "A greeting.", finish_reason="stop")
    assert all("�" not in delta.content for delta in deltas)
    assert session.speed.num_tokens == len(
        tokenizer.encode("<think>\nA greeting.\n</think>\n\n你好！", allow_special=True)
    )
    assert session.speed.seconds >= session.speed.first_seconds >= 0
    talk(session, "Thanks")
    expected = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "你好！", "reasoning_content": "A greeting."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye."},
    ]
    assert session.messages == expected
    assert engine.prompts == [render(tokenizer, expected[:count], add_generation_prompt=True).ids for count in (2, 4)]
    assert [params.seed for params in engine.params] == [7, 8]
    assert set(engine.params[0].stop_ids) == {0, 1, 2}


def test_sampled_ids_are_never_made_from_text_again(tokenizer: Tokenizer) -> None:
    odd = [*(tokenizer.encode(letter)[0] for letter in "garden"), tokenizer.eos_id]
    assert odd[:-1] != tokenizer.encode("garden")
    engine = ScriptedEngine(tokenizer, [odd, "x<|im_end|>", "y<|im_end|>", "z<|im_end|>"])
    session = ChatSession(engine, tokenizer)
    talk(session, "a")
    talk(session, "b")
    assert engine.prompts[1][: len(engine.prompts[0]) + len(odd)] == engine.prompts[0] + odd
    # The switch changes what is before the next answer only; what was said before stays as it was.
    session.enable_thinking = False
    talk(session, "c")
    begin = engine.prompts[1] + tokenizer.encode("x") + [tokenizer.eos_id]
    assert engine.prompts[2][: len(begin)] == begin
    assert tokenizer.decode(engine.prompts[2]).endswith("<think>\n\n</think>\n\n")
    session.system = "Now be brief."
    talk(session, "d")
    text = tokenizer.decode(engine.prompts[3])
    assert text.startswith("<|im_start|>system\nNow be brief.<|im_end|>\n<|im_start|>user\na")
    assert " ".join(map(str, odd)) in " ".join(map(str, engine.prompts[3]))


def test_forced_thinking(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["hm\n</think>\n\n3<|im_end|>"])
    session = ChatSession(engine, tokenizer, enable_thinking=True)
    assert sum(talk(session, "1+2?"), ChatDelta()) == ChatDelta("3", "hm", finish_reason="stop")


def test_tool_rounds(tokenizer: Tokenizer) -> None:
    asked: list[Any] = []

    def run_tool(name: str, arguments: dict[str, Any]) -> str:
        asked.append((name, arguments))
        if arguments.get("expression") == "bad":
            raise ValueError("no number")
        return "3"

    bad = {"name": "calculator", "arguments": {"expression": "bad"}}
    engine = ScriptedEngine(
        tokenizer,
        [f"Let me see.\n{call_text()}<|im_end|>", f"{call_text(bad)}\n{call_text()}<|im_end|>", "It is 3.<|im_end|>"],
    )
    tools = [{"name": "calculator", "description": "compute"}]
    session = ChatSession(engine, tokenizer, tools=tools, run_tool=run_tool)
    deltas = talk(session, "1+2?")
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["tool_calls", "tool_calls", "stop"]
    total = sum(deltas, ChatDelta())
    assert total.tool_calls == (CALL, bad, CALL)
    assert [result["content"] for result in total.tool_results] == ["3", "error: ValueError: no number", "3"]
    assert asked[0] == (CALL["name"], CALL["arguments"])
    assert [message["role"] for message in session.messages] == [
        *("user", "assistant", "tool", "assistant", "tool", "tool", "assistant")
    ]
    assert session.row()["tools"] == tools
    assert engine.prompts[2] == render(tokenizer, session.messages[:-1], tools=tools, add_generation_prompt=True).ids
    assert session.undo() == "1+2?"
    assert session.messages == []


def test_tool_rounds_end(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, [call_text() + "<|im_end|>"] * 5)
    session = ChatSession(engine, tokenizer, run_tool=lambda *_: "3", max_tool_rounds=2)
    assert talk(session, "again")[-1].finish_reason == "tool_calls"
    assert len(engine.prompts) == 3
    engine = ScriptedEngine(tokenizer, [call_text() + "<|im_end|>"])
    assert talk(ChatSession(engine, tokenizer), "once")[-1].finish_reason == "tool_calls"


def test_length_and_stop_strings_close_the_turn(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["red ball in the garden", "one STOP two<|im_end|>", "x<|im_end|>"])
    session = ChatSession(engine, tokenizer, sampling=SamplingParams(max_tokens=3))
    assert talk(session, "a")[-1].finish_reason == "length"
    session.sampling = SamplingParams(max_tokens=50)
    session.stop = ("STOP",)
    assert sum(talk(session, "b"), ChatDelta()) == ChatDelta("one ", finish_reason="stop")
    talk(session, "c")
    assert engine.closed == 3
    prompt = engine.prompts[2]
    assert prompt[: len(engine.prompts[1])] == engine.prompts[1]
    assert prompt.count(tokenizer.eos_id) == 5
    assert tokenizer.decode(prompt).count("<|im_end|>\n<|im_start|>") == 5


def test_a_stray_turn_start_ends_the_answer(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["x<|im_start|>user\nand I say", "y<|im_end|>"])
    session = ChatSession(engine, tokenizer)
    assert sum(talk(session, "a"), ChatDelta()) == ChatDelta("x", finish_reason="stop")
    talk(session, "b")
    assert tokenizer.decode(engine.prompts[1]).count("<|im_start|>") == 4


def test_interrupting(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["a b c d e<|im_end|>", "never<|im_end|>"])
    session = ChatSession(engine, tokenizer)
    answer = session.send("go")
    assert next(answer).content == "a"
    answer.close()
    assert engine.closed == 1
    assert [message["content"] for message in session.messages] == ["go", "a"]
    unread = session.send("unread")
    unread.close()
    assert len(session.messages) == 2


def test_the_oldest_turns_leave_a_full_context(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["The red ball.<|im_end|>"] * 12, max_length=120)
    session = ChatSession(engine, tokenizer, system="Be kind.", sampling=SamplingParams(max_tokens=30))
    for number in range(12):
        talk(session, f"Where is ball {number}?")
        assert len(engine.prompts[-1]) + engine.params[-1].max_tokens <= 120
    assert session.num_forgotten > 0
    assert len(session.messages) == 25  # nothing is lost for `row`
    kept = session.messages[1:-1][session.num_forgotten :]
    assert kept[0]["role"] == "user"
    assert engine.prompts[-1] == render(tokenizer, [session.messages[0], *kept], add_generation_prompt=True).ids
    before, forgotten = session.messages, session.num_forgotten
    with pytest.raises(ConfigError, match="but the context has 120"):
        talk(session, "garden " * 200)
    assert (session.messages, session.num_forgotten) == (before, forgotten)
    session.undo()
    assert session.num_forgotten == 0
    session.clear()
    assert session.messages == before[:1]
    assert session.undo() is None


@pytest.mark.parametrize("version", ["2025-11", "2026-08"])
def test_upstream_templates(public_data: Any, version: str) -> None:
    upstream = Tokenizer.load(public_data / "upstream_minimind" / version)
    engine = ScriptedEngine(upstream, ["<think>\nhm\n</think>\n\nHello.<|im_end|>", "Bye.<|im_end|>"])
    session = ChatSession(engine, upstream)
    talk(session, "hi")
    talk(session, "bye")
    sampled = upstream.encode("<think>\nhm\n</think>\n\nHello.<|im_end|>", allow_special=True)
    begin = engine.prompts[0] + sampled
    assert engine.prompts[1][: len(begin)] == begin
    assert render_text(upstream, [{"role": "user", "content": "bye"}], add_generation_prompt=True).endswith(
        upstream.decode(engine.prompts[1][len(begin) :])[-30:]
    )
