"""Adapters (LoRA) on a Transformer: put on by name, taken off, merged, switched, and trained alone.

Layers are replaced, never patched. Names of tensors on disk are PEFT's. It knows neither data nor directories.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minimind.batch import Output
from minimind.errors import ConfigError
from minimind.model import disk
from minimind.model.adapter_config import (
    ADAPTER_MODEL,
    ATTENTION_LAYERS,
    DENSE_LAYERS,
    AdapterBase,
    LoraConfig,
    texts_of,
)
from minimind.model.lora import LoRALinear
from minimind.model.transformer import Transformer
from minimind.model.weights import WeightsOnDisk

_PREFIX = "base_model.model."
"""What PEFT writes before the name that a layer has in its model."""


def adaptable(model: Transformer) -> dict[str, nn.Linear]:
    """Return the layers that can have an adapter, by full name: the linear ones of attention and dense feed-forwards.

    Not among them: embedding and head, whose weights the losses read; of a mixture of experts the router, whose weight
    is read in float32, the routed experts, which are one stacked tensor, and the shared ones, which its files hold
    fused, so that PEFT has no name for them.
    """
    endings = ATTENTION_LAYERS if model.config.use_moe else DENSE_LAYERS
    linear = {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    return {name: module for name, module in linear.items() if name.rpartition(".")[2] in endings}


def add_lora(model: Transformer, config: LoraConfig) -> dict[str, LoRALinear]:
    """Give layers of `model` a new adapter, freeze everything else, and return the new layers by full name.

    A is drawn from torch's current random state. Raises ConfigError for names that no layer has, or if there is an
    adapter already.
    """
    if adapted(model):
        raise ConfigError("lora: the model has an adapter already; merge or remove that first")
    layers = adaptable(model)
    targets = config.target_modules or tuple(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    chosen = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in targets}
    if unknown := [target for target, names in chosen.items() if not names]:
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
        raise ConfigError(
            f"lora.target_modules: no layer named {', '.join(unknown[:5])} can be adapted in this model; there are "
            f"{known}, also with what stands before, as in {next(iter(layers))}"
        )
    model.requires_grad_(False)
    names = {name for some in chosen.values() for name in some}
    for name in layers:  # in the model's order, whatever that of the targets, so that a seed means one adapter
        if name in names:
            _replace(model, name, LoRALinear(layers[name], config))
    return adapted(model)


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the layers that have an adapter, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def remove_lora(model: Transformer) -> None:
    """Take the adapter off: the model is its base again, bit for bit, and trainable."""
    for name, layer in adapted(model).items():
        _replace(model, name, layer.base_layer)
    model.requires_grad_(True)


@torch.no_grad()
def merge_lora(model: Transformer) -> bool:
    """Return whether there was an adapter; it is now in the weights, summed in float32, and the model is plain."""
    layers = adapted(model)
    for layer in layers.values():
        layer.base_layer.weight.copy_(layer.weight)
    remove_lora(model)
    return bool(layers)


def merged(model: Transformer) -> Transformer:
    """Return a plain copy of `model` with its adapter in the weights; `model` stays as it is."""
    twin = copy.deepcopy(model)
    merge_lora(twin)
    return twin


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors under PEFT's names."""
    found: dict[str, Tensor] = {}
    for name, layer in adapted(model).items():
        found[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach()
        found[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach()
    return found


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Take over what `adapter_state` returned, all of it and nothing else. CheckpointError naming every difference."""
    own = adapter_state(model)
    disk.check(state, own)
    for name, tensor in own.items():
        tensor.copy_(state[name])


def layers_of(state: dict[str, Tensor]) -> tuple[str, ...]:
    """Return the full names of the layers that an adapter's tensors belong to, in order."""
    return tuple(dict.fromkeys(name.removeprefix(_PREFIX).partition(".lora_")[0] for name in state))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    place, _, last = name.rpartition(".")
    parent = model.get_submodule(place)
    setattr(parent, last, module.train(parent.training))


class Adapters:
    """Several adapters for one base, of which one or none is on. The base's weights never change."""

    def __init__(self, model: Transformer) -> None:
        """`model` is the base, without an adapter."""
        self.model = model
        self.active: str | None = None
        """The adapter that is on; None: the base as it is."""
        self._known: dict[str, tuple[LoraConfig, dict[str, Tensor]]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order in which they came."""
        return tuple(self._known)

    def add(self, name: str, config: LoraConfig, state: dict[str, Tensor]) -> None:
        """Take in an adapter and switch it on. ConfigError or CheckpointError if it does not fit the base."""
        before = self.active
        self._known[name] = config, state
        try:
            self.use(name)
        except BaseException:
            del self._known[name]
            self.use(before)
            raise

    def use(self, name: str | None) -> None:
        """Switch to the adapter of that name; None: to the base. ConfigError for a name that is not known."""
        if name is not None and name not in self._known:
            raise ConfigError(f"there is no adapter {name!r}; known: {', '.join(self._known) or 'none'}")
        remove_lora(self.model)
        self.active = None
        if name is not None:
            config, state = self._known[name]
            add_lora(self.model, config)
            load_adapter_state(self.model, state)
            self.active = name


class LoraModel(WeightsOnDisk):
    """A Transformer with a new adapter as the loop trains and saves it: the adapter alone, in PEFT's two files.

    `transformer` is the model to validate, sample and ask: it is changed in place.
    """

    def __init__(self, transformer: Transformer, config: LoraConfig, base: AdapterBase) -> None:
        """Put an adapter on `transformer`; `base` says where its weights are from. ConfigError as `add_lora`."""
        super().__init__()
        layers = add_lora(transformer, config)
        self.transformer = transformer
        names = tuple(dict.fromkeys(name.rpartition(".")[2] for name in layers))
        self._texts = texts_of(replace(config, target_modules=config.target_modules or names), base)

    @property
    def num_trained(self) -> int:
        """Number of parameters that are trained."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def forward(self, *arguments: Any, **options: Any) -> Output:
        """Return what the Transformer returns."""
        return self.transformer(*arguments, **options)

    def files_for_disk(self) -> dict[str, dict[str, Tensor]]:
        """Return the adapter's tensors under PEFT's names."""
        return {ADAPTER_MODEL: adapter_state(self.transformer)}

    def load_files(self, files: dict[str, dict[str, Tensor]]) -> None:
        """Take over what `files_for_disk` returned. Raises CheckpointError, naming the difference, for others."""
        disk.check_files(files, self.files_for_disk())
        load_adapter_state(self.transformer, files[ADAPTER_MODEL])

    def texts_for_disk(self) -> dict[str, str]:
        """Return PEFT's `adapter_config.json`, and which base it is for."""
        return dict(self._texts)
