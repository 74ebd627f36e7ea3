"""The conversation on a screen of 80 columns and in a pipe, with a fake engine."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from minimind.inference.chat import ChatDelta
from minimind.inference.sampling import SamplingParams
from minimind.inference.session import ChatSession
from minimind.inference.terminal import Writer, command, serve_lines, show, talk, visible, write_answer
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.train import train

CALL = '<tool_call>\n{"name": "clock", "arguments": {"时": 1}}\n</tool_call>'


class Event(NamedTuple):
    token_id: int
    finish_reason: str | None


class EchoEngine:
    """Answers with what it finds in the script, else with the last line the user said."""

    def __init__(self, tokenizer: Tokenizer, script: list[str] | None = None, *, interrupt_after: int = -1) -> None:
        self.tokenizer = tokenizer
        self.script = script or []
        self.interrupt_after = interrupt_after

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams | None = None) -> Iterator[Any]:
        asked = self.tokenizer.decode(prompt_ids).rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        answer = self.script.pop(0) if self.script else f"You said {asked}."
        for place, token in enumerate(self.tokenizer.encode(answer + "<|im_end|>", allow_special=True)):
            if place == self.interrupt_after:
                raise KeyboardInterrupt
            yield Event(token, "stop" if token == self.tokenizer.eos_id else None)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["The red ball is in the garden. You said 你好，世界。"] * 20, 330)


def screen(*, color: bool = False) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=80, force_terminal=color, color_system="standard" if color else None), file


def written(pieces: Sequence[str]) -> str:
    console, file = screen()
    writer = Writer(console)
    for piece in pieces:
        writer.write(piece)
    writer.end_line()
    return file.getvalue()


letters = st.text(st.sampled_from("ab 好，\n[é"), max_size=60)


@given(pieces=st.lists(letters, max_size=8))
@settings(deadline=None)
def test_wrapping_keeps_the_width_and_the_words(pieces: list[str]) -> None:
    text = "".join(pieces)
    lines = written(pieces).split("\n")
    assert all(cell_len(line) <= 80 for line in lines)
    assert written(list(text)) == written([text])
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_wrapping_between_words_and_wide_characters() -> None:
    lines = written(["word " * 20, "x" * 100, "\n", "好" * 50]).splitlines()
    assert lines[0] == ("word " * 16).strip()[:80]
    assert lines[1].startswith("word word")
    assert "x" * 80 in lines
    assert "好" * 40 in lines
    assert lines[-1] == "好" * 10


def test_nothing_in_the_text_is_obeyed() -> None:
    assert visible("a\x1b[31mb\x07\x9bc\u202ed\te\n") == "a␛[31mb␇�c�d\te\n"
    console, file = screen(color=True)
    show([ChatDelta("[bold]\x1b[2Jx[/bold] :smile: http://a.b 123")], console)
    assert file.getvalue() == "[bold]␛[2Jx[/bold] :smile: http://a.b 123\n"


def test_thoughts_stand_apart_and_dim() -> None:
    deltas = [
        ChatDelta(reasoning="one "),
        ChatDelta(reasoning="and one"),
        ChatDelta("two"),
        ChatDelta("!"),
        ChatDelta(finish_reason="stop"),
    ]
    console, file = screen()
    show(deltas, console)
    assert file.getvalue() == "one and one\n\ntwo!\n"
    console, file = screen(color=True)
    show(deltas, console)
    assert file.getvalue().startswith("\x1b[2;3mone ")
    assert file.getvalue().endswith("two!\n")


def test_tools_and_cut_answers_are_shown() -> None:
    console, file = screen()
    call = {"name": "clock", "arguments": {"时": 1}}
    show(
        [
            ChatDelta("See:"),
            ChatDelta(tool_calls=(call,)),
            ChatDelta(tool_results=({"name": "clock", "content": "09:10"},)),
            ChatDelta("Ten past"),
            ChatDelta(finish_reason="length"),
        ],
        console,
    )
    assert file.getvalue() == 'See:\n-> clock {"时": 1}\n<- 09:10\nTen past\n[cut: no room for more tokens]\n'


def run_talk(session: ChatSession, lines: list[Any]) -> str:
    console, file = screen()
    waiting = iter(lines)

    def read_line() -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    talk(session, console, read_line, greeting="hello")
    assert next(waiting, None) is None or lines[-1] != "/exit"
    return file.getvalue()


def test_a_conversation_on_a_screen(tokenizer: Tokenizer, tmp_path: Path) -> None:
    session = ChatSession(EchoEngine(tokenizer, ["<think>\nhm\n</think>\n\nThe red ball."]), tokenizer)
    file = tmp_path / "saved.jsonl"
    text = run_talk(
        session,
        [
            "",
            "who?",
            "and you",
            "/undo",
            "/system Be kind.",
            "/think off",
            f"/save {file}",
            "/nope",
            "/exit",
            "never read",
        ],
    )
    assert text.startswith("hello\nhm\n\nThe red ball.\n")
    assert "tokens/s, first after" in text
    assert "You said and you.\n" in text
    assert "Taken back: and you" in text
    assert "/nope: no such command; /help lists them" in text
    assert session.enable_thinking is False
    saved = json.loads(file.read_text("utf-8"))
    assert saved == {"messages": session.messages}
    assert saved["messages"][0] == {"role": "system", "content": "Be kind."}
    assert saved["messages"][2] == {"role": "assistant", "content": "The red ball.", "reasoning_content": "hm"}


def test_commands(tokenizer: Tokenizer, tmp_path: Path) -> None:
    session = ChatSession(EchoEngine(tokenizer), tokenizer)
    assert "/undo" in command(session, "/help").text
    assert command(session, "/undo").text == "There is nothing to take back."
    assert command(session, "/save x").is_error
    assert command(session, "/save").is_error
    assert command(session, "/think maybe").is_error
    assert command(session, "/system").text == "No system prompt."
    list(session.send("hi"))
    assert "Is a directory" in command(session, f"/save {tmp_path}").text
    command(session, "/clear")
    assert session.messages == []
    assert command(session, "/quit").is_end


def test_interrupting_an_answer_and_leaving(tokenizer: Tokenizer) -> None:
    session = ChatSession(EchoEngine(tokenizer, interrupt_after=3), tokenizer)
    text = run_talk(session, ["one two three", KeyboardInterrupt, KeyboardInterrupt, "never read"])
    assert "[stopped]" in text
    assert "Ctrl-C again or Ctrl-D leaves" in text
    assert [message["role"] for message in session.messages] == ["user", "assistant"]


def test_errors_do_not_end_the_conversation(tokenizer: Tokenizer) -> None:
    session = ChatSession(EchoEngine(tokenizer), tokenizer, context_length=64)
    text = run_talk(session, ["garden " * 100, "hi", "/exit"])
    assert "but the context has 64" in " ".join(text.split())
    assert "You said hi." in text


def test_a_pipe_gets_a_line_for_a_line(tokenizer: Tokenizer) -> None:
    script = ["<think>\nhm\n</think>\n\nOne\nline.", "You said 你好.", CALL, "It is late."]
    session = ChatSession(EchoEngine(tokenizer, script), tokenizer, run_tool=lambda *_: "09:10", context_length=400)
    out, notes = io.StringIO(), io.StringIO()
    lines = [
        "who?\n",
        "\n",
        "你好\r\n",
        "what time\n",
        "garden " * 500 + "\n",
        "/clear\n",
        "/nope\n",
        "bye\n",
        "/exit\n",
        "no\n",
    ]
    assert serve_lines(session, lines, out, notes, is_verbose=True) == 2
    assert out.getvalue() == "One line.\n\nYou said 你好.\nIt is late.\n\nYou said bye.\n"
    assert notes.getvalue().startswith("hm\n-> clock")
    assert '-> clock {"时": 1}\n<- 09:10\n' in notes.getvalue()
    assert "error: the message and what must go with it take" in notes.getvalue()
    assert [message["content"] for message in session.messages] == ["bye", "You said bye."]


def test_one_answer_as_it_is(tokenizer: Tokenizer) -> None:
    session = ChatSession(EchoEngine(tokenizer, ["<think>\nhm\n</think>\n\nTwo\nlines.\n\x1b"]), tokenizer)
    out, notes = io.StringIO(), io.StringIO()
    write_answer(session, "hi", out, notes)
    assert out.getvalue() == "Two\nlines.\n\x1b\n"
    assert notes.getvalue() == ""
