"""How a run looks while it goes: a bar with the time left on a terminal, plain lines in a pipe, always on stderr.

It formats numbers that the loop measured, and knows nothing about how they came about. log.txt gets the plain lines.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Generator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from minimind.runtime import distributed
from minimind.runtime.log import get_logger

_log = get_logger("training")

PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
    "T4": 65e12,
}
"""Dense 16-bit matrix products per second that the maker gives, by a part of the device's name."""


class Clock:
    """Time in the loop: the whole of it over all sessions, and the speed of the steps alone since the last look."""

    def __init__(self, earlier_seconds: float = 0.0) -> None:
        self._begin = time.monotonic() - earlier_seconds
        self._mark, self._idle, self._tokens, self._steps = time.monotonic(), 0.0, 0, 0
        self._session_steps, self._session_seconds = 0, 0.0

    def seconds(self) -> float:
        """Return the seconds since the run began, without the gaps between its sessions."""
        return time.monotonic() - self._begin

    def tick(self, tokens: int) -> None:
        """Count a step."""
        self._tokens += tokens
        self._steps += 1

    @contextlib.contextmanager
    def stopped(self) -> Generator[None]:
        """Leave the block out of the speed."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._idle += time.monotonic() - start

    def tokens_per_second(self) -> float:
        """Return the speed since the last call."""
        now = time.monotonic()
        busy = max(1e-9, now - self._mark - self._idle)
        speed = self._tokens / busy
        self._session_steps += self._steps
        self._session_seconds += now - self._mark
        self._mark, self._idle, self._tokens, self._steps = now, 0.0, 0, 0
        return speed

    def seconds_per_step(self) -> float:
        """Return what a step of this session took up to the last look, validation and saving included."""
        return self._session_seconds / max(1, self._session_steps)


class Display:
    """The face of one run. Rows are shown by `show`, results of validation by `say`."""

    def __init__(self, steps: int, *, start: int = 0, log_file: logging.Handler | None = None) -> None:
        self._steps, self._log_file = steps, log_file
        self._live: Live | None = None
        self._is_main = distributed.is_main()
        self._newest_validation = ""
        if self._is_main and sys.stderr.isatty():
            console = Console(stderr=True)
            self._live = Live(self._face(start, ""), console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, row: Mapping[str, Any], *, eta_seconds: float) -> None:
        """Show the numbers of a step: in the bar on a terminal, as one line else."""
        if not self._is_main:
            return
        line = progress_line(row, steps=self._steps, eta_seconds=eta_seconds)
        if self._live is None:
            _log.info(line)
            return
        self._live.update(self._face(int(row["step"]), numbers(row), eta_seconds))
        if self._log_file:
            self._log_file.handle(_log.makeRecord(_log.name, logging.INFO, "", 0, line, (), None))

    def say(self, row: Mapping[str, Any]) -> None:
        """Print the results of a validation on a line of their own that stays."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step" and value is not None)
        if "val_loss" in row:
            self._newest_validation = f"val {row['val_loss']:.3f}"
        _log.info("step %d/%d  %s", row["step"], self._steps, shown)

    def _face(self, step: int, text: str, eta_seconds: float = 0.0) -> Group:
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(ratio=1)
        for _ in range(3):
            bar.add_column(no_wrap=True, justify="right")
        bar.add_row(
            ProgressBar(total=self._steps, completed=step),
            f"{step}/{self._steps}",
            f"{100 * step / self._steps:.1f} %",
            f"ETA {duration(eta_seconds)}" if step else "",
        )
        details = "  ".join(part for part in (text, self._newest_validation) if part) or "starting"
        return Group(bar, Text(details, style="dim", no_wrap=True, overflow="ellipsis"))


def progress_line(row: Mapping[str, Any], *, steps: int, eta_seconds: float) -> str:
    """Return `step 120/1270  9.4%  loss 2.310  lr 6.0e-3  grad 0.81  8.4k tok/s  420 MB  ETA 2:31`."""
    share = f"{100 * row['step'] / steps:.1f}%"
    return f"step {row['step']}/{steps}  {share}  {numbers(row)}  ETA {duration(eta_seconds)}"


def numbers(row: Mapping[str, Any]) -> str:
    """Return reward (if there is one), loss, rate, gradient norm, speed, MFU (where known) and memory in one line."""
    exponent = f"{row['lr']:.1e}".replace("e-0", "e-").replace("e+00", "")
    parts = [f"loss {row['train_loss']:.3f}", f"lr {exponent}", f"grad {_grad(row['grad_norm'])}"]
    if "reward" in row:
        parts[:0] = [f"reward {row['reward']:.3f}", f"{row['answer_tokens']:.0f} tokens an answer"]
    parts.append(f"{count(row['tokens_per_second'])} tok/s")
    if row.get("mfu") is not None:
        parts.append(f"MFU {100 * row['mfu']:.0f}%")
    parts.append(size(row["memory_bytes"]))
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Return `2:31`, or `1:02:31` from an hour on."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(num_bytes: float) -> str:
    """Return `420 MB`, or `1.9 GB` from a thousand megabytes on."""
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"


def count(number: float) -> str:
    """Return `843`, `8.4k`, `84k` or `1.2M`."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{letter}" if number < 10 * unit else f"{number / unit:.0f}{letter}"
    return f"{number:.0f}"


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense 16-bit operations per second, None where they are not known (any CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def _grad(norm: float | None) -> str:
    return "-" if norm is None else f"{norm:.2f}"
