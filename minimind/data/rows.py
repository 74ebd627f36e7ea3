"""What reading yields: a `Row` or a `Problem`, each with its place; and one JSON object -> one of the two.

It knows neither files and their compression (jsonl.py) nor what the fields mean.
"""

import json
from dataclasses import dataclass
from typing import Any, cast

import orjson

MAX_DEPTH = 100
"""Deeper nesting than this is no training data."""

CHUNK = 2**20
"""Bytes read at once."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in its file."""

    data: dict[str, Any]
    file: str
    line: int
    """Line number from 1; in Parquet the row number from 1."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong at one place of one file."""

    file: str
    line: int
    what: str
    fatal: bool = False
    """The rest of the file cannot be read."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


class Place:
    """Where the reader is; so that an error of the decompressor gets a line too."""

    def __init__(self, file: str) -> None:
        """Start at line 1 of `file`."""
        self.file = file
        self.line = 1

    def problem(self, what: str, *, fatal: bool = False) -> Problem:
        """Return a Problem at the current line."""
        return Problem(self.file, self.line, what, fatal)


def parse_row(line: bytes, place: Place) -> Row | Problem:
    """Return the row that one line of JSON holds, or what is wrong with it."""
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return place.problem(_json_error(line, error))
    if not isinstance(data, dict):
        hint = "; a file that holds one array needs a name ending in .json" if isinstance(data, list) else ""
        return place.problem(f"the line holds {json_type(data)}, expected an object {{...}}{hint}")
    what = _structure_problem(line, cast(dict[str, Any], data))
    return place.problem(what) if what else Row(cast(dict[str, Any], data), place.file, place.line)


def _json_error(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as bad:
        return f"not UTF-8: byte 0x{line[bad.start]:02x} at column {bad.start + 1}"
    if error.msg == "depth limit exceeded":
        return f"nested deeper than {MAX_DEPTH} levels"
    return f"not valid JSON: {error.msg} (column {error.colno})"


def json_type(value: object) -> str:
    """Return what a JSON value is, in words for a message: "a list", "null", "the number 3"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"


def _structure_problem(line: bytes, data: dict[str, Any]) -> str:
    """Return what the parser let pass: too deep nesting, a key given twice (it keeps the last); "" when nothing."""
    num_keys = 0
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                num_keys += len(value)
                below.extend(v for v in value.values() if isinstance(v, dict | list))
            else:
                below.extend(v for v in value if isinstance(v, dict | list))
        if not below:
            break
        level = below
    else:
        return f"nested deeper than {MAX_DEPTH} levels"
    # Each key stands before a colon: as many `":` as keys means that no key was lost. A text may hold `":` too, and
    # JSON allows white space there: only then the slow parser looks.
    if line.count(b'":') == num_keys and b'" :' not in line and b'"\t:' not in line:
        return ""
    duplicates: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                duplicates.append(key)
            seen.add(key)

    json.loads(line, object_pairs_hook=note)
    return f"the key {json.dumps(duplicates[0], ensure_ascii=False)} is given twice in one object" if duplicates else ""
