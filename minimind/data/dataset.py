"""Tokenised documents on disk: a memory-mapped cache that is reused while nothing it was made from has changed.

The fingerprint hashes the content of the files, the tokenizer and its chat template, the options and the format
version; paths and dates do not matter. Corpora larger than memory stream while building and are mapped while reading.

Training and validation come from the same files by the hash of each document's content (`validation_fraction`), or from
files of their own. It knows nothing of rows, batches or order: packing.py and loader.py do.
"""

import hashlib
import json
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minimind.batch import Example
from minimind.data.build import DOCUMENTS_PER_ROW, Builder, Kind, Part, Writer, unwritable, write_folder
from minimind.data.config import DataConfig
from minimind.data.jsonl import file_format
from minimind.errors import ConfigError, DataError
from minimind.runtime.log import get_logger
from minimind.tokenizer.bpe import Tokenizer

FORMAT_VERSION = 1
"""Of the cache's files and of everything that decides their content (templates are hashed apart)."""

REMEMBERED_BYTES = 64 * 2**20
"""Digests of larger files are remembered by (path, size, time of change), so that a resume need not read terabytes."""

_log = get_logger(__name__)


class TokenDataset:
    """Documents of one kind, tokenised, memory-mapped from a cache folder."""

    def __init__(self, folder: Path) -> None:
        """Map a finished cache folder; DataError when its files do not have the sizes that meta.json tells."""
        try:
            meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: not a token cache ({error}); delete it, it will be made again") from None
        self.folder = folder
        self.fingerprint: str = meta["fingerprint"]
        self.kind: Kind = meta["kind"]
        self.max_length: int | None = meta["max_length"]
        self.num_documents: int = meta["num_documents"]
        self.num_tokens: int = meta["num_tokens"]
        self.num_learned_tokens: int = meta["num_learned_tokens"]
        """Tokens with a weight above 0 that are predicted (the first token of a document never is)."""
        self.longest: int = meta["longest"]
        """Tokens of the longest document."""
        self.report: dict[str, int] = meta["report"]
        self.documents_per_row: int = DOCUMENTS_PER_ROW[self.kind]
        dtype = np.dtype(meta["dtype"])
        self.ids = map_file(folder / "ids.bin", dtype, self.num_tokens)
        self.offsets = map_file(folder / "offsets.bin", np.dtype(np.int64), self.num_documents + 1)
        table = meta["weight_table"]
        self.weight_table = None if table is None else np.asarray(table, dtype=np.float32)
        self.weight_codes = None
        if self.weight_table is not None:
            self.weight_codes = map_file(folder / "weights.bin", np.dtype(np.uint8), self.num_tokens)

    def __len__(self) -> int:
        """Return the number of documents."""
        return self.num_documents

    def slice(self, start: int, length: int) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.float32]]:
        """Return (ids, loss weights) of `length` tokens from token `start` of all documents laid end to end."""
        ids = self.ids[start : start + length]
        if self.weight_codes is None or self.weight_table is None:
            return ids, np.ones(length, dtype=np.float32)
        return ids, self.weight_table[self.weight_codes[start : start + length]]

    def document(self, index: int) -> Example:
        """Return one document."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        ids, weights = self.slice(start, end - start)
        return Example(ids.tolist(), weights.tolist())

    def __iter__(self) -> Iterator[Example]:
        """Yield every document in order."""
        return (self.document(index) for index in range(self.num_documents))


def map_file(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    """Return `count` numbers of a file, memory-mapped; DataError when the file has another size."""
    expected = count * dtype.itemsize
    size = path.stat().st_size if path.is_file() else -1
    if size != expected:
        found = f"{size} bytes" if size >= 0 else "missing"
        raise DataError(
            f"{path}: {found}, expected {expected} bytes; delete the folder {path.parent}, it will be made again"
        )
    if not count:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)).view(np.ndarray)  # slices of the subclass are slow


def prepare(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    kind: Kind,
    cache_dir: Path,
    max_length: int | None = None,
    on_error: str = "raise",
    validation_fraction: float = 0.0,
    part: Part = "train",
) -> TokenDataset:
    """Return the tokenised documents of `files`, from the cache when it is there, else built now.

    `max_length`: tokens of one document at most (required except for kind "pretrain", whose documents packing cuts).
    `part`: with a `validation_fraction`, documents whose content hashes below it are "validation", the others "train".
    Raises ConfigError for a missing file, DataError for bad rows (unless `on_error` is "skip").
    """
    if kind != "pretrain" and (max_length is None or max_length < 2):
        raise ConfigError(f"max_length is {max_length}, expected at least 2 tokens for kind {kind}")
    if not files:
        raise ConfigError("no data files; name them with --data FILE ...")
    options: dict[str, Any] = {
        "kind": kind,
        "max_length": None if kind == "pretrain" else max_length,
        "on_error": on_error,
        "validation_fraction": validation_fraction,
        "part": part,
    }
    for file in files:
        file_format(file)
    before = _stamps(files)
    fingerprint = _fingerprint(files, tokenizer, options, cache_dir)
    folder = cache_dir / f"tokens-{fingerprint[:32]}"
    with lock(folder):
        if (folder / "meta.json").is_file():
            dataset = TokenDataset(folder)
            if dataset.fingerprint == fingerprint:
                return dataset

        def fill(target: Path) -> None:
            _build(target, files, tokenizer, options, fingerprint)
            if _stamps(files) != before:  # the cache would hold other rows than its fingerprint says
                raise DataError(
                    f"{', '.join(map(str, files))}: changed while being read; wait for the writer and try again"
                )

        write_folder(folder, fill)
    return TokenDataset(folder)


def train_and_validation(
    config: DataConfig, tokenizer: Tokenizer, *, kind: Kind
) -> tuple[TokenDataset, TokenDataset | None]:
    """Return (training, validation) documents as `config` says; validation is None when there is nothing for it.

    Validation is `config.validation` where given, else the share `config.validation_fraction` of the training files.
    DataError when no document is left to train on.
    """

    def part(files: tuple[Path, ...], fraction: float, which: Part) -> TokenDataset:
        return prepare(
            files,
            tokenizer,
            kind=kind,
            cache_dir=config.cache_dir,
            max_length=config.row_length // DOCUMENTS_PER_ROW[kind] + 1,  # a row holds one slot less than tokens
            on_error=config.on_error,
            validation_fraction=fraction,
            part=which,
        )

    fraction = 0.0 if config.validation else config.validation_fraction
    train = part(config.files, fraction, "train")
    if not train.num_documents:
        names = ", ".join(str(file) for file in config.files)
        counts = ", ".join(f"{key} {count}" for key, count in train.report.items() if count)
        raise DataError(
            f"{names}: nothing to train on ({counts or 'no rows'}); `minimind data check` tells what the rows hold"
        )
    validation = None
    if config.validation or fraction > 0:
        validation = part(config.validation or config.files, fraction, "validation")
        if not validation.num_documents:
            _log.warning("no document fell into the validation part; there will be no validation loss")
            validation = None
    return train, validation


def _build(
    target: Path, files: Sequence[Path], tokenizer: Tokenizer, options: dict[str, Any], fingerprint: str
) -> None:
    started = time.perf_counter()
    kind: Kind = options["kind"]
    writer = Writer(target, tokenizer.vocab_size, uniform=kind == "pretrain")
    builder = Builder(
        tokenizer,
        writer,
        max_length=options["max_length"] or 0,
        on_error=options["on_error"],
        validation_fraction=options["validation_fraction"],
        part=options["part"],
    )
    try:
        report = builder.build(files, kind)
        meta = options | {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "report": dict(report)}
        writer.close(meta)
    except BaseException:
        writer.abandon()
        raise
    size = sum(file.stat().st_size for file in files)
    seconds = time.perf_counter() - started
    counts = ", ".join(f"{key} {count:,}" for key, count in report.items() if count and key != "documents")
    shape = f"{writer.num_documents:,} documents, {writer.num_tokens:,} tokens"
    speed = size / 1e6 / max(seconds, 1e-9)
    _log.info("tokenised %s: %s (%s) in %.1f s, %.1f MB/s", options["part"], shape, counts, seconds, speed)


# --- fingerprints and locks -----------------------------------------------------------------------------------------


def _fingerprint(files: Sequence[Path], tokenizer: Tokenizer, options: dict[str, Any], cache_dir: Path) -> str:
    content = {
        "format_version": FORMAT_VERSION,
        "files": [content_digest(file, cache_dir) for file in files],
        "formats": [file_format(file) for file in files],
        "tokenizer": tokenizer.sha256,
        "template": tokenizer.template_sha256 if options["kind"] != "pretrain" else "",
        "options": options,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stamps(files: Sequence[Path]) -> list[tuple[int, int]]:
    return [(status.st_size, status.st_mtime_ns) for status in (file.stat() for file in files)]


def content_digest(path: Path, cache_dir: Path | None = None) -> str:
    """Return the blake2b digest of a file's bytes; that of a large unchanged file is remembered in `cache_dir`."""
    status = path.stat()
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    if status.st_size < REMEMBERED_BYTES or cache_dir is None:
        return _digest(path)
    note = cache_dir / "digests" / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    try:
        return note.read_text()
    except OSError:
        pass
    digest = _digest(path)
    # A file changed within the clock's grain would keep its time: remember only what has been still for a while.
    if time.time() - status.st_mtime > 2 and path.stat().st_mtime_ns == status.st_mtime_ns:
        with suppress(OSError):  # a folder that cannot be written is refused when the cache is made (`lock`)
            note.parent.mkdir(parents=True, exist_ok=True)
            temporary = note.with_suffix(f".{os.getpid()}")
            temporary.write_text(digest)
            temporary.replace(note)
    return digest


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


@contextmanager
def lock(folder: Path) -> Generator[None]:
    """Hold the lock of a cache folder: of several processes one builds it, the others wait and find it.

    Raises ConfigError when the folder above it cannot be written, OutOfResourcesError when its disk is full.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two builders at once cost time, the rename keeps the result whole
        yield
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stream = folder.with_name(f"{folder.name}.lock").open("wb")
    except OSError as error:
        raise unwritable(folder.parent, error) from None
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
