"""The checkpoint directory: written atomically, verified whenever read, pruned without ever losing the last good one.

    RUN/checkpoints/step-000500/{model.safetensors, optimizer.safetensors, state.json, config.json,
                                 tokenizer files, MANIFEST.json}
    RUN/latest -> checkpoints/step-000500

Everything is safetensors or JSON; no pickle is read or written. The directory is a Transformers directory as it stands.
Which files the weights are, the model says (`model/weights.py`): an adapter's and a critic's are named otherwise.
A checkpoint appears by one rename of a complete, fsynced sibling, so there is never a half one under a visible name.
It does not know what the optimizer's tensors or the loop's state mean, nor when a checkpoint is due.
"""

import errno
import hashlib
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minimind.errors import CheckpointError, ConfigError, OutOfResourcesError
from minimind.model.config import ModelConfig
from minimind.model.disk import MODEL
from minimind.runtime.faults import fault_point
from minimind.runtime.integrity import fsync, read_json, read_tensors, sha256_of_file
from minimind.runtime.log import get_logger

if TYPE_CHECKING:
    from minimind.model.weights import WeightsOnDisk
    from minimind.tokenizer.bpe import Tokenizer

FORMAT = 1
OPTIMIZER, STATE, CONFIG, TOKENIZER = "optimizer.safetensors", "state.json", "config.json", "tokenizer.json"
MANIFEST, TENSORS = "MANIFEST.json", ".safetensors"
REQUIRED = (CONFIG, STATE, TOKENIZER, OPTIMIZER)
"""Beside these a checkpoint has at least one file of weights."""

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
    files: dict[str, dict[str, Tensor]]
    """The weights: file name -> name -> tensor, as `WeightsOnDisk.load_files` takes them."""
    optimizer_state: dict[str, Tensor]
    state: dict[str, Any]
    """What the loop gave to `save`, and `step`, `tokenizer_sha256`, `format`."""
    tokenizer_sha256: str

    @property
    def model_state(self) -> dict[str, Tensor]:
        """The language model's weights by Hugging Face name; empty where the checkpoint has none (an adapter's)."""
        return self.files.get(MODEL, {})


def save(
    run_dir: Path,
    step: int,
    *,
    model: "WeightsOnDisk",
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
    files = {name: _on_cpu(tensors) for name, tensors in model.files_for_disk().items()}
    optimizer_state = _on_cpu(optimizer_state)
    texts = {CONFIG: json.dumps(model_config.to_hf(), indent=2) + "\n"} | model.texts_for_disk()
    state_text = json.dumps({**state, "step": step, "format": FORMAT, "tokenizer_sha256": tokenizer.sha256})
    num_bytes = sum(tensor.nbytes for tensors in (*files.values(), optimizer_state) for tensor in tensors.values())
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
        for name, tensors in files.items():
            save_file(tensors, temporary / name, metadata={"format": "pt"})
        fault_point("model-written")
        save_file(optimizer_state, temporary / OPTIMIZER, metadata={"format": "pt"})
        fault_point("optimizer-written")
        (temporary / STATE).write_text(state_text, encoding="utf-8")
        fault_point("state-written")
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        fault_point("config-written")
        tokenizer.save(temporary, model_max_length=model_config.max_position_embeddings)
        fault_point("tokenizer-written")
        paths = sorted(temporary.iterdir())
        entries = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)} for path in paths}
        (temporary / MANIFEST).write_bytes(_manifest_bytes(step, entries))
        fault_point("manifest-written")
        for path in (*paths, temporary / MANIFEST, temporary):
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


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


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
        saved, sha256 = read_config(path), str(read_json(path / STATE)["tokenizer_sha256"])
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
    names = [name for name in _read_manifest(path) if name.endswith(TENSORS) and name != OPTIMIZER]
    return Checkpoint(
        path,
        int(state["step"]),
        read_config(path),
        {name: read_tensors(path / name) for name in names},
        read_tensors(path / OPTIMIZER),
        state,
        str(state["tokenizer_sha256"]),
    )


def _small_problems(path: Path) -> list[str]:
    try:
        files = _read_manifest(path)
        missing = [f"{path / name}: not in {MANIFEST}" for name in REQUIRED if name not in files]
        if not any(name.endswith(TENSORS) and name != OPTIMIZER for name in files):
            missing.append(f"{path}: no file of weights in {MANIFEST}")
        wrong = [_file_problem(path / name, entry) for name, entry in files.items() if not name.endswith(TENSORS)]
        if not any((*missing, *wrong)):
            read_config(path)
        return [text for text in (*missing, *wrong) if text]
    except CheckpointError as error:
        return [str(error)]


def _large_problems(path: Path) -> list[str]:
    large = {name: entry for name, entry in _read_manifest(path).items() if name.endswith(TENSORS)}
    return [text for name, entry in large.items() if (text := _file_problem(path / name, entry))]


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


def read_config(path: Path) -> ModelConfig:
    """Return the model's configuration in directory `path`. Raises CheckpointError when there is none that is known."""
    try:
        return ModelConfig.from_hf(read_json(path / CONFIG))
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path / CONFIG}: not a model this package knows: {error}") from error


def is_ours(path: Path) -> bool:
    """Whether a directory is (or was, before its manifest was lost) a checkpoint: it is then verified, or refused."""
    return (path / MANIFEST).exists() or (path / STATE).exists() or _VISIBLE.fullmatch(path.name) is not None
