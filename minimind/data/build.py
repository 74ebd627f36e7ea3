"""Rows -> the files of a token cache, streaming and atomic: written to a temporary sibling, fsynced, renamed.

Layout of a cache folder: `ids.bin` (uint16 or uint32), `weights.bin` (uint8 index into the table of meta.json; absent
when every token has weight 1), `offsets.bin` (int64, documents + 1), `meta.json`. Memory is bounded by a batch of rows.
It does not decide whether a cache is up to date: dataset.py does.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from minimind.batch import Example
from minimind.data import conversation, preference, text
from minimind.data.budget import fit_conversation, fit_pair
from minimind.data.jsonl import Problem, Row, scan
from minimind.data.messages import Conversation
from minimind.data.preference import Preference
from minimind.errors import ConfigError, DataError, OutOfResourcesError
from minimind.runtime.log import get_logger
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.chat import Conversation as Rendering
from minimind.tokenizer.chat import render_batch

Kind = Literal["pretrain", "conversation", "preference", "unpaired"]
Part = Literal["train", "validation"]

DOCUMENTS_PER_ROW = {"pretrain": 1, "conversation": 1, "preference": 2, "unpaired": 1}
"""A preference row becomes two documents, chosen and rejected, which stay together; or, for KTO ("unpaired"), the sides
it has, each by itself: then a rejected one is told by the sign of its loss weights, which are negative."""

BATCH_CHARACTERS = 2**21
BATCH_CONVERSATIONS = 256
KNOWN_CHARACTERS = 2**20
"""Of the texts whose ids are kept from one batch of conversations to the next."""
SHOWN_PROBLEMS = 5

_log = get_logger(__name__)


class Report(dict[str, int]):
    """Counts of what happened to the rows, all keys always present."""

    KEYS = (
        "rows",
        "skipped",
        "other_part",
        "empty",
        "nothing_to_learn",
        "too_long",
        "disliked",
        "truncated",
        "cut",
        "documents",
    )

    def __init__(self) -> None:
        """Start with every count at 0."""
        super().__init__(dict.fromkeys(self.KEYS, 0))


class Writer:
    """Appends documents to the files of a cache in the making."""

    def __init__(self, folder: Path, vocab_size: int, *, uniform: bool) -> None:
        """Open the files of an empty `folder`; `uniform`: every weight is 1 and none is stored."""
        self.folder = folder
        self.dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self.uniform = uniform
        self.table: dict[float, int] = {}
        self.num_documents = self.num_tokens = self.num_learned_tokens = self.longest = 0
        self._ids = (folder / "ids.bin").open("wb")
        self._weights = None if uniform else (folder / "weights.bin").open("wb")
        self._offsets = (folder / "offsets.bin").open("wb")
        self._offsets.write(np.int64(0).tobytes())

    def add(self, documents: Sequence[list[int]], weights: Sequence[list[float]] | None = None) -> None:
        """Append documents (and the weight of each of their tokens, unless uniform)."""
        if not documents:
            return
        lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
        self._ids.write(np.concatenate([np.asarray(ids, dtype=self.dtype) for ids in documents]).tobytes())
        self._offsets.write((self.num_tokens + np.cumsum(lengths)).astype(np.int64).tobytes())
        self.num_documents += len(documents)
        self.num_tokens += int(lengths.sum())
        self.longest = max(self.longest, int(lengths.max()))
        if self._weights is None:
            self.num_learned_tokens += int((lengths - 1).sum())
            return
        values = np.concatenate([np.asarray(row, dtype=np.float32) for row in weights or []])
        firsts = values[np.cumsum(lengths) - lengths]  # the first token of a document is never predicted
        self.num_learned_tokens += int(np.count_nonzero(values)) - int(np.count_nonzero(firsts))
        distinct, where = np.unique(values, return_inverse=True)
        codes = [self.table.setdefault(float(value), len(self.table)) for value in distinct]
        if len(self.table) > 256:
            raise ConfigError("more than 256 different loss weights; a cache stores an index of one byte for each")
        self._weights.write(np.asarray(codes, dtype=np.uint8)[where].tobytes())

    def close(self, meta: dict[str, Any]) -> None:
        """Flush everything to the disk and write meta.json last."""
        for stream in self._streams():
            _flush(stream)
        meta = meta | {
            "dtype": self.dtype.name,
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "num_learned_tokens": self.num_learned_tokens,
            "longest": self.longest,
            "weight_table": None
            if self.uniform
            else [value for value, _ in sorted(self.table.items(), key=lambda x: x[1])],
        }
        with (self.folder / "meta.json").open("wb") as stream:
            stream.write((json.dumps(meta, indent=2) + "\n").encode())
            _flush(stream)

    def abandon(self) -> None:
        """Close the files without finishing them."""
        for stream in self._streams():
            stream.close()

    def _streams(self) -> list[IO[bytes]]:
        return [stream for stream in (self._ids, self._offsets, self._weights) if stream is not None]


def _flush(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `target` by `fill(temporary sibling)` and one rename: it exists complete or not at all.

    Leftovers of killed attempts are removed; the caller holds the lock of `target`.
    """
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f"{target.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise unwritable(target.parent, error) from None
    try:
        fill(temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except OSError as error:
        needed = sum(file.stat().st_size for file in temporary.glob("*")) if temporary.exists() else 0
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in _NO_SPACE:
            raise unwritable(target.parent, error, needed) from None
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def unwritable(cache_dir: Path, error: OSError, num_bytes: int = 0) -> ConfigError | OutOfResourcesError:
    """Return the error of a cache folder that takes nothing, or nothing more after `num_bytes`."""
    if error.errno in _NO_SPACE:
        return OutOfResourcesError(
            f"{cache_dir}: {os.strerror(error.errno)} after {num_bytes:,} bytes of the token cache; "
            "free some space or name another folder with --data.cache-dir"
        )
    reason = error.strerror or str(error)
    return ConfigError(f"data.cache_dir = {cache_dir}: cannot be written ({reason}); give another --data.cache-dir")


def in_validation(content: str, fraction: float) -> bool:
    """Return whether a document belongs to the validation part: by the hash of its content, nothing else.

    So equal documents stand on one side, wherever they are in the files, and more files never move one.
    """
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8, person=b"minimind split").digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


class Builder:
    """Turns the rows of some files into documents of one part and counts what happens to them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        writer: Writer,
        *,
        max_length: int,
        on_error: str,
        validation_fraction: float,
        part: Part,
    ) -> None:
        """`max_length`: tokens of one document at most (not for pretraining text, which packing cuts)."""
        self.tokenizer, self.writer = tokenizer, writer
        self.max_length, self.on_error = max_length, on_error
        self.fraction, self.part = validation_fraction, part
        self.report = Report()
        self._known: dict[str, list[int]] = {}
        """Ids of stretches of text met before: prompts, tools and answers recur, in pairs and in cut conversations."""

    def build(self, files: Iterable[Path], kind: Kind) -> Report:
        """Read every file and write its documents; DataError at the first problem unless `on_error` is "skip"."""
        rows = self._rows(files)
        if kind == "pretrain":
            self._texts(rows)
        elif kind == "conversation":
            self._conversations(rows)
        else:
            for index, row in enumerate(rows):
                self._preference(row, is_paired=kind == "preference")
                if index % BATCH_CONVERSATIONS == 0:
                    self._forget()
        self.report["documents"] = self.writer.num_documents
        if self.report["skipped"]:
            _log.warning("left out %d bad rows; `minimind data check` lists them all", self.report["skipped"])
        return self.report

    def _rows(self, files: Iterable[Path]) -> Iterator[Row]:
        for file in files:
            for item in scan(file):
                self.report["rows"] += 1
                if isinstance(item, Row):
                    yield item
                elif item.fatal:
                    raise DataError(f"{item}; the rest of the file cannot be read")
                else:
                    self._problem(item)

    def _problem(self, problem: Problem) -> None:
        if self.on_error == "raise":
            raise DataError(
                f"{problem}\nmend it (`minimind data check {problem.file}` lists all problems), "
                "or leave bad rows out: --data.on-error skip"
            )
        self.report["skipped"] += 1
        if self.report["skipped"] <= SHOWN_PROBLEMS:
            _log.warning("left out: %s", problem)

    def _bad(self, row: Row, problems: list[str]) -> bool:
        if problems:
            self._problem(Problem(row.file, row.line, "; ".join(problems)))
        return bool(problems)

    def _elsewhere(self, content: str) -> bool:
        elsewhere = self.fraction > 0 and in_validation(content, self.fraction) != (self.part == "validation")
        self.report["other_part"] += elsewhere
        return elsewhere

    def _texts(self, rows: Iterable[Row]) -> None:
        batch: list[str] = []
        size = 0
        for row in rows:
            content, problems = text.read(row.data)
            if self._bad(row, problems):
                continue
            if not content.strip():
                self.report["empty"] += 1
            elif not self._elsewhere(content.strip()):
                batch.append(content)
                size += len(content)
            if size >= BATCH_CHARACTERS:
                self.writer.add(text.documents(self.tokenizer, batch))
                batch, size = [], 0
        self.writer.add(text.documents(self.tokenizer, batch))

    def _conversations(self, rows: Iterable[Row]) -> None:
        batch: list[tuple[Row, Conversation]] = []
        for row in rows:
            found, problems = conversation.read(row.data)
            if self._bad(row, problems):
                continue
            if found.disliked:
                self.report["disliked"] += 1
            elif not found.messages:
                self.report["empty"] += 1
            elif not self._elsewhere(conversation.content_key(found)):
                batch.append((row, found))
            if len(batch) == BATCH_CONVERSATIONS:
                self._render_batch(batch)
                batch = []
        self._render_batch(batch)

    def _render_batch(self, batch: list[tuple[Row, Conversation]]) -> None:
        whole: list[Example | None]
        try:
            whole = [*self._render_all([Rendering(found.messages, found.tools) for _, found in batch])]
        except DataError:
            whole = [None] * len(batch)  # one by one then, to name the row at fault
        examples: list[Example] = []
        for (row, found), rendered in zip(batch, whole, strict=True):
            examples += self._fitted(
                row, lambda c=found, r=rendered: _alone(fit_conversation(c, self._render, self.max_length, r))
            )
        self._write(examples)
        self._forget()

    def _preference(self, row: Row, *, is_paired: bool) -> None:
        found, problems = preference.read(row.data)
        if self._bad(row, problems) or (is_paired and self._bad(row, preference.unpaired(found))):
            return
        if not self._elsewhere(preference.content_key(found)):
            examples = self._fitted(row, lambda: fit_pair(found, self._render, self.max_length))
            self._write(examples if is_paired else _signed(found, examples))

    def _fitted(self, row: Row, make: Callable[[], tuple[list[Example] | None, str]]) -> list[Example]:
        """Return the documents of a row (none when it is bad or teaches nothing) and count what was done to it."""
        try:
            examples, outcome = make()
        except DataError as error:
            self._bad(row, [str(error)])
            return []
        if outcome:
            self.report[outcome] += 1
        if examples is None:
            return []
        if not all(any(example.loss_weights[1:]) for example in examples):
            self.report["nothing_to_learn"] += 1
            return []
        return examples

    def _write(self, examples: Sequence[Example]) -> None:
        self.writer.add([e.ids for e in examples], [e.loss_weights for e in examples])

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> Example:
        return self._render_all([Rendering(messages, tools)])[0]

    def _render_all(self, conversations: Sequence[Rendering]) -> list[Example]:
        return render_batch(self.tokenizer, conversations, known=self._known)

    def _forget(self) -> None:
        """Keep what was encoded only while it is little; called after every batch of rows."""
        if sum(map(len, self._known)) > KNOWN_CHARACTERS:
            self._known.clear()


def _alone(fitted: tuple[Example | None, str]) -> tuple[list[Example] | None, str]:
    example, outcome = fitted
    return (None if example is None else [example]), outcome


def _signed(found: Preference, sides: list[Example]) -> list[Example]:
    """Return the sides of a row with the rejected one's weights negative: each is then a document by itself."""
    if found.rejected is not None and sides:
        sides[-1] = Example(sides[-1].ids, [-weight if weight else 0.0 for weight in sides[-1].loss_weights])
    return sides
