"""A conversation on a screen and in a pipe: streaming, thoughts dim and apart, commands that begin with `/`.

It is given a `ChatSession` and streams to write to; how a model is loaded (`stages.chat`) and what an answer consists
of (`inference.chat`) it does not know. Model text is never markup and never a control sequence of the terminal.
"""

import json
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from minimind.errors import MinimindError
from minimind.inference.chat import ChatDelta
from minimind.inference.session import ChatSession

THOUGHT, NOTE, CALL, ERROR = "dim italic", "dim", "cyan", "red"

# What a terminal would obey is shown instead: C0 as its picture, C1 and changes of direction as U+FFFD.
_OBEYED = (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A)},
    **dict.fromkeys(_OBEYED, "\ufffd"),
    0x7F: "\u2421",
}

HELP = """\
/help              this list
/undo              take back the last question and its answer
/clear             forget the conversation
/think on|off|auto the model must think first, must not, or decides (auto)
/system TEXT       set the system prompt; without a text remove it
/adapter [NAME]    answer with this adapter (LoRA), or none; no name: list them
/save FILE         add the conversation to a JSONL file that `minimind sft` reads
/exit              leave (or Ctrl-D); Ctrl-C stops an answer"""


def visible(text: str) -> str:
    """Return `text` with the characters that a terminal would obey replaced by visible ones."""
    return text.translate(_VISIBLE)


class Writer:
    """Writes text that comes in pieces, wrapped between words (or wide characters) at the console's width."""

    def __init__(self, console: Console) -> None:
        """Start at the beginning of a line."""
        self._console = console
        self._column = 0
        self._word = ""
        self._style = ""
        self._out: list[str] = []

    def write(self, text: str, style: str = "") -> None:
        """Write a piece; the last word waits until it is known to be whole."""
        if style != self._style:
            self._place()
            self._flush()
            self._style = style
        for character in visible(text):
            if character == "\n":
                self._place()
                self._newline()
            elif character in " \t":
                self._place()
                if self._column < self._console.width - 1:
                    self._out.append(" ")
                    self._column += 1
            elif cell_len(character) > 1:  # Chinese and Japanese break anywhere
                self._place()
                self._word = character
                self._place()
            else:
                self._word += character
        self._flush()

    def end_line(self) -> None:
        """Write what waits, and end the line if it has begun."""
        self._place()
        if self._column:
            self._newline()
        self._flush()

    def _place(self) -> None:
        width = cell_len(self._word)
        if self._column and self._column + width > self._console.width:
            self._newline()
        for character in self._word:
            if self._column + cell_len(character) > self._console.width:
                self._newline()
            self._out.append(character)
            self._column += cell_len(character)
        self._word = ""

    def _newline(self) -> None:
        self._out.append("\n")
        self._column = 0

    def _flush(self) -> None:
        if self._out:
            self._console.print(Text("".join(self._out), self._style), end="", soft_wrap=True, highlight=False)
            self._console.file.flush()
            self._out.clear()


def show(deltas: Iterable[ChatDelta], console: Console) -> None:
    """Write an answer as it comes: thoughts dim in a paragraph of their own, tool calls and results on their lines."""
    writer = Writer(console)
    kind = ""

    def begin(new: str) -> None:
        nonlocal kind
        if kind and kind != new:
            writer.end_line()
            if "thought" in (kind, new):
                writer.write("\n")
        kind = new

    try:
        for delta in deltas:
            if delta.reasoning:
                begin("thought")
                writer.write(delta.reasoning, THOUGHT)
            if delta.content:
                begin("content")
                writer.write(delta.content)
            for call in delta.tool_calls:
                begin("call")
                writer.write(f"-> {call['name']} {json.dumps(call['arguments'], ensure_ascii=False)}\n", CALL)
            for result in delta.tool_results:
                begin("call")
                writer.write(f"<- {result['content']}\n", CALL)
            if delta.finish_reason == "length":
                begin("note")
                writer.write("[cut: no room for more tokens]", NOTE)
    finally:
        writer.end_line()


def speed_line(session: ChatSession) -> str:
    """Return the speed of the last answer in words."""
    speed = session.speed
    return f"{speed.num_tokens} tokens, {speed.tokens_per_second:.1f} tokens/s, first after {speed.first_seconds:.2f} s"


@dataclass
class Reply:
    """What a command says, and whether it ends the conversation."""

    text: str
    is_error: bool = False
    is_end: bool = False


def command(session: ChatSession, line: str) -> Reply:
    """Carry out a line that begins with `/`."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name in ("/exit", "/quit", "/bye"):
        return Reply("", is_end=True)
    if name == "/help":
        return Reply(HELP)
    if name == "/clear":
        session.clear()
        return Reply("The conversation is forgotten.")
    if name == "/undo":
        said = session.undo()
        return Reply("There is nothing to take back." if said is None else f"Taken back: {said}")
    if name == "/think":
        switch = {"on": True, "off": False, "auto": None}
        if rest not in switch:
            return Reply(f"/think {rest}: say on, off or auto", is_error=True)
        session.enable_thinking = switch[rest]
        return Reply(f"Thinking: {rest}.")
    if name == "/system":
        session.system = rest or None
        return Reply(f"System prompt: {rest}" if rest else "No system prompt.")
    if name == "/adapter":
        return _switch(session, rest)
    if name == "/save":
        return _save(session, rest)
    return Reply(f"{name}: no such command; /help lists them", is_error=True)


def _switch(session: ChatSession, name: str) -> Reply:
    adapters = session.adapters
    if adapters is None or not adapters.names:
        return Reply("/adapter: there is none; start with minimind chat RUN --adapter DIR", is_error=True)
    if name:
        try:
            adapters.use(None if name == "none" else name)
        except MinimindError as error:
            return Reply(f"/adapter: {error}", is_error=True)
    active = adapters.active or "none"
    return Reply("Adapters: " + ", ".join(f"[{n}]" if n == active else n for n in (*adapters.names, "none")))


def _save(session: ChatSession, name: str) -> Reply:
    if not name:
        return Reply("/save: say which file", is_error=True)
    if not session.messages:
        return Reply("/save: there is nothing to save yet", is_error=True)
    try:
        with Path(name).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps(session.row(), ensure_ascii=False) + "\n")
    except OSError as error:
        return Reply(f"/save: {error}", is_error=True)
    return Reply(f"Added {len(session.messages)} messages to {name}.")


def talk(session: ChatSession, console: Console, read_line: Callable[[], str], *, greeting: str = "") -> None:
    """Hold a conversation until `/exit` or the end of input. `read_line` raises EOFError at the end, as `input` does.

    Ctrl-C stops an answer, and what was said stays; at the prompt it leaves when pressed twice.
    """
    if greeting:
        console.print(Text(greeting, NOTE), highlight=False)
    was_interrupted = False
    while True:
        try:
            line = read_line()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            if was_interrupted:
                console.print()
                return
            was_interrupted = True
            console.print(Text("\nCtrl-C again or Ctrl-D leaves", NOTE))
            continue
        was_interrupted = False
        if not line.strip():
            continue
        if line.startswith("/"):
            reply = command(session, line)
            if reply.is_end:
                return
            console.print(Text(visible(reply.text), ERROR if reply.is_error else NOTE), highlight=False)
        else:
            _answer(session, console, line)


def _answer(session: ChatSession, console: Console, text: str) -> None:
    forgotten = session.num_forgotten
    try:
        with closing(session.send(text)) as answer:
            show(answer, console)
    except KeyboardInterrupt:
        console.print(Text("[stopped]", NOTE), highlight=False)
    except MinimindError as error:
        console.print(Text(visible(str(error)), ERROR), highlight=False)
        return
    note = speed_line(session)
    if session.num_forgotten > forgotten:
        note += f", the first {session.num_forgotten} messages no longer fit"
    console.print(Text(note, NOTE), highlight=False)
    console.print()


def write_answer(
    session: ChatSession, text: str, out: TextIO, notes: TextIO, *, is_verbose: bool = False, is_one_line: bool = False
) -> None:
    """Write the answer to `text` (its content only) on `out`, as it is or as one line.

    Tool calls, and if `is_verbose` thoughts, go to `notes`.
    """
    total = ChatDelta()
    for delta in session.send(text):
        total += delta
        for call in delta.tool_calls:
            notes.write(visible(f"-> {call['name']} {json.dumps(call['arguments'], ensure_ascii=False)}\n"))
        for result in delta.tool_results:
            notes.write(visible(f"<- {result['content']}\n"))
    if is_verbose and total.reasoning:
        notes.write(visible(total.reasoning) + "\n")
    answer = " ".join(total.content.split()) if is_one_line else total.content.rstrip("\n")
    out.write((visible(answer) if out.isatty() else answer) + "\n")
    out.flush()


def serve_lines(
    session: ChatSession, lines: Iterable[str], out: TextIO, notes: TextIO, *, is_verbose: bool = False
) -> int:
    """Answer each line of `lines` by one line on `out` (line breaks become spaces); return how many failed.

    The lines are one conversation; `/clear` and the other commands work as on a screen, and answer on `notes`. An empty
    line gets an empty line, a failed one too, so that questions and answers stay side by side.
    """
    num_failed = 0
    for line in lines:
        line = line.rstrip("\r\n")
        if line.startswith("/"):
            reply = command(session, line)
            if reply.is_end:
                break
            num_failed += reply.is_error
            notes.write(visible(reply.text) + "\n")
            continue
        try:
            if line.strip():
                write_answer(session, line, out, notes, is_verbose=is_verbose, is_one_line=True)
            else:
                out.write("\n")
        except MinimindError as error:
            num_failed += 1
            notes.write(f"error: {error}\n")
            out.write("\n")
    return num_failed
