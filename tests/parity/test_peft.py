"""Our adapters and PEFT's are one format and one arithmetic: forward, gradients, merging, directories both ways."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training.tiny_run import DENSE, MOE, tiny_tokenizer

from minimind import checkpoint
from minimind.errors import CheckpointError
from minimind.model.adapter_config import LoraConfig
from minimind.model.adapters import LoraModel, adapted, merged
from minimind.model.config import ModelConfig
from minimind.model.transformer import Transformer

peft = pytest.importorskip("peft", reason="needs peft")
transformers = pytest.importorskip("transformers", reason="needs transformers")

CASES: dict[str, tuple[ModelConfig, tuple[str, ...]]] = {
    "llama": (DENSE, ()),
    "qwen3": (replace(DENSE, qk_norm=True), ()),
    "a few layers": (DENSE, ("q_proj", "mlp.down_proj")),
    "one layer": (DENSE, ("model.layers.1.self_attn.o_proj",)),
    "granitemoeshared": (MOE, ()),
    "mixtral": (replace(MOE, n_shared_experts=0), ()),
    "qwen3_moe": (replace(MOE, n_shared_experts=0, qk_norm=True), ("q_proj", "v_proj")),
}


def new_base(folder: Path, config: ModelConfig = DENSE, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = replace(config, initializer_range=0.2)
    return checkpoint.save(
        folder / f"base-{seed}",
        1,
        model=Transformer(config),
        model_config=config,
        tokenizer=tiny_tokenizer(),
        optimizer_state={},
        state={},
    )


def new_adapter(folder: Path, base: Path, config: LoraConfig) -> tuple[LoraModel, Path]:
    """Save an adapter as a LoRA run would."""
    model, tokenizer = checkpoint.load(base)
    torch.manual_seed(1)
    trained = LoraModel(model, config, checkpoint.base_of(model, base, folder / "run" / "checkpoints" / "step"))
    with torch.no_grad():
        for layer in adapted(model).values():
            layer.lora_B.normal_(0, 0.2)
    saved = checkpoint.save(
        folder / "run",
        1,
        model=trained,
        model_config=model.config,
        tokenizer=tokenizer,
        optimizer_state={},
        state={},
    )
    return trained, saved


def theirs_of(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")


def ids_of(rows: int = 2, length: int = 14) -> Tensor:
    return torch.randint(20, DENSE.vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_equal(ours: Any, theirs: Any) -> None:
    mine, other = ours(ids_of()).logits, theirs(ids_of()).logits
    assert mine.abs().max() > 0.5
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-6 * float(mine.abs().max().clamp(min=1)))


@pytest.mark.parametrize("case", CASES)
def test_our_directory_loads_in_peft(case: str, tmp_path: Path) -> None:
    config, targets = CASES[case]
    base = new_base(tmp_path, config)
    trained, saved = new_adapter(tmp_path, base, LoraConfig(rank=3, alpha=6, target_modules=targets))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(theirs_of(base), str(saved)).eval()
    assert not [str(one.message) for one in said if "adapter" in str(one.message) or "Unexpected" in str(one.message)]
    ours = trained.transformer.eval()
    assert theirs.peft_config["default"].base_model_name_or_path == str(base.resolve())
    assert_equal(ours, theirs)
    assert_equal(merged(ours), theirs.merge_and_unload())
    assert checkpoint.verify(saved) == []


def test_transformers_finds_the_base_itself(tmp_path: Path) -> None:
    trained, saved = new_adapter(tmp_path, new_base(tmp_path), LoraConfig(rank=2))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(saved), dtype=torch.float32).eval()
    assert_equal(trained.transformer.eval(), theirs)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear", r".*layers\.1.*\.(k|v)_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_their_directory_loads_here(targets: list[str] | str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = new_base(tmp_path)
    torch.manual_seed(2)
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.3, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(theirs_of(base), settings).eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(dtype).float()  # what a narrow file can hold
    theirs.to(dtype).save_pretrained(tmp_path / "theirs")
    theirs.to(torch.float32)
    theirs_again = peft.PeftModel.from_pretrained(theirs_of(base), str(tmp_path / "theirs")).eval().to(torch.float32)
    ours, tokenizer = checkpoint.load(tmp_path / "theirs")
    assert tokenizer.sha256 == tiny_tokenizer().sha256  # the base's
    assert len(adapted(ours)) == {"q": 4, "a": 14, ".": 2}[targets[0][0]]
    assert_equal(ours, theirs_again)
    assert_equal(merged(ours), theirs_again.merge_and_unload())


def test_gradients_are_theirs(tmp_path: Path) -> None:
    base = new_base(tmp_path)
    trained, saved = new_adapter(tmp_path, base, LoraConfig(rank=3))
    theirs = peft.PeftModel.from_pretrained(theirs_of(base), str(saved), is_trainable=True).train()
    ids = ids_of()
    trained.train()(ids, labels=ids).loss.backward()
    theirs(ids, labels=ids).loss.backward()
    other = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    mine = {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}
    assert len(mine) == len(other) == 2 * 14
    for name, grad in mine.items():
        there = other["base_model.model." + name.removeprefix("transformer.") + ".default.weight"]
        assert grad is not None
        assert grad.abs().max() > 1e-3
        torch.testing.assert_close(grad, there, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"use_rslora": True}, "use_rslora True"),
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern {'q_proj': 2}"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save ['embed_tokens']"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = new_base(tmp_path)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
    peft.get_peft_model(theirs_of(base), settings).save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="only plain LoRA is computed here") as refused:
        checkpoint.load(tmp_path / "theirs")
    assert said in str(refused.value)


def test_an_adapter_for_another_shape_is_refused(tmp_path: Path) -> None:
    new_base(tmp_path)
    other = new_base(tmp_path, replace(DENSE, hidden_size=32), seed=1)
    peft.get_peft_model(
        theirs_of(other), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="wrong shape"):
        checkpoint.load_with_adapters(tmp_path / "base-0", [tmp_path / "theirs"])
    file = tmp_path / "theirs" / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "base_model_name_or_path": "someone/elsewhere"}))
    with pytest.raises(CheckpointError, match="an adapter for someone/elsewhere, which is not here"):
        checkpoint.load(tmp_path / "theirs")
    file.write_text(json.dumps({**content, "use_what_is_not_known_yet": True}))
    with pytest.raises(CheckpointError, match="use_what_is_not_known_yet True: only plain LoRA"):
        checkpoint.load(tmp_path / "theirs")
    file.write_text(json.dumps({**content, "r": "many"}))
    with pytest.raises(CheckpointError, match="r, lora_alpha or lora_dropout is missing or no number"):
        checkpoint.load(tmp_path / "theirs")


def test_a_base_is_known_by_its_weights_whatever_file_holds_them(tmp_path: Path) -> None:
    base = new_base(tmp_path)
    trained, saved = new_adapter(tmp_path, base, LoraConfig(rank=2))
    copy = tmp_path / "copy"
    theirs_of(base).save_pretrained(copy, max_shard_size="20KB")
    for file in base.glob("*oken*.json"):
        shutil.copy(file, copy)
    ours, _, adapters = checkpoint.load_with_adapters(copy, [saved])
    assert adapters.active == "run"
    assert_equal(ours, trained.transformer.eval())
    changed = theirs_of(base)
    changed.model.norm.weight.data[0] += 1e-6  # one bit of one number
    changed.save_pretrained(copy)
    with pytest.raises(CheckpointError, match="an adapter for"):
        checkpoint.load_with_adapters(copy, [saved])
