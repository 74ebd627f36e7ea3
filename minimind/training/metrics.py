"""Where numbers go: metrics.jsonl always, and trackers that may fail without harm. What they mean it does not know."""

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from minimind.runtime import distributed
from minimind.runtime.log import get_logger

Row = Mapping[str, float | int | str | bool | None]
_log = get_logger("metrics")


class Metrics:
    """The rows of a run: one JSON object a line in `path`, and each row to every tracker that works."""

    def __init__(self, path: Path, *, trackers: tuple[str, ...] = (), keep_until: int = -1) -> None:
        """Open `path` for appending after cutting it back to the rows whose step is at most `keep_until`.

        On every rank but the main one nothing is opened and rows go nowhere.
        """
        self._trackers: list[Tracker] = []
        self._file = None
        if distributed.is_main():
            truncate_after(path, keep_until)
            self._file = path.open("ab")
            self._trackers = [Tracker(name, path.parent) for name in trackers]

    def write(self, row: Row) -> None:
        """Append one row, which must name its `step`; NaN and infinity become null."""
        if self._file is None:
            return
        self._file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(row)

    def sync(self) -> None:
        """Have the rows on the disk, as a checkpoint that counts on them is about to be written."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and every tracker."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the whole rows of a metrics file; a line cut off by a crash is left out."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines():
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def truncate_after(path: Path, step: int) -> None:
    """Drop the rows after `step` (and a half-written last one): they belong to steps that will be made again."""
    if not path.exists():
        return
    rows = read_metrics(path)
    kept = b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows if row.get("step", 0) <= step)
    if kept != path.read_bytes():
        fresh = path.with_name(f".{path.name}-partial")
        fresh.write_bytes(kept)
        fresh.replace(path)


class Tracker:
    """One outside service. The first failure, be it the import or the network, is logged; then it stays silent."""

    def __init__(self, name: str, run_dir: Path) -> None:
        self.name = name
        self._log_row: Callable[[dict[str, float], int], object] | None = None
        self._finish: Callable[[], object] | None = None
        self._guard(lambda: self._open(run_dir))

    def write(self, row: Row) -> None:
        """Send the numbers of a row."""
        log_row = self._log_row
        if log_row is not None:
            numbers = {
                key: float(value) for key, value in row.items() if isinstance(value, int | float) and key != "step"
            }
            self._guard(lambda: log_row(numbers, int(row["step"] or 0)))

    def close(self) -> None:
        """Let the service finish sending."""
        finish, self._finish, self._log_row = self._finish, None, None
        if finish is not None:
            self._guard(finish)

    def _open(self, run_dir: Path) -> None:
        if self.name == "tensorboard":
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(run_dir / "tensorboard"))

            def log_row(numbers: dict[str, float], step: int) -> None:
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)

            self._log_row, self._finish = log_row, writer.close
            return
        module = importlib.import_module(self.name)  # wandb and swanlab share these three calls
        service = module.init(project="minimind", name=run_dir.name, dir=str(run_dir)) if self.name == "wandb" else None
        if service is None:
            service = module.init(project="minimind", experiment_name=run_dir.name, logdir=str(run_dir / "swanlab"))
        self._log_row, self._finish = (lambda numbers, step: module.log(numbers, step=step)), module.finish

    def _guard(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever a tracker throws, training goes on
            self._log_row = self._finish = None
            _log.warning("%s is off for this run, training goes on: %s: %s", self.name, type(error).__name__, error)
