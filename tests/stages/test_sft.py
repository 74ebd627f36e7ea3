"""`minimind sft`: it can learn conversations by heart, learns the answers only, and counts what teaches nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stages.tiny_stage import DENSE, MOE, Files, curve, train, write_rows

from minimind import checkpoint
from minimind.data.config import DataConfig
from minimind.data.dataset import train_and_validation
from minimind.inference.engine import Engine
from minimind.inference.sampling import SamplingParams
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.chat import render


def row(question: str, answer: str, **more: str) -> dict[str, Any]:
    asked = {"role": "user", "content": question}
    return {"messages": [asked, {"role": "assistant", "content": answer, **more}]}


ROWS = [
    row("Who are you?", "A very small model."),
    row("2 + 3 = ?", "5", reasoning_content="Two and three."),
    row("你好", "你好，很高兴见到你。"),
    {
        "messages": [
            *row("Knock knock.", "Who is there?")["messages"],
            *row("Boo.", "Boo who?")["messages"],
        ]
    },
]


@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_four_conversations_are_learned_by_heart(shape: tuple[str, ...], files: Files) -> None:
    data = write_rows(files.folder / "four.jsonl", ROWS)
    train(files.argv("pretrain", "base", "--steps", "2", shape=shape))
    flags = ("--init-from", str(files.folder / "base"), "--steps", "120", "--save-every", "0", "--optim.lr", "1e-2")
    result = train(files.argv("sft", "run", *flags, "--data.row-length", "128", "--batch-tokens", "512", data=data))
    losses = [row[1] for row in curve(files.folder / "run")]
    assert losses[0] > 4
    assert losses[-1] < 0.02
    model, tokenizer = checkpoint.load(result.checkpoint)
    for conversation in ROWS:
        messages = conversation["messages"]
        prompt = render(tokenizer, messages[:-1], add_generation_prompt=True).ids
        whole = render(tokenizer, messages).ids
        end = SamplingParams(temperature=0, max_tokens=64, stop_ids=(tokenizer.eos_id,))
        (answer,) = Engine(model).generate([prompt], end)
        assert tokenizer.decode([*prompt, *answer.ids]).rstrip("\n") == tokenizer.decode(whole).rstrip("\n")


def test_only_the_answers_are_learned(files: Files) -> None:
    tokenizer = Tokenizer.load(files.tokenizer)
    data = write_rows(files.folder / "rows.jsonl", ROWS)
    config = DataConfig(files=(data,), row_length=128, validation_fraction=0, cache_dir=files.cache)
    documents, _ = train_and_validation(config, tokenizer, kind="conversation")
    learned = ["A very small model.", "5", "你好，很高兴见到你。", "Boo who?"]
    for document, last in zip(documents, learned, strict=True):
        text = tokenizer.decode([i for i, w in zip(document.ids, document.loss_weights, strict=True) if w])
        assert last in text
        assert not any(words in text for words in ("Who are you", "Knock", "2 + 3", "Boo."))
    padded = ("--data.packing", "padded")  # a row each, so that one step sees each of them once
    result = train(
        files.argv(
            "sft", "run", "--data.row-length", "128", "--batch-tokens", "512", "--steps", "1", *padded, data=data
        )
    )
    step = json.loads((files.folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert step["step_weight"] == documents.num_learned_tokens
    assert result.tokens == documents.num_tokens - len(documents)


def test_rows_that_teach_nothing_are_counted(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    endless = row("Tell me. " * 200, "No.")  # the answer lies beyond the row
    data = write_rows(files.folder / "rows.jsonl", [*ROWS, endless, {**ROWS[0], "label": False}])
    result = train(files.argv("sft", "run", "--data.row-length", "128", "--batch-tokens", "512", data=data))
    said = capsys.readouterr().err
    assert "rows 6" in said
    assert "disliked 1" in said
    assert "too_long 1" in said or "nothing_to_learn 1" in said
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.read(result.checkpoint).model_state.values())


def test_it_starts_from_any_directory_that_holds_a_model(files: Files) -> None:
    transformers = pytest.importorskip("transformers")
    folder = files.folder / "theirs"
    source = files.base / "latest"
    transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    starts: dict[str, Path] = {"run": files.base, "checkpoint": source, "theirs": folder}
    hashes = {
        train(files.argv("sft", name, "--init-from", str(path), "--steps", "3")).state_hash
        for name, path in starts.items()
    }
    assert len(hashes) == 1
