"""How contenders are compared: each in a process of its own, one round at a time in turn, medians of what they report.

A benchmark is a script with a table of `Contender`s. Called by a user it starts itself once for each of them, ours with
this interpreter and peers with theirs (`peers.py`), waits until each is warm, then plays rounds A B C A B C ...; while
one computes, the others wait for a line on stdin. So whatever else the machine does hits all of them alike, and only
ratios from one run count. A contender that cannot run is reported with its error and the others go on.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import peers

RESULTS = Path(__file__).parent / "results"
PAUSE = 0.3
"""Seconds between rounds in which the threads of the last contender go to sleep."""

Task = dict[str, Any]
"""What a contender is to do: shapes, rows, threads; the same for all of one race."""
Round = Callable[[], Mapping[str, float]]
"""Does the timed work once and returns numbers, `tokens_per_second` among them."""
Action = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """One side of a contest: its name, what warms it up and returns its round, and whether it is a peer."""

    name: str
    make: Callable[[Task], Round]
    is_peer: bool = False
    has_llama_cpp: bool = False
    is_measure: bool = False
    """Measures the machine between the others: always taken, never compared."""


def parser(doc: str | None, *, rounds: int = 5) -> argparse.ArgumentParser:
    """Return a parser with the flags that every contest has."""
    result = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    result.add_argument("--threads", type=int, default=os.cpu_count())
    result.add_argument("--rounds", type=int, default=rounds)
    result.add_argument("--only", nargs="+", default=[], help="parts of the contenders' names; default: all")
    result.add_argument("--worker", help=argparse.SUPPRESS)
    return result


def work(contenders: Sequence[Contender], name: str) -> None:
    """Be the contender `name`: read the task, warm up, then a round for every line on stdin until its end."""
    import torch

    answers = os.fdopen(os.dup(1), "w")  # libraries print what they like; only answers go to the pipe
    os.dup2(2, 1)
    try:
        task: Task = json.loads(sys.stdin.readline())
        torch.set_num_threads(task["threads"])
        torch.manual_seed(0)
        start = time.perf_counter()
        play = next(one for one in contenders if one.name == name).make(task)
        play()
        _say(answers, {"warm_up_seconds": time.perf_counter() - start})
        for _ in sys.stdin:
            _say(answers, {**play(), "peak_rss_bytes": peak_rss()})
    except Exception as error:  # noqa: BLE001 - whatever stops a contender belongs into the report
        traceback.print_exc()
        _say(answers, {"error": f"{type(error).__name__}: {error}"[:300]})


def race(contenders: Sequence[Contender], task: Task, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return for each contender the medians of its numbers over all rounds, its rounds, or its error."""
    chosen = [
        one
        for one in contenders
        if one.is_measure or not options.only or any(part in one.name for part in options.only)
    ]
    sides = {one.name: _Side(one, task | {"threads": options.threads}) for one in chosen}
    for number in range(options.rounds):
        for side in sides.values():
            side.play()
            time.sleep(PAUSE)
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
    return {name: side.close() for name, side in sides.items()}


class _Side:
    """The process of one contender, as the runner sees it."""

    def __init__(self, contender: Contender, task: Task) -> None:
        self.name, self.rounds, self.error = contender.name, list[dict[str, Any]](), ""
        python = peers.python(has_llama_cpp=contender.has_llama_cpp) if contender.is_peer else Path(sys.executable)
        self.process = subprocess.Popen(
            [str(python), sys.argv[0], "--worker", contender.name],
            env=environment(task["threads"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._ask(json.dumps(task))
        print(
            f"{self.name}: {self.error or 'warm'} after {self.facts.get('warm_up_seconds', 0):.0f} s", file=sys.stderr
        )

    def play(self) -> None:
        if not self.error and (answer := self._ask("go")):
            self.rounds.append(answer)

    def close(self) -> dict[str, Any]:
        self.process.communicate()
        if self.error:
            return {"error": self.error}
        medians = {key: statistics.median(played[key] for played in self.rounds) for key in self.rounds[0]}
        medians["peak_rss_bytes"] = self.rounds[-1]["peak_rss_bytes"]
        speeds = [round(played["tokens_per_second"], 1) for played in self.rounds if "tokens_per_second" in played]
        return {**medians, **self.facts, "rounds": speeds}

    def _ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        try:
            print(line, file=self.process.stdin, flush=True)
            answer: dict[str, Any] = json.loads(self.process.stdout.readline() or '{"error": "the process ended"}')
        except BrokenPipeError:
            answer = {"error": "the process ended"}
        self.error = answer.get("error", "")
        return {} if self.error else answer


def report(
    title: str, results: dict[str, dict[str, Any]], peer_names: Sequence[str], *, ceilings: Mapping[str, float]
) -> None:
    """Add ratio to the best peer and share of the limit (tokens/s, by name) to the results, and print them."""
    speeds = {name: found["tokens_per_second"] for name, found in results.items() if "tokens_per_second" in found}
    best = max((speeds[name] for name in peer_names if name in speeds), default=0.0)
    print(f"\n{title}\n{'contender':32} {'tokens/s':>9} {'x best peer':>12} {'peak GiB':>9} {'of the limit':>13}")
    for name, found in results.items():
        if name in speeds:
            limit = ceilings.get(name, 0.0)
            found["times_best_peer"] = speeds[name] / best if best else None
            found["share_of_limit"] = speeds[name] / limit if limit else None
            ratio, share = (
                (f"{speeds[name] / best:.2f}" if best else "-"),
                f"{speeds[name] / limit:.0%}" if limit else "-",
            )
            memory = found["peak_rss_bytes"] / 2**30
            print(f"{name:32} {speeds[name]:9.0f} {ratio:>12} {memory:9.2f} {share:>13}")
        elif "error" in found:
            print(f"{name:32} {found['error']}")


def timed(action: Action) -> float:
    """Return the seconds that `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a process that computes in `threads` threads and leaves the network and bars alone."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    quiet = {f"HF_{name}_DISABLE_PROGRESS_BARS": "1" for name in ("HUB", "DATASETS")}
    quiet |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | dict.fromkeys(names, str(threads)) | quiet


def conditions() -> dict[str, Any]:
    """Return where and with what was measured: processor, memory, versions of ours and of the peers, the command."""
    cpu = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) / 2**20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    words = ["FOLDER" if word.startswith("/") else word for word in sys.argv[1:]]
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "machine": {"cpu": (cpu or [platform.machine()])[0], "cores": os.cpu_count(), "gib": round((memory or [0])[0])},
        "versions": {name: metadata.version(name) for name in ("minimind", "torch")}
        | {"python": platform.python_version()},
        "peers": peers.versions(),
    }


def write(name: str, result: dict[str, Any]) -> None:
    """Write a contest's results file."""
    text = json.dumps(conditions() | result, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def peak_rss() -> int:
    """Return the most bytes that were resident for this process (Linux)."""
    return next((int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith("VmHWM")), 0)


def _say(answers: IO[str], answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
