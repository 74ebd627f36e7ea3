"""Rows that others published read as they are: every file, without a problem, to the expected numbers."""

from collections import Counter
from pathlib import Path

import pytest

from minimind.data.check import Findings, check_file
from minimind.data.config import DataConfig
from minimind.data.dataset import train_and_validation
from minimind.data.packing import pack
from minimind.tokenizer.bpe import Tokenizer

FILES: dict[str, tuple[str, int]] = {
    "sft_llamafactory/identity.json": ("conversation", 46),
    "sft_llamafactory/glaive_toolcall_en_demo.json": ("conversation", 140),
    "sft_llamafactory/glaive_toolcall_zh_demo.json": ("conversation", 142),
    "sft_llamafactory/reason_tool_use_demo.jsonl": ("conversation", 24),
    "sft_kdconv_zh/film_dev.json": ("conversation", 150),
    "sft_kdconv_zh/music_dev.json": ("conversation", 150),
    "sft_kdconv_zh/travel_dev.json": ("conversation", 150),
    "sft_dolly_hhrlhf/train_small.jsonl": ("conversation", 500),
    "sft_gpteacher_roleplay/roleplay.json": ("conversation", 962),
    "pref_llamafactory/dpo_en_demo.json": ("preference", 162),
    "pref_llamafactory/dpo_zh_demo.json": ("preference", 158),
    "pref_llamafactory/kto_en_demo.json": ("preference", 152),
    "gsm8k/train.jsonl": ("prompt", 7473),
    "en_web_demo/c4_demo.jsonl": ("pretrain", 300),
    "tinystories/tinystories_train_head_2MiB.txt": ("pretrain", 2317),
    "zh_classics/shuihuzhuan.txt": ("pretrain", 126),
}


@pytest.mark.parametrize("name", FILES)
def test_public_files_have_no_problems(name: str, public_data: Path) -> None:
    kind, rows = FILES[name]
    findings = Findings()
    assert list(check_file(public_data / name, "auto", findings)) == []
    assert findings.kinds == Counter({kind: rows})


def test_tool_calls_and_thoughts_are_found(public_data: Path) -> None:
    findings = Findings()
    assert list(check_file(public_data / "sft_llamafactory/reason_tool_use_demo.jsonl", "auto", findings)) == []
    assert (findings.features["with reasoning"], findings.features["with tool calls"]) == (24, 16)
    assert findings.roles["tool"] == 18


def test_public_conversations_and_pairs_pack(public_data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = [name for name in FILES if name.startswith(("sft_llama", "sft_dolly"))]
    config = DataConfig(files=tuple(public_data / name for name in files), row_length=1024, cache_dir=tmp_path)
    training, validation = train_and_validation(config, tokenizer, kind="conversation")
    assert validation is not None
    report = training.report
    left_out = ("other_part", "empty", "nothing_to_learn", "too_long", "disliked", "skipped")
    assert (
        report["rows"]
        == sum(FILES[name][1] for name in files)
        == training.num_documents + sum(report[k] for k in left_out)
    )
    assert validation.num_documents + validation.report["too_long"] <= report["other_part"]
    assert pack(training, 1024).fill_rate > 0.9  # a tokenizer this small makes most documents nearly fill a row
    pairs = DataConfig(files=(public_data / "pref_llamafactory/dpo_zh_demo.json",), row_length=2048, cache_dir=tmp_path)
    chosen_and_rejected = train_and_validation(pairs, tokenizer, kind="preference")[0]
    assert chosen_and_rejected.num_documents % 2 == 0
    assert chosen_and_rejected.num_documents > 60
