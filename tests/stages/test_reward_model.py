"""`minimind reward-model`: it learns which answer is better, is a classifier of Transformers as it stands, resumes."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stages.test_exactness import INTERRUPTED, torchrun
from stages.tiny_pairs import HELD_OUT, PAIRS
from stages.tiny_stage import DENSE, MOE, Files, after_update, curve, exit_code, send, write_rows
from stages.tiny_stage import train as train_language_model

from minimind import checkpoint
from minimind.config import parse
from minimind.errors import CheckpointError
from minimind.model.config import ModelConfig
from minimind.model.heads import ScalarModel
from minimind.model.transformer import Transformer
from minimind.stages import reward_model
from minimind.tokenizer.chat import render
from minimind.training.loop import FitResult
from minimind.training.metrics import read_metrics

Refused = Callable[..., str]


@pytest.fixture
def data(files: Files) -> Path:
    return write_rows(files.folder / "pairs.jsonl", PAIRS)


def argv(files: Files, data: Path, out: str, *more: str) -> list[str]:
    """The words after `minimind` of a short run in `out`."""
    flags = [*files.argv("sft", out, "--data.row-length", "128", data=data)[1:], *more]
    return ["reward-model", *flags]


def train(words: list[str]) -> FitResult:
    return reward_model.run(parse(reward_model.Config, words[1:], command="reward-model"))


def test_it_learns_which_answer_is_better(files: Files, data: Path) -> None:

    validation = write_rows(files.folder / "held.jsonl", HELD_OUT)
    flags = ("--data.validation", str(validation), "--eval-every", "25", "--steps", "25", "--batch-tokens", "512")
    result = train(argv(files, data, "run", *flags))
    rows = [*read_metrics(files.folder / "run" / "metrics.jsonl")]
    steps = [row for row in rows if "train_loss" in row]
    assert steps[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-6)  # every value is 0 at the start
    assert steps[-1]["train_loss"] < 0.3
    looks = [row for row in rows if "val_loss" in row]
    assert looks[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert looks[-1]["val_reward_accuracy"] == 1.0
    assert looks[-1]["val_reward_margin"] > 1
    model, tokenizer = checkpoint.load_reward_model(result.checkpoint)
    end = 1  # the line break after the end token of the last answer
    sides = [render(tokenizer, row[side]).ids[:-end] for row in HELD_OUT for side in ("chosen", "rejected")]
    assert all(ids[-1] == tokenizer.eos_id for ids in sides)
    rewards = model.rewards(sides)
    margins = [a - b for a, b in zip(rewards[0::2], rewards[1::2], strict=True)]
    assert sum(margins) / 6 == pytest.approx(looks[-1]["val_reward_margin"], rel=1e-4)


def test_scoring_is_the_same_in_any_company(files: Files) -> None:
    language_model, _ = checkpoint.load(files.base)
    model = ScalarModel.from_transformer(language_model)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    sequences = [torch.randint(3, 300, (size,)).tolist() for size in (5, 60, 1, 17, 60, 2)]
    one_by_one = [model.rewards([ids])[0] for ids in sequences]
    for tokens in (1, 64, 10_000):
        assert model.rewards(sequences, batch_tokens=tokens) == pytest.approx(one_by_one, abs=1e-5)
    with torch.no_grad():
        last = [float(model(torch.tensor([ids])).values[0, -1]) for ids in sequences]
    assert one_by_one == pytest.approx(last, abs=1e-5)
    assert model.rewards([]) == []
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        model.rewards([[3], []])
    model.train()
    model.rewards([[3]])
    assert model.training


def test_the_values_are_float32_under_autocast(files: Files) -> None:
    model = ScalarModel.from_transformer(checkpoint.load(files.base)[0])
    torch.nn.init.normal_(model.score.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = model(torch.tensor([[5, 6, 7]])).values
    assert values.dtype == torch.float32
    assert (values != values.bfloat16().float()).any()


QWEN3 = (*DENSE, "--model.qk-norm")
MIXTRAL = (*MOE, "--model.n-shared-experts", "0")


@pytest.mark.parametrize(
    ("shape", "architecture"),
    [
        (DENSE, "LlamaForSequenceClassification"),
        ((*DENSE, "--model.no-tie-word-embeddings"), "LlamaForSequenceClassification"),
        (QWEN3, "Qwen3ForSequenceClassification"),
        (MIXTRAL, "MixtralForSequenceClassification"),
    ],
    ids=["llama", "untied", "qwen3", "mixtral"],
)
def test_the_checkpoint_is_a_classifier_of_transformers(
    shape: tuple[str, ...], architecture: str, files: Files, data: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    train_language_model(files.argv("pretrain", "base", "--steps", "1", shape=shape))
    result = train(argv(files, data, "run", "--init-from", str(files.folder / "base"), "--steps", "3"))
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        result.checkpoint, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == architecture
    assert theirs.config.num_labels == 1
    model, _ = checkpoint.load_reward_model(result.checkpoint)
    sequences = [torch.randint(3, 300, (size,)).tolist() for size in (9, 30, 4)]
    ids = torch.zeros(3, 30, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    with torch.no_grad():
        logits = theirs.eval()(ids, attention_mask=(ids != 0).long()).logits[:, 0].tolist()
    assert max(map(abs, logits)) > 1e-3
    assert model.rewards(sequences) == pytest.approx(logits, abs=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(result.checkpoint).save_pretrained(tmp_path / "theirs")
    again, _ = checkpoint.load_reward_model(tmp_path / "theirs")
    assert again.rewards(sequences) == pytest.approx(logits, abs=1e-5)


def test_each_kind_of_model_is_refused_where_the_other_is_wanted(files: Files, data: Path, refused: Refused) -> None:
    train(argv(files, data, "run", "--steps", "1"))
    run = files.folder / "run"
    with pytest.raises(CheckpointError, match=r"holds a language model \(LlamaForCausalLM\), not a reward model"):
        checkpoint.load_reward_model(files.base)
    said = refused(4, *files.argv("sft", "tuned", "--init-from", str(run)))
    assert "holds a reward model (LlamaForSequenceClassification), which cannot write" in said
    assert "holds a reward model" in refused(4, *argv(files, data, "again", "--init-from", str(run)))
    # Nor does a run of one kind go on as the other.
    words = argv(files, data, "tuned", "--steps", "1", "--loss", "simpo")
    assert exit_code(["dpo", *words[1:]]) == 0
    said = refused(4, *argv(files, data, "tuned"))
    assert "missing: score.weight" in said
    train(argv(files, data, "run", "--steps", "2"))  # the one that it is goes on


def test_ten_steps_are_five_and_resume_five(files: Files, data: Path) -> None:
    flags = ("--save-every", "0", "--micro-batch-tokens", "128", "--centre", "0.01", "--margin", "0.1")
    whole = train(argv(files, data, "whole", *flags))
    with after_update(5, send(signal.SIGINT)):
        assert exit_code(argv(files, data, "cut", *flags)) == INTERRUPTED
    resumed = train(argv(files, data, "cut", *flags))
    assert (resumed.steps, resumed.state_hash) == (10, whole.state_hash)
    assert curve(files.folder / "cut") == curve(files.folder / "whole")


def test_the_split_into_micro_batches_changes_nothing(files: Files, data: Path) -> None:
    losses: dict[int, list[float]] = {}
    for tokens in (128, 512):
        flags = ("--batch-tokens", "512", "--micro-batch-tokens", str(tokens), "--save-every", "0")
        train(argv(files, data, str(tokens), *flags))
        losses[tokens] = [row[1] for row in curve(files.folder / str(tokens))]
    assert losses[128] == pytest.approx(losses[512], rel=1e-5)


@pytest.mark.slow
def test_two_processes_are_one(files: Files, data: Path) -> None:
    flags = ("--batch-tokens", "512", "--steps", "6")
    train(argv(files, data, "one", *flags))
    assert torchrun(argv(files, data, "two", *flags)) == 0
    for mine, other in zip(curve(files.folder / "two"), curve(files.folder / "one"), strict=True):
        assert mine[1] == pytest.approx(other[1], rel=1e-5)


def test_impossible_settings_are_refused_together(files: Files, data: Path, refused: Refused) -> None:
    said = refused(2, *argv(files, data, "run", "--sample-every", "5", "--margin", "-1", "--centre", "-0.5"))
    for what in ("sample_every = 5: a reward model writes nothing", "margin = -1.0", "centre = -0.5"):
        assert what in said


def test_a_template_that_ends_with_the_end_token_is_refused(files: Files, data: Path, refused: Refused) -> None:
    import shutil

    source = files.base / "latest"
    folder = files.folder / "theirs"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder)
    template = folder / "chat_template.jinja"
    text = template.read_text()
    ending = "{%- endgeneration %}\n        {{- '\\n' }}"
    assert ending in text
    template.write_text(text.replace(ending, "{%- endgeneration %}\n        {{- '\\n' if not loop.last }}"))
    said = refused(2, *argv(files, data, "run", "--init-from", str(folder)))
    assert "writes no line break (one token) after the end token" in said


def test_it_starts_as_a_copy_of_the_model() -> None:
    config = ModelConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, tie_word_embeddings=False)  # fmt: skip
    language_model = Transformer(config)
    model = ScalarModel.from_transformer(language_model)
    own: dict[str, Any] = dict(model.named_parameters())
    assert set(own) == {name for name, _ in language_model.named_parameters()} - {"lm_head.weight"} | {"score.weight"}
    for name, parameter in language_model.model.named_parameters():
        assert torch.equal(parameter, own[f"model.{name}"])
        assert parameter is not own[f"model.{name}"]
    assert not model(torch.tensor([[3, 4, 5]])).values.any()
