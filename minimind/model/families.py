"""Which Transformers family computes exactly our model, and its `config.json` both ways. Plain dicts, no torch.

A checkpoint directory is a Transformers directory as written, so each shape must be one family to the last bit of
mathematics: dense is Llama, with QK-norm Qwen3; softmax top-k renormalised is softmax over the top-k logits, so a
mixture with shared experts is GraniteMoeShared with every multiplier 1, without them Mixtral, with QK-norm Qwen3-MoE.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from minimind.errors import ConfigError

if TYPE_CHECKING:
    from minimind.model.config import ModelConfig

Family = Literal["llama", "qwen3", "granitemoeshared", "mixtral", "qwen3_moe"]

_ARCHITECTURES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

_SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
)

_EXTRAS = ("preset", "seq_aux", "scoring_func", "original_max_position_embeddings")
"""What no family has a name for; kept under the one key "minimind", which Transformers and vLLM ignore."""

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "logits_scaling": (1, None),
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
    "router_jitter_noise": (0, None),
    "pretraining_tp": (1, None),
}


def family_of(config: "ModelConfig") -> Family:
    """Return the model_type whose mathematics is exactly that of `config`."""
    if not config.use_moe:
        return "qwen3" if config.qk_norm else "llama"
    if config.qk_norm:
        return "qwen3_moe"
    return "granitemoeshared" if config.n_shared_experts else "mixtral"


def yarn_attention_factor(factor: float) -> float:
    """Return what cos and sin are multiplied by under YaRN: 0.1 ln(s) + 1 (arXiv 2309.00071, eq. 22)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def to_hf(config: "ModelConfig") -> dict[str, Any]:
    """Return the `config.json` that Transformers (4 and 5), vLLM and llama.cpp's converter read as this model."""
    family = family_of(config)
    result: dict[str, Any] = {"architectures": [_ARCHITECTURES[family]], "model_type": family}
    result |= {name: getattr(config, name) for name in _SAME_NAME}
    result |= {"attention_bias": False, "attention_dropout": config.dropout, "use_cache": True}
    result |= {"torch_dtype": "float32", "dtype": "float32"}  # the name before and since Transformers 5
    result["intermediate_size"] = config.feed_forward_size
    if family != "granitemoeshared":
        result["head_dim"] = config.size_per_head
    if family == "llama":
        result["mlp_bias"] = False
    if family in ("qwen3", "qwen3_moe"):
        result |= {"use_sliding_window": False, "sliding_window": None}
    if config.use_moe:
        result |= _moe_to_hf(config, family)
    result |= _rope_to_hf(config)
    result["minimind"] = {name: getattr(config, name) for name in _EXTRAS}
    return result


def _moe_to_hf(config: "ModelConfig", family: Family) -> dict[str, Any]:
    result: dict[str, Any] = {
        "num_experts_per_tok": config.num_experts_per_tok,
        "router_aux_loss_coef": config.aux_loss_alpha,
        "output_router_logits": False,
    }
    if family == "qwen3_moe":
        return result | {
            "num_experts": config.n_routed_experts,
            "moe_intermediate_size": config.expert_size,
            "norm_topk_prob": config.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    result |= {"num_local_experts": config.n_routed_experts, "intermediate_size": config.expert_size}
    if family == "mixtral":
        return result | {"sliding_window": None, "router_jitter_noise": 0.0}
    return result | {
        "shared_intermediate_size": config.n_shared_experts * config.expert_size,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_multiplier": 1.0 / math.sqrt(config.size_per_head),
    }


def _rope_to_hf(config: "ModelConfig") -> dict[str, Any]:
    if config.rope_scaling == "none":
        scaling = None
        parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    else:
        scaling = {
            "rope_type": "yarn",
            "factor": config.yarn_factor,
            "beta_fast": config.yarn_beta_fast,
            "beta_slow": config.yarn_beta_slow,
            "attention_factor": yarn_attention_factor(config.yarn_factor),
            "original_max_position_embeddings": config.original_max_position_embeddings,
        }
        parameters = scaling | {"rope_theta": config.rope_theta}
    # Transformers 4, vLLM and llama.cpp read the first two; Transformers 5 the third.
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}


def from_hf(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that a Transformers `config.json` describes.

    Raises ConfigError naming key, value and what is supported, for anything our model would not compute exactly.
    """
    family = mapping.get("model_type")
    if family not in _ARCHITECTURES:
        raise ConfigError(f"config.json: model_type is {family!r}; supported: {', '.join(_ARCHITECTURES)}")
    for name, allowed in _MUST_BE.items():
        if mapping.get(name) not in allowed:
            raise ConfigError(f"config.json: {name} is {mapping[name]!r}; only {allowed[0]!r} is supported")
    missing = [name for name in (*_SAME_NAME[:4], "intermediate_size") if mapping.get(name) is None]
    if missing:
        raise ConfigError(f"config.json: {', '.join(missing)} missing; is this a complete Transformers directory?")
    result: dict[str, Any] = {name: mapping[name] for name in _SAME_NAME if mapping.get(name) is not None}
    result.setdefault("num_key_value_heads", mapping["num_attention_heads"])
    result.setdefault("tie_word_embeddings", False)  # the default of every one of these families
    if isinstance(result.get("eos_token_id"), list):
        result["eos_token_id"] = result["eos_token_id"][0]
    result["head_dim"] = mapping.get("head_dim") or 0
    if family in ("qwen3", "qwen3_moe") and not result["head_dim"]:
        result["head_dim"] = 128  # what these two families mean by a missing head_dim
    if result["head_dim"] * mapping["num_attention_heads"] == mapping["hidden_size"]:
        result["head_dim"] = 0
    result["intermediate_size"] = mapping["intermediate_size"]
    result["dropout"] = float(mapping.get("attention_dropout") or 0.0)
    result["qk_norm"] = family in ("qwen3", "qwen3_moe")
    if family in ("granitemoeshared", "mixtral", "qwen3_moe"):
        result |= _moe_from_hf(mapping, family)
    result |= _rope_from_hf(mapping)
    extras = mapping.get("minimind") or {}
    result |= {name: extras[name] for name in _EXTRAS if name in extras}
    return result


def _moe_from_hf(mapping: Mapping[str, Any], family: str) -> dict[str, Any]:
    experts = mapping.get("num_experts") if family == "qwen3_moe" else None
    experts = experts or mapping.get("num_local_experts")
    expert_size = mapping.get("moe_intermediate_size") if family == "qwen3_moe" else mapping["intermediate_size"]
    if not experts or not expert_size:
        raise ConfigError("config.json: the number or the size of the experts is missing")
    result: dict[str, Any] = {
        "use_moe": True,
        "n_routed_experts": experts,
        "num_experts_per_tok": mapping.get("num_experts_per_tok", 2),
        "n_shared_experts": 0,
        "moe_intermediate_size": expert_size,
        "norm_topk_prob": bool(mapping.get("norm_topk_prob", False)) if family == "qwen3_moe" else True,
        "aux_loss_alpha": mapping.get("router_aux_loss_coef", 0.001),
    }
    if family == "mixtral" and mapping.get("sliding_window") is not None:
        raise ConfigError(f"config.json: sliding_window is {mapping['sliding_window']}; only null is supported")
    if family == "granitemoeshared":
        shared = mapping.get("shared_intermediate_size", 0)
        if shared % expert_size:
            raise ConfigError(
                f"config.json: shared_intermediate_size {shared} is no multiple of intermediate_size {expert_size}"
            )
        head_dim = mapping.get("head_dim") or mapping["hidden_size"] // mapping["num_attention_heads"]
        multiplier = mapping.get("attention_multiplier", 1.0)
        if abs(multiplier * math.sqrt(head_dim) - 1) > 1e-6:
            raise ConfigError(
                f"config.json: attention_multiplier is {multiplier}; only 1/sqrt(head_dim) = "
                f"{1 / math.sqrt(head_dim):.6g} is supported"
            )
        result["n_shared_experts"] = shared // expert_size
    return result


def _rope_from_hf(mapping: Mapping[str, Any]) -> dict[str, Any]:
    parameters = dict(mapping.get("rope_parameters") or {}) | dict(mapping.get("rope_scaling") or {})
    default_theta = 1e6 if mapping["model_type"] == "mixtral" else 1e4
    theta = parameters.get("rope_theta") or mapping.get("rope_theta") or default_theta
    result: dict[str, Any] = {"rope_theta": float(theta)}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return result
    if kind != "yarn":
        raise ConfigError(f"config.json: rope_type is {kind!r}; supported: 'default', 'yarn'")
    factor = float(parameters.get("factor") or 1.0)
    expected = yarn_attention_factor(factor)
    given = parameters.get("attention_factor")
    if given is not None and abs(given - expected) > 1e-6:
        raise ConfigError(f"config.json: attention_factor is {given}; only 0.1 ln(factor) + 1 = {expected:.6g} works")
    for name in ("mscale", "mscale_all_dim"):
        if parameters.get(name):
            raise ConfigError(f"config.json: {name} is {parameters[name]}; only yarn without it is supported")
    if parameters.get("truncate") is False:
        raise ConfigError("config.json: truncate is false; only yarn with the ramp's ends rounded is supported")
    original = parameters.get("original_max_position_embeddings") or mapping.get("original_max_position_embeddings")
    return result | {
        "rope_scaling": "yarn",
        "yarn_factor": factor,
        "yarn_beta_fast": float(parameters.get("beta_fast") or 32),
        "yarn_beta_slow": float(parameters.get("beta_slow") or 1),
        "original_max_position_embeddings": original or 0,
    }
