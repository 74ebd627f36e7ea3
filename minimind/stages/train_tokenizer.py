"""Train a tokenizer: learn which byte sequences of the given texts deserve an id of their own (byte-level BPE).

It reads the same files as the later stages; conversations are rendered by the chat template first, so that role names
and tool schemas become short too. It reports how short it writes each language.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from minimind.config import parse
from minimind.errors import ConfigError

if TYPE_CHECKING:
    from minimind.tokenizer.bpe import Tokenizer
    from minimind.tokenizer.train import Compression

CJK = ("\u3400", "\u9fff")
"""A text is counted as Chinese when a fifth of its characters stand between these."""

REPORTED_CHARACTERS = 200_000
"""How much text of each language the compression is measured on."""


@dataclass(frozen=True)
class Config:
    """Learn a vocabulary from text and conversations: --data FILE ... --out DIR."""

    files: Annotated[tuple[Path, ...], tyro.conf.arg(name="data", metavar="FILE ...")] = ()
    """Texts and conversations to learn from, in any format that the later stages read."""
    out: Path = Path("runs/tokenizer")
    """Directory to write tokenizer.json, tokenizer_config.json and chat_template.jinja to."""
    vocab_size: int = 6400
    """Number of tokens, control tokens and the 256 bytes included."""
    single_digits: bool = True
    """Write every digit as a token of its own, so that numbers can be computed with."""
    min_frequency: int = 2
    """How often a pair must occur to be merged."""
    max_rows: int = 0
    """Learn from at most so many rows of each file, 0: all of them."""
    max_token_bytes: int = 0
    """Longest token in bytes, 0: any length. On little Chinese text 8 (two characters) keeps whole phrases, in which a
    small model cannot see the words, from becoming tokens."""
    reference: Path | None = None
    """Another tokenizer's directory to compare the compression with."""
    chat_template: Path | None = None
    """A Jinja chat template to save instead of the built-in one."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = [] if self.files else ["data: no file to learn from; give --data FILE ..."]
        if self.min_frequency < 1:
            found.append(f"min_frequency = {self.min_frequency}: at least 1")
        if self.max_rows < 0:
            found.append(f"max_rows = {self.max_rows}: 0 (all rows) or more")
        if self.max_token_bytes < 0 or self.max_token_bytes == 1:
            found.append(f"max_token_bytes = {self.max_token_bytes}: 0 (any length) or at least 2")
        if self.out.exists() and not self.out.is_dir():
            found.append(f"out = {self.out}: is a file; give the folder to write the tokenizer to")
        return found


def run(config: Config) -> "Tokenizer":
    """Train, save to `config.out`, and return the tokenizer."""
    from minimind.tokenizer.bpe import Tokenizer
    from minimind.tokenizer.train import MIN_VOCAB_SIZE, train

    reference = Tokenizer.load(config.reference) if config.reference else None
    bytes_only = train(["\n"], MIN_VOCAB_SIZE)
    if config.chat_template is not None:
        if not config.chat_template.is_file():
            raise ConfigError(f"chat_template = {config.chat_template}: no such file; name a Jinja template")
        bytes_only.chat_template = config.chat_template.read_text(encoding="utf-8")
    tokenizer = train(
        texts(config.files, bytes_only, config.max_rows),
        config.vocab_size,
        single_digits=config.single_digits,
        min_frequency=config.min_frequency,
        max_token_bytes=config.max_token_bytes or None,
    )
    tokenizer.chat_template = bytes_only.chat_template
    tokenizer.save(config.out)
    report(tokenizer, config, reference)
    return tokenizer


def texts(files: Sequence[Path], tokenizer: "Tokenizer", max_rows: int = 0) -> Iterator[str]:
    """Yield the text of every row (of the first `max_rows` of each file), conversations as the chat template renders
    them. DataError for a bad row."""
    from minimind.data import conversation, text
    from minimind.data.jsonl import read_rows
    from minimind.errors import DataError
    from minimind.tokenizer.chat import render_text

    for file in files:
        for row in islice(read_rows(file), max_rows or None):
            if "text" in row.data:
                found, problems = text.read(row.data)
            else:
                turns, problems = conversation.read(row.data)
                found = "" if problems else render_text(tokenizer, turns.messages, tools=turns.tools)
            if problems:
                raise DataError(f"{row.file}:{row.line}: {'; '.join(problems)}")
            yield found


def report(tokenizer: "Tokenizer", config: Config, reference: "Tokenizer | None") -> None:
    """Log the bytes per token of each language, beside UTF-8's own and the reference's."""
    from minimind.runtime.log import get_logger
    from minimind.tokenizer.train import measure

    log = get_logger("tokenizer")
    sample: dict[str, list[str]] = {"zh": [], "other": []}
    left = dict.fromkeys(sample, REPORTED_CHARACTERS)
    for text in texts(config.files, tokenizer):
        language = "zh" if sum(CJK[0] <= c <= CJK[1] for c in text) * 5 > len(text) else "other"
        if left[language] > 0:
            sample[language].append(text)
            left[language] -= len(text)
        elif max(left.values()) <= 0:
            break
    log.info("%s: %d tokens, %s", config.out, tokenizer.vocab_size, tokenizer.sha256[:12])
    others = measure(reference, sample) if reference else {}
    for language, counts in measure(tokenizer, sample).items():
        if counts.characters:
            log.info("%s", compression_line(counts, others.get(language)))


def compression_line(counts: "Compression", other: "Compression | None") -> str:
    """Return one line: bytes and characters per token of one language, and the reference's."""
    sizes = f"{counts.bytes_per_token:.2f} bytes, {counts.characters_per_token:.2f} characters per token"
    return f"{counts.language}: {sizes}" + (f" (reference: {other.bytes_per_token:.2f} bytes)" if other else "")


def main(argv: Sequence[str]) -> None:
    """`minimind train-tokenizer`."""
    run(parse(Config, argv, command="train-tokenizer"))
