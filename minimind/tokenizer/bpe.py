"""The tokenizer: byte-level BPE over the `tokenizers` library, its files, its bytes.

It turns text into ids and back, exactly. Deliberately unknown here: messages, roles and masks (`tokenizer.chat`), how a
vocabulary is learned (`tokenizer.train`), tensors and models.

Two encoders share one vocabulary: the full one reads control tokens such as `<|im_end|>` in the text, the plain one has
never heard of them, so text from outside can be encoded without ever becoming a control token.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as Backend

from minimind.errors import CheckpointError, DataError

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TAGS = (
    *("<think>", "</think>", "<answer>", "</answer>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
)
"""Tags with a single token each. They are part of the text (kept by `skip_special`), unlike the three above."""

TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
DEFAULT_TEMPLATE = Path(__file__).with_name(TEMPLATE_FILE)
MAX_FILE_BYTES = 256 * 2**20


class Tokenizer:
    """Byte-level BPE: every text and every byte string has ids, and decoding gives it back exactly.

    `bos_id`, `eos_id` and `pad_id` are 1, 2 and 0 for a vocabulary trained here (`<|im_start|>`, `<|im_end|>`,
    `<|endoftext|>`); a loaded one says its own in `tokenizer_config.json`.
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        chat_template: str | None = None,
        config: dict[str, Any] | None = None,
        where: str = TOKENIZER_FILE,
    ) -> None:
        """Build from the text of a `tokenizer.json`; `where` names it in errors. CheckpointError if it is unusable."""
        self._json = tokenizer_json
        self._where = where
        self._config = dict(config or {})
        self.chat_template = DEFAULT_TEMPLATE.read_text("utf-8") if chat_template is None else chat_template
        """Jinja source of the chat template (`tokenizer.chat` renders it)."""
        try:
            content = json.loads(tokenizer_json)
            self._full = Backend.from_str(tokenizer_json)
            # The plain twin: without added tokens nothing in a text can be one.
            self._plain = Backend.from_str(json.dumps({**content, "added_tokens": [], "post_processor": None}))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{where}: not a tokenizer: {error}. Restore the file or train another.") from error
        for backend in (self._full, self._plain):
            backend.no_padding()
            backend.no_truncation()
        _require_byte_level(content, where)
        added: list[dict[str, Any]] = content.get("added_tokens") or []
        self.special_ids: dict[str, int] = {token["content"]: int(token["id"]) for token in added}
        """Id of every control token, hidden ones (`<|...|>`) and tags (`<think>`) alike."""
        self._hidden = frozenset(int(token["id"]) for token in added if token["special"])
        self._bytes = _bytes_of_ids(self._full, self.special_ids, where)
        self.bos_id = self._named_id("bos_token", TURN_START)
        self.eos_id = self._named_id("eos_token", TURN_END)
        self.pad_id = self._named_id("pad_token", END_OF_TEXT)
        control_ids = set(self.special_ids.values())
        for text in self.special_ids:
            if not control_ids.isdisjoint(self.encode(text)):
                raise CheckpointError(
                    f"{where}: the plain text {text!r} would become a control token, so text of users could forge one. "
                    "Use a vocabulary whose merges do not spell its control tokens."
                )

    # -- files ---------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the tokenizer of a directory (or of a `tokenizer.json` file). CheckpointError names what is wrong.

        The chat template is `chat_template.jinja`, else the one in `tokenizer_config.json`, else the built-in one.
        """
        file = Path(path)
        file = file / TOKENIZER_FILE if file.is_dir() else file
        config_text = _read(file.with_name(CONFIG_FILE), required=False)
        config: Any = {}
        if config_text is not None:
            try:
                config = json.loads(config_text)
            except ValueError as error:
                raise CheckpointError(f"{file.with_name(CONFIG_FILE)}: not JSON: {error}") from error
            if not isinstance(config, dict):
                raise CheckpointError(f"{file.with_name(CONFIG_FILE)}: expected an object, got {type(config).__name__}")
        template: Any = config.pop("chat_template", None)
        if isinstance(template, list):  # several named templates; the default one is meant
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        template = _read(file.with_name(TEMPLATE_FILE), required=False) or template
        text = _read(file, required=True)
        assert text is not None
        return cls(text, chat_template=template, config=config, where=str(file))

    def save(self, path: str | Path, *, model_max_length: int | None = None) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, a directory for AutoTokenizer.

        `tokenizer.json` is written back byte for byte, so `sha256` survives every copy. `model_max_length` in tokens.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.id_to_token(self.bos_id),
            "eos_token": self.id_to_token(self.eos_id),
            "pad_token": self.id_to_token(self.pad_id),
            "model_max_length": 32768,
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            **self._config,
            "chat_template": self.chat_template,
        }
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        (folder / TOKENIZER_FILE).write_bytes(self._json.encode())
        (folder / CONFIG_FILE).write_bytes((json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode())
        (folder / TEMPLATE_FILE).write_bytes(self.chat_template.encode())

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of `tokenizer.json` as it is on disk: what a checkpoint names."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    @cached_property
    def template_sha256(self) -> str:
        """SHA-256 of the chat template: a cache of rendered conversations depends on it as well."""
        return hashlib.sha256(self.chat_template.encode()).hexdigest()

    # -- vocabulary ----------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included."""
        return len(self._bytes)

    @cached_property
    def token_bytes(self) -> list[int]:
        """UTF-8 bytes of text each id stands for; 0 for control tokens. Length `vocab_size`."""
        control = set(self.special_ids.values())
        return [0 if index in control else len(value) for index, value in enumerate(self._bytes)]

    def id_to_token(self, token_id: int) -> str:
        """Return the vocabulary's own name of an id (`Ġthe`, `<think>`), for people to read."""
        name = self._full.id_to_token(token_id)
        if name is None:
            raise DataError(f"token id {token_id} is outside the vocabulary of {self.vocab_size} ({self._where}).")
        return name

    # -- text to ids ---------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the ids of `text`. Control tokens in it stay plain text, unless `allow_special`."""
        try:
            return (self._full if allow_special else self._plain).encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise _not_text(text) from error

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """Return `encode` of each text, on all processors."""
        backend = self._full if allow_special else self._plain
        try:
            return [item.ids for item in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except (UnicodeEncodeError, TypeError) as error:
            for text in texts:
                self.encode(text)  # finds the one at fault and names it
            raise DataError(f"encode_batch: {error}") from error

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of any bytes, valid UTF-8 or not; `decode_bytes` gives them back."""
        ids: list[int] = []
        # Undecodable bytes become lone surrogates U+DC80..U+DCFF, which no valid text holds.
        for run in re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape")):
            if run and "\udc80" <= run[0] <= "\udcff":
                ids += [self._id_of_byte[ord(character) - 0xDC00] for character in run]
            elif run:
                ids += self.encode(run)
        return ids

    # -- ids to text ---------------------------------------------------------------------------------------------------

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Return the bytes that `ids` stand for. `skip_special` leaves out hidden control tokens, but keeps tags."""
        try:
            return b"".join([self._bytes[i] for i in ids if i >= 0 and not (skip_special and i in self._hidden)])
        except IndexError:
            wrong = max(ids)
            raise DataError(
                f"token id {wrong} is outside the vocabulary of {self.vocab_size} ({self._where})."
            ) from None

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD. A negative id stands for nothing."""
        return self.decode_bytes(list(ids), skip_special=skip_special).decode("utf-8", "replace")

    def stream_decoder(self, *, skip_special: bool = False) -> "StreamDecoder":
        """Return a decoder for ids that come one at a time."""
        return StreamDecoder(self, skip_special=skip_special)

    # -- private -------------------------------------------------------------------------------------------------------

    @cached_property
    def _id_of_byte(self) -> list[int]:
        single = {value[0]: index for index, value in reversed(list(enumerate(self._bytes))) if len(value) == 1}
        missing = sorted(set(range(256)) - single.keys())
        if missing:
            raise CheckpointError(
                f"{self._where}: the vocabulary lacks the bytes {missing[:5]}...; it cannot hold any data."
            )
        return [single[value] for value in range(256)]

    def _named_id(self, key: str, default: str) -> int:
        token = self._config.get(key) or default
        token = token["content"] if isinstance(token, dict) else token
        found = self._full.token_to_id(token)
        if found is None:
            raise CheckpointError(f"{self._where}: {key} is {token!r}, which the vocabulary does not have.")
        return found


class StreamDecoder:
    """Decoder of a stream of ids: `push` each, join what it returns, end with `flush`. Never cuts a UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        """Start an empty stream."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._pending = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the text that became complete with this id, maybe empty."""
        return self._pending.decode(self._tokenizer.decode_bytes((token_id,), skip_special=self._skip_special))

    def flush(self) -> str:
        """Return what is left (U+FFFD for a character that never ended) and start anew."""
        return self._pending.decode(b"", final=True)


def byte_alphabet() -> dict[str, int]:
    """Return the 256 characters in which byte-level BPE writes bytes (printable Latin-1 as itself), and the bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in set(printable)]
    return {chr(v): v for v in printable} | {chr(256 + n): v for n, v in enumerate(others)}


def _bytes_of_ids(backend: Backend, special_ids: dict[str, int], where: str) -> list[bytes]:
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    alphabet = byte_alphabet()
    for token, index in vocabulary.items():
        if token in special_ids:
            table[index] = token.encode()
        elif all(character in alphabet for character in token):
            table[index] = bytes(alphabet[character] for character in token)
        else:
            raise CheckpointError(f"{where}: token {index} ({token!r}) is not byte-level.")
    if not table:
        raise CheckpointError(f"{where}: the vocabulary is empty.")
    return [b"" if value is None else value for value in table]  # an unused id stands for nothing


def _require_byte_level(content: dict[str, Any], where: str) -> None:
    decoder = (content.get("decoder") or {}).get("type")
    kind = (content.get("model") or {}).get("type")
    if kind != "BPE" or decoder != "ByteLevel":
        raise CheckpointError(f"{where}: model {kind} with decoder {decoder}; only byte-level BPE is supported.")


def _read(file: Path, *, required: bool) -> str | None:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes; more than {MAX_FILE_BYTES} is no tokenizer.")
        return file.read_bytes().decode()
    except FileNotFoundError:
        if required:
            raise CheckpointError(
                f"{file}: not found. Name a folder with a {TOKENIZER_FILE}; `minimind train-tokenizer` makes one."
            ) from None
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error


def _not_text(text: object) -> DataError:
    if not isinstance(text, str):
        return DataError(f"expected text, got {type(text).__name__}: {text!r:.60}")
    place = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), 0)
    return DataError(
        f"text has half a surrogate pair (U+{ord(text[place]):04X}) at character {place}, after "
        f"{text[max(0, place - 20) : place]!r}. That is not Unicode; mend the source (`encode_bytes` takes any bytes)."
    )


def iterate_batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Return consecutive lists of at most `size` texts; memory is one list."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
