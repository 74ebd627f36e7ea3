"""What all contests share: threads, the machine and the versions beside every figure, the file of results."""

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import peers

RESULTS = Path(__file__).parent / "results"


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a process that computes in `threads` threads, whatever library it takes."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return os.environ | dict.fromkeys(names, str(threads)) | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def conditions() -> dict[str, Any]:
    """Return where and with what was measured: processor, memory, versions of ours and of the peers, the command."""
    cpu = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) / 2**20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
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


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
