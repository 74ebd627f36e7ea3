from dataclasses import replace

import pytest

from minimind.errors import ConfigError
from minimind.model.config import PRESETS, ModelConfig
from minimind.model.transformer import Transformer


def test_presets_have_the_sizes_people_know():
    sizes = {name: preset.describe() for name, preset in PRESETS.items()}
    assert sizes == {
        "small": "25.8M",
        "base": "104.0M",
        "moe": "145.0M-A91.9M",
        "v3": "63.9M",
        "v3-moe": "198.4M-A64.0M",
        "large": "333.8M",
        "demo": "1.0M",
    }
    for name, preset in PRESETS.items():
        assert preset.preset == name
        assert preset.problems() == []


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_counted_as_built(name: str):
    small = {"hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 40, "intermediate_size": 56, "head_dim": 0}
    config = replace(PRESETS[name], **small, num_attention_heads=4, num_key_value_heads=2, moe_intermediate_size=24)
    for tied in (True, False):
        config = replace(config, tie_word_embeddings=tied)
        model = Transformer(config)
        total, active = config.num_parameters()
        assert sum(parameter.numel() for parameter in model.parameters()) == total
        unused = (config.n_routed_experts - config.num_experts_per_tok) * 3 * 48 * 24 * 3 if config.use_moe else 0
        assert total - active == unused


def test_flops_of_small_are_the_known_ones():
    # 6 x 25.83M weights + 6 x 8 layers x 512 wide x 512 context
    assert PRESETS["small"].flops_per_token(512) == 6 * PRESETS["small"].num_parameters()[0] + 6 * 8 * 512 * 512
    untied = replace(PRESETS["small"], tie_word_embeddings=False)
    assert untied.flops_per_token(512) == PRESETS["small"].flops_per_token(512)  # a lookup multiplies nothing


def test_feed_forward_size_is_rounded_up():
    assert {ModelConfig(hidden_size=h).feed_forward_size for h in (512, 511)} == {1408}
    assert ModelConfig(hidden_size=768).feed_forward_size == 2048
    assert ModelConfig(hidden_size=640).feed_forward_size == 1728


BAD = {
    "heads do not divide": ({"hidden_size": 100, "num_attention_heads": 8}, "hidden_size 100", "num_attention_heads 8"),
    "kv heads do not divide": ({"num_key_value_heads": 3}, "num_attention_heads 8", "num_key_value_heads 3"),
    "negative": ({"num_hidden_layers": -1}, "num_hidden_layers is -1", "at least 1"),
    "zero vocabulary": ({"vocab_size": 0}, "vocab_size is 0", "at least 1"),
    "odd head": ({"head_dim": 33}, "head_dim is 33", "even"),
    "epsilon": ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0", "greater than 0"),
    "dropout": ({"dropout": 1.0}, "dropout is 1.0", "[0, 1)"),
    "activation": ({"hidden_act": "gelu"}, "'gelu'", "silu"),
    "special token": ({"eos_token_id": 6400}, "eos_token_id is 6400", "6399"),
    "yarn without length": ({"rope_scaling": "yarn"}, "original_max_position_embeddings is 0", "trained on"),
    "yarn factor": (
        {"rope_scaling": "yarn", "original_max_position_embeddings": 64, "yarn_factor": 0.5},
        "yarn_factor is 0.5",
        "1 or more",
    ),
    "too few experts": (
        {"use_moe": True, "num_experts_per_tok": 5},
        "num_experts_per_tok 5",
        "n_routed_experts 4",
    ),
    "no family": ({"use_moe": True, "qk_norm": True}, "qk_norm with n_shared_experts 1", "Qwen3-MoE"),
    "not normalised": ({"use_moe": True, "norm_topk_prob": False}, "norm_topk_prob", "always normalise"),
    "scoring": ({"use_moe": True, "scoring_func": "sigmoid"}, "'sigmoid'", "softmax"),
    "granite head": ({"use_moe": True, "head_dim": 32}, "head_dim 32", "leave head_dim at 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_shapes_are_refused_with_field_value_and_next_move(name: str):
    changes, *parts = BAD[name]
    config = replace(ModelConfig(), **changes)
    problems = config.problems()
    assert len(problems) == 1
    for part in parts:
        assert part in problems[0]
    with pytest.raises(ConfigError):
        Transformer(config)


def test_all_problems_are_told_at_once():
    problems = ModelConfig(num_key_value_heads=3, dropout=2.0, hidden_act="relu").problems()
    assert len(problems) == 3


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'small'"):
        ModelConfig.from_preset("smal")
    with pytest.raises(ConfigError, match="small, base, moe"):
        ModelConfig.from_preset("zzz")


ROUND_TRIPS = {
    **PRESETS,
    "untied": ModelConfig(tie_word_embeddings=False, dropout=0.1, seq_aux=False),
    "head_dim": ModelConfig(head_dim=32, rope_theta=5e5),
    "mixtral": ModelConfig(use_moe=True, n_shared_experts=0, seq_aux=False, aux_loss_alpha=0.02),
    "yarn": ModelConfig(rope_scaling="yarn", yarn_factor=3.0, original_max_position_embeddings=512),
    "trained length": ModelConfig(original_max_position_embeddings=340),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_config_json_round_trip(name: str):
    config = ROUND_TRIPS[name]
    assert ModelConfig.from_hf(config.to_hf()) == config


UNSUPPORTED = {
    "model_type": ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
    "bias": ({"attention_bias": True}, "attention_bias is True"),
    "rope": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}, "rope_scaling": None}, "'llama3'"),
    "missing": ({"hidden_size": None}, "hidden_size missing"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_config_json_that_we_would_not_compute_exactly_is_refused(name: str):
    changes, message = UNSUPPORTED[name]
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(ModelConfig().to_hf() | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits_scaling": 8.0}, "logits_scaling is 8.0"),
        ({"attention_multiplier": 0.5}, "attention_multiplier is 0.5"),
        ({"shared_intermediate_size": 1000}, "shared_intermediate_size 1000"),
    ],
)
def test_granite_multipliers_must_be_neutral(changes: dict[str, float], message: str):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(PRESETS["moe"].to_hf() | changes)


def test_older_config_json_without_rope_parameters_is_read():
    older = {name: value for name, value in ROUND_TRIPS["yarn"].to_hf().items() if name != "rope_parameters"}
    assert ModelConfig.from_hf(older) == ROUND_TRIPS["yarn"]
