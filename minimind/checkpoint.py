"""The checkpoint directory: written atomically, verified whenever read, pruned without ever losing the last good one.

    RUN/checkpoints/step-000500/{model.safetensors, optimizer.safetensors, state.json, config.json,
                                 tokenizer files, MANIFEST.json}
    RUN/latest -> checkpoints/step-000500

Everything is safetensors or JSON; no pickle is read or written. The directory is a Transformers directory as it stands.
A checkpoint appears by one rename of a complete, fsynced sibling, so there is never a half one under a visible name.
It does not know what the optimizer's tensors or the loop's state mean, nor when a checkpoint is due.
"""

import errno
import hashlib
import json
import re
import shutil
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minimind.errors import CheckpointError, ConfigError, OutOfResourcesError
from minimind.model.config import ModelConfig
from minimind.runtime.faults import fault_point
from minimind.runtime.integrity import fsync, read_json, read_tensors, sha256_of_file
from minimind.runtime.log import get_logger

if TYPE_CHECKING:
    from minimind.model.transformer import Transformer
    from minimind.tokenizer.bpe import Tokenizer

FORMAT = 1
MODEL, OPTIMIZER, STATE, CONFIG = "model.safetensors", "optimizer.safetensors", "state.json", "config.json"
TOKENIZER, MANIFEST, INDEX = "tokenizer.json", "MANIFEST.json", "model.safetensors.index.json"
SMALL, LARGE = (CONFIG, STATE, TOKENIZER), (MODEL, OPTIMIZER)

FAULT_POINTS = (
    "start", "temporary-made", "model-written", "optimizer-written", "state-written", "config-written",
    "tokenizer-written", "manifest-written", "synced", "old-moved", "renamed", "parent-synced", "latest-moved",
    "prune-renamed", "pruned",
)  # fmt: skip
"""Every place inside `save` where a test may crash the process (`runtime/faults`)."""

_log = get_logger("checkpoint")
_VISIBLE = re.compile(r"step-(\d{6,})")
_REPLACED = re.compile(r"\.replaced-step-(\d{6,})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint, read into CPU memory."""

    path: Path
    step: int
    model_config: ModelConfig
    model_state: dict[str, Tensor]
    """By Hugging Face name, as `Transformer.load_disk_state_dict` takes it."""
    optimizer_state: dict[str, Tensor]
    state: dict[str, Any]
    """What the loop gave to `save`, and `step`, `tokenizer_sha256`, `format`."""
    tokenizer_sha256: str


def save(
    run_dir: Path,
    step: int,
    *,
    model: "Transformer",
    model_config: ModelConfig,
    tokenizer: "Tokenizer",
    optimizer_state: dict[str, Tensor],
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write checkpoint `step` of a run, move `latest` to it, prune down to `keep`, and return its directory.

    Only one process of a run may save. Raises OutOfResourcesError, which names the bytes needed, when the disk is full
    or cannot be written; the earlier checkpoints are then untouched and no partial one is visible.
    """
    parent = Path(run_dir) / "checkpoints"
    target = parent / f"step-{step:06d}"
    temporary = parent / f".partial-{target.name}"
    model_state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict_for_disk().items()}
    optimizer_state = {name: tensor.detach().cpu().contiguous() for name, tensor in optimizer_state.items()}
    state_text = json.dumps({**state, "step": step, "format": FORMAT, "tokenizer_sha256": tokenizer.sha256})
    num_bytes = sum(tensor.nbytes for tensor in (*model_state.values(), *optimizer_state.values()))
    needed = num_bytes + len(state_text) + (4 << 20)  # headers, the tokenizer and the small files
    fault_point("start")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(parent)
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"only {free:,} bytes are free")
        temporary.mkdir()
        fault_point("temporary-made")
        save_file(model_state, temporary / MODEL, metadata={"format": "pt"})
        fault_point("model-written")
        save_file(optimizer_state, temporary / OPTIMIZER, metadata={"format": "pt"})
        fault_point("optimizer-written")
        (temporary / STATE).write_text(state_text, encoding="utf-8")
        fault_point("state-written")
        (temporary / CONFIG).write_text(json.dumps(model_config.to_hf(), indent=2) + "\n", encoding="utf-8")
        fault_point("config-written")
        tokenizer.save(temporary, model_max_length=model_config.max_position_embeddings)
        fault_point("tokenizer-written")
        files = sorted(temporary.iterdir())
        entries = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)} for path in files}
        (temporary / MANIFEST).write_bytes(_manifest_bytes(step, entries))
        fault_point("manifest-written")
        for path in (*files, temporary / MANIFEST, temporary):
            fsync(path)
        fault_point("synced")
        _replace(temporary, target)
        fault_point("renamed")
        fsync(parent)
        fault_point("parent-synced")
        _point_latest(Path(run_dir), target)
        fault_point("latest-moved")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutOfResourcesError(
            f"{target}: could not be written, it needs {needed:,} bytes: {error}. Earlier checkpoints are untouched. "
            f"Free the space or make the directory writable; the same command resumes from the newest checkpoint"
        ) from error
    _prune(Path(run_dir), max(2, keep))
    fault_point("pruned")
    return target


def _replace(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`; a directory already there keeps a readable name until the new one stands."""
    old = target.with_name(f".replaced-{target.name}")
    if target.exists():
        target.rename(old)
        fault_point("old-moved")
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _point_latest(run_dir: Path, target: Path) -> None:
    fresh = run_dir / ".latest-partial"
    try:
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target.relative_to(run_dir), target_is_directory=True)
        fresh.replace(run_dir / "latest")
    except OSError as error:  # a file system without symlinks: only people read the link
        _log.warning("%s/latest could not be moved to %s: %s", run_dir, target.name, error)
    fsync(run_dir)


def _clear_leftovers(parent: Path) -> None:
    """Remove what a crashed save or prune left behind; a replaced checkpoint without successor gets its name back."""
    for path in parent.glob(".*-step-*"):
        target = path.with_name("step-" + path.name.rpartition("-")[2])
        if _REPLACED.fullmatch(path.name) and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=not path.name.startswith(".partial-"))


def _prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, but never the newest that verifies; failing deletes are logged."""
    newest_first = checkpoints_of(run_dir)
    surplus = newest_first[keep:]
    if surplus and all(verify(path) for path in newest_first[:keep]):
        rescued = next((path for path in surplus if not verify(path)), None)
        _log.warning("%s: none of the newest %d checkpoints is good; keeping %s too", run_dir, keep, rescued)
        surplus = [path for path in surplus if path != rescued] if rescued else []
    for path in surplus:
        doomed = path.with_name(f".deleted-{path.name.removeprefix('.replaced-')}")
        try:
            path.rename(doomed)
            fault_point("prune-renamed")
            shutil.rmtree(doomed)
        except OSError as error:
            _log.warning("%s: an old checkpoint could not be deleted, training goes on: %s", path, error)


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Return the checkpoint directories of a run, newest first, unverified."""
    found: dict[int, Path] = {}
    parent = Path(run_dir) / "checkpoints"
    for pattern in (_REPLACED, _VISIBLE):  # a visible one wins over the one it was to replace
        for path in parent.iterdir() if parent.is_dir() else ():
            if match := pattern.fullmatch(path.name):
                found[int(match[1])] = path
    return [found[step] for step in sorted(found, reverse=True)]


def verify(path: Path) -> list[str]:
    """Return what is wrong with a checkpoint directory, one sentence each; empty when every byte is as written."""
    return _small_problems(Path(path)) or _large_problems(Path(path))


def find_latest(run_dir: Path) -> Path | None:
    """Return a run's newest checkpoint that verifies, None where there is none at all; what is passed over is logged.

    Raises CheckpointError when there are checkpoints and every one is bad.
    """
    reasons: list[str] = []
    for path in checkpoints_of(run_dir):
        problems = verify(path)
        if not problems:
            return path
        reasons += problems
        _log.warning("%s is passed over: %s", path, "; ".join(problems))
    if reasons:
        raise CheckpointError(
            f"{run_dir}: every checkpoint is bad, nothing was changed: {'; '.join(reasons)}. "
            f"Restore one from a copy, or start again with --fresh, which moves them aside"
        )
    return None


def read(path: Path) -> Checkpoint:
    """Return the checkpoint in directory `path`. Raises CheckpointError when any byte differs from what was written."""
    path = Path(path)
    problems = verify(path)
    if problems:
        others = [other.name for other in checkpoints_of(path.parent.parent) if other.name != path.name]
        advice = f"name another ({', '.join(others)}) or the run itself" if others else "restore it from a copy"
        raise CheckpointError(f"{'; '.join(problems)}. It is not loaded: {advice}")
    return _read_verified(path)


def check_identity(run_dir: Path, *, tokenizer_sha256: str, model_config: ModelConfig) -> None:
    """Raise CheckpointError if a run's checkpoints are of another tokenizer or model; no large file is read."""
    for path in checkpoints_of(run_dir):
        if _small_problems(path):
            continue
        saved, sha256 = _read_config(path), str(read_json(path / STATE)["tokenizer_sha256"])
        length, theirs, ours = saved.original_max_position_embeddings, saved.to_hf(), model_config.to_hf()
        keys = [key for key in ours | theirs if theirs.get(key) != ours.get(key)]
        found = [f"{key} {theirs.get(key)}, here {ours.get(key)}" for key in keys]
        what = "of another model: "
        if sha256 != tokenizer_sha256:
            found.append(f"tokenizer {sha256[:12]}, here {tokenizer_sha256[:12]}")
        elif found and replace(model_config, original_max_position_embeddings=length).to_hf() == theirs:
            what, found = "", [f"data.row_length was {length} and is {model_config.original_max_position_embeddings}"]
        if found:
            raise CheckpointError(f"{path}: {what}{'; '.join(found)}. Give the same, or add --fresh")


def read_latest(run_dir: Path, *, tokenizer_sha256: str, model_config: ModelConfig) -> Checkpoint | None:
    """Return a run's newest good checkpoint as `find_latest` finds it, to be resumed with this tokenizer and model.

    Raises CheckpointError as `check_identity` does, before any large file is read, and as `find_latest` does.
    """
    check_identity(run_dir, tokenizer_sha256=tokenizer_sha256, model_config=model_config)
    path = find_latest(run_dir)
    return _read_verified(path) if path else None


def _read_verified(path: Path) -> Checkpoint:
    state = read_json(path / STATE)
    tensors, sha256 = (read_tensors(path / MODEL), read_tensors(path / OPTIMIZER)), str(state["tokenizer_sha256"])
    return Checkpoint(path, int(state["step"]), _read_config(path), *tensors, state, sha256)


def _small_problems(path: Path) -> list[str]:
    try:
        files = _read_manifest(path)
        missing = [f"{path / name}: not in {MANIFEST}" for name in (*SMALL, *LARGE) if name not in files]
        wrong = [_file_problem(path / name, entry) for name, entry in files.items() if name not in LARGE]
        if not any((*missing, *wrong)):
            _read_config(path)
        return [text for text in (*missing, *wrong) if text]
    except CheckpointError as error:
        return [str(error)]


def _large_problems(path: Path) -> list[str]:
    files = _read_manifest(path)
    return [text for name in LARGE if (text := _file_problem(path / name, files[name]))]


def _file_problem(path: Path, entry: dict[str, Any]) -> str:
    """Return what is wrong with one file, "" if nothing."""
    if not path.is_file():
        return f"{path}: missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path}: {size:,} bytes, written with {entry['bytes']:,}"
    return "" if sha256_of_file(path) == entry["sha256"] else f"{path}: its bytes are not those written (sha256)"


def _manifest_bytes(step: int, files: dict[str, dict[str, Any]]) -> bytes:
    body: dict[str, Any] = {"files": files, "format": FORMAT, "step": step}
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Return {file name: {bytes, sha256}}. Raises CheckpointError unless the manifest is byte for byte as written."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: {'is not a directory' if path.exists() else 'does not exist'}")
    try:
        body = read_json(path / MANIFEST)
        step, files = int(body["step"]), dict(body["files"])
        is_as_written = _manifest_bytes(step, files) == (path / MANIFEST).read_bytes()
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST}: malformed: {error}") from error
    if not is_as_written or any(Path(name).name != name for name in files):
        raise CheckpointError(f"{path / MANIFEST}: altered since it was written, or not of format {FORMAT}")
    match = _VISIBLE.fullmatch(path.name)
    if match and int(match[1]) != step:
        raise CheckpointError(f"{path}: holds the files of step {step}")
    return files


def _read_config(path: Path) -> ModelConfig:
    try:
        return ModelConfig.from_hf(read_json(path / CONFIG))
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path / CONFIG}: not a model this package knows: {error}") from error


def resolve(path: Path) -> Path:
    """Return the directory to read for a run, a run's `checkpoints`, a checkpoint or a Transformers directory.

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
    if _is_ours(path) or ((path / CONFIG).exists() and ((path / MODEL).exists() or (path / INDEX).exists())):
        return path
    if any((*path.glob("*.bin"), *path.glob("*.pt*"))):
        raise _nothing(path, "holds only pickled weights, which are not read; save them as safetensors")
    raise _nothing(path, "is neither a run, nor a checkpoint, nor a Transformers directory")


def load(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> "tuple[Transformer, Tokenizer]":
    """Return (model in evaluation mode, tokenizer) of a run, a checkpoint or a Transformers directory.

    Raises CheckpointError: nothing there, corrupt, or model and tokenizer do not belong together.
    """
    from minimind.model.transformer import Transformer
    from minimind.tokenizer.bpe import Tokenizer

    directory = resolve(path)
    if _is_ours(directory):
        saved = read(directory)
        sha256, config, model_state = saved.tokenizer_sha256, saved.model_config, saved.model_state
    else:
        sha256, config = None, _read_config(directory)
        model_state = _read_transformers(directory, is_tied=config.tie_word_embeddings)
    tokenizer = Tokenizer.load(directory)
    if sha256 not in (None, tokenizer.sha256):
        raise CheckpointError(f"{directory}: trained with tokenizer {sha256[:12]}, holds {tokenizer.sha256[:12]}")
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(f"{directory}: {tokenizer.vocab_size} tokens, but a model for {config.vocab_size}")
    model = Transformer(config)
    model.load_disk_state_dict({name: tensor.float() for name, tensor in model_state.items()})
    return model.to(device=device, dtype=dtype).eval(), tokenizer


def _is_ours(path: Path) -> bool:
    """Whether a directory is (or was, before its manifest was lost) a checkpoint: it is then verified, or refused."""
    return (path / MANIFEST).exists() or (path / STATE).exists() or _VISIBLE.fullmatch(path.name) is not None


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
