"""An external reward model scores as Transformers scores each conversation alone, and ours is one of them."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from minimind.data.prompt import Prompt
from minimind.errors import CheckpointError, ConfigError
from minimind.interop.reward import TransformersReward
from minimind.model.config import ModelConfig
from minimind.model.heads import ScalarModel
from minimind.rl.rewards import Rewards
from minimind.rl.scoring import read_answer
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.train import train

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")

TEXTS = ["The red ball is in the garden.", "Who has the ball now?", "It is 12 o'clock.", "谁有球？球在花园里。"]
TALKS = [
    [{"role": "user", "content": "Who has the ball?"}, {"role": "assistant", "content": text}]
    for text in ("Mila has it.", "I do not know who has the red ball now, ask again.", "", "球在花园里。")
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TEXTS * 30, 300)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward")
    model = small(tokenizer)
    save_file({name: value.contiguous() for name, value in model.files_for_disk()["model.safetensors"].items()},
              path / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    for name, text in model.texts_for_disk().items():
        (path / name).write_text(text)
    tokenizer.save(path, model_max_length=64)
    return path


def small(tokenizer: Tokenizer) -> ScalarModel:
    torch.manual_seed(2)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    model = ScalarModel(config)
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


def ids_of(folder: Path, talk: list[dict[str, Any]]) -> list[int]:
    found = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        talk, tokenize=True, return_dict=True
    )
    return found["input_ids"]


def test_scores_are_those_of_each_conversation_alone(folder: Path, tokenizer: Tokenizer):
    scores = TransformersReward(folder, CPU)(TALKS)
    ours = small(tokenizer).rewards([ids_of(folder, talk) for talk in TALKS])
    assert scores == pytest.approx(ours, abs=1e-5)
    assert len({round(score, 3) for score in scores}) == len(TALKS)
    assert TransformersReward(folder, CPU)(TALKS[1:2]) == pytest.approx(scores[1:2], abs=1e-5)


def test_without_a_padding_token_they_are_scored_one_by_one(folder: Path, tmp_path: Path):
    want = TransformersReward(folder, CPU)(TALKS)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    assert TransformersReward(tmp_path, CPU)(TALKS) == pytest.approx(want, abs=1e-5)


def test_a_conversation_that_is_too_long_has_no_score(folder: Path):
    long = [{"role": "user", "content": "ball " * 80}, {"role": "assistant", "content": "yes"}]
    scores = TransformersReward(folder, CPU)([long, TALKS[0]])
    assert math.isnan(scores[0])
    assert math.isfinite(scores[1])


def test_a_thought_stays_where_the_template_knows_none(folder: Path, tmp_path: Path):
    talk = [TALKS[0][0], {"role": "assistant", "content": "Mila.", "reasoning_content": "the ball"}]
    own = TransformersReward(folder, CPU)
    assert own._ids(talk) == ids_of(folder, talk)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    plain = TransformersReward(tmp_path, CPU)
    text = transformers.AutoTokenizer.from_pretrained(folder).decode(plain._ids(talk))
    assert text == "Who has the ball?<think>\nthe ball\n</think>\n\nMila."


def test_it_is_a_reward_by_name(folder: Path):
    rewards = Rewards([f"transformers:{folder}"], scorer_of=lambda _, path: TransformersReward(Path(path), CPU))
    prompt = Prompt(TALKS[0][:1])
    scores = rewards.score([(prompt, read_answer(talk[1]["content"], num_tokens=5)) for talk in TALKS])
    want = TransformersReward(folder, CPU)(TALKS)
    assert scores.parts["transformers"] == pytest.approx([max(-3, min(3, score)) for score in want], abs=1e-5)


def test_what_is_no_reward_model_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        TransformersReward(tmp_path / "nowhere", CPU)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    two = {**config, "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (tmp_path / "config.json").write_text(json.dumps(two))
    with pytest.raises(CheckpointError):
        TransformersReward(tmp_path, CPU)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="its tokenizer has no chat template"):
        TransformersReward(tmp_path, CPU)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot read it as a reward model"):
        TransformersReward(tmp_path, CPU)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r'pip install "minimind\[hf\]"'):
        TransformersReward(folder, CPU)
