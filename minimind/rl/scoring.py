"""What a reward is given, and how a function of the user's is run: in a process of its own, which may be killed.

A user's function may hang, crash, print or leave threads behind; none of that reaches training. The process is started
once, asked for one answer at a time in lines of JSON, killed when it does not reply in time and started again when it
is needed again. Which rewards there are by name, and how they are mixed, is known to `rl.rewards`.
"""

import difflib
import importlib
import importlib.util
import inspect
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

from minimind.data.prompt import Message, Prompt
from minimind.errors import ConfigError
from minimind.inference.chat import parse
from minimind.rl.process import end, pass_on, take_in

START_SECONDS = 60.0
"""Within which a user's file must be imported."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the policy made of a prompt. `read_answer` makes one."""

    text: str
    """The visible answer of the last turn: without the thought and without tool calls."""
    reasoning: str
    """The thought of the last turn."""
    tool_calls: list[dict[str, Any]]
    """Tool calls of the last turn, `{"name", "arguments"}`."""
    messages: list[Message]
    """Everything said after the prompt: the assistant's turns and the tools' replies; one message without tools."""
    num_tokens: int
    """Tokens the policy chose, over all turns, ends of turns included."""
    is_truncated: bool
    """The budget ended before the answer did."""
    written: str = ""
    """The last turn as it was written, tags included, without the token that ended it."""


def read_answer(written: str, *, num_tokens: int, is_truncated: bool = False, before: Sequence[Message] = ()) -> Answer:
    """Return the answer whose last turn is `written` (with a thought that the prompt has opened: `<think>` included).

    `before` are the turns between the prompt and this one, the tools' replies among them.
    """
    found = parse(written)
    messages = [*before, found.message()]
    calls = list(found.tool_calls)
    return Answer(found.content, found.reasoning, calls, messages, num_tokens, is_truncated, written)


Reward = Callable[[Prompt, Answer], float]


class RewardFault(Exception):  # noqa: N818 - not an error of the system: the sample is masked and counted
    """A reward that could not be had, and why."""

    def __init__(self, kind: Literal["raised", "hung", "died", "no number"], what: str) -> None:
        """Note the kind of fault and what was seen."""
        super().__init__(f"{kind}: {what}")
        self.kind = kind


class UserFunction:
    """A `Reward` of the user's: `file.py:function` or `package.module:function`, called as function(prompt, answer).

    ConfigError at once when there is no such function. A call raises RewardFault when the function raises, returns no
    number, takes longer than `seconds` or ends its process.
    """

    def __init__(self, where: str, *, seconds: float = 10.0) -> None:
        """Start the process and import the function in it."""
        self.where, self.seconds = where, seconds
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._start()

    def __call__(self, prompt: Prompt, answer: Answer) -> float:
        """Return what the function returns. RewardFault when that is no number or does not come."""
        if self._process is None:
            try:
                self._start()
            except ConfigError as error:  # it was there when training began
                raise RewardFault("died", str(error)) from None
        reply = self._ask(json.dumps([asdict(prompt), asdict(answer)], default=str), self.seconds)
        if "value" in reply:
            return float(reply["value"])
        raise RewardFault("no number" if reply.get("is_value") else "raised", str(reply["problem"]))

    def close(self) -> None:
        """End the process. A later call would start it again."""
        process, self._process = self._process, None
        if process is not None:
            end(process)

    def _start(self) -> None:
        code = f"from minimind.rl.scoring import serve; serve({self.where!r})"
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C is for training, which closes this when it is done
        )
        self._replies = queue.SimpleQueue()
        threading.Thread(target=pass_on, args=(self._process.stdout, self._replies), daemon=True).start()
        try:
            reply = self._ask("", START_SECONDS)
        except RewardFault as fault:
            raise ConfigError(f"reward {self.where}: its import {fault}") from None
        if "problem" in reply:
            self.close()
            raise ConfigError(f"reward {self.where}: {reply['problem']}")

    def _ask(self, request: str, seconds: float) -> dict[str, Any]:
        """Send a request ("" waits for the import alone) and return the reply, or end the process and raise."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            if request:
                process.stdin.write(request + "\n")
                process.stdin.flush()
            reply = self._replies.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise RewardFault("hung", f"no reply within {seconds:g} s") from None
        except OSError:
            reply = ""
        if not reply:
            self.close()
            raise RewardFault("died", f"its process ended with code {process.returncode}")
        return cast(dict[str, Any], json.loads(reply))


def serve(where: str) -> None:
    """Be the process of one user's function: one request for each line read, one reply for each line written."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints goes to stderr
    sys.stdout = sys.stderr  # at once
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # and what it reads is empty

    def say(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    try:
        function = import_function(where)
    except ConfigError as error:
        say({"problem": str(error)})
        return
    say({"ready": True})
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=take_in, args=(requests, waiting), daemon=True).start()
    while True:
        prompt, answer = json.loads(waiting.get())
        try:
            say(_reply(function(Prompt(**prompt), Answer(**answer))))
        except BaseException as error:  # noqa: BLE001 - whatever it is, SystemExit too, it is one masked sample
            say({"problem": f"{type(error).__name__}: {error} ({_place_of(error)})"})


def _reply(value: Any) -> dict[str, Any]:
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return {"problem": f"it returned {value!r:.80}, expected a number", "is_value": True}
    return {"value": float(value)}


def _place_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "no place"


def import_function(where: str) -> Callable[..., Any]:
    """Return the function at `file.py:function` or `package.module:function`.

    ConfigError that says what exists when there is no such file, module or function, when its import fails, or when
    it cannot be called with a prompt and an answer.
    """
    source, _, name = where.rpartition(":")
    try:
        module = _import_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (source == error.name or source.startswith(f"{error.name}.")):
            raise ConfigError(f"there is no module {source!r}, neither installed nor in {Path.cwd()}") from None
        raise ConfigError(f"importing {source} failed: {error} ({_place_of(error)})") from None
    except BaseException as error:  # noqa: BLE001 - a user's file may do anything, SystemExit too
        raise ConfigError(f"importing {source} failed: {type(error).__name__}: {error} ({_place_of(error)})") from None
    function = getattr(module, name, None)
    if function is None:
        own = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
        ]
        near = difflib.get_close_matches(name, own, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(own)) or 'no function'}"
        raise ConfigError(f"{source} has no function {name!r}; {hint}")
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError):
        raise ConfigError(f"{source}: {name} is not a function of (prompt, answer)") from None
    return function


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        folder = path.parent
        others = sorted(file.name for file in folder.glob("*.py")) if folder.is_dir() else []
        found = f"{folder} has {', '.join(others[:10]) or 'no .py file'}" if folder.is_dir() else f"no folder {folder}"
        raise ConfigError(f"there is no file {path}; {found}")
    name = f"user_reward_{path.stem}"  # no name of a module that anyone else imports
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be imported")
    sys.path.insert(0, str(path.parent.resolve()))  # so that it can import its neighbours
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
