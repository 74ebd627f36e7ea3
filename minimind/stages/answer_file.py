"""Answers on disk, block by block: each is there as a whole or not at all, and nobody goes on where another wrote.

answers.jsonl    the rows
answers.json     what they were made of, how many there are and were left out, and how many bytes of the rows count
"""

import json
import os
from pathlib import Path
from typing import Any

import orjson

from minimind.errors import ConfigError
from minimind.runtime import distributed
from minimind.runtime.integrity import read_json

ROWS, NOTE = "answers.jsonl", "answers.json"
COUNTS = ("done", "written", "cut", "empty", "bytes")


class AnswerFile:
    """The two files. Rows after the last note are written again; only the main process writes."""

    def __init__(self, folder: Path, identity: dict[str, Any], facts: dict[str, Any]) -> None:
        """Open what is there. Raises ConfigError, naming what differs, when it is not of this identity."""
        self.path, self.note, self.about = folder / ROWS, folder / NOTE, identity | facts
        self.is_writer = distributed.is_main()
        saved = read_json(self.note) if self.is_writer and self.note.exists() else {}
        saved = distributed.broadcast_object(saved)
        changed = [f"{k} was {saved.get(k)} and is {v}" for k, v in identity.items() if saved and saved.get(k) != v]
        if changed:
            raise ConfigError(f"{self.path}: {'; '.join(changed)}; use the old values, another --out, or --fresh")
        self.counts: dict[str, int] = saved.get("counts", dict.fromkeys(COUNTS, 0))
        if self.is_writer:
            with self.path.open("ab") as file:
                file.truncate(self.counts["bytes"])

    def add(self, rows: list[dict[str, Any] | str]) -> None:
        """Append the rows of a block and count the others, all of it or nothing."""
        good = [orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows if not isinstance(row, str)]
        self.counts["done"] += len(rows)
        self.counts["written"] += len(good)
        self.counts["bytes"] += sum(map(len, good))
        for why in ("cut", "empty"):
            self.counts[why] += rows.count(why)
        if not self.is_writer:
            return
        with self.path.open("ab") as file:
            file.writelines(good)
            file.flush()
            os.fsync(file.fileno())
        fresh = self.note.with_suffix(".partial")
        fresh.write_text(json.dumps(self.about | {"counts": self.counts}, indent=2) + "\n", encoding="utf-8")
        fresh.replace(self.note)
