"""`minimind pretrain`: it learns rows by heart, keeps a record, goes on where it was, and Transformers reads it."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from stages.tiny_stage import DENSE, MOE, Files, curve, train, write_rows

from minimind import checkpoint
from minimind.inference.engine import Engine
from minimind.inference.sampling import SamplingParams
from minimind.training.metrics import read_metrics

TEXTS = (
    "The red ball is under the old bridge.",
    "Ann sold three green pears to her uncle.",
    "河边的小屋里住着一只白猫。",
    "Yesterday 17 + 25 was 42, and it still is.",
)


@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_four_rows_are_learned_by_heart(shape: tuple[str, ...], files: Files) -> None:
    rows = write_rows(files.folder / "four.jsonl", [{"text": text} for text in TEXTS])
    # The loss that is left is the choice among four beginnings: log 4 for each row's first token.
    flags = ("--steps", "120", "--save-every", "0", "--optim.lr", "1e-2", "--optim.weight-decay", "0")
    result = train(files.argv("pretrain", "run", *flags, "--data.packing", "padded", shape=shape, data=rows))
    losses = [row[1] for row in curve(files.folder / "run")]
    assert losses[0] > 5
    assert losses[-1] < 0.06
    model, tokenizer = checkpoint.load(result.checkpoint)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text[:3])] for text in TEXTS]
    answers = Engine(model).generate(prompts, SamplingParams(temperature=0, stop_ids=(tokenizer.eos_id,)))
    assert [
        text[:3] + tokenizer.decode(answer.ids, skip_special=True) for text, answer in zip(TEXTS, answers, strict=True)
    ] == [*TEXTS]
    assert {answer.finish_reason for answer in answers} == {"stop"}


def test_the_record_of_a_run(files: Files) -> None:
    validation = str(files.world / "pretrain-validation.jsonl")
    result = train(
        files.argv("pretrain", "run", "--data.validation", validation, "--eval-every", "5", "--sample-every", "5")
    )
    run = files.folder / "run"
    validations = [row for row in read_metrics(run / "metrics.jsonl") if "val_loss" in row]
    assert [row["step"] for row in validations] == [0, 5, 10]
    assert validations[-1]["val_bits_per_byte"] < validations[0]["val_bits_per_byte"]
    assert result.metrics["val_loss"] == validations[-1]["val_loss"]
    assert result.metrics["train_loss"] == curve(run)[-1][1]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0] * 4 + [5] * 4 + [10] * 4
    assert all(row["prompt"] and isinstance(row["output"], str) for row in samples)
    config = tomllib.loads((run / "config.toml").read_text())
    assert (config["steps"], config["optim"]["lr"], config["model"]["hidden_size"]) == (10, 3e-3, 32)
    facts = json.loads((run / "environment.json").read_text())
    assert (files.cache / f"tokens-{facts['data']['train'][:32]}").is_dir()
    assert facts["data"]["tokenizer"] == checkpoint.read(result.checkpoint).tokenizer_sha256
    assert "state " + result.state_hash in (run / "log.txt").read_text()


def test_the_written_configuration_makes_the_same_run(files: Files) -> None:
    first = train(files.argv("pretrain", "first"))
    again = train(
        ["pretrain", "--config", str(files.folder / "first" / "config.toml"), "--out", str(files.folder / "second")]
    )
    assert again.state_hash == first.state_hash


def test_a_finished_run_is_left_as_it_is_and_fresh_moves_it_aside(files: Files) -> None:
    first = train(files.argv("pretrain", "run"))
    rows = read_metrics(files.folder / "run" / "metrics.jsonl")
    assert train(files.argv("pretrain", "run")).state_hash == first.state_hash
    assert read_metrics(files.folder / "run" / "metrics.jsonl") == rows
    assert train(files.argv("pretrain", "run", "--fresh", "--seed", "1")).state_hash != first.state_hash
    kept = checkpoint.read(files.folder / "run" / "previous-1" / "checkpoints" / "step-000010")
    assert kept.step == 10
    assert train(files.argv("pretrain", "run", "--no-resume")).state_hash == first.state_hash
    assert (files.folder / "run" / "previous-2").is_dir()


def test_training_further_keeps_weights_and_tokenizer(files: Files) -> None:
    # With a rate of 0 the last weights are the first: those of the run it started from.
    argv = files.argv("pretrain", "more", "--init-from", str(files.base), "--optim.lr", "0")
    at = argv.index("--tokenizer")
    base, more = checkpoint.read(files.base / "latest"), checkpoint.read(train(argv[:at] + argv[at + 2 :]).checkpoint)
    assert more.tokenizer_sha256 == base.tokenizer_sha256
    assert all(torch.equal(more.model_state[name], tensor) for name, tensor in base.model_state.items())


def test_epochs_count_the_steps(files: Files) -> None:
    result = train(files.argv("pretrain", "run", "--steps", "0", "--epochs", "1.5", "--batch-tokens", "2048"))
    num_rows = checkpoint.read(result.checkpoint).state["batches"]["num_rows"]
    assert result.steps == -(-3 * -(-num_rows // 32) // 2)


def test_the_context_is_inherited(files: Files) -> None:
    argv = files.argv("sft", "run", "--steps", "1", "--data.row-length", "0")
    state = checkpoint.read(train(argv).checkpoint).state
    assert state["batches"]["row_length"] == 64


@pytest.mark.parametrize("shape", [DENSE, MOE, (*DENSE, "--model.qk-norm")], ids=["dense", "moe", "qk-norm"])
def test_transformers_reads_what_the_stages_write(shape: tuple[str, ...], files: Files) -> None:
    transformers = pytest.importorskip("transformers")
    base = train(files.argv("pretrain", "base", "--optim.lr", "2e-2", shape=shape))
    tuned = train(files.argv("sft", "tuned", "--init-from", str(files.folder / "base"), "--steps", "3"))
    for result in (base, tuned):
        model, tokenizer = checkpoint.load(result.checkpoint)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(result.checkpoint, dtype=torch.float32).eval()
        auto = transformers.AutoTokenizer.from_pretrained(result.checkpoint)
        texts = [row["text"] for row in map(json.loads, _lines(files.world / "pretrain-test.jsonl"))]
        assert [auto.encode(text) for text in texts] == tokenizer.encode_batch(texts)
        for text in texts[:3]:
            ids = torch.tensor([tokenizer.encode(text)[:64]])
            with torch.no_grad():
                torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
