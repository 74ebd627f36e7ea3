"""An adapter's directory, a checkpoint of a LoRA run or written by PEFT: reads it, and checks which base it is for.

    adapter_config.json, adapter_model.safetensors     PEFT's two files
    adapter_base.json                                  ours: the base's directory and the sha256 of its weights

It knows neither runs nor how a base is loaded.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from minimind.checkpoint.directory import checkpoints_of, is_ours, read, verify
from minimind.errors import CheckpointError
from minimind.model.adapter_config import ADAPTER_BASE, ADAPTER_CONFIG, ADAPTER_MODEL, AdapterBase, LoraConfig
from minimind.model.adapters import Adapters, LoraModel, adaptable, layers_of
from minimind.runtime.integrity import read_json, read_tensors, sha256_of_tensors
from minimind.runtime.log import get_logger

if TYPE_CHECKING:
    from minimind.model.transformer import Transformer
    from minimind.tokenizer.bpe import Tokenizer

_log = get_logger("checkpoint")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter, read into CPU memory; its bytes are verified where it is one of ours."""

    path: Path
    config: LoraConfig
    tensors: dict[str, Tensor]
    """float32, under PEFT's names."""
    base: AdapterBase
    """What it is for; `sha256` is empty where its files do not say which weights that is."""
    tokenizer_sha256: str | None
    """None where its files do not say."""


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter instead of a model."""
    return (directory / ADAPTER_CONFIG).exists()


def read_adapter(directory: Path) -> Adapter:
    """Return the adapter in `directory`. CheckpointError: missing, corrupt, or not the plain LoRA computed here."""
    tokenizer_sha256 = None
    if is_ours(directory):
        saved = read(directory)
        tensors, tokenizer_sha256 = saved.files.get(ADAPTER_MODEL, {}), saved.tokenizer_sha256
    else:
        tensors = read_tensors(directory / ADAPTER_MODEL)
    file = directory / ADAPTER_CONFIG
    content = read_json(file)
    config = LoraConfig.from_peft(content, layers_of(tensors), where=str(file))
    base = AdapterBase(str(content.get("base_model_name_or_path") or ""), "", "")
    if (directory / ADAPTER_BASE).exists():
        ours = read_json(directory / ADAPTER_BASE)
        base = AdapterBase(*(str(ours.get(name, "")) for name in ("path", "from_adapter", "sha256")))
    return Adapter(
        directory, config, {name: tensor.float() for name, tensor in tensors.items()}, base, tokenizer_sha256
    )


def base_directory(adapter: Adapter) -> Path:
    """Return the directory of the model that an adapter names. CheckpointError when it is not here."""
    places = [Path(adapter.base.path)] if adapter.base.path else []
    places += [adapter.path / adapter.base.from_adapter] if adapter.base.from_adapter else []
    for place in places:
        if place.is_dir():
            return place.resolve()
    raise CheckpointError(
        f"{adapter.path}: an adapter for {adapter.base.path or 'a base that it does not name'}, which is not here; put "
        f"it there, or name its base yourself: minimind chat BASE --adapter {adapter.path}"
    )


def base_of(model: "Transformer", directory: Path, adapter_directory: Path) -> AdapterBase:
    """Return how an adapter at `adapter_directory` names the plain `model` that was loaded from `directory`."""
    directory = directory.resolve()  # not `latest`, which moves
    from_adapter = Path(os.path.relpath(directory, adapter_directory.resolve()))
    return AdapterBase(str(directory), from_adapter.as_posix(), sha256_of_weights(model))


def sha256_of_weights(model: "Transformer") -> str:
    """Return the sha256 of a plain model's weights, under the names that they have on disk."""
    return sha256_of_tensors(model.state_dict_for_disk())


def put_on(adapters: Adapters, adapter: Adapter, name: str, *, base: Path, sha256: str, tokenizer: "Tokenizer") -> None:
    """Add `adapter` to those of a model and switch it on; `base` and `sha256` say which model that is.

    Raises CheckpointError for an adapter of another base, naming both, of another tokenizer, or of another shape.
    """
    if adapter.base.sha256 and adapter.base.sha256 != sha256:
        raise CheckpointError(
            f"{adapter.path}: an adapter for {adapter.base.path} (weights {adapter.base.sha256[:12]}), not for {base} "
            f"(weights {sha256[:12]}). On other weights it means nothing; give the base it was trained on"
        )
    if adapter.tokenizer_sha256 not in (None, tokenizer.sha256):
        raise CheckpointError(
            f"{adapter.path}: trained with tokenizer {adapter.tokenizer_sha256[:12]}, {base} has "
            f"{tokenizer.sha256[:12]}; give the base it was trained on"
        )
    layers = adaptable(adapters.model)
    odd = [layer for layer in adapter.config.target_modules if layer not in layers]
    if odd or not adapter.tensors:
        raise CheckpointError(
            f"{adapter.path}: adapts {', '.join(odd[:3]) or 'nothing'}, which {base} does not have or cannot adapt; it "
            f"is for another model ({adapter.base.path})"
        )
    if not adapter.base.sha256:
        _log.info("%s does not say which weights it is for: only shapes were compared with %s", adapter.path, base)
    adapters.add(name, adapter.config, adapter.tensors)


def check_same_adapter(run_dir: Path, model: LoraModel) -> None:
    """Raise CheckpointError if a run's checkpoints are adapters of another base or of other settings than `model`."""
    texts = model.texts_for_disk()
    compared = {ADAPTER_BASE: ("sha256",), ADAPTER_CONFIG: ("r", "lora_alpha", "lora_dropout", "target_modules")}
    for path in checkpoints_of(run_dir):
        if not is_adapter(path) or verify(path):  # of another kind of stage, or damaged: the loop says so
            continue
        found: list[str] = []
        for name, keys in compared.items():
            ours, theirs = json.loads(texts[name]), read_json(path / name)
            found += [f"{key} {theirs.get(key)}, here {ours[key]}" for key in keys if theirs.get(key) != ours[key]]
        if found:
            raise CheckpointError(f"{path}: of another adapter: {'; '.join(found)}. Give the same, or add --fresh")
