"""Lines to and from a process of a user's code: what both sides of `scoring` and `sandbox` share; no protocol."""

import contextlib
import os
import queue
import signal
import subprocess
from typing import IO, NoReturn


def end(process: "subprocess.Popen[str]") -> None:
    """Kill a process that leads its session, with all that it has started, and close its pipes."""
    with contextlib.suppress(OSError):  # it may be gone already
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with contextlib.suppress(OSError):
                pipe.close()


def pass_on(replies: IO[str], into: "queue.SimpleQueue[str]") -> None:
    """Hand lines on until there are none; then "" says that the process is gone."""
    with contextlib.suppress(OSError, ValueError):  # closed while it is being read
        for line in replies:
            into.put(line)
    into.put("")


def take_in(requests: IO[str], waiting: "queue.SimpleQueue[str]") -> NoReturn:
    """Hand requests on, in the process; when training is gone, be gone too, even if the code hangs."""
    for line in requests:
        waiting.put(line)
    os._exit(0)
