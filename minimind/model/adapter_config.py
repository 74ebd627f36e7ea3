"""The settings of a LoRA adapter, and the JSON files that say them on disk. No torch, no weights.

`adapter_config.json` is PEFT's. It has no field for the weights that an adapter was trained on, and of fields it does
not know PEFT warns, or fails when it is old; so these are in a file of ours beside it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minimind.errors import CheckpointError

ADAPTER_CONFIG, ADAPTER_MODEL, ADAPTER_BASE = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json"

DENSE_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a dense model."""
ATTENTION_LAYERS = DENSE_LAYERS[:4]
"""Those of a mixture of experts that can be adapted."""

_HARMLESS = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "inference_mode", "auto_mapping"),
    *("init_lora_weights", "eva_config", "ensure_weight_tying"),
}
"""What PEFT's file says by true, a list or a table without changing what the adapter's tensors mean."""
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is; others (pissa, olora, ...) move a part of it."""


@dataclass(frozen=True)
class LoraConfig:
    """Which layers are adapted, and by how much."""

    rank: int = 8
    """Width R of the adapter's two thin matrices: what it can change, and what it costs."""
    alpha: float = 16.0
    """The adapter's part is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that training drops."""
    target_modules: tuple[str, ...] = ()
    """Linear layers that are adapted, by name: q_proj, or self_attn.q_proj, or model.layers.0.self_attn.q_proj. None
    given: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; of a mixture of experts the first four."""

    @property
    def scaling(self) -> float:
        """alpha / R."""
        return self.alpha / self.rank

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found: list[str] = []
        if self.rank < 1:
            found.append(f"rank = {self.rank}: at least 1")
        if not self.alpha > 0:
            found.append(f"alpha = {self.alpha}: more than 0, or the adapter changes nothing")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout = {self.dropout}: 0 or more, and less than 1")
        return found

    def to_peft(self, base: str) -> dict[str, Any]:
        """Return the content of `adapter_config.json` for an adapter of the model in directory `base`."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.target_modules),
            "bias": "none",
            "inference_mode": True,
        }

    @classmethod
    def from_peft(cls, mapping: Mapping[str, Any], layers: tuple[str, ...], *, where: str) -> "LoraConfig":
        """Return the settings that an `adapter_config.json` says. CheckpointError for what is not computed here.

        `layers`: full names of the adapted layers, which the adapter's tensors tell; patterns in the file are not read.
        """
        # Whatever PEFT will learn to do beyond plain LoRA is switched on by true, a list or a table.
        odd = [name for name, value in mapping.items() if value and isinstance(value, bool | list | dict)]
        odd = [name for name in odd if name not in _HARMLESS]
        odd += ["peft_type"] if mapping.get("peft_type") != "LORA" else []
        odd += ["bias"] if mapping.get("bias", "none") != "none" else []
        odd += ["init_lora_weights"] if mapping.get("init_lora_weights") not in _PLAIN_STARTS else []
        if odd:
            said = ", ".join(f"{name} {mapping.get(name)!r}" for name in odd)
            raise CheckpointError(
                f"{where}: {said}: only plain LoRA is computed here. Merge the adapter into its base with the program "
                "that made it, and use the merged model"
            )
        try:
            rank, alpha = int(mapping["r"]), float(mapping["lora_alpha"])
            config = cls(rank, alpha, float(mapping.get("lora_dropout", 0.0)), layers)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: r, lora_alpha or lora_dropout is missing or no number: {error}") from error
        if problems := config.problems():
            raise CheckpointError(f"{where}: {'; '.join(problems)}")
        return config


@dataclass(frozen=True)
class AdapterBase:
    """The weights that an adapter was trained on."""

    path: str
    """Their directory, absolute: what PEFT loads."""
    from_adapter: str
    """The same, relative to the adapter's directory: it holds when both have been moved or copied together."""
    sha256: str
    """Of the weights as tensors, float32, so that it holds for any file they are kept in."""


def texts_of(config: LoraConfig, base: AdapterBase) -> dict[str, str]:
    """Return file name -> content of the JSON files of an adapter."""
    contents = {
        ADAPTER_CONFIG: config.to_peft(base.path),
        ADAPTER_BASE: {"path": base.path, "from_adapter": base.from_adapter, "sha256": base.sha256},
    }
    return {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}
