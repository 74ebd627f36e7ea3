"""What a user can get wrong, command by command: exit code, place, value and next move; and nothing is lost."""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stages.tiny_stage import STAGES, Files, Stage, exit_code, snapshot, train, write_rows

from minimind import checkpoint
from minimind.runtime import faults
from minimind.training.run import RunDirectory

Refused = Callable[..., str]
USAGE, DATA, CHECKPOINT, RESOURCES = 2, 3, 4, 6


# --- impossible configurations ----------------------------------------------------------------------------------------

IMPOSSIBLE = {
    "heads": (("--model.num-attention-heads", "3"), r"model\.hidden_size 32 .* num_attention_heads 3; change one"),
    "kv heads": (("--model.num-key-value-heads", "3"), r"num_attention_heads 2 .* num_key_value_heads 3; choose"),
    "rate": (("--optim.lr", "-1"), r"optim\.lr = -1\.0: must not be negative"),
    "rate nan": (("--optim.lr", "nan"), r"optim\.lr = nan"),
    "decay": (("--optim.weight-decay", "-0.1"), r"optim\.weight_decay = -0\.1"),
    "positions": (("--data.row-length", "512", "--batch-tokens", "512"), r"512 .*max_position_embeddings = 256; give"),
    "batch": (("--batch-tokens", "63"), r"batch_tokens = 63 holds no row of 64 tokens; give --batch-tokens 64"),
    "row": (("--data.row-length", "1"), r"data\.row_length is 1, expected at least 2"),
    "fraction": (("--data.validation-fraction", "1"), r"validation_fraction is 1\.0, expected 0 <= fraction < 1"),
    "keep": (("--keep", "1"), r"keep = 1: at least 2"),
    "seed": (("--seed", "-1"), r"seed = -1: must not be negative"),
    "log": (("--log-every", "0"), r"log_every = 0: at least 1"),
    "nothing": (("--steps", "0", "--epochs", "0"), r"nothing to train; give --steps or --epochs"),
    "device": (("--device", "gpu7"), r"device 'gpu7' is not known: use auto, cpu"),
    "flag": (("--batch-token", "64"), r"Unrecognized options: --batch-token.*Perhaps you meant.*--batch-tokens"),
    "nested flag": (("--data.onerror", "skip"), r"--data\.onerror.*Perhaps you meant.*--data\.on-error"),
    "number": (("--steps", "ten"), r"--steps: .*'ten'"),
    "choice": (("--optim.name", "sgd"), r"'sgd' .*'--optim\.name'.* \('adamw', 'muon'\)"),
    "preset": (("--model.preset", "smal"), r"model preset 'smal' does not exist; did you mean 'small'"),
    "no such file": (("--data", "rows.jsonl"), r"rows\.jsonl: no such file"),
    "no such validation": (("--data.validation", "rows.jsonl"), r"rows\.jsonl: no such file"),
    "kind of file": (("--data", "rows.pdf"), r"rows\.pdf: .*expected a name ending in \.jsonl"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_configuration(case: str, files: Files, refused: Refused) -> None:
    flags, message = IMPOSSIBLE[case]
    (files.folder / "rows.pdf").write_text("%PDF")
    flags = [str(files.folder / word) if word.startswith("rows.") else word for word in flags]
    assert re.search(message, refused(USAGE, *files.argv("pretrain", "run", *flags)))
    assert not (files.folder / "run").exists()


def test_all_problems_are_told_at_once(files: Files, refused: Refused) -> None:
    flags = ("--optim.lr", "-1", "--keep", "1", "--model.num-key-value-heads", "3", "--seed", "-1", "--log-every", "0")
    said = refused(USAGE, *files.argv("pretrain", "run", *flags))
    assert "5 problems in the configuration" in said
    assert all(name in said for name in ("optim.lr", "keep", "num_key_value_heads 3", "seed", "log_every"))


def test_unknown_keys_in_a_file_are_told_at_once(files: Files, refused: Refused) -> None:
    path = files.folder / "run.toml"
    path.write_text('stepz = 3\n[optim]\nlrr = 1\nwarmup_steps = "x"\n[data]\nrow_lenght = 64\n')
    said = refused(USAGE, *files.argv("pretrain", "run", "--config", str(path)))
    assert "4 problems" in said
    assert f"{path}: unknown key stepz; did you mean steps?" in said
    assert "unknown key optim.lrr; did you mean optim.lr?" in said
    assert "unknown key data.row_lenght; did you mean data.row_length?" in said
    assert "optim.warmup_steps: expected an integer, got 'x' (string)" in said
    path.write_text("steps = = 3")
    assert "not valid TOML" in refused(USAGE, *files.argv("pretrain", "run", "--config", str(path)))
    assert f"did you mean {path}?" in refused(
        USAGE, *files.argv("pretrain", "run", "--config", f"{path.parent}/rum.toml")
    )


def test_where_to_start_from(files: Files, refused: Refused) -> None:
    both = refused(USAGE, *files.argv("pretrain", "run", "--init-from", str(files.base)))
    assert "give --tokenizer DIR for a new model, or --init-from RUN" in both
    said = refused(USAGE, "pretrain")
    assert "data: no training file; give --data FILE" in said
    assert "tokenizer = None and init_from = None" in said
    assert "give --init-from RUN" in refused(USAGE, "sft", "--data", str(files.world / "sft.jsonl"))
    assert "no file to learn from" in refused(USAGE, "train-tokenizer")
    assert "--reference" not in refused(CHECKPOINT, *files.argv("pretrain", "run", "--tokenizer", str(files.world)))
    missing = refused(CHECKPOINT, *files.argv("sft", "run", "--init-from", f"{files.base}-2"))
    assert f"{files.base}-2: does not exist. Runs near it: {files.base}" in missing
    assert "is neither a run" in refused(CHECKPOINT, *files.argv("sft", "run", "--init-from", str(files.world)))
    assert not (files.folder / "run").exists()


def test_train_tokenizer(files: Files, refused: Refused) -> None:
    rows, out = str(files.world / "pretrain.jsonl"), str(files.folder / "out")
    data = ("train-tokenizer", "--data", rows, "--out")
    assert "Ask for 272 or more" in refused(USAGE, *data, out, "--vocab-size", "20")
    assert "min_frequency = -3: at least 1" in refused(USAGE, *data, out, "--min-frequency", "-3")
    assert "is a file; give the folder" in refused(USAGE, *data, rows)
    assert "no such file; name a Jinja template" in refused(USAGE, *data, out, "--chat-template", "none.jinja")
    assert "not found" in refused(CHECKPOINT, *data, out, "--reference", f"{files.tokenizer}-2")
    empty = write_rows(files.folder / "empty.jsonl", [])
    assert "the texts are empty" in refused(DATA, "train-tokenizer", "--data", str(empty), "--out", out)
    bad = write_rows(files.folder / "bad.jsonl", [{"text": "x"}, {"text": 3}])
    assert f"{bad}:2: text: is the number 3" in refused(DATA, "train-tokenizer", "--data", str(bad), "--out", out)
    assert not Path(out).exists()


def test_a_run_where_no_run_can_be(files: Files, refused: Refused) -> None:
    (files.folder / "file").write_text("mine")
    for out in ("file", "file/below"):
        said = refused(USAGE, *files.argv("pretrain", out))
        assert f"{files.folder / out}: cannot be a run directory" in said
        assert "give another --out" in said
    assert (files.folder / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT], ids=["full", "read-only", "quota"])
def test_a_disk_that_takes_nothing(
    number: int, files: Files, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = 0

    def fail(name: str) -> None:
        nonlocal saves
        saves += name == "model-written"
        if saves == 2 and name == "model-written":
            raise OSError(number, "no")

    monkeypatch.setattr(faults, "hook", fail)
    said = refused(RESOURCES, *files.argv("pretrain", "run"))
    assert re.search(
        r"step-000010: could not be written, it needs [\d,]+ bytes.*Earlier checkpoints are untouched", said
    )
    monkeypatch.undo()
    assert checkpoint.read(files.folder / "run" / "latest").step == 5
    assert train(files.argv("pretrain", "run")).state_hash == train(files.argv("pretrain", "whole")).state_hash


# --- bad data ---------------------------------------------------------------------------------------------------------

GOOD = {"text": "a fine row"}
BAD_TEXTS = {
    '{"text": 3}': "text: is the number 3, expected a string",
    '{"text": null}': "text: is null",
    '{"txt": "x"}': "text: is missing (the row has txt)",
    "{oops": "not valid JSON",
    "[1]": "the line holds a list",
    '{"text": "a", "text": "b"}': 'the key "text" is given twice',
    '{"text": "\\ud800"}': "",
}


def test_bad_rows_stop_a_run_and_can_be_left_out(
    files: Files, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    for line, what in BAD_TEXTS.items():
        data = write_rows(files.folder / "bad.jsonl", [GOOD, GOOD, line])
        said = refused(DATA, *files.argv("pretrain", "run", data=data))
        assert f"{data}:3: {what}" in said, line
        assert "--data.on-error skip" in said
    assert not (files.folder / "run").exists()
    data = write_rows(files.folder / "bad.jsonl", [*[GOOD] * 8, *BAD_TEXTS])
    train(files.argv("pretrain", "run", "--data.on-error", "skip", data=data))
    said = capsys.readouterr().err
    assert f"left out {len(BAD_TEXTS)} bad rows" in said
    assert f"{data}:9: text: is the number 3" in said
    report = [json.loads(path.read_text())["report"] for path in files.cache.glob("tokens-*/meta.json")]
    assert sum(row["skipped"] == len(BAD_TEXTS) and row["documents"] == 8 for row in report) == 1


BAD_CONVERSATIONS = {
    '{"messages": [{"role": "user", "content": "hi"}]}': "no assistant turn",
    '{"messages": []}': "messages",
    '{"messages": [{"role": "robot", "content": "hi"}]}': "messages[0].role",
    '{"text": "plain"}': "has no conversation",
    '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": 5}]}': "messages[1].content",
}


def test_bad_conversations_stop_a_run(files: Files, refused: Refused) -> None:
    good = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    data = files.folder / "bad.jsonl"
    for line, what in BAD_CONVERSATIONS.items():
        write_rows(data, [good, line])
        said = refused(DATA, *files.argv("sft", "run", data=data))
        assert f"{data}:2: " in said, line
        assert what in said, line
    train(files.argv("sft", "run", "--data.on-error", "skip", data=write_rows(data, [good, *BAD_CONVERSATIONS])))


@pytest.mark.parametrize(
    ("stage", "rows"),
    [("pretrain", []), ("pretrain", [{"text": ""}, {"text": " \n"}]), ("sft", []), ("sft", ["", ""])],
    ids=["no text", "blank texts", "no conversation", "blank lines"],
)
def test_files_with_nothing_to_learn(stage: Stage, rows: list[object], files: Files, refused: Refused) -> None:
    data = write_rows(files.folder / "nothing.jsonl", rows)
    said = refused(DATA, *files.argv(stage, "run", data=data))
    assert f"{data}: nothing to train on" in said
    assert not (files.folder / "run").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_data_that_changed_since_the_checkpoint(stage: Stage, files: Files, refused: Refused) -> None:
    data = files.folder / "rows.jsonl"
    shutil.copy(files.world / f"{stage}.jsonl", data)
    first = train(files.argv(stage, "run", data=data))
    known = checkpoint.read(first.checkpoint).state["batches"]["fingerprint"]
    before, content = snapshot(files.folder / "run"), data.read_text()
    data.write_text(content + content.splitlines()[0] + "\n")
    said = refused(DATA, *files.argv(stage, "run", "--steps", "12", data=data))
    fingerprints = re.findall(r"\b[0-9a-f]{64}\b", said)
    assert fingerprints[0] == known != fingerprints[1]
    assert "--fresh" in said
    assert snapshot(files.folder / "run") == before
    data.write_text(content)
    assert train(files.argv(stage, "run", "--steps", "12", data=data)).steps == 12


def test_another_order_of_samples_is_refused(files: Files, refused: Refused) -> None:
    train(files.argv("pretrain", "run"))
    before = snapshot(files.folder / "run")
    for flags, what in (
        (("--batch-tokens", "512"), "batch_rows was 4 and is 8"),
        (("--seed", "1"), "seed was 0 and is 1"),
        (("--data.row-length", "128"), "step-000010: data.row_length was 64 and is 128. Give the same, or add --fresh"),
    ):
        argv = files.argv("pretrain", "run", "--steps", "12", *flags)
        code = CHECKPOINT if "--data.row-length" in flags else USAGE
        said = refused(code, *argv)
        assert what in said
        assert "--fresh" in said
    assert snapshot(files.folder / "run") == before


# --- bad checkpoints --------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def base(files: Files) -> Path:
    """A copy of the base's newest checkpoint, to spoil."""
    source = files.base / "latest"
    return shutil.copytree(source.resolve(), files.folder / "checkpoints" / source.resolve().name)


def other_tokenizer(files: Files) -> Path:
    out = files.folder / "other"
    rows = str(files.world / "sft.jsonl")
    assert exit_code(["train-tokenizer", "--data", rows, "--out", str(out), "--vocab-size", "300"]) == 0
    return out


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "MANIFEST.json", "state.json"])
def test_an_edited_checkpoint_is_refused(name: str, base: Path, files: Files, refused: Refused) -> None:
    flip(base / name)
    begin = time.monotonic()
    said = refused(CHECKPOINT, *files.argv("sft", "run", "--init-from", str(base)))
    assert time.monotonic() - begin < 2
    assert str(base / name) in said
    assert not (files.folder / "run").exists()


def test_another_tokenizer_in_a_checkpoint_is_refused(base: Path, files: Files, refused: Refused) -> None:
    for path in other_tokenizer(files).iterdir():
        shutil.copy(path, base)
    begin = time.monotonic()
    said = refused(CHECKPOINT, *files.argv("sft", "run", "--init-from", str(base)))
    assert time.monotonic() - begin < 2
    assert "tokenizer.json: " in said


def test_another_tokenizer_or_model_for_a_run_is_refused(files: Files, refused: Refused) -> None:
    train(files.argv("pretrain", "run"))
    before = snapshot(files.folder / "run")
    for flags, what in (
        (("--tokenizer", str(other_tokenizer(files))), "tokenizer "),
        (("--model.hidden-size", "48"), "hidden_size 32, here 48"),
        (("--model.qk-norm",), "model_type llama, here qwen3"),
    ):
        begin = time.monotonic()
        cache = files.folder / "untouched"
        flags = (*flags, "--data.cache-dir", str(cache))
        said = refused(CHECKPOINT, *files.argv("pretrain", "run", "--steps", "12", *flags))
        assert time.monotonic() - begin < 2
        assert what in said
        assert "--fresh" in said
        assert not cache.exists()  # refused before any text is tokenised
    assert snapshot(files.folder / "run") == before
    train(files.argv("pretrain", "run", "--fresh", "--model.hidden-size", "48"))
    aside = checkpoint.read(files.folder / "run" / "previous-1" / "checkpoints" / "step-000010")
    assert (aside.model_config.hidden_size, checkpoint.read(files.folder / "run" / "latest").step) == (32, 10)


def test_a_run_that_another_process_trains_is_refused_before_the_data_are_read(files: Files, refused: Refused) -> None:
    cache = files.folder / "untouched"
    for flags in ((), ("--fresh",)):
        with RunDirectory(files.folder / "run"):
            said = refused(USAGE, *files.argv("pretrain", "run", "--data.cache-dir", str(cache), *flags))
        assert f"process {os.getpid()} is training here; wait for it, stop it, or give another --out" in said
    assert not cache.exists()


def test_bad_data_put_no_run_aside(files: Files, refused: Refused) -> None:
    train(files.argv("pretrain", "run"))
    before = snapshot(files.folder / "run")
    data = write_rows(files.folder / "bad.jsonl", [{"text": 3}])
    refused(DATA, *files.argv("pretrain", "run", "--fresh", data=data))
    assert snapshot(files.folder / "run") == before


def test_a_bad_checkpoint_is_passed_over_and_a_named_one_refused(
    files: Files, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(files.argv("pretrain", "run"))
    checkpoints = files.folder / "run" / "checkpoints"
    flip(checkpoints / "step-000010" / "optimizer.safetensors")
    named = refused(CHECKPOINT, *files.argv("sft", "tuned", "--init-from", str(checkpoints / "step-000010")))
    assert "optimizer.safetensors: its bytes are not those written" in named
    assert "name another (step-000005)" in named
    assert train(files.argv("pretrain", "run")).state_hash == whole.state_hash  # from step 5, by itself
    assert "step-000010 is passed over" in capsys.readouterr().err
    flip(checkpoints / "step-000010" / "config.json")
    train(files.argv("sft", "tuned", "--init-from", str(files.folder / "run")))
    assert "step-000010 is passed over" in capsys.readouterr().err


def test_all_checkpoints_bad(files: Files, refused: Refused) -> None:
    train(files.argv("pretrain", "run"))
    for path in checkpoint.checkpoints_of(files.folder / "run"):
        (path / "model.safetensors").write_bytes(b"")
    before = snapshot(files.folder / "run")
    said = refused(CHECKPOINT, *files.argv("pretrain", "run", "--steps", "12"))
    assert "every checkpoint is bad, nothing was changed" in said
    assert "every checkpoint is bad" in refused(
        CHECKPOINT, *files.argv("sft", "tuned", "--init-from", str(files.folder / "run"))
    )
    assert snapshot(files.folder / "run") == before
    train(files.argv("pretrain", "run", "--fresh"))
    assert (
        files.folder / "run" / "previous-1" / "checkpoints" / "step-000010" / "model.safetensors"
    ).read_bytes() == b""
