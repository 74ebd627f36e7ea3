"""Text, bytes and files come back exactly; control tokens cannot be forged; bad files are refused in words."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.errors import CheckpointError, DataError
from minimind.tokenizer.bpe import TAGS, Tokenizer
from minimind.tokenizer.train import CONTROL_TOKENS

ENGLISH = [
    "The red ball is in the garden. Who has the ball now?",
    "Don't stop, it's 12 o'clock.\n\nTen past nine: 9:10.",
]
CHINESE = ["红色的球在花园里。现在谁有球？", "今天天气怎么样？今天是晴天，气温二十三度。\n明天见。"]

text_or_tags = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(CONTROL_TOKENS)), max_size=6).map("".join)


@given(text=text_or_tags)
@settings(max_examples=200, deadline=None)
def test_round_trip_and_no_forgery(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == text
    assert tokenizer.encode_batch([text, "x"])[0] == ids


@given(data=st.binary(max_size=40))
@settings(deadline=None)
def test_any_bytes_round_trip(tokenizer: Tokenizer, data: bytes) -> None:
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_every_byte_has_a_token_and_bytes_agree_with_text(tokenizer: Tokenizer) -> None:
    for value in range(256):
        assert len(tokenizer.encode_bytes(bytes([value]))) == 1
    assert tokenizer.encode_bytes("红球 ball".encode()) == tokenizer.encode("红球 ball")


@given(text=text_or_tags, skip=st.booleans())
@settings(deadline=None)
def test_stream_decoder_equals_decode(tokenizer: Tokenizer, text: str, skip: bool) -> None:
    ids = tokenizer.encode(text, allow_special=True)
    stream = tokenizer.stream_decoder(skip_special=skip)
    pieces = [stream.push(i) for i in ids]
    assert "�" in text or all("�" not in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special=skip)


def test_stream_decoder_holds_half_a_character(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream_decoder()
    ids = tokenizer.encode("龘")  # not in the training text: three byte tokens
    assert len(ids) == 3
    assert [stream.push(i) for i in ids] == ["", "", "龘"]
    assert stream.push(ids[0]) + stream.flush() == "�"


def test_skip_special_drops_hidden_tokens_but_keeps_tags(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|><think>a</think><|im_end|>", allow_special=True)
    assert ids[0] == 1
    assert ids[-1] == 2
    assert tokenizer.decode(ids, skip_special=True) == "<think>a</think>"


def test_ids_and_token_bytes(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert [tokenizer.special_ids[name] for name in CONTROL_TOKENS] == list(range(16))
    assert tokenizer.special_ids["<think>"] == 3
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size == 400
    assert tokenizer.token_bytes[:16] == [0] * 16
    for text in ENGLISH + CHINESE:
        assert sum(tokenizer.token_bytes[i] for i in tokenizer.encode(text)) == len(text.encode())


def test_decode_agrees_with_the_library(tokenizer: Tokenizer) -> None:
    for text in [*ENGLISH, *CHINESE, "\x00 naïve 🎈\r\n"]:
        ids = tokenizer.encode(text)
        assert tokenizer._full.decode(ids, skip_special_tokens=False) == text


def test_save_and_load_keep_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a", model_max_length=512)
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.sha256 == hashlib.sha256((tmp_path / "b" / "tokenizer.json").read_bytes()).hexdigest()
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.template_sha256 == tokenizer.template_sha256
    assert loaded.encode("Who has 红球?") == tokenizer.encode("Who has 红球?")
    assert Tokenizer.load(tmp_path / "a" / "tokenizer.json").sha256 == tokenizer.sha256
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["model_max_length"] == 512


def test_hash_follows_the_content(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|reserved_4|>", "<|reserved_9|>"))
    assert Tokenizer.load(tmp_path).sha256 != tokenizer.sha256


def test_template_of_the_jinja_file_wins_over_the_config(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("mine")
    assert Tokenizer.load(tmp_path).chat_template == "mine"
    (tmp_path / "chat_template.jinja").unlink()
    assert Tokenizer.load(tmp_path).chat_template == tokenizer.chat_template


def test_bad_input_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"surrogate pair \(U\+D83D\) at character 3"):
        tokenizer.encode("abc\ud83d")
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode_batch(["fine", "abc\ud83d"])
    with pytest.raises(DataError, match="expected text, got int"):
        tokenizer.encode(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="token id 99999 is outside the vocabulary of 400"):
        tokenizer.decode([5, 99999])
    assert tokenizer.decode([-1, *tokenizer.encode("a"), -1]) == "a"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "not found.*train-tokenizer"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer.json", "not json", "not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "cannot be read"),
        ("tokenizer_config.json", "[]", "expected an object"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("tokenizer_config.json", '{"eos_token": "<eos>"}', "eos_token is '<eos>', which the vocabulary does not have"),
    ],
)
def test_bad_files_are_refused(
    tokenizer: Tokenizer, tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    tokenizer.save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_that_spells_its_control_tokens_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = True  # a whole word that is in the vocabulary becomes that id
    content["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="would become a control token"):
        Tokenizer.load(tmp_path)


def test_other_kinds_of_tokenizers_are_refused(tokenizer: Tokenizer) -> None:
    content = json.loads(tokenizer._json)
    content["decoder"] = None
    with pytest.raises(CheckpointError, match="only byte-level BPE"):
        Tokenizer(json.dumps(content))


@pytest.mark.parametrize("version", ["2025-11", "2026-08"])
def test_upstream_tokenizers_load(public_data: Path, version: str, tmp_path: Path) -> None:
    folder = public_data / "upstream_minimind" / version
    upstream = Tokenizer.load(folder)
    assert upstream.vocab_size == 6400
    assert (upstream.pad_id, upstream.bos_id, upstream.eos_id) == (0, 1, 2)
    for text in [*ENGLISH, *CHINESE, "<|im_end|> 🎈 <think>"]:
        ids = upstream.encode(text)
        assert upstream.decode(ids) == text
        assert not set(ids) & set(upstream.special_ids.values())
    assert ("<think>" in upstream.special_ids) == (version == "2026-08")
    upstream.save(tmp_path)
    assert Tokenizer.load(tmp_path).sha256 == upstream.sha256
    assert set(TAGS) > {name for name in TAGS if name in upstream.special_ids}
