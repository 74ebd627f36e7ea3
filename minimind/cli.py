"""The command line: a table from command to the function that runs it. It imports only the one chosen, and no torch.

What a command does, and which flags it takes, its own module knows: every `main(argv) -> int | None` is called alike.
"""

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from minimind import __version__
from minimind.errors import MinimindError


class Command(NamedTuple):
    """Where a command lives and what `minimind --help` says about it."""

    target: str
    """`module:function`, imported when the command is chosen."""
    summary: str
    """One line."""


GROUPS: dict[str, dict[str, Command]] = {
    "make a model": {
        "demo": Command("minimind.demo.pipeline:main", "the whole pipeline on a small invented world, in minutes"),
        "world": Command("minimind.world.write:main", "write that world as JSONL files, in every format"),
        "train-tokenizer": Command("minimind.stages.train_tokenizer:main", "learn a vocabulary from text"),
        "pretrain": Command("minimind.stages.pretrain:main", "learn a language from text"),
        "sft": Command("minimind.stages.sft:main", "learn to answer from conversations"),
        "lora": Command("minimind.stages.lora:main", "the same beside frozen weights: thin adapters"),
        "reason": Command("minimind.stages.reason:main", "learn to think before answering"),
        "distill": Command("minimind.stages.distill:main", "learn what a larger model knows"),
        "dpo": Command("minimind.stages.dpo:main", "learn which of two answers is better"),
        "reward-model": Command("minimind.stages.reward_model:main", "learn what an answer is worth, for RL"),
        "ppo": Command("minimind.stages.ppo:main", "learn from rewards, beside a critic"),
        "grpo": Command("minimind.stages.grpo:main", "learn from rewards, answer against answer"),
        "spo": Command("minimind.stages.spo:main", "learn from rewards, one answer a prompt"),
        "agent": Command("minimind.stages.agent:main", "learn to use tools from rewards"),
    },
    "use a model": {
        "chat": Command("minimind.stages.chat:main", "talk with a model in the terminal"),
    },
    "look inside": {
        "eval": Command("minimind.evaluation.harness:main", "score a model on questions, with intervals"),
        "data check": Command("minimind.data.check:main", "report every bad row of a data file"),
    },
}

COMMANDS: dict[str, Command] = {name: command for group in GROUPS.values() for name, command in group.items()}

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (None: the process's arguments) names and return its exit code.

    A MinimindError becomes its message on stderr and its `exit_code`; `MINIMIND_DEBUG=1` keeps the traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Read by OpenMP when torch is loaded: how long a waiting thread spins before it sleeps. Long spinning collapses
    # beside other torch processes, none at all takes twice the time on a quiet machine (docs/decisions.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    try:
        code = _run(words)
        sys.stdout.flush()  # here, where a reader that has gone away can still be handled
    except MinimindError as error:
        if _is_debug():
            raise
        print(f"minimind: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if _is_debug():
            raise
        print("\nminimind: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _close_stdout()
        return 128 + _SIGPIPE
    return code


def help_text() -> str:
    """Return what `minimind --help` prints; 80 columns."""
    width = max(len(name) for name in COMMANDS) + 2
    lines = [
        "usage: minimind COMMAND [OPTIONS]",
        "",
        "From raw text to a model that chats, every line of it readable.",
        "",
    ]
    for group, commands in GROUPS.items():
        lines.append(f"{group}:")
        lines.extend(f"  {name:<{width}}{command.summary}" for name, command in commands.items())
        lines.append("")
    lines.append("minimind COMMAND --help shows the options of a command.")
    lines.append("New here? Type minimind demo, wait a few minutes, and chat with what it made.")
    return "\n".join(lines)


def _run(words: list[str]) -> int:
    if not words or words[0] in {"-h", "--help", "help"}:
        print(help_text())
        return 0
    if words[0] in {"-V", "--version", "version"}:
        print(f"minimind {__version__}")
        return 0
    name, rest = _split(words)
    if name is None:
        print(_unknown(words), file=sys.stderr)
        return 2
    result = _load(COMMANDS[name].target)(rest)
    return 0 if result is None else result


def _split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the command that `words` begin with (its name may be two words) and the words after it."""
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in COMMANDS:
            return name, list(words[length:])
    return None, []


def _unknown(words: Sequence[str]) -> str:
    group = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if group:
        listed = "\n".join(f"  minimind {name}  {COMMANDS[name].summary}" for name in group)
        return f"minimind {words[0]} needs one more word:\n{listed}"
    near = difflib.get_close_matches(words[0].replace("_", "-"), COMMANDS, n=1, cutoff=0.5)
    hint = f"Did you mean: minimind {near[0]}" if near else "minimind --help lists the commands."
    return f"minimind: no command {words[0]!r}. {hint}"


def _load(target: str) -> Callable[[list[str]], int | None]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def _is_debug() -> bool:
    return os.environ.get("MINIMIND_DEBUG", "") not in {"", "0"}


_SIGPIPE = int(getattr(signal, "SIGPIPE", 13))


def _close_stdout() -> None:
    """Send what is still buffered nowhere, so that Python does not complain about the broken pipe while it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
