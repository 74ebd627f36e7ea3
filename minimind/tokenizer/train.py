"""Learning a vocabulary: byte-level BPE from a stream of texts, and how well it compresses each language.

It knows neither files nor rows (a stage hands it texts) nor messages. Sennrich et al. 2016 (BPE), Radford et al. 2019
(byte-level).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from minimind.errors import ConfigError, DataError
from minimind.tokenizer.bpe import END_OF_TEXT, TAGS, TURN_END, TURN_START, Tokenizer, byte_alphabet, iterate_batches

NUM_RESERVED = 5
"""Spare control tokens `<|reserved_0|>`..., for use after training; with them the bytes start at id 16."""

CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, *TAGS, *(f"<|reserved_{i}|>" for i in range(NUM_RESERVED)))
"""Control tokens in the order of their ids, from 0."""

MIN_VOCAB_SIZE = len(CONTROL_TOKENS) + 256

_WORDS = r"'(?:[sdmt]|ll|ve|re)(?![\p{L}\p{M}])| ?[\p{L}\p{M}]+"
_ONE_DIGIT = r"\p{N}"
_THREE_DIGITS = r" ?\p{N}{1,3}"
# A line break is always a piece of its own: cutting a text after one never changes its ids, so that the ids of a chat
# prompt (which ends with one) are a prefix of the ids of the whole conversation, in every library that reads the file.
_REST = r" ?[^\s\p{L}\p{M}\p{N}]+|[\r\n]|[^\S\r\n]+(?!\S)|[^\S\r\n]+"


def train(
    texts: Iterable[str],
    vocab_size: int = 6400,
    *,
    single_digits: bool = True,
    min_frequency: int = 2,
    max_token_bytes: int | None = None,
) -> Tokenizer:
    """Return a tokenizer of exactly or (on little text) at most `vocab_size` ids, the same for the same texts.

    Ids: `CONTROL_TOKENS`, then the 256 bytes, then merges, most frequent first. `single_digits`: a number is a sequence
    of its digits, with the same token for a digit everywhere (sums can be learned); else up to three share one.
    `max_token_bytes` bounds a token's length. Texts are streamed; control tokens spelled out in them teach no merges.
    ConfigError for an impossible size, DataError for no text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size {vocab_size} is too small: {len(CONTROL_TOKENS)} control tokens and 256 bytes need "
            f"{MIN_VOCAB_SIZE}. Ask for {MIN_VOCAB_SIZE} or more."
        )
    backend = Backend(models.BPE())
    digits = _ONE_DIGIT if single_digits else _THREE_DIGITS
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{_WORDS}|{digits}|{_REST}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(name, normalized=False) for name in CONTROL_TOKENS],
        initial_alphabet=list(byte_alphabet()),
        max_token_length=max_token_bytes,
        show_progress=False,
    )
    counter = _Counter()
    backend.train_from_iterator(iterate_batches(counter.pieces(texts), 256), trainer)
    if counter.characters == 0:
        raise DataError("train-tokenizer: the texts are empty; there is nothing to learn a vocabulary from.")
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] not in TAGS  # the trainer makes all of them special; tags are text, though
    return Tokenizer(json.dumps(content, ensure_ascii=False, indent=2) + "\n")


@dataclass(frozen=True)
class Compression:
    """How many tokens a language's texts take."""

    language: str
    characters: int
    bytes: int
    """UTF-8 bytes of the texts."""
    tokens: int

    @property
    def bytes_per_token(self) -> float:
        """Higher is shorter; compare only within one language."""
        return self.bytes / max(1, self.tokens)

    @property
    def bytes_per_character(self) -> float:
        """UTF-8's own: 1 for English, 3 for Chinese."""
        return self.bytes / max(1, self.characters)

    @property
    def characters_per_token(self) -> float:
        """`bytes_per_token / bytes_per_character`: comparable between languages."""
        return self.characters / max(1, self.tokens)


def measure(tokenizer: Tokenizer, texts_by_language: Mapping[str, Iterable[str]]) -> dict[str, Compression]:
    """Return the counts of each language's texts. For a reference, call it again with another tokenizer."""
    measured: dict[str, Compression] = {}
    for language, texts in texts_by_language.items():
        characters = size = tokens = 0
        for batch in iterate_batches(texts, 256):
            characters += sum(map(len, batch))
            size += sum(len(text.encode()) for text in batch)
            tokens += sum(map(len, tokenizer.encode_batch(batch)))
        measured[language] = Compression(language, characters, size, tokens)
    return measured


def compression(tokenizer: Tokenizer, texts_by_language: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """Return bytes per token for each language."""
    return {language: counts.bytes_per_token for language, counts in measure(tokenizer, texts_by_language).items()}


class _Counter:
    """Cuts control tokens out of the texts on their way to the trainer, and counts what is left."""

    def __init__(self) -> None:
        self.characters = 0

    def pieces(self, texts: Iterable[str]) -> Iterator[str]:
        control = re.compile("|".join(re.escape(token) for token in CONTROL_TOKENS))
        for text in texts:
            for piece in control.split(text):
                self.characters += len(piece)
                yield piece
