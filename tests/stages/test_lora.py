"""`minimind lora`: learns by heart on frozen weights, resumes bit for bit, and never lands on another base."""

import io
import json
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stages.test_exactness import INTERRUPTED, assert_curves_agree, torchrun
from stages.test_sft import ROWS, row
from stages.tiny_stage import MOE, Files, after_update, curve, exit_code, send, train, write_rows

from minimind import checkpoint
from minimind.checkpoint.adapter import sha256_of_weights
from minimind.cli import main
from minimind.config import parse
from minimind.errors import CheckpointError
from minimind.inference.engine import Engine
from minimind.inference.sampling import SamplingParams
from minimind.inference.terminal import command
from minimind.model.adapters import adapted, merged
from minimind.stages import lora
from minimind.stages.chat import chat
from minimind.tokenizer.chat import render
from minimind.training.loop import FitResult

BAD_CONFIG, BAD_CHECKPOINT = 2, 4
ADAPTER = "adapter_model.safetensors"


WIDE = ("--model.initializer-range", "0.5", "--steps", "20")
"""An embedding near 0 and frozen could never be sure of a token, whatever an adapter does before it."""

STRONG = ("--optim.lr", "1e-2", "--lora.rank", "16", "--lora.alpha", "32")


@pytest.fixture(scope="module")
def base(shared_files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    train(replace(shared_files, folder=folder).argv("pretrain", "base", *WIDE))
    return folder / "base"


@pytest.fixture
def files(shared_files: Files, base: Path, tmp_path: Path) -> Files:
    """The shared files with a base of our own, and a fresh folder for runs."""
    return replace(shared_files, base=base, folder=tmp_path)


def argv(files: Files, out: str, *more: str, data: Path | None = None) -> list[str]:
    data = data or write_rows(files.folder / "rows.jsonl", ROWS)
    return ["lora", *files.argv("sft", out, "--data.row-length", "128", "--lora.rank", "4", *more, data=data)[1:]]


def fit(words: Sequence[str]) -> FitResult:
    return lora.run(parse(lora.Config, words[1:], command="lora"))


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path)[0].state_dict()


@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_four_conversations_are_learned_by_heart_on_a_base_that_keeps_every_bit(shape: str, files: Files) -> None:
    if shape == "moe":
        train(files.argv("pretrain", "moe", *WIDE, shape=MOE))
        files = replace(files, base=files.folder / "moe")
    before, bytes_before = weights_of(files.base), (files.base / "latest" / "model.safetensors").read_bytes()
    flags = ("--steps", "200", "--save-every", "0", "--batch-tokens", "512", *STRONG)
    result = fit(argv(files, "run", *flags))
    losses = [step[1] for step in curve(files.folder / "run")]
    assert losses[-1] < 0.1 < 4 < losses[0]
    model, tokenizer = checkpoint.load(result.checkpoint)
    layers = adapted(model)
    assert len(layers) == 2 * (4 if shape == "moe" else 7)
    for conversation in ROWS:
        messages = conversation["messages"]
        prompt = render(tokenizer, messages[:-1], add_generation_prompt=True).ids
        end = SamplingParams(temperature=0, max_tokens=64, stop_ids=(tokenizer.eos_id,))
        (answer,) = Engine(model).generate([prompt], end)
        whole = tokenizer.decode(render(tokenizer, messages).ids)
        assert tokenizer.decode([*prompt, *answer.ids]).rstrip("\n") == whole.rstrip("\n")
    assert (files.base / "latest" / "model.safetensors").read_bytes() == bytes_before
    frozen = {name.replace(".base_layer", ""): p for name, p in model.state_dict().items() if "lora_" not in name}
    assert frozen.keys() == before.keys()
    assert all(torch.equal(before[name], p) for name, p in frozen.items())
    names = {path.name for path in result.checkpoint.iterdir()}
    assert {"adapter_config.json", ADAPTER, "adapter_base.json", "optimizer.safetensors", "MANIFEST.json"} <= names
    assert "model.safetensors" not in names
    config = json.loads((result.checkpoint / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((files.base / "latest").resolve())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 16, 32.0, "none")
    moments = checkpoint.read(result.checkpoint).optimizer_state
    assert len(moments) == 3 * 2 * len(layers)  # of the adapter alone


def test_ten_steps_are_five_and_resume_five(files: Files) -> None:
    flags = ("--lora.dropout", "0.2", "--micro-batch-tokens", "128", "--save-every", "0")
    whole = fit(argv(files, "whole", *flags))
    assert fit(argv(files, "again", *flags)).state_hash == whole.state_hash
    with after_update(5, send(signal.SIGINT)):
        assert exit_code(argv(files, "cut", *flags)) == INTERRUPTED
    assert checkpoint.read(files.folder / "cut" / "latest").step == 5
    resumed = fit(argv(files, "cut", *flags))
    assert (resumed.steps, resumed.state_hash) == (10, whole.state_hash)
    assert curve(files.folder / "cut") == curve(files.folder / "whole")
    assert fit(argv(files, "other", *flags, "--seed", "1")).state_hash != whole.state_hash
    first = {name: (files.folder / name / "latest" / ADAPTER).read_bytes() for name in ("cut", "whole")}
    assert first["cut"] == first["whole"]


def test_the_split_into_micro_batches_changes_nothing(files: Files) -> None:
    data = files.world / "sft.jsonl"
    flags = ("--batch-tokens", "512", "--data.row-length", "64", "--steps", "20", "--save-every", "0")
    for micro_tokens in ("64", "128"):
        fit(argv(files, micro_tokens, *flags, "--micro-batch-tokens", micro_tokens, data=data))
    losses = [[step[1] for step in curve(files.folder / tokens)] for tokens in ("64", "128")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] < losses[0][0] - 0.05


@pytest.mark.slow
def test_two_processes_are_one(files: Files) -> None:
    data = files.world / "sft.jsonl"
    flags = ("--batch-tokens", "512", "--data.row-length", "64", "--steps", "20", "--save-every", "6")
    fit(argv(files, "one", *flags, data=data))
    assert torchrun(argv(files, "two", *flags, data=data)) == 0
    assert_curves_agree(files.folder / "two", files.folder / "one", steps=20)


@pytest.fixture
def other_base(files: Files) -> Path:
    """A model of the same shape and tokenizer with other weights."""
    train(files.argv("sft", "other-base", "--steps", "1", "--save-every", "0"))
    return files.folder / "other-base"


def test_an_adapter_for_another_base_is_refused(files: Files, other_base: Path, refused: Callable[..., str]) -> None:
    saved = fit(argv(files, "run", "--steps", "2")).checkpoint
    ours, theirs = (sha256_of_weights(checkpoint.load(path)[0])[:12] for path in (files.base, other_base))
    said = refused(BAD_CHECKPOINT, "chat", str(other_base), "--adapter", str(files.folder / "run"), "--prompt", "hi")
    base = (files.base / "latest").resolve()
    assert f"an adapter for {base} (weights {ours}), not for {other_base}" in said
    assert f"(weights {theirs})" in said
    said = refused(BAD_CHECKPOINT, *argv(files, "run", "--steps", "4", "--init-from", str(other_base)))
    assert "of another adapter: sha256" in said
    assert "add --fresh" in said
    said = refused(BAD_CHECKPOINT, *argv(files, "run", "--steps", "4", "--lora.rank", "8", "--lora.alpha", "3"))
    assert "r 4, here 8; lora_alpha 16.0, here 3.0" in said
    assert checkpoint.verify(saved) == []  # and nothing is lost
    assert fit(argv(files, "run", "--steps", "4")).steps == 4
    rows = files.folder / "rows.jsonl"
    train(files.argv("sft", "sft", "--steps", "2", "--data.row-length", "128", data=rows))
    assert "was made by another kind of stage" in refused(BAD_CHECKPOINT, *argv(files, "sft"))


def test_a_base_that_is_gone_changed_or_moved(files: Files, refused: Callable[..., str]) -> None:
    shutil.copytree(files.base, files.folder / "place" / "base", symlinks=True)
    there = replace(files, base=files.folder / "place" / "base", folder=files.folder / "place")
    saved = fit(argv(there, "run", "--steps", "2")).checkpoint
    weights = merged(checkpoint.load(saved)[0]).state_dict()
    (files.folder / "place").rename(files.folder / "elsewhere")  # together: the adapter still finds it
    run = files.folder / "elsewhere" / "run"
    again = merged(checkpoint.load(run)[0]).state_dict()
    assert all(torch.equal(weights[name], p) for name, p in again.items())
    (files.folder / "elsewhere" / "base").rename(files.folder / "base")
    said = refused(BAD_CHECKPOINT, "chat", str(run), "--prompt", "hi")
    assert "which is not here; put it there, or name its base yourself: minimind chat BASE --adapter" in said
    assert exit_code(["chat", str(files.folder / "base"), "--adapter", str(run), "--prompt", "hi"]) == 0
    train(files.argv("sft", "elsewhere/base", "--steps", "20", "--save-every", "0"))  # another model in its place
    with pytest.raises(CheckpointError, match=r"an adapter for .*not for .*elsewhere/base"):
        checkpoint.load(run)


def test_a_damaged_adapter_is_never_loaded(files: Files, refused: Callable[..., str]) -> None:
    whole = fit(argv(files, "run", "--steps", "4", "--save-every", "2"))
    saved = whole.checkpoint
    content = bytearray((saved / ADAPTER).read_bytes())
    content[-3] ^= 1
    (saved / ADAPTER).write_bytes(content)
    assert "its bytes are not those written" in refused(BAD_CHECKPOINT, "chat", str(saved), "--prompt", "hi")
    assert adapted(checkpoint.load(files.folder / "run")[0])  # the run has an older one that is good
    for damage in (lambda path: path.write_text("{}"), lambda path: path.unlink()):
        damage(saved / "adapter_config.json")
        assert fit(argv(files, "run", "--steps", "4", "--save-every", "2")).state_hash == whole.state_hash
    for step in saved.parent.iterdir():
        (step / "adapter_config.json").write_text("{}")
    assert "every checkpoint is bad" in refused(BAD_CHECKPOINT, "chat", str(files.folder / "run"), "--prompt", "hi")


def test_what_cannot_be_adapted_is_refused_before_the_data_are_read(files: Files, refused: Callable[..., str]) -> None:
    words = argv(files, "run", "--lora.target-modules", "q_proj", "qproj", data=files.folder / "missing.jsonl")
    said = refused(BAD_CONFIG, *words)
    assert "no layer named qproj can be adapted in this model; there are q_proj, k_proj" in said
    said = refused(BAD_CONFIG, *argv(files, "run", "--lora.rank", "0", "--lora.dropout", "1"))
    assert "rank = 0: at least 1" in said
    assert "dropout = 1.0: 0 or more, and less than 1" in said
    fit(argv(files, "run", "--steps", "1"))
    said = refused(BAD_CONFIG, *argv(files, "second", "--init-from", str(files.folder / "run")))
    assert f"is an adapter itself; give its base, --init-from {(files.base / 'latest').resolve()}" in said


def test_other_stages_start_from_the_merged_model(files: Files) -> None:
    fit(argv(files, "run", "--optim.lr", "1e-2"))
    expected = merged(checkpoint.load(files.folder / "run")[0]).state_dict()
    flags = ("--init-from", str(files.folder / "run"), "--steps", "1", "--optim.lr", "1e-12")
    result = train(files.argv("sft", "next", *flags, "--save-every", "0"))
    found = weights_of(result.checkpoint)
    assert found.keys() == expected.keys()
    base = weights_of(files.base)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7)
    assert sum(not torch.equal(base[name], p) for name, p in found.items()) >= 14


def test_several_adapters_in_one_conversation(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--steps", "100", "--save-every", "0", *STRONG)
    for name in ("Ada", "Bob"):
        data = write_rows(files.folder / f"{name}.jsonl", [row("Who are you?", f"I am {name}.")])
        fit(argv(files, name, *flags, data=data))
    folders = [files.folder / "Ada", files.folder / "Bob" / "latest"]
    session = chat(files.base, adapters=folders, device="cpu", dtype="float32", sampling=SamplingParams(temperature=0))

    def ask() -> str:
        session.clear()
        return "".join(delta.content for delta in session.send("Who are you?"))

    assert session.adapters is not None
    assert (session.adapters.names, session.adapters.active) == (("Ada", "Bob"), "Ada")
    assert ask() == "I am Ada."
    assert command(session, "/adapter Bob").text == "Adapters: Ada, [Bob], none"
    assert ask() == "I am Bob."
    assert command(session, "/adapter none").text == "Adapters: Ada, Bob, [none]"
    assert ask() not in ("I am Ada.", "I am Bob.")
    refusal = command(session, "/adapter Eve")
    assert (refusal.is_error, refusal.text) == (True, "/adapter: there is no adapter 'Eve'; known: Ada, Bob")
    assert command(session, "/adapter Ada").text == "Adapters: [Ada], Bob, none"
    assert ask() == "I am Ada."
    # On the command line, in a pipe; a LoRA run brings its base along, and the same name comes twice.
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n/clear\n/adapter Bob\nWho are you?\n/adapter\n"))
    flags = ("--adapter", str(folders[1]), "--adapter", str(folders[0]), "--temperature", "0", "--dtype", "float32")
    assert main(["chat", str(folders[0]), *flags]) == 0
    found = capsys.readouterr()
    assert found.out == "I am Ada.\nI am Bob.\n"
    assert found.err.endswith("Adapters: Ada, [Bob], Ada-2, none\n")
    plain = chat(files.base, device="cpu")
    assert "there is none; start with minimind chat RUN --adapter DIR" in command(plain, "/adapter").text
    with pytest.raises(CheckpointError, match="a model, not an adapter"):
        chat(files.base, adapters=[files.base])
