"""`minimind chat RUN`: load a model and talk with it, on a screen or in a pipe; `minimind.chat(path)` in Python.

It plugs the parts together and knows none of them: the conversation is `inference.session`, the screen
`inference.terminal`, the tools those of the built-in world.
"""

import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import tyro

from minimind.config import parse

if TYPE_CHECKING:
    from minimind.inference.engine import Engine
    from minimind.inference.session import ChatSession

THINKING = {"auto": None, "on": True, "off": False}


@dataclass(frozen=True)
class ChatConfig:
    """Talk with a model. Without a terminal on stdin, each line is a turn and gets one line of answer on stdout."""

    run: tyro.conf.Positional[Path]
    """A run, a checkpoint directory or a Transformers directory; a LoRA run brings its base along."""
    adapter: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A LoRA run or PEFT directory for this model; may be repeated: the first is on, and /adapter switches."""
    prompt: str = ""
    """Answer this one text as it is on stdout, and end."""
    system: str = ""
    """System prompt; none unless given."""
    tools: bool = False
    """Offer the calculator, clock and weather of the built-in world, and run the calls."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether answers begin with a thought; auto leaves it to the model."""
    show_thinking: bool = False
    """In a pipe or with --prompt: write thoughts to stderr."""
    temperature: float = 0.7
    """0 takes the most likely token; higher is more varied."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0: all."""
    top_p: float = 0.9
    """Sample among the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Sample among tokens at least this fraction as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1: tokens already there become less likely."""
    max_tokens: int = 512
    """Tokens of an answer at most."""
    seed: int | None = None
    """Seed of the sampling; the same seed and texts give the same answers. Without one, each run differs."""
    context: int = 0
    """Tokens of conversation the model sees; 0: 2048 or as many as its positions allow."""
    device: str = "auto"
    """cpu, cuda, cuda:N, mps, or auto (the best at hand)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the matrix products."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each (sampling values are checked where used)."""
        return [f"context = {self.context}: use 0 or at least 16"] if 0 != self.context < 16 else []


def chat(
    path: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    tools: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    **options: Any,
) -> "ChatSession":
    """Return a conversation with the model at `path` (a run, a checkpoint or a Transformers directory).

    `adapters` are put beside it (`session.adapters.use(name)` switches; the first is on). `tools` offers those of the
    built-in world. `options` are `ChatSession`'s: system, sampling, enable_thinking,
    context_length... CheckpointError when there is no model, ConfigError for impossible values.
    """
    from minimind.checkpoint import load_with_adapters
    from minimind.inference.engine import Engine
    from minimind.inference.session import ChatSession
    from minimind.runtime.device import pick_device, pick_dtype

    where = pick_device(device)
    model, tokenizer, known = load_with_adapters(Path(path), [Path(adapter) for adapter in adapters])
    model.to(where)
    precision = pick_dtype(dtype, where, num_parameters=model.config.num_parameters()[0])
    engine = Engine(model, max_batch_size=1, max_length=options.pop("context_length", None), dtype=precision)
    if tools:
        from minimind.world.tools import TOOLS, run_tool

        options = {"tools": [tool.schema for tool in TOOLS.values()], "run_tool": run_tool, **options}
    return ChatSession(engine, tokenizer, adapters=known, **options)


def main(argv: list[str]) -> int:
    """Run `minimind chat` and return its exit code: 1 if a line of a pipe got no answer."""
    config = parse(ChatConfig, argv, command="chat")
    from minimind.inference import terminal
    from minimind.inference.sampling import SamplingParams

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens")
    seed = secrets.randbits(31) if config.seed is None else config.seed
    session = chat(
        config.run,
        adapters=config.adapter,
        tools=config.tools,
        device=config.device,
        dtype=config.dtype,
        system=config.system or None,
        sampling=SamplingParams(seed=seed, **{name: getattr(config, name) for name in names}),
        enable_thinking=THINKING[config.thinking],
        context_length=config.context or None,
    )
    if config.prompt:
        terminal.write_answer(session, config.prompt, sys.stdout, sys.stderr, is_verbose=config.show_thinking)
        return 0
    if not sys.stdin.isatty():
        return int(
            terminal.serve_lines(session, sys.stdin, sys.stdout, sys.stderr, is_verbose=config.show_thinking) > 0
        )
    from rich.console import Console

    with suppress(ImportError):
        import_module("readline")  # where the platform has it, `input` gets line editing and history
    size = cast("Engine", session.engine).model.config.describe()
    adapted = f" with {session.adapters.active}" if session.adapters and session.adapters.active else ""
    greeting = f"{config.run}{adapted}, {size} parameters. /help lists the commands, Ctrl-D leaves."
    terminal.talk(session, Console(highlight=False), lambda: input("> "), greeting=greeting)
    return 0
