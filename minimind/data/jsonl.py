"""Rows out of files, streaming: JSON Lines, JSON arrays, Parquet and plain text, also compressed with gzip or zstd.

Every row carries its file and line; everything that is wrong with a file or a line becomes a `Problem` with the same
place, so a caller can collect them all (`scan`) or stop at the first (`read_rows`). Memory is bounded by the longest
line, and a longer one than `MAX_LINE_BYTES` is refused before it is read: a small compressed file cannot fill the memory.
It deliberately does not know what a row means: formats live in text.py, conversation.py, preference.py and prompt.py.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import orjson
import zstandard

from minimind.errors import ConfigError, DataError

MAX_LINE_BYTES = 64 * 2**20
"""A longer line (after decompression) is refused: 64 MiB, a thousand times a long document."""

MAX_DEPTH = 100
"""Deeper nesting than this is no training data."""

CHUNK = 2**20
END_OF_TEXT = "<|endoftext|>"
TEXT_CHUNK_CHARACTERS = 4096
"""Plain text without `<|endoftext|>` is joined to documents of about this many characters."""

FORMATS = (".jsonl", ".json", ".txt", ".parquet")
COMPRESSIONS = (".gz", ".zst")

_DECOMPRESSION_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


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


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of one file; raise DataError at the first problem."""
    for item in scan(path):
        if isinstance(item, Problem):
            raise DataError(str(item))
        yield item


def scan(path: Path, *, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Row | Problem]:
    """Yield every row of one file, and a Problem in the place of every line that is not one.

    Raises ConfigError for a file that does not exist or whose kind is unknown, or when Parquet's reader is not installed.
    """
    kind = file_format(path)
    if kind == ".parquet":
        yield from _scan_parquet(path)
        return
    place = _Place(str(path))
    try:
        with open_stream(path) as stream:
            start = stream.peek(4)[:4]
            if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
                yield place.problem(
                    "the file is UTF-16, expected UTF-8 (convert it: iconv -f UTF-16 -t UTF-8)", fatal=True
                )
            elif start[:2] == b"\x1f\x8b" or start == b"\x28\xb5\x2f\xfd":
                yield place.problem("the file is compressed, but its name does not end in .gz or .zst", fatal=True)
            elif kind == ".txt":
                yield from _scan_text(stream, place, max_line_bytes)
            elif kind == ".json" and _starts_array(stream):
                yield from _scan_array(stream, place, max_line_bytes)
            else:
                yield from _scan_lines(stream, place, max_line_bytes)
    except _DECOMPRESSION_ERRORS as error:
        reason = str(error) or type(error).__name__
        yield place.problem(f"the compressed data is damaged or cut off ({reason})", fatal=True)


def file_format(path: Path) -> str:
    """Return ".jsonl", ".json", ".txt" or ".parquet"; ConfigError when the file is missing or of another kind."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind == ".ndjson":
        kind = ".jsonl"
    if kind not in FORMATS or (kind == ".parquet" and path.suffix.lower() != ".parquet"):
        raise ConfigError(
            f"{path}: unknown kind of data file; expected a name ending in .jsonl, .json, .txt (each also with .gz or .zst) "
            "or .parquet"
        )
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name its files")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file{_near_matches(path)}")
    return kind


def _near_matches(path: Path) -> str:
    import difflib

    if not path.parent.is_dir():
        return f" (the folder {path.parent} does not exist)"
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(str(path.parent / name) for name in near)}?" if near else ""


class _Place:
    """Where the reader is; so that an error of the decompressor gets a line too."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.line = 1

    def problem(self, what: str, *, fatal: bool = False) -> Problem:
        return Problem(self.file, self.line, what, fatal)


def open_stream(path: Path) -> io.BufferedReader:
    """Return the file's bytes, decompressed, as a buffered stream."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(cast(io.RawIOBase, gzip.open(path, "rb")), CHUNK)
    if suffix == ".zst":
        reader = zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(
            path.open("rb"), read_across_frames=True
        )
        return io.BufferedReader(cast(io.RawIOBase, reader), CHUNK)
    return path.open("rb", buffering=CHUNK)


def _lines(stream: IO[bytes], place: _Place, limit: int) -> Iterator[bytes | Problem]:
    """Yield each line without its end; the byte order mark of the first is dropped; `place` follows."""
    place.line = 0
    while line := stream.readline(limit + 1):
        place.line += 1
        if place.line == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > limit and not line.endswith(b"\n"):
            yield place.problem(f"the line is longer than {limit:,} bytes")
            while (rest := stream.readline(CHUNK)) and not rest.endswith(b"\n"):
                pass
            continue
        yield line.rstrip(b"\r\n")


def _scan_lines(stream: IO[bytes], place: _Place, limit: int) -> Iterator[Row | Problem]:
    for line in _lines(stream, place, limit):
        if isinstance(line, Problem):
            yield line
        elif line and not line.isspace():
            yield _row(line, place)


def _row(line: bytes, place: _Place) -> Row | Problem:
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
    return {str: "a string", list: "a list", dict: "an object"}.get(type(value), type(value).__name__)


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


# --- one JSON array -------------------------------------------------------------------------------------------------


def _starts_array(stream: io.BufferedReader) -> bool:
    return stream.peek(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


class _Text:
    """A decoded window of the stream that grows on demand and forgets what was consumed."""

    def __init__(self, stream: IO[bytes], place: _Place) -> None:
        self.stream, self.place = stream, place
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.position, self.ended = "", 0, False

    def more(self) -> None:
        data = self.stream.read(max(CHUNK, len(self.text) - self.position))
        self.ended = not data
        self.text = self.text[self.position :] + self.decoder.decode(data, final=self.ended)
        self.position = 0

    def consume(self, end: int) -> None:
        self.place.line += self.text.count("\n", self.position, end)
        self.position = end

    def next_sign(self) -> str:
        """Return the next character that is not white space, without consuming it; "" at the end."""
        while True:
            rest = self.text[self.position : self.position + 4096]
            stripped = rest.lstrip(" \t\r\n")
            self.consume(self.position + len(rest) - len(stripped))
            if stripped:
                return stripped[0]
            if not rest:
                if self.ended:
                    return ""
                self.more()


def _scan_array(stream: io.BufferedReader, place: _Place, limit: int) -> Iterator[Row | Problem]:
    text = _Text(stream, place)
    try:
        text.next_sign()
        text.consume(text.position + 1)
        if text.next_sign() == "]":
            text.consume(text.position + 1)
        else:
            yield from _elements(text, place, limit)
        if sign := text.next_sign():
            yield place.problem(f"{sign!r} after the end of the array", fatal=True)
    except UnicodeDecodeError as error:
        yield place.problem(f"not UTF-8 here or in the following lines: {error.reason}", fatal=True)
    except _BadArrayError as error:
        yield place.problem(str(error), fatal=True)


class _BadArrayError(Exception):
    pass


def _elements(text: _Text, place: _Place, limit: int) -> Iterator[Row | Problem]:
    while True:
        if not text.next_sign():
            raise _BadArrayError("the file ends inside the array: expected an element")
        end = _element_end(text, place, limit)
        line = text.text[text.position : end].encode("utf-8", "surrogatepass")
        yield _row(line, place)
        text.consume(end)
        sign = text.next_sign()
        text.consume(text.position + 1 if sign else text.position)
        if sign == "]":
            return
        if sign != ",":
            raise _BadArrayError(
                f"expected ',' or ']' after an element of the array, found {sign or 'the end of the file'!r}"
            )


def _element_end(text: _Text, place: _Place, limit: int) -> int:
    """Return where the element that starts at `text.position` ends, reading as much as it needs."""
    decoder = json.JSONDecoder()
    while True:
        try:
            end = decoder.raw_decode(text.text, text.position)[1]
            if end < len(text.text) or text.ended:
                return end
        except RecursionError:
            raise _BadArrayError(f"nested deeper than {MAX_DEPTH} levels") from None
        except json.JSONDecodeError as error:
            unfinished = error.msg.startswith("Unterminated string") or error.pos >= len(text.text) - 16
            if text.ended or not unfinished:
                place.line += text.text.count("\n", text.position, error.pos)
                column = error.pos - text.text.rfind("\n", 0, error.pos)
                raise _BadArrayError(f"not valid JSON: {error.msg} (column {column})") from None
        if len(text.text) - text.position > limit:
            raise _BadArrayError(f"the element is longer than {limit:,} characters")
        text.more()


# --- plain text and Parquet -----------------------------------------------------------------------------------------


def _scan_text(stream: io.BufferedReader, place: _Place, limit: int) -> Iterator[Row | Problem]:
    """Documents end at `<|endoftext|>`; a file whose first MiB has none is cut at blank lines or lines into chunks.

    A chunk grows to `TEXT_CHUNK_CHARACTERS`, ends at the first blank line after that, or at twice that at any line.
    """
    has_marker = END_OF_TEXT.encode() in stream.peek(CHUNK)
    parts: list[str] = []
    size, first = 0, 1

    def document() -> Row | None:
        nonlocal parts, size
        text = "\n".join(parts).strip("\n")
        parts, size = [], 0
        return Row({"text": text}, place.file, first) if text.strip() else None

    for line in _lines(stream, place, limit):
        if isinstance(line, Problem):
            yield line
            continue
        try:
            decoded = line.decode()
        except UnicodeDecodeError as bad:
            yield place.problem(f"not UTF-8: byte 0x{line[bad.start]:02x} at column {bad.start + 1}")
            continue
        *ended, rest = decoded.split(END_OF_TEXT)
        blank = not decoded.strip()
        full = not has_marker and (size >= TEXT_CHUNK_CHARACTERS if blank else size >= 2 * TEXT_CHUNK_CHARACTERS)
        if (full or size > limit) and (row := document()):
            yield row
        for part in ended:
            first = first if parts else place.line
            parts.append(part)
            if row := document():
                yield row
        if rest or (parts and not ended):
            first = first if parts else place.line
            parts.append(rest)
            size += len(rest) + 1
    if row := document():
        yield row


def _scan_parquet(path: Path) -> Iterator[Row | Problem]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(
            f'{path}: reading Parquet needs pyarrow; install it with: pip install "minimind[data]"'
        ) from None
    place = _Place(str(path))
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for data in batch.to_pylist():
                    yield Row(_without_none(data), place.file, place.line)
                    place.line += 1
    except (pa.ArrowException, OSError) as error:
        yield place.problem(f"the Parquet file cannot be read ({str(error).splitlines()[0]})", fatal=True)


def _without_none(value: Any) -> Any:
    """Return `value` without the nulls that Parquet puts where a row lacks a field that others have."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in cast(dict[str, Any], value).items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in cast(list[Any], value)]
    return value
