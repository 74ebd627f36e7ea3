"""What a stage, a chat or an evaluation starts from: the model and the tokenizer of a run, a checkpoint, a directory.

It finds the directory, reads the weights, and refuses what does not belong together. It never writes.
"""

from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minimind.checkpoint.adapter import base_directory, is_adapter, put_on, read_adapter, sha256_of_weights
from minimind.checkpoint.directory import CONFIG, find_latest, is_ours, read, read_config
from minimind.errors import CheckpointError
from minimind.model.adapters import Adapters
from minimind.model.disk import MODEL
from minimind.runtime.integrity import read_json, read_tensors

if TYPE_CHECKING:
    from minimind.model.config import ModelConfig
    from minimind.model.heads import ScalarModel
    from minimind.model.transformer import Transformer
    from minimind.tokenizer.bpe import Tokenizer

INDEX = "model.safetensors.index.json"
"""Names the files of a Transformers directory whose weights are sharded."""


def resolve(path: Path) -> Path:
    """Return the directory to read for a run, a run's `checkpoints`, a checkpoint, a Transformers or PEFT directory.

    Raises CheckpointError when there is nothing to read, naming what exists nearby.
    """
    path = Path(path)
    if not path.is_dir():
        raise _nothing(path, "is a file, not a directory" if path.exists() else "does not exist")
    if (path / "checkpoints").is_dir() or path.name == "checkpoints":
        found = find_latest(path.parent if path.name == "checkpoints" else path)
        if found is None:
            raise _nothing(path, "has no checkpoint yet")
        return found
    has_model = (path / CONFIG).exists() and ((path / MODEL).exists() or (path / INDEX).exists())
    if is_ours(path) or is_adapter(path) or has_model:
        return path
    if any((*path.glob("*.bin"), *path.glob("*.pt*"))):
        raise _nothing(path, "holds only pickled weights, which are not read; save them as safetensors")
    raise _nothing(path, "is neither a run, nor a checkpoint, nor a Transformers directory")


def load(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> "tuple[Transformer, Tokenizer]":
    """Return (model in evaluation mode, tokenizer) of a run, a checkpoint or a Transformers directory.

    Of a LoRA run or a PEFT directory: the base that it names, with the adapter on (`model.adapters.merge_lora` makes it
    plain). Raises CheckpointError: nothing there, corrupt, a reward model, or things that do not belong together.
    """
    model, tokenizer, _ = load_with_adapters(path, ())
    return model.to(device=device, dtype=dtype), tokenizer


def load_with_adapters(path: Path, adapters: Sequence[Path]) -> "tuple[Transformer, Tokenizer, Adapters]":
    """Return (model, tokenizer, adapters to switch between) of a base, or of an adapter on the base that it names.

    The first adapter is on; they are named as their runs, or their directories. The model is float32, in evaluation
    mode. Raises CheckpointError as `load` does.
    """
    from minimind.model.transformer import Transformer

    directories = [resolve(path), *map(resolve, adapters)]
    if not is_adapter(directories[0]):
        base = directories.pop(0)
    elif is_adapter(base := resolve(base_directory(read_adapter(directories[0])))):
        raise CheckpointError(f"{path}: an adapter on {base}, which is an adapter itself")
    config, model_state, tokenizer = _read(base, is_scalar=False)
    model = Transformer(config)
    model.load_disk_state_dict(model_state)
    known = Adapters(model.eval())
    sha256 = sha256_of_weights(model) if directories else ""
    for directory in directories:
        if not is_adapter(directory):
            raise CheckpointError(f"{directory}: a model, not an adapter; give it first, as the one to talk with")
        folder = directory.resolve()
        name = (folder.parent.parent if folder.parent.name == "checkpoints" else folder).name
        while name in known.names:
            name += "-2"
        put_on(known, read_adapter(directory), name, base=base, sha256=sha256, tokenizer=tokenizer)
    known.use(next(iter(known.names), None))
    return model, tokenizer, known


def load_reward_model(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> "tuple[ScalarModel, Tokenizer]":
    """Return (reward model in evaluation mode, tokenizer) of a run, a checkpoint or a Transformers directory.

    Raises CheckpointError as `load` does, and for a language model.
    """
    from minimind.model.heads import ScalarModel

    config, model_state, tokenizer = _read(resolve(path), is_scalar=True)
    model = ScalarModel(config)
    model.load_disk_state_dict(model_state)
    return model.to(device=device, dtype=dtype).eval(), tokenizer


def _read(directory: Path, *, is_scalar: bool) -> "tuple[ModelConfig, dict[str, Tensor], Tokenizer]":
    """Return (config, float32 weights as on disk, tokenizer) of a model with or without a scalar head."""
    from minimind.model.heads import check_kind
    from minimind.tokenizer.bpe import Tokenizer

    if is_ours(directory):
        saved = read(directory)
        sha256, config, model_state = saved.tokenizer_sha256, saved.model_config, saved.model_state
    else:
        sha256, config = None, read_config(directory)
        model_state = _read_transformers(directory, is_tied=config.tie_word_embeddings)
    check_kind(read_json(directory / CONFIG), is_scalar=is_scalar, where=str(directory))
    tokenizer = Tokenizer.load(directory)
    if sha256 not in (None, tokenizer.sha256):
        raise CheckpointError(f"{directory}: trained with tokenizer {sha256[:12]}, holds {tokenizer.sha256[:12]}")
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(f"{directory}: {tokenizer.vocab_size} tokens, but a model for {config.vocab_size}")
    return config, {name: tensor.float() for name, tensor in model_state.items()}, tokenizer


def _read_transformers(path: Path, *, is_tied: bool) -> dict[str, Tensor]:
    """Return the weights of a Transformers directory, sharded or not, without what is written twice or recomputed."""
    names = {MODEL}
    if not (path / MODEL).exists():
        weight_map = read_json(path / INDEX).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set[Any]()
        if not names or any(Path(str(name)).name != name for name in names):
            raise CheckpointError(f"{path / INDEX}: no usable weight_map")
    state = {key: tensor for name in sorted(names) for key, tensor in read_tensors(path / name).items()}
    head, embedding = state.get("lm_head.weight"), state.get("model.embed_tokens.weight")
    if is_tied and head is not None and embedding is not None and torch.equal(head, embedding):
        del state["lm_head.weight"]
    return {key: tensor for key, tensor in state.items() if not key.endswith("rotary_emb.inv_freq")}


def _nothing(path: Path, why: str) -> CheckpointError:
    """Return the error that names the runs near `path`."""
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    runs = sorted(folder.parent for folder in (*parent.glob("*/checkpoints"), *parent.glob("*/*/checkpoints")))
    runs.sort(key=lambda run: SequenceMatcher(None, run.name, path.name).ratio(), reverse=True)
    nearby = f"Runs near it: {', '.join(map(str, runs[:8]))}" if runs else f"There is no run in {parent} either"
    return CheckpointError(f"{path}: {why}. {nearby}")
