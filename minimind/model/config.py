"""`ModelConfig`: the shape of a model, its presets, its size and its price. No torch, and no training settings.

How a shape is written as a Transformers `config.json` is `families.py`'s knowledge.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from minimind.errors import ConfigError
from minimind.model import families


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Transformer. Zeros in `head_dim`, `intermediate_size`, `moe_intermediate_size` mean: derived."""

    preset: str = ""
    """Name of the preset to start from: small, base, moe, v3, v3-moe, large or demo; empty: the fields as given."""
    vocab_size: int = 6400
    """Number of token ids (V)."""
    hidden_size: int = 512
    """Width of the residual stream (D)."""
    num_hidden_layers: int = 8
    """Number of layers."""
    num_attention_heads: int = 8
    """Number of query heads (H)."""
    num_key_value_heads: int = 2
    """Number of key/value heads (K); divides the query heads."""
    head_dim: int = 0
    """Size of one head (Dh); 0: hidden_size / num_attention_heads."""
    intermediate_size: int = 0
    """Inner width of the SwiGLU feed-forward; 0: 64 * ceil(8/3 * hidden_size / 64)."""
    max_position_embeddings: int = 32768
    """Longest sequence the model accepts; positions are 0 .. this - 1."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    rope_theta: float = 1e6
    """Base of the rotary frequencies."""
    rope_scaling: Literal["none", "yarn"] = "none"
    """yarn: stretch the context beyond the trained length (arXiv 2309.00071)."""
    yarn_factor: float = 16.0
    """How many times longer than trained the context becomes under yarn."""
    yarn_beta_fast: float = 32.0
    """Dimensions rotating more often than this in the trained length keep their frequency."""
    yarn_beta_slow: float = 1.0
    """Dimensions rotating less often than this in the trained length are interpolated fully."""
    original_max_position_embeddings: int = 0
    """The context length the model was trained on, to which yarn is relative; 0: not known."""
    hidden_act: str = "silu"
    """Activation of the feed-forward; only silu."""
    dropout: float = 0.0
    """Dropout on attention probabilities and on both residual branches while training."""
    tie_word_embeddings: bool = True
    """Use the embedding matrix as the output head as well."""
    qk_norm: bool = False
    """RMSNorm on each query and key head before the rotation (as Qwen3)."""
    bos_token_id: int = 1
    """Token that opens a message."""
    eos_token_id: int = 2
    """Token that ends a message."""
    pad_token_id: int = 0
    """Token that fills rows."""
    use_moe: bool = False
    """Replace every feed-forward by a mixture of experts."""
    n_routed_experts: int = 4
    """Number of routed experts (E)."""
    num_experts_per_tok: int = 2
    """Routed experts each token visits (A)."""
    n_shared_experts: int = 1
    """Experts that every token visits."""
    moe_intermediate_size: int = 0
    """Inner width of one expert; 0: that of intermediate_size."""
    scoring_func: str = "softmax"
    """How the router turns logits into scores; only softmax."""
    norm_topk_prob: bool = True
    """Scale the chosen experts' scores to sum to one."""
    aux_loss_alpha: float = 0.01
    """The balance loss of an evenly loaded router (whatever the number of layers or experts per token)."""
    seq_aux: bool = True
    """Balance each row by itself and average over rows; false: all tokens of the micro-batch together."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; residual projections get it divided by sqrt(2 * layers)."""

    @classmethod
    def from_preset(cls, name: str) -> "ModelConfig":
        """Return the preset of that name. ConfigError for an unknown one, with the nearest name."""
        if name not in PRESETS:
            close = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(PRESETS)}"
            raise ConfigError(f"model preset {name!r} does not exist; {hint}")
        return PRESETS[name]

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> "ModelConfig":
        """Return the config of a Transformers `config.json` (as a dict). ConfigError where we could not be exact."""
        config = cls(**families.from_hf(mapping))
        # A size that is the derived one anyway reads as derived, so that a preset survives the round trip unchanged.
        derived = replace(config, intermediate_size=0, moe_intermediate_size=0)
        if config.intermediate_size == derived.feed_forward_size:
            config = replace(config, intermediate_size=0)
        if config.moe_intermediate_size == config.feed_forward_size:
            config = replace(config, moe_intermediate_size=0)
        problems = config.problems()
        if problems:
            raise ConfigError("config.json: " + "; ".join(problems))
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the `config.json` of the Transformers family that computes exactly this model."""
        return families.to_hf(self)

    @property
    def family(self) -> families.Family:
        """The Transformers model_type that computes exactly this model."""
        return families.family_of(self)

    @property
    def size_per_head(self) -> int:
        """`head_dim`, derived where it is 0."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def feed_forward_size(self) -> int:
        """`intermediate_size`, derived where it is 0."""
        return self.intermediate_size or 64 * -(-8 * self.hidden_size // (3 * 64))

    @property
    def expert_size(self) -> int:
        """`moe_intermediate_size`, derived where it is 0."""
        return self.moe_intermediate_size or self.feed_forward_size

    def problems(self) -> list[str]:
        """Return what is impossible about this config, one sentence each, naming field, value and the next move."""
        found: list[str] = []
        at_least_one = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
        at_least_one += ["max_position_embeddings"]
        not_negative = ["head_dim", "intermediate_size", "moe_intermediate_size", "original_max_position_embeddings"]
        not_negative += ["aux_loss_alpha", "initializer_range"]
        positive = ["rms_norm_eps", "rope_theta"]
        if self.use_moe:
            at_least_one += ["n_routed_experts", "num_experts_per_tok"]
            not_negative += ["n_shared_experts"]
        bad = {name: "at least 1" for name in at_least_one if getattr(self, name) < 1}
        bad |= {name: "0 or more" for name in not_negative if getattr(self, name) < 0}
        bad |= {name: "greater than 0" for name in positive if getattr(self, name) <= 0}
        found += [f"{name} is {getattr(self, name)}; it must be {bound}" for name, bound in bad.items()]
        if found:  # the rest divides by these values
            return found
        found += self._shape_problems() + self._rope_problems()
        if self.use_moe:
            found += self._moe_problems()
        return found

    def _shape_problems(self) -> list[str]:
        found: list[str] = []
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim == 0 and self.hidden_size % heads:
            found.append(
                f"hidden_size {self.hidden_size} does not divide by num_attention_heads {heads}; "
                "change one of them or set head_dim"
            )
        if heads % kv_heads:
            found.append(
                f"num_attention_heads {heads} does not divide by num_key_value_heads {kv_heads}; "
                f"choose a divisor of {heads}"
            )
        if self.size_per_head % 2:
            found.append(f"head_dim is {self.size_per_head}, which is odd; rotary positions rotate pairs, make it even")
        if self.hidden_act != "silu":
            found.append(f"hidden_act is {self.hidden_act!r}; only 'silu' (SwiGLU) is implemented")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout is {self.dropout}; it must be in [0, 1)")
        return found + [
            f"{name} is {getattr(self, name)}; it must be a token id, 0 to {self.vocab_size - 1}"
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
            if not 0 <= getattr(self, name) < self.vocab_size
        ]

    def _rope_problems(self) -> list[str]:
        if self.rope_scaling == "none":
            return []
        if self.rope_scaling != "yarn":
            return [f"rope_scaling is {self.rope_scaling!r}; it must be 'none' or 'yarn'"]
        found: list[str] = []
        if self.original_max_position_embeddings == 0:
            found.append(
                "rope_scaling is 'yarn' but original_max_position_embeddings is 0; "
                "set it to the context length the model was trained on"
            )
        if self.yarn_factor < 1:
            found.append(f"yarn_factor is {self.yarn_factor}; it must be 1 or more")
        if not 0 < self.yarn_beta_slow < self.yarn_beta_fast:
            found.append(
                f"yarn_beta_slow {self.yarn_beta_slow} must be above 0 and below yarn_beta_fast {self.yarn_beta_fast}"
            )
        return found

    def _moe_problems(self) -> list[str]:
        found: list[str] = []
        if self.num_experts_per_tok > self.n_routed_experts:
            found.append(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than n_routed_experts {self.n_routed_experts}"
            )
        if self.scoring_func != "softmax":
            found.append(f"scoring_func is {self.scoring_func!r}; only 'softmax' is implemented")
        # Every checkpoint must load in Transformers as it is, so a model that no family computes is refused up front.
        if self.qk_norm and self.n_shared_experts:
            found.append(
                f"qk_norm with n_shared_experts {self.n_shared_experts}: no Transformers family has both; "
                "set n_shared_experts to 0 (Qwen3-MoE) or qk_norm to false (GraniteMoeShared)"
            )
        if not self.norm_topk_prob and not self.qk_norm:
            found.append(
                "norm_topk_prob is false without qk_norm: GraniteMoeShared and Mixtral always normalise; "
                "set norm_topk_prob to true, or qk_norm to true and n_shared_experts to 0"
            )
        if self.n_shared_experts and self.head_dim not in (0, self.hidden_size / self.num_attention_heads):
            found.append(
                f"head_dim {self.head_dim} with shared experts: GraniteMoeShared needs hidden_size / "
                f"num_attention_heads = {self.hidden_size / self.num_attention_heads:g}; leave head_dim at 0"
            )
        return found

    def num_parameters(self) -> tuple[int, int]:
        """Return (total, active): all weights, and those one token uses (fewer only for a mixture of experts)."""
        width, size = self.hidden_size, self.size_per_head
        attention = 2 * width * size * (self.num_attention_heads + self.num_key_value_heads)
        norms = 2 * width + (2 * size if self.qk_norm else 0)
        if self.use_moe:
            expert = 3 * width * self.expert_size
            router = width * self.n_routed_experts
            feed_forward = router + expert * (self.n_routed_experts + self.n_shared_experts)
            active_feed_forward = router + expert * (self.num_experts_per_tok + self.n_shared_experts)
        else:
            feed_forward = active_feed_forward = 3 * width * self.feed_forward_size
        outside = self.vocab_size * width * (1 if self.tie_word_embeddings else 2) + width
        layers = self.num_hidden_layers
        total = outside + layers * (attention + norms + feed_forward)
        return total, outside + layers * (attention + norms + active_feed_forward)

    def flops_per_token(self, context: int) -> float:
        """Return the training FLOPs (forward and backward) of one token in rows of `context` tokens.

        6 per active weight that multiplies (an untied embedding only looks up), plus causal attention: two products,
        two FLOPs each, half the square, times three passes = 6 * layers * heads * head_dim * context.
        """
        active = self.num_parameters()[1]
        if not self.tie_word_embeddings:
            active -= self.vocab_size * self.hidden_size
        attention = 6.0 * self.num_hidden_layers * self.num_attention_heads * self.size_per_head * context
        return 6.0 * active + attention

    def describe(self) -> str:
        """Return the size as people say it: "25.8M", or "145.2M-A92.1M" (total and active) for a mixture of experts."""
        total, active = (f"{count / 1e6:.1f}M" for count in self.num_parameters())
        return f"{total}-A{active}" if self.use_moe else total


PRESETS: dict[str, ModelConfig] = {
    "small": ModelConfig(preset="small"),
    "base": ModelConfig(preset="base", hidden_size=768, num_hidden_layers=16),
    "moe": ModelConfig(preset="moe", hidden_size=640, use_moe=True),
    "v3": ModelConfig(preset="v3", hidden_size=768, num_key_value_heads=4, intermediate_size=2432, qk_norm=True),
    # Eight half-width experts, two per token: the sizes of four with one per token, but with a router that learns from
    # the loss (a single normalised score is always 1 and has no gradient).
    "v3-moe": ModelConfig(
        preset="v3-moe",
        hidden_size=768,
        num_key_value_heads=4,
        intermediate_size=2432,
        qk_norm=True,
        use_moe=True,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=0,
        moe_intermediate_size=1216,
    ),
    "large": ModelConfig(
        preset="large",
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        intermediate_size=3584,
    ),
    "demo": ModelConfig(
        preset="demo",
        vocab_size=1200,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        qk_norm=True,
    ),
}
"""Named shapes. Parameters: small 25.8M, base 104M, moe 145M, v3 64M, v3-moe 198M-A64M, large 334M, demo 1.0M."""
