"""SIGTERM and SIGINT while training: the first asks the loop to save and stop, the second stops at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Generator
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from minimind.errors import Interrupted, Preempted
from minimind.runtime import distributed

SHOW_CURSOR = "\x1b[?25h"


class Cut(BaseException):
    """Raised inside `Signals.cuttable` by a signal: what runs there can be made again and need not be waited for."""


class Signals:
    """While the block lasts, `received` is the number of the first SIGTERM or SIGINT, 0 without one."""

    def __init__(self) -> None:
        self.received = 0
        self._is_cuttable = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def cuttable(self, *, enabled: bool) -> Generator[None]:
        """Let a signal end the block by raising Cut: for validation and samples, which change nothing."""
        self._is_cuttable = enabled
        try:
            if enabled and self.received:
                raise Cut
            yield
        finally:
            self._is_cuttable = False

    def raise_outcome(self, where: str) -> NoReturn:
        """Raise what a saved and stopped run ends with: Interrupted after SIGINT, else Preempted."""
        if self.received == signal.SIGINT:
            raise Interrupted(f"interrupted and saved: {where}. The same command resumes it")
        raise Preempted(f"stopped and saved: {where}. The same command resumes it")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature signal asks for
        if self.received:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"{SHOW_CURSOR if sys.stderr.isatty() else ''}\nstopped at once, not saved\n")
                sys.stderr.flush()
            os._exit(128 + number)
        self.received = number
        if distributed.is_main():
            os.write(2, b"\nsaving, then stopping (once more: stop at once)\n")
        if self._is_cuttable:
            raise Cut
