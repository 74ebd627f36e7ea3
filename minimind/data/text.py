"""Pretraining rows: `{"text": ...}` -> one document, every token learned.

A document is `<bos> text <eos>`, so that the first token of a text and its end are predicted too; a base model is asked
to continue `prompt_ids(prompt)`. Knows nothing of length: packing cuts long documents without losing a label.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from minimind.data.messages import Reader


class TextTokenizer(Protocol):
    """What this module needs of a tokenizer."""

    @property
    def bos_id(self) -> int: ...  # noqa: D102
    @property
    def eos_id(self) -> int: ...  # noqa: D102
    def encode(self, text: str) -> list[int]: ...  # noqa: D102
    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...  # noqa: D102


def read(data: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the text of a row and the list of its problems."""
    reader = Reader()
    if "text" not in data:
        keys = ", ".join(list(data)[:8]) or "nothing"
        return "", [f'text: is missing (the row has {keys}), expected {{"text": "..."}}']
    text = reader.text(data["text"], "text")
    return text, reader.problems


def documents(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text as a document: bos, text, eos."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    return [[bos, *ids, eos] for ids in tokenizer.encode_batch(list(texts))]


def prompt_ids(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """Return the ids a base model continues: as in a training document, without its end."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]
