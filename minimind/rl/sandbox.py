"""A Python process of its own that answers requests: limited in memory, without network where the system can, killable.

It protects training from code that hangs, crashes, prints, eats memory or leaves threads behind, and that code from
what a model writes: requests and replies are lines of JSON. It is no prison for a hostile program: the code that runs
is the user's own, and the file system stays readable. What is asked is not known here. It needs no torch.
"""

import contextlib
import ctypes
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from minimind.rl.process import end, pass_on, take_in

START_SECONDS = 60.0
"""Within which the code must be imported."""

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "SYSTEMROOT", "VIRTUAL_ENV")
"""Of the environment; nothing else, for it holds keys."""


class SandboxFault(Exception):  # noqa: N818 - an answer that could not be had, told to whoever asked
    """A request without reply, and why."""

    def __init__(self, kind: Literal["hung", "died"], what: str) -> None:
        """Note the kind of fault and what was seen."""
        super().__init__(what)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Limits:
    """What a process may have."""

    memory_bytes: int = 2 << 30
    """Address space."""
    file_bytes: int = 64 << 20
    """The largest file that it may write."""
    has_network: bool = False
    """False cuts it off, where the system permits that (Linux with namespaces)."""


class Sandbox:
    """A process that runs `module:function` of ours once, with text arguments, and then answers requests with it.

    That function takes the arguments and returns (what is known from the start, what answers one request).
    """

    def __init__(self, target: str, *arguments: str, limits: Limits | None = None) -> None:
        """Note what is to be run; the first request, or `start`, runs it."""
        self._target, self._arguments, self._limits = target, arguments, limits or Limits()
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> dict[str, Any]:
        """Start the process and return what it knows from the start, with `has_network`. SandboxFault; see `ask`.

        A `problem` in it says what kept the process from starting; it is then gone.
        """
        self.close()
        self._folder = tempfile.TemporaryDirectory(prefix="minimind-sandbox-")
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from minimind.rl.sandbox import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            cwd=self._folder.name,
            env={**kept, "PYTHONPATH": paths, "HOME": self._folder.name, "PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,  # Ctrl-C is for training, which closes this when it is done
        )
        self._replies = queue.SimpleQueue()
        threading.Thread(target=pass_on, args=(self._process.stdout, self._replies), daemon=True).start()
        first = self._exchange([self._target, self._arguments, asdict(self._limits)], START_SECONDS)
        if "problem" in first:
            self.close()
        return first

    def ask(self, request: Any, seconds: float) -> Any:
        """Return the reply to a request of JSON values.

        SandboxFault when none comes within `seconds` ("hung") or the process ends ("died"). It is then killed with all
        that it has started, and started again when it is needed again.
        """
        if self._process is None and "problem" in (first := self.start()):
            raise SandboxFault("died", str(first["problem"]))
        return self._exchange(request, seconds)

    def close(self) -> None:
        """End the process. A later request would start it again."""
        process, self._process = self._process, None
        folder, self._folder = self._folder, None
        if process is not None:
            end(process)
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.cleanup()

    def _exchange(self, request: Any, seconds: float) -> Any:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            reply = self._replies.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise SandboxFault("hung", f"no reply within {seconds:g} s") from None
        except OSError:
            reply = ""
        if not reply:
            self.close()
            raise SandboxFault("died", f"its process ended with code {process.returncode}")
        return json.loads(reply)


# -- the other side: what runs in the process --------------------------------------------------------------------------


def serve() -> NoReturn:
    """Be the process: take the limits, run the target, then write one reply for each request read, for ever."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the code prints goes to stderr
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # and what it reads is empty
    target, arguments, limits = json.loads(requests.readline())
    has_network = not _restrict(Limits(**limits))

    def say(reply: Any) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    try:
        known, answer = _run(target, arguments)
    except BaseException as error:  # noqa: BLE001 - a user's file may do anything, SystemExit too
        say({"problem": f"{type(error).__name__}: {error}"})
        sys.exit(0)
    say({**known, "has_network": has_network})
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=take_in, args=(requests, waiting), daemon=True).start()
    while True:
        say(answer(json.loads(waiting.get())))


def _run(target: str, arguments: list[str]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    import importlib

    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)(*arguments)


def _restrict(limits: Limits) -> bool:
    """Take the limits on; return whether there is no network."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # no such limits on this system
        import resource

        for name, value in (
            (resource.RLIMIT_AS, limits.memory_bytes),
            (resource.RLIMIT_FSIZE, limits.file_bytes),
            (resource.RLIMIT_CORE, 0),
        ):
            _, hard = resource.getrlimit(name)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(name, (value, value))
    return not limits.has_network and _leave_network()


def _leave_network() -> bool:
    """Move this process, of one thread still, to a network of its own without any device; return whether that went."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        unshare = cast(Any, ctypes.CDLL(None, use_errno=True)).unshare
    except (OSError, AttributeError):
        return False
    if unshare(_CLONE_NEWNET) == 0:
        return True
    user, group = os.getuid(), os.getgid()
    if unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    with contextlib.suppress(OSError):  # without the map it is nobody, and still without network
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="ascii")
    return True
