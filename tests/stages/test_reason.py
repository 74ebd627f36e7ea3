"""`minimind reason`: the tags count more exactly where they are learned, and everything else is fine-tuning."""

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from stages.test_exactness import INTERRUPTED, assert_curves_agree, torchrun
from stages.test_sft import row
from stages.tiny_stage import Files, after_update, curve, exit_code, send, train, write_rows

from minimind import checkpoint
from minimind.config import parse
from minimind.data.config import DataConfig
from minimind.data.dataset import train_and_validation
from minimind.data.loader import Loader
from minimind.data.packing import pack
from minimind.errors import ConfigError
from minimind.inference.engine import Engine
from minimind.inference.sampling import SamplingParams
from minimind.stages import reason
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.chat import render
from minimind.training.loop import FitResult

BAD_CONFIG, BAD_CHECKPOINT = 2, 4
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def thought(question: str, thought: str, answer: str) -> dict[str, Any]:
    return row(question, f"<think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>")


ROWS = [
    thought("2 + 3?", "Two, then three more: 3, 4, 5.", "5"),
    thought("What is <answer> 1 + 1 </answer>?", "One and one.", "2"),  # in a question it is text
    row("4 - 1?", "<answer>\n3\n</answer>", reasoning_content="Four without one."),
    {
        "messages": [
            *thought("9 + 1?", "Nine and one.", "10")["messages"],
            *thought("And 2 more?", "Ten and two.", "12")["messages"],
        ]
    },
]


def argv(files: Files, out: str, *more: str, data: Path | None = None) -> list[str]:
    data = data or write_rows(files.folder / "rows.jsonl", ROWS)
    words = files.argv("sft", out, "--data.row-length", "128", "--batch-tokens", "512", *more, data=data)
    return ["reason", *words[1:]]


def fit(words: Sequence[str]) -> FitResult:
    return reason.run(parse(reason.Config, words[1:], command="reason"))


def loaders(files: Files, weight: float) -> tuple[Tokenizer, Loader, Loader]:
    """Return the tokenizer, the loader of plain fine-tuning, and that with the tags at `weight`; a document a row."""
    tokenizer = Tokenizer.load(files.tokenizer)
    data = write_rows(files.folder / "rows.jsonl", ROWS)
    config = DataConfig(files=(data,), row_length=128, validation_fraction=0, cache_dir=files.cache)
    documents, _ = train_and_validation(config, tokenizer, kind="conversation")
    rows = pack(documents, 128, mode="padded")
    emphasis = dict.fromkeys(reason.tag_ids(tokenizer, where="here"), weight)
    plain = Loader(rows, batch_rows=4, micro_rows=4, seed=0)
    return tokenizer, plain, Loader(rows, batch_rows=4, micro_rows=4, seed=0, emphasis=emphasis)


def test_tags_weigh_more_exactly_where_they_are_learned(files: Files) -> None:
    tokenizer, plain, emphasised = loaders(files, 10.0)
    (before,), (batch,) = plain.micro_batches(0), emphasised.micro_batches(0)
    ids = {tokenizer.special_ids[tag] for tag in TAGS}
    num_tags = 0
    for label, was, now in zip(
        *(tensor.flatten().tolist() for tensor in (batch.labels, before.loss_weights, batch.loss_weights)), strict=True
    ):
        assert now == (10 * was if label in ids else was)
        num_tags += label in ids and was > 0
    assert num_tags == 4 * 5  # five answers; not those in a question
    assert torch.equal(batch.labels, before.labels)
    assert batch.weight == before.weight + 9 * num_tags == float(batch.loss_weights.sum())
    assert [b.weight for b in emphasised.all_batches()] == [before.weight]  # validation stays comparable
    assert emphasised.state() == {**plain.state(), "emphasis": {str(token): 10.0 for token in ids}}


def test_a_state_of_other_weights_is_another_run(files: Files) -> None:
    _, plain, emphasised = loaders(files, 10.0)
    for one, other in ((plain, emphasised), (emphasised, plain), (emphasised, loaders(files, 5.0)[2])):
        saved = json.loads(json.dumps(one.state()))
        one.check_state(saved)
        with pytest.raises(ConfigError, match="emphasis was"):
            other.check_state(saved)


def test_the_first_loss_by_hand_and_a_validation_like_that_of_sft(files: Files) -> None:
    validation = ("--data.validation", str(write_rows(files.folder / "validation.jsonl", ROWS[:2])), "--steps", "1")
    flags = ("--data.packing", "padded", *validation)
    fit(argv(files, "reason", *flags))
    train(["sft", *argv(files, "sft", *flags)[1:]])
    rows = {
        name: [json.loads(line) for line in (files.folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("reason", "sft")
    }
    assert rows["reason"][0] == rows["sft"][0]  # validation before the first step
    assert rows["reason"][0]["val_loss"] > 3
    step = rows["reason"][1]
    _, plain, _ = loaders(files, 10.0)
    model, tokenizer = checkpoint.load(files.base)
    (batch,) = plain.micro_batches(0)
    with torch.no_grad():
        logits = model(batch.input_ids, positions=batch.positions, documents=batch.documents).logits
    costs = -logits.log_softmax(-1).gather(2, batch.labels[..., None])[..., 0]  # (B, T)
    is_tag = torch.isin(batch.labels, torch.tensor([tokenizer.special_ids[tag] for tag in TAGS]))
    weights = batch.loss_weights * (1 + 9 * is_tag)
    assert step["train_loss"] == pytest.approx(float((weights * costs).sum() / weights.sum()), rel=1e-5)
    assert step["step_weight"] == float(weights.sum())
    assert step["tag_share"] == pytest.approx(float((weights * is_tag).sum() / weights.sum()), rel=1e-6)
    assert rows["sft"][1]["train_loss"] != pytest.approx(step["train_loss"], rel=1e-3)


def test_with_weight_one_it_is_fine_tuning_bit_for_bit(files: Files) -> None:
    words = argv(files, "one")[1:]
    plain = train(["sft", *argv(files, "sft")[1:]])
    assert fit(["reason", *words, "--tag-weight", "1"]).state_hash == plain.state_hash
    assert fit(argv(files, "ten")).state_hash != plain.state_hash


def test_thoughts_are_learned_by_heart(files: Files) -> None:
    result = fit(argv(files, "run", "--steps", "150", "--save-every", "0", "--optim.lr", "1e-2"))
    assert curve(files.folder / "run")[-1][1] < 0.05
    model, tokenizer = checkpoint.load(result.checkpoint)
    for conversation in ROWS:
        messages = conversation["messages"]
        prompt = render(tokenizer, messages[:-1], add_generation_prompt=True).ids
        end = SamplingParams(temperature=0, max_tokens=96, stop_ids=(tokenizer.eos_id,))
        (answer,) = Engine(model).generate([prompt], end)
        assert [answer.ids.count(tokenizer.special_ids[tag]) for tag in TAGS] == [1, 1, 1, 1]
        whole = tokenizer.decode(render(tokenizer, messages).ids)
        assert tokenizer.decode([*prompt, *answer.ids]).rstrip("\n") == whole.rstrip("\n")


def test_ten_steps_are_five_and_resume_five_with_the_same_weight_only(
    files: Files, refused: Callable[..., str]
) -> None:
    flags = ("--micro-batch-tokens", "128", "--batch-tokens", "256", "--save-every", "0")
    whole = fit(argv(files, "whole", *flags))
    with after_update(5, send(signal.SIGINT)):
        assert exit_code(argv(files, "cut", *flags)) == INTERRUPTED
    said = refused(BAD_CONFIG, *argv(files, "cut", *flags, "--tag-weight", "2"))
    assert "cannot resume with other batches: emphasis was" in said
    resumed = fit(argv(files, "cut", *flags))
    assert (resumed.steps, resumed.state_hash) == (10, whole.state_hash)
    assert curve(files.folder / "cut") == curve(files.folder / "whole")


def test_the_split_into_micro_batches_changes_nothing(files: Files) -> None:
    for micro_tokens in ("128", "256"):  # the share of tags differs between micro-batches
        fit(argv(files, micro_tokens, "--micro-batch-tokens", micro_tokens, "--steps", "20", "--save-every", "0"))
    losses = [[step[1] for step in curve(files.folder / tokens)] for tokens in ("128", "256")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] < losses[0][0] - 0.5


@pytest.mark.slow
def test_two_processes_are_one(files: Files) -> None:
    fit(argv(files, "one", "--steps", "20"))
    assert torchrun(argv(files, "two", "--steps", "20")) == 0
    assert_curves_agree(files.folder / "two", files.folder / "one", steps=20)


def test_a_tokenizer_that_splits_a_tag_is_refused(files: Files, refused: Callable[..., str]) -> None:
    folder = files.folder / "theirs"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(files.base / "latest" / name, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    kept = [token for token in content["added_tokens"] if token["content"] not in ("<answer>", "</think>")]
    assert len(kept) == len(content["added_tokens"]) - 2
    for name in ("<answer>", "</think>"):
        content["model"]["vocab"].pop(name, None)
    (folder / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": kept}))
    said = refused(BAD_CHECKPOINT, *argv(files, "run", "--init-from", str(folder)))
    assert f"{folder}: its tokenizer splits </think> into" in said.replace("minimind: ", "")
    assert "<answer> into" in said
    assert "each of <think> </think> <answer> </answer> must be one" in said
    assert exit_code(["sft", *argv(files, "run", "--init-from", str(folder), "--steps", "1")[1:]]) == 0


@pytest.mark.parametrize("weight", ["0", "-1", "inf", "nan"])
def test_impossible_weights_are_refused(weight: str, files: Files, refused: Callable[..., str]) -> None:
    said = refused(BAD_CONFIG, *argv(files, "run", "--tag-weight", weight))
    assert f"tag_weight = {float(weight)}: more than 0" in said
