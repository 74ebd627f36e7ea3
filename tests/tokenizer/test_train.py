"""Training is deterministic, streams, respects its limits, and says how well it compresses."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minimind.errors import ConfigError, DataError
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.train import CONTROL_TOKENS, MIN_VOCAB_SIZE, compression, measure, train

ENGLISH = [
    "The red ball is in the garden. Who has the ball now?",
    "Don't stop, it's 12 o'clock.\n\nTen past nine: 9:10.",
]
CHINESE = ["红色的球在花园里。现在谁有球？", "今天天气怎么样？今天是晴天，气温二十三度。\n明天见。"]

_SCRIPT = """
from minimind.tokenizer.train import train
print(train((f"word{i % 97} 球{i % 31}的花园 {i}" for i in range(3000)), 600).sha256)
"""


def test_same_texts_give_the_same_tokenizer_in_every_process() -> None:
    hashes = {
        subprocess.run(
            [sys.executable, "-c", _SCRIPT],
            env={"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "2"))
    }
    assert len(hashes) == 1


def test_small_and_impossible_sizes() -> None:
    small = train(ENGLISH * 5, 300)
    assert small.vocab_size == 300
    smallest = train(ENGLISH, MIN_VOCAB_SIZE)
    assert smallest.vocab_size == MIN_VOCAB_SIZE == len(CONTROL_TOKENS) + 256
    assert smallest.decode(smallest.encode("球 ball")) == "球 ball"
    with pytest.raises(ConfigError, match=f"vocab_size 271 is too small: .* Ask for {MIN_VOCAB_SIZE}"):
        train(ENGLISH, 271)
    with pytest.raises(DataError, match="nothing to learn"):
        train(iter(["", "<|im_end|>"]), 300)


def test_digits() -> None:
    numbers = ["12345 + 12345 = 24690"] * 50
    single = train(numbers, 400)
    assert [single.decode([i]) for i in single.encode("12345")] == list("12345")
    assert len({single.encode(text)[-1] for text in ("7", " 7", "17", "x7")}) == 1
    joined = train(numbers, 400, single_digits=False)
    assert len(joined.encode("12345")) == 2


def test_a_line_break_is_always_its_own_token() -> None:
    tokenizer = train(["a\n\nb\n\n\nc"] * 50, 400)
    one = tokenizer.encode("\n")
    assert tokenizer.encode("\n\n\n") == one * 3
    assert tokenizer.encode("a\n\nb") == [*tokenizer.encode("a"), *one, *one, *tokenizer.encode("b")]


def test_max_token_bytes() -> None:
    texts = ["永远不变的花园"] * 50
    longest = max(train(texts, 400).token_bytes)
    assert longest == len(texts[0].encode())
    assert max(train(texts, 400, max_token_bytes=6).token_bytes) <= 6


def test_control_tokens_in_the_text_teach_no_merges() -> None:
    with_tags = train([f"<|im_start|>{text}<|im_end|>" for text in ENGLISH * 20], 400)
    without = train(ENGLISH * 20, 400)
    assert with_tags.sha256 == without.sha256


def test_texts_are_streamed() -> None:
    taken = 0

    def texts() -> Iterator[str]:
        nonlocal taken
        for index in range(2000):
            taken += 1
            yield f"story number {index} about a ball"

    train(texts(), 300)
    assert taken == 2000


def test_compression(tokenizer: Tokenizer) -> None:
    texts = {"en": ENGLISH, "zh": CHINESE}
    measured = measure(tokenizer, texts)
    for language, rows in texts.items():
        counts = measured[language]
        assert counts.bytes == sum(len(text.encode()) for text in rows)
        assert counts.characters == sum(map(len, rows))
        assert counts.tokens == sum(len(tokenizer.encode(text)) for text in rows)
        assert counts.bytes_per_token == counts.bytes / counts.tokens
        assert counts.characters_per_token == pytest.approx(counts.bytes_per_token / counts.bytes_per_character)
    assert measured["zh"].bytes_per_character > 2.5 > measured["en"].bytes_per_character
    assert compression(tokenizer, texts) == {k: v.bytes_per_token for k, v in measured.items()}
    bytes_only = train(ENGLISH, MIN_VOCAB_SIZE)
    assert compression(bytes_only, {"en": iter(ENGLISH)}) == {"en": 1.0}
    assert compression(tokenizer, {"none": []}) == {"none": 0.0}


def test_compresses_real_text_better_than_upstream(public_data: Path) -> None:
    story = (public_data / "tinystories" / "tinystories_train_head_2MiB.txt").read_text("utf-8")[:150_000]
    novel = (public_data / "zh_classics" / "hongloumeng.txt").read_text("utf-8")[:60_000]
    cut_en, cut_zh = 130_000, 50_000
    ours = train([story[:cut_en], novel[:cut_zh]], 6400)
    upstream = Tokenizer.load(public_data / "upstream_minimind" / "2025-11")
    held_out = {"en": [story[cut_en:]], "zh": [novel[cut_zh:]]}
    mine, reference = compression(ours, held_out), compression(upstream, held_out)
    assert mine["en"] > reference["en"]
    assert mine["zh"] > 0.95 * reference["zh"]
