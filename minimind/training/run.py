"""The directory of a run: one owner at a time, and what a reader later needs to know how it came about.

    RUN/{config.toml, environment.json, metrics.jsonl, samples.jsonl, log.txt, checkpoints/, latest}

It knows names and files; what is in a checkpoint is minimind.checkpoint's matter.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from minimind.errors import ConfigError
from minimind.runtime import distributed
from minimind.runtime.log import get_logger
from minimind.training.metrics import truncate_after

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_log = get_logger("run")
LOCK = ".lock"


class RunDirectory:
    """One run's directory. Making the object touches nothing; `with run:` owns it (only the main rank does)."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None
        self._depth = 0
        self._is_new = False

    @property
    def metrics(self) -> Path:
        """The rows of the training curves."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """What the model said to the fixed prompts while training."""
        return self.path / "samples.jsonl"

    @property
    def log(self) -> Path:
        """Every message of the run, with its time."""
        return self.path / "log.txt"

    @property
    def config(self) -> Path:
        """The configuration the run was started with."""
        return self.path / "config.toml"

    def __enter__(self) -> Self:
        """Own the directory until the end of the block. Raises ConfigError, naming the process, if another one does.

        A directory that was made for it and into which nothing was written is gone afterwards.
        """
        if self._depth == 0 and distributed.is_main():
            self._acquire()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0 and self._lock is not None:
            with suppress(OSError):  # Windows removes no open file; an empty directory does no harm
                if self._is_new and [entry.name for entry in self.path.iterdir()] == [LOCK]:
                    (self.path / LOCK).unlink()
                    self.path.rmdir()
            os.close(self._lock)  # closing releases the lock, and so does the death of the process
            self._lock = None

    def write_config(self, toml: str) -> None:
        """Keep the configuration as it was given."""
        if distributed.is_main():
            self._write(self.config, toml.encode())

    def write_environment(self, fingerprints: Mapping[str, str] | None = None) -> None:
        """Keep versions, platform, git commit and the fingerprints of the data in environment.json."""
        if distributed.is_main():
            facts = {**environment(), "data": dict(fingerprints or {})}
            self._write(self.path / "environment.json", orjson.dumps(facts, option=orjson.OPT_INDENT_2))

    def append_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append sample rows, each naming its `step`."""
        if distributed.is_main():
            with self.samples.open("ab") as file:
                file.writelines(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)

    def cut_samples_after(self, step: int) -> None:
        """Drop samples of steps that will be made again."""
        if distributed.is_main():
            truncate_after(self.samples, step)

    def start_afresh(self) -> Path | None:
        """Move everything of an earlier run aside, into `previous-N` here, and return that; None without one."""
        with self:
            if not distributed.is_main() or not self.path.exists():
                return None
            old = [
                entry for entry in self.path.iterdir() if entry.name != LOCK and not entry.name.startswith("previous-")
            ]
            if not old:
                return None
            number = 1 + max((int(p.name[9:]) for p in self.path.glob("previous-*") if p.name[9:].isdigit()), default=0)
            aside = self.path / f"previous-{number}"
            aside.mkdir()
            for entry in sorted(old, key=lambda entry: entry.name != "checkpoints"):  # what matters most first
                entry.rename(aside / entry.name)
            _log.info("%s: the earlier run was moved to %s", self.path, aside)
            return aside

    def _acquire(self) -> None:
        self._is_new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be a run directory ({error}); give another --out") from error
        try:
            if fcntl is None:
                raise OSError("no fcntl")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._lock, 64).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            self._lock = None
            raise ConfigError(
                f"{self.path}: process {owner} is training here; wait for it, stop it, or give another --out"
            ) from None
        except OSError as error:
            _log.warning("%s: this system cannot lock (%s); start no second run here", self.path, error)
        if not _is_file(self._lock, self.path / LOCK):  # its owner removed it between our opening and our locking
            os.close(self._lock)
            self._lock = None
            self._acquire()
            return
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())

    def _write(self, path: Path, content: bytes) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}-partial")
        fresh.write_bytes(content)
        fresh.replace(path)


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def environment() -> dict[str, Any]:
    """Return what this process runs on: package, torch, Python, platform, git commit of the package, command line."""
    versions = {}
    for name in ("minimind", "torch", "numpy", "safetensors", "tokenizers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "git_commit": _git_commit(),
        "command": sys.argv,
        "world_size": distributed.world_size(),
    }


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
