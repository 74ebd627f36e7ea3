"""`minimind data check FILE ...`: every problem of data files, and what their rows hold. Needs no torch.

The report goes to stdout, one problem a line (`file:line: what`), wrapped only on a terminal. Memory stays flat.
"""

import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from minimind.config import parse
from minimind.data import conversation, preference, prompt, text
from minimind.data.jsonl import file_format, scan
from minimind.data.messages import Message
from minimind.data.rows import Problem, Row

Kind = Literal["auto", "pretrain", "conversation", "preference", "prompt", "agent"]

BAD_DATA = 3


@dataclass(frozen=True)
class CheckConfig:
    """Report every bad row of data files, and what the good ones hold."""

    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE ...")] = ()
    """Files: .jsonl, .json or .txt (each also .gz or .zst), .parquet."""
    kind: Kind = "auto"
    """What every row has to be; auto takes what each row looks like."""
    limit: int = 20
    """Problems shown of each file; all are counted. 0 shows all."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values."""
        found = [] if self.files else ["files: no data file; name at least one: minimind data check FILE ..."]
        return found + ([f"limit is {self.limit}, expected 0 or more"] if self.limit < 0 else [])


@dataclass
class Findings:
    """What one file holds."""

    rows: int = 0
    problems: int = 0
    kinds: Counter[str] = field(default_factory=Counter[str])
    roles: Counter[str] = field(default_factory=Counter[str])
    """Turns by role."""
    characters: int = 0
    longest: int = 0
    """Characters of the longest row."""
    features: Counter[str] = field(default_factory=Counter[str])
    """Rows with tools, thoughts, ..."""

    def add(self, kind: str, messages: Sequence[Message], characters: int) -> None:
        """Count one good row."""
        self.kinds[kind] += 1
        self.roles.update(message["role"] for message in messages)
        self.features["with tool calls"] += any(message.get("tool_calls") for message in messages)
        self.features["with reasoning"] += any(message.get("reasoning_content") for message in messages)
        self.features["with a system turn"] += any(message["role"] == "system" for message in messages)
        characters += sum(len(m["content"]) + len(m.get("reasoning_content", "")) for m in messages)
        self.features["empty"] += characters == 0
        self.characters += characters
        self.longest = max(self.longest, characters)


def main(argv: Sequence[str]) -> int:
    """Print the report; return 0 when every row is good, else 3 (also when a file holds no row)."""
    config = parse(CheckConfig, argv, command="data check")
    for file in config.files:
        file_format(file)
    bad = 0
    for file in config.files:
        findings = Findings()
        for problem in check_file(file, config.kind, findings):
            findings.problems += 1
            if not config.limit or findings.problems <= config.limit:
                _say(str(problem))
        if findings.problems > config.limit > 0:
            _say(f"{file}: {findings.problems - config.limit:,} more problems (--limit 0 shows all)")
        for line in summary(file, findings):
            _say(line)
        bad += findings.problems > 0 or findings.rows == 0
    if bad:
        _say(f"{bad} of {len(config.files)} file{'s' * (len(config.files) != 1)} not usable as it is")
    return BAD_DATA if bad else 0


def check_file(file: Path, kind: Kind, findings: Findings) -> Iterator[Problem]:
    """Yield every problem of one file and count its rows into `findings`."""
    for item in scan(file):
        findings.rows += 1
        if isinstance(item, Problem):
            yield item
        else:
            for what in _check_row(item, detect(item.data) if kind == "auto" else kind, findings):
                yield Problem(item.file, item.line, what)


def detect(data: dict[str, Any]) -> str:
    """Return which kind of row this looks like; "" when none."""
    if "chosen" in data or "rejected" in data or "label" in data:
        return "preference"
    turns = next((data[key] for key in conversation.TURN_FIELDS if key in data), None)
    if "gt" in data:
        return "agent"
    if turns is not None or "instruction" in data:
        last = turns[-1] if isinstance(turns, list) and turns else None
        if isinstance(last, dict) and last.get("content", last.get("value")) == "" and not last.get("tool_calls"):
            return "prompt"
        return "prompt" if "answer" in data else "conversation"
    if "prompt" in data or "question" in data:
        return "conversation" if "response" in data or "completion" in data else "prompt"
    return "pretrain" if "text" in data else ""


def _check_row(row: Row, kind: str, findings: Findings) -> list[str]:
    messages: list[Message] = []
    characters = 0
    if kind == "pretrain":
        content, problems = text.read(row.data)
        characters = len(content)
    elif kind == "conversation":
        found, problems = conversation.read(row.data)
        messages = found.messages
    elif kind == "preference":
        pair, problems = preference.read(row.data)
        messages = [*pair.prompt, *(pair.chosen or []), *(pair.rejected or [])]
        findings.features["unpaired"] += not problems and bool(preference.unpaired(pair))
    elif kind in ("prompt", "agent"):
        wanted, problems = prompt.read(row.data, needs_tools=kind == "agent")
        messages = wanted.messages
        findings.features["with an answer"] += not problems and wanted.answer is not None
    else:
        keys = ", ".join(list(row.data)[:8]) or "nothing"
        return [
            f"no known kind of row (its fields are {keys}), expected text, {conversation.LAYOUTS}, chosen + rejected"
        ]
    if not problems:
        findings.add(kind, messages, characters)
    return problems


def summary(file: Path, findings: Findings) -> list[str]:
    """Return the lines that describe a file, at most 80 columns but for its name."""
    good = sum(findings.kinds.values())
    if not findings.rows:
        return [f"{file}: no rows"]
    problems = f"{findings.problems:,} problem{'s' * (findings.problems != 1)}" if findings.problems else "no problems"
    lines = [f"{file}: {findings.rows:,} row{'s' * (findings.rows != 1)}, {problems}"]
    if not good:
        return lines
    lines.append("  kinds       " + _counts(findings.kinds))
    if findings.roles:
        lines.append("  turns       " + _counts(findings.roles))
    lines.append(
        f"  characters  {findings.characters:,} ({findings.characters // good:,} a row, longest {findings.longest:,})"
    )
    if +findings.features:
        lines.append("  rows        " + _counts(+findings.features))
    return lines


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counter.most_common())


def _say(line: str) -> None:
    if sys.stdout.isatty():
        width = max(40, shutil.get_terminal_size((80, 24)).columns)
        indent = " " * (14 if line.startswith("  ") else 4)
        line = "\n".join(
            textwrap.wrap(
                line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False,
                replace_whitespace=False, drop_whitespace=True,
            )
        )  # fmt: skip
    sys.stdout.write(line + "\n")
