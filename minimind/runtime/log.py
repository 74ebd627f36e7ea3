"""Messages for people: on stderr, from the main rank only, and in a run's log.txt once `add_file` names it.

It needs no torch, so that the command line can speak before torch is loaded. `MINIMIND_LOG=debug` shows more.
"""

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

ROOT = "minimind"


class _StandardError(logging.StreamHandler[TextIO]):
    """Looks `sys.stderr` up at each message: a progress bar may have taken its place in between."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride] - a property instead of a field
        return sys.stderr


class _Plain(logging.Formatter):
    """The bare message; from `warning` on, its level in front."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


def get_logger(name: str) -> logging.Logger:
    """Return the logger called `name` below `minimind`, ready to speak on stderr (only on the main rank)."""
    root = logging.getLogger(ROOT)
    if not any(isinstance(handler, _StandardError) for handler in root.handlers):
        handler = _StandardError()
        handler.setFormatter(_Plain())
        root.addHandler(handler)
        root.setLevel(_level())
        root.addFilter(_is_main_rank)
        root.propagate = False
    if name == ROOT or name.startswith(f"{ROOT}."):
        logger = logging.getLogger(name)
    else:
        logger = logging.getLogger(f"{ROOT}.{name}")
    if _is_main_rank not in logger.filters:  # a filter on the root logger does not see its children's records
        logger.addFilter(_is_main_rank)
    return logger


def add_file(path: Path) -> logging.Handler:
    """Write every further message to `path` too, with time and level (appended). Returns what `remove_file` takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode="a", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    get_logger(ROOT).addHandler(handler)
    return handler


def remove_file(handler: logging.Handler) -> None:
    """Stop writing to the file that `add_file` opened, and close it."""
    logging.getLogger(ROOT).removeHandler(handler)
    handler.close()


def _is_main_rank(record: logging.LogRecord) -> bool:  # noqa: ARG001 - the signature logging asks for
    return os.environ.get("RANK", "0") == "0"


def _level() -> int:
    name = os.environ.get("MINIMIND_LOG", "info").upper()
    return logging.getLevelNamesMapping().get(name, logging.INFO)
