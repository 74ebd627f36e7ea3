"""Named places in code that writes to disk, at which tests can crash. In ordinary use passing one costs nothing."""

import os
import signal
from collections import Counter
from collections.abc import Callable

hook: Callable[[str], None] | None = None
"""Called with the name of every place passed, when set: it may raise, as a full disk would."""

_passed: Counter[str] = Counter()


def fault_point(name: str) -> None:
    """Let a test interfere here. MINIMIND_FAULT=NAME[:N] in the environment kills the process (SIGKILL) at its N-th."""
    if hook is not None:
        hook(name)
    wanted = os.environ.get("MINIMIND_FAULT")
    if wanted:
        _passed[name] += 1
        point, _, count = wanted.partition(":")
        if point == name and _passed[name] == int(count or "1"):
            os.kill(os.getpid(), signal.SIGKILL)
