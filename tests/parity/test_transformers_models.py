"""Every preset's tiny sibling computes what Transformers computes from the directory we write."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from minimind.model.cache import KVCache
from minimind.model.config import PRESETS, ModelConfig
from minimind.model.transformer import Transformer

transformers = pytest.importorskip("transformers", reason="parity needs the extra 'hf'")

SMALL = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "initializer_range": 0.08,
}
SIBLINGS = {name: replace(preset, **SMALL) for name, preset in PRESETS.items()}
CONFIGS = SIBLINGS | {
    "untied": replace(SIBLINGS["small"], tie_word_embeddings=False),
    "head_dim": replace(SIBLINGS["v3"], head_dim=24),
    "mixtral": replace(SIBLINGS["moe"], n_shared_experts=0),
    "two shared": replace(SIBLINGS["moe"], n_shared_experts=2),
    "unnormalised": replace(SIBLINGS["v3-moe"], norm_topk_prob=False),
    "yarn": replace(SIBLINGS["small"], rope_scaling="yarn", yarn_factor=8.0, original_max_position_embeddings=32),
    "yarn qwen3": replace(
        SIBLINGS["v3"], rope_scaling="yarn", yarn_factor=4.0, original_max_position_embeddings=64, rope_theta=1e4
    ),
}
FAMILIES = {"llama", "qwen3", "granitemoeshared", "mixtral", "qwen3_moe"}


class Pair:
    """Our model and Transformers' of the same directory."""

    def __init__(self, config: ModelConfig, directory: Path) -> None:
        torch.manual_seed(1)
        self.config = config
        self.ours = Transformer(config).eval()
        state = {name: tensor.contiguous() for name, tensor in self.ours.state_dict_for_disk().items()}
        directory.mkdir(parents=True)
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config.to_hf()))
        self.theirs, self.info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
        self.theirs.eval()
        self.ids = torch.randint(3, config.vocab_size, (3, 40))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            made[name] = Pair(CONFIGS[name], tmp_path_factory.mktemp("hf") / "model")
        return made[name]

    return get


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_every_family_is_covered() -> None:
    assert {config.family for config in CONFIGS.values()} == FAMILIES


@pytest.mark.parametrize("name", CONFIGS)
def test_directory_loads_strictly_and_logits_are_equal(pairs, name: str) -> None:
    pair = pairs(name)
    assert type(pair.theirs).__name__ == CONFIGS[name].to_hf()["architectures"][0]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not pair.info[kind], pair.info
    with torch.no_grad():
        ours, theirs = pair.ours(pair.ids).logits, pair.theirs(pair.ids).logits
    assert theirs.std() > 0.1  # else agreement says nothing
    assert_close(ours, theirs)


GRANITE_NAMES = {
    "block_sparse_moe.router.weight": "mlp.gate.weight",
    "block_sparse_moe.experts.": "mlp.experts.",
    "shared_mlp.output_linear": "mlp.shared_experts.down_proj",
}


@pytest.mark.parametrize("name", [*PRESETS, "mixtral", "untied", "unnormalised"])
def test_loss_and_gradients_are_equal(pairs, name: str) -> None:
    pair = pairs(name)
    labels = pair.ids.clone()
    labels[:, :7] = -100
    labels[2] = -100
    ours, theirs = pair.ours(pair.ids, labels=labels), pair.theirs(pair.ids, labels=labels)
    loss = ours.loss - ours.aux_loss
    assert_close(loss, theirs.loss)
    pair.ours.zero_grad()
    pair.theirs.zero_grad()
    loss.backward()
    theirs.loss.backward()
    gradients = {key: parameter.grad for key, parameter in pair.ours.named_parameters()}
    for key, parameter in pair.theirs.named_parameters():
        for theirs_name, ours_name in GRANITE_NAMES.items():
            key = key.replace(theirs_name, ours_name)
        if "shared_mlp.input_linear" in key:
            prefix = key.removesuffix("shared_mlp.input_linear.weight") + "mlp.shared_experts."
            ours_grad = torch.cat([gradients.pop(f"{prefix}{part}_proj.weight") for part in ("gate", "up")])
        else:
            ours_grad = gradients.pop(key)
        assert parameter.grad is not None
        assert_close(ours_grad, parameter.grad)
    assert not gradients


@pytest.mark.parametrize("name", ["small", "v3", "moe", "mixtral", "v3-moe", "yarn"])
def test_cached_generation_step_by_step_equals_their_full_forward(pairs, name: str) -> None:
    pair = pairs(name)
    with torch.no_grad():
        theirs = pair.theirs(pair.ids).logits
        cache = KVCache(pair.config, 3, 40)
        pieces = [pair.ours(pair.ids[:, start:end], cache=cache).logits for start, end in ((0, 9), (9, 10), (10, 25))]
        pieces += [pair.ours(pair.ids[:, t : t + 1], cache=cache).logits for t in range(25, 40)]
    assert_close(torch.cat(pieces, dim=1), theirs)


@pytest.mark.parametrize("name", ["small", "v3", "moe", "mixtral", "v3-moe"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_equal_at_real_tokens(pairs, name: str, side: str) -> None:
    pair = pairs(name)
    mask = torch.ones_like(pair.ids)
    for row, padding in enumerate((0, 11, 25)):
        mask[row, slice(0, padding) if side == "left" else slice(40 - padding, 40)] = 0
    with torch.no_grad():
        ours = pair.ours(pair.ids, attention_mask=mask).logits
        theirs = pair.theirs(pair.ids, attention_mask=mask).logits
    real = mask.bool()
    assert torch.isfinite(ours).all()
    assert_close(ours[real], theirs[real])


@pytest.mark.parametrize("name", ["small", "v3", "moe", "mixtral", "v3-moe", "yarn"])
def test_packed_documents_equal_each_document_alone(pairs, name: str) -> None:
    pair = pairs(name)
    lengths = (5, 13, 1, 17)  # and 4 of padding
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((4,), -1)])[None]
    row = pair.ids[:1]
    with torch.no_grad():
        ours = pair.ours(row, documents=documents).logits
        start = 0
        for length in lengths:
            theirs = pair.theirs(row[:, start : start + length]).logits
            assert_close(ours[:, start : start + length], theirs)
            start += length


def test_yarn_rotation_is_theirs(pairs) -> None:
    for name in ("yarn", "yarn qwen3"):
        pair = pairs(name)
        rotary = pair.theirs.model.rotary_emb
        assert rotary.attention_scaling == pair.ours._rope_factor
        assert torch.equal(rotary.inv_freq, pair.ours._frequencies)


def test_balance_loss_is_theirs_without_the_growth_in_k(tmp_path: Path) -> None:
    config = replace(CONFIGS["v3-moe"], num_hidden_layers=1, seq_aux=False, aux_loss_alpha=0.5)
    pair = Pair(config, tmp_path / "model")
    ours, theirs = pair.ours(pair.ids), pair.theirs(pair.ids, output_router_logits=True)
    assert_close(ours.aux_loss, 0.5 * theirs.aux_loss / config.num_experts_per_tok)


@pytest.mark.parametrize("name", CONFIGS)
def test_their_own_saved_config_reads_as_ours(pairs, name: str, tmp_path: Path) -> None:
    pair = pairs(name)
    pair.theirs.config.save_pretrained(tmp_path)
    read = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert replace(read, preset="") == replace(ModelConfig.from_hf(pair.config.to_hf()), preset="")
