"""Rows out of files, streaming: JSON Lines, JSON arrays, Parquet and plain text, also compressed with gzip or zstd.

Every row carries its file and line; everything that is wrong with a file or a line becomes a `Problem` with the same
place, so a caller can collect them all (`scan`) or stop at the first (`read_rows`). Memory is bounded by the longest
line, and one longer than `MAX_LINE_BYTES` is refused before it is read: a small compressed file cannot fill the memory.
It deliberately does not know what a row means: formats live in text.py, conversation.py, preference.py and prompt.py.
"""

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from minimind.data.json_array import scan_array
from minimind.data.rows import CHUNK, Place, Problem, Row, parse_row
from minimind.errors import ConfigError, DataError

MAX_LINE_BYTES = 64 * 2**20
"""A longer line (after decompression) is refused: 64 MiB, a thousand times a long document."""

END_OF_TEXT = "<|endoftext|>"
TEXT_CHUNK_CHARACTERS = 4096
"""Plain text without `<|endoftext|>` is joined to documents of about this many characters."""

FORMATS = (".jsonl", ".json", ".txt", ".parquet")
COMPRESSIONS = (".gz", ".zst")
SHOWN_NAMES = 6

_DECOMPRESSION_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of one file; raise DataError at the first problem."""
    for item in scan(path):
        if isinstance(item, Problem):
            raise DataError(str(item))
        yield item


def scan(path: Path, *, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Row | Problem]:
    """Yield every row of one file, and a Problem in the place of every line that is not one.

    Raises ConfigError for a file that does not exist or is of an unknown kind, or when Parquet's reader is missing.
    """
    kind = file_format(path)
    if kind == ".parquet":
        yield from _scan_parquet(path)
        return
    place = Place(str(path))
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
                yield from scan_array(stream, place, max_line_bytes)
            else:
                yield from _scan_lines(stream, place, max_line_bytes, is_json=kind == ".json")
    except _DECOMPRESSION_ERRORS as error:
        reason = str(error) or type(error).__name__
        yield place.problem(f"the compressed data is damaged or cut off ({reason})", fatal=True)
    except OSError as error:
        yield place.problem(f"cannot be read: {error.strerror or error}", fatal=True)


def file_format(path: Path) -> str:
    """Return ".jsonl", ".json", ".txt" or ".parquet"; ConfigError when the file is missing or of another kind."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name its files{_offered(path)}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file{_near_matches(path)}")
    kind = _kind(path)
    if not kind:
        raise ConfigError(
            f"{path}: unknown kind of data file; expected a name ending in .jsonl, .json, .txt "
            "(each also with .gz or .zst) or .parquet"
        )
    return kind


def _kind(path: Path) -> str:
    """Return the kind that a file's name tells, "" for none of ours."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind == ".ndjson":
        kind = ".jsonl"
    return "" if kind not in FORMATS or (kind == ".parquet" and path.suffix.lower() != ".parquet") else kind


def _near_matches(path: Path) -> str:
    """Return the next move for a file that does not exist: names like it, else what is there at all."""
    import difflib

    folder = path.parent
    if not folder.is_dir():
        above = next(parent for parent in folder.absolute().parents if parent.is_dir())
        return f" (the folder {folder} does not exist; {above} does): check the path"
    near = difflib.get_close_matches(path.name, _file_names(folder), n=3, cutoff=0.6)
    if near:
        return f"; did you mean {', '.join(str(folder / name) for name in near)}?"
    return f"; the folder {folder} holds {_offered(folder).removeprefix(': ') or 'no data file, check the path'}"


def _file_names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError:  # a folder may be entered without being listed
        return []


def _offered(folder: Path) -> str:
    """Return ": " and the data files of a folder, the first few by name; "" when it holds none."""
    names = [name for name in _file_names(folder) if _kind(folder / name)]
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return f": {', '.join(names[:SHOWN_NAMES])}{more}" if names else ""


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
    return cast(io.BufferedReader, path.open("rb", buffering=CHUNK))


def _lines(stream: IO[bytes], place: Place, limit: int) -> Iterator[bytes | Problem]:
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


def _scan_lines(stream: IO[bytes], place: Place, limit: int, *, is_json: bool) -> Iterator[Row | Problem]:
    for line in _lines(stream, place, limit):
        if isinstance(line, Problem):
            yield line
        elif line and not line.isspace():
            item = parse_row(line, place)
            if is_json and place.line == 1 and isinstance(item, Problem):
                # An object spread over many lines would give a problem for each of them.
                what = "a .json file holds an array of objects, or one object a line"
                yield place.problem(f"{item.what}; {what}", fatal=True)
                return
            yield item


def _starts_array(stream: io.BufferedReader) -> bool:
    return stream.peek(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _scan_text(stream: io.BufferedReader, place: Place, limit: int) -> Iterator[Row | Problem]:
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
    place = Place(str(path))
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
