"""The checkpoint directory: written atomically, verified whenever it is read, pruned without ever losing the last good one.

    RUN/checkpoints/step-000500/{model.safetensors, optimizer.safetensors, state.json, config.json,
                                 tokenizer files, MANIFEST.json}
    RUN/latest -> checkpoints/step-000500

Everything is safetensors or JSON; no pickle is read or written. The directory is a Transformers directory as it stands.
A checkpoint appears by one rename of a complete, fsynced sibling, so there is never a half one under a visible name.
It does not know what the optimizer's tensors or the loop's state mean, nor when a checkpoint is due.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimind.errors import CheckpointError, ConfigError, OutOfResourcesError
from minimind.model.config import ModelConfig
from minimind.runtime.log import get_logger

if TYPE_CHECKING:
    from minimind.model.transformer import Transformer
    from minimind.tokenizer.bpe import Tokenizer

FORMAT = 1
MODEL, OPTIMIZER, STATE, CONFIG = "model.safetensors", "optimizer.safetensors", "state.json", "config.json"
TOKENIZER, MANIFEST, INDEX = "tokenizer.json", "MANIFEST.json", "model.safetensors.index.json"
REQUIRED = (CONFIG, STATE, TOKENIZER, MODEL, OPTIMIZER)
MAX_JSON_BYTES, MAX_HEADER_BYTES = 256 << 20, 100 << 20
RESUMES = "The same training command resumes from the newest good checkpoint."

FAULT_POINTS = (
    "start", "temporary-made", "model-written", "optimizer-written", "state-written", "config-written",
    "tokenizer-written", "manifest-written", "synced", "old-moved", "renamed", "parent-synced", "latest-moved",
    "prune-renamed", "pruned",
)  # fmt: skip
"""Every place inside `save` where a test may crash the process."""

fault_hook: Callable[[str], None] | None = None
"""Called at each fault point when set. The environment variable MINIMIND_FAULT=NAME[:N] kills the process at its N-th."""

_log = get_logger("checkpoint")
_passed: Counter[str] = Counter()
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


def fault_point(name: str) -> None:
    """Give tests the chance to crash here."""
    if fault_hook is not None:
        fault_hook(name)
    wanted = os.environ.get("MINIMIND_FAULT")
    if wanted:
        _passed[name] += 1
        point, _, count = wanted.partition(":")
        if point == name and _passed[name] == int(count or "1"):
            os.kill(os.getpid(), signal.SIGKILL)


# --- writing ---------------------------------------------------------------------------------------------------------


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
    run_dir = Path(run_dir)
    parent = run_dir / "checkpoints"
    target = parent / f"step-{step:06d}"
    temporary = parent / f".partial-{target.name}"
    model_state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict_for_disk().items()}
    optimizer_state = {name: tensor.detach().cpu().contiguous() for name, tensor in optimizer_state.items()}
    identity = {"step": step, "format": FORMAT, "tokenizer_sha256": tokenizer.sha256}
    state_text = json.dumps({**state, **identity})
    tensors = [*model_state.values(), *optimizer_state.values()]
    needed = sum(tensor.nbytes for tensor in tensors) + len(state_text) + (4 << 20)
    fault_point("start")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(parent)
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{free:,} bytes are free")
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
        files = sorted(path for path in temporary.iterdir() if path.is_file())
        entries = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
        (temporary / MANIFEST).write_bytes(_manifest_bytes(step, entries))
        fault_point("manifest-written")
        for path in (*files, temporary / MANIFEST, temporary):
            _fsync(path)
        fault_point("synced")
        _replace(temporary, target)
        fault_point("renamed")
        _fsync(parent)
        fault_point("parent-synced")
        _point_latest(run_dir, target)
        fault_point("latest-moved")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutOfResourcesError(
            f"{target}: could not be written ({error}); it needs {needed:,} bytes. "
            f"Earlier checkpoints are untouched. Free the space or make the directory writable. {RESUMES}"
        ) from error
    _prune(run_dir, keep)
    fault_point("pruned")
    return target


def _replace(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`; a directory already there keeps a readable name until the new one stands."""
    old = target.with_name(f".replaced-{target.name}")
    if target.exists():
        target.rename(old)
        fault_point("old-moved")
    temporary.rename(target)
    if old.exists():
        shutil.rmtree(old, ignore_errors=True)


def _point_latest(run_dir: Path, target: Path) -> None:
    link, fresh = run_dir / "latest", run_dir / ".latest-partial"
    fresh.unlink(missing_ok=True)
    try:
        fresh.symlink_to(target.relative_to(run_dir), target_is_directory=True)
        fresh.replace(link)
    except OSError as error:  # a file system without symlinks: nothing reads the link but people
        _log.warning("%s could not be moved to %s: %s", link, target.name, error)
        return
    _fsync(run_dir)


def _clear_leftovers(parent: Path) -> None:
    """Remove what a crashed save or prune left behind; a replaced checkpoint without successor gets its name back."""
    for path in parent.glob(".*-step-*"):
        target = path.with_name("step-" + path.name.rpartition("-")[2])
        if _REPLACED.fullmatch(path.name) and not target.exists():
            path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    for path in parent.glob(".partial-*"):
        if path.exists():
            raise OSError(errno.EACCES, f"{path} is left over from an earlier save and cannot be removed")


def _prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, but never the newest that verifies; failing deletes are logged."""
    newest_first = checkpoints_of(run_dir)
    kept, surplus = newest_first[: max(2, keep)], newest_first[max(2, keep) :]
    if not surplus:
        return
    if not any(not verify(path) for path in kept):
        rescued = next((path for path in surplus if not verify(path)), None)
        _log.warning("%s: none of the newest %d checkpoints is good; keeping %s", run_dir, len(kept), rescued)
        surplus = [path for path in surplus if path != rescued] if rescued else []
    for path in surplus:
        doomed = path.with_name(f".deleted-{path.name.lstrip('.')}")
        try:
            path.rename(doomed)
            fault_point("prune-renamed")
            shutil.rmtree(doomed)
        except OSError as error:
            _log.warning("%s: an old checkpoint could not be deleted (%s); training goes on", path, error)


# --- reading ---------------------------------------------------------------------------------------------------------


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
    return next((problems for problems in _check(Path(path)) if problems), [])


def _check(path: Path) -> Iterator[list[str]]:
    """Yield the problems of the small files, then those of the large ones."""
    try:
        files = _read_manifest(path)
    except CheckpointError as error:
        yield [str(error)]
        return
    large = {MODEL, OPTIMIZER}
    yield [f"{path / name}: not in {MANIFEST}" for name in REQUIRED if name not in files]
    yield [text for name in sorted(files.keys() - large) if (text := _check_file(path / name, files[name]))]
    try:
        _read_config(path)
        _read_json(path / STATE)
    except CheckpointError as error:
        yield [str(error)]
        return
    yield [text for name in sorted(files.keys() & large) if (text := _check_file(path / name, files[name]))]


def read(path: Path, *, tokenizer_sha256: str | None = None, model_config: ModelConfig | None = None) -> Checkpoint:
    """Return the checkpoint in directory `path`, verified.

    Raises CheckpointError when any byte differs from what was written, or when the tokenizer or the model is not the
    one given; that is found out before the large files are read.
    """
    path = Path(path)
    stages = _check(path)
    problems = next(stages, []) or next(stages, []) or next(stages, [])
    if not problems:
        state, config = _read_json(path / STATE), _read_config(path)
        _check_identity(path, state, config, tokenizer_sha256, model_config)
        problems = next(stages, [])
        if not problems:
            model_state, optimizer_state = _read_tensors(path / MODEL), _read_tensors(path / OPTIMIZER)
            return Checkpoint(
                path, int(state["step"]), config, model_state, optimizer_state, state, str(state["tokenizer_sha256"])
            )
    others = [other.name for other in checkpoints_of(path.parent.parent) if other != path]
    advice = f"Name another one ({', '.join(others)}) or the run itself." if others else "Restore it from a copy."
    raise CheckpointError("; ".join(problems) + f". {advice}")


def find_latest(run_dir: Path) -> Path | None:
    """Return the newest checkpoint of a run that verifies, None where there is none at all; why others are passed over is logged.

    Raises CheckpointError when there are checkpoints and every one is bad.
    """
    candidates = checkpoints_of(run_dir)
    reasons: list[str] = []
    for path in candidates:
        problems = verify(path)
        if not problems:
            return path
        reasons += problems
        _log.warning("%s is not used: %s", path, "; ".join(problems))
    if candidates:
        raise CheckpointError(
            f"{run_dir}: all {len(candidates)} checkpoints are bad, nothing was changed: {'; '.join(reasons)}. "
            f"Restore one from a copy, or start again with --fresh (which moves these aside)"
        )
    return None


def read_latest(run_dir: Path, *, tokenizer_sha256: str, model_config: ModelConfig) -> Checkpoint | None:
    """Return the newest good checkpoint of a run, as `find_latest` and `read` do, None where there is none.

    Raises CheckpointError within moments when the newest one belongs to another tokenizer or model.
    """
    for path in checkpoints_of(run_dir)[:1]:
        stages = _check(path)
        if not (next(stages, []) or next(stages, []) or next(stages, [])):
            _check_identity(path, _read_json(path / STATE), _read_config(path), tokenizer_sha256, model_config)
    found = find_latest(run_dir)
    return read(found, tokenizer_sha256=tokenizer_sha256, model_config=model_config) if found else None


def resolve(path: Path) -> Path:
    """Return the directory to read for a run, a run's `checkpoints`, a checkpoint or a Transformers directory.

    Raises CheckpointError when there is nothing to read, naming what exists nearby.
    """
    path = Path(path)
    if not path.is_dir():
        _nothing(path, "is a file, not a directory" if path.exists() else "does not exist")
    if (path / "checkpoints").is_dir() or path.name == "checkpoints":
        found = find_latest(path.parent if path.name == "checkpoints" else path)
        if found is None:
            _nothing(path, "has no checkpoint yet")
        return found
    if (path / MANIFEST).exists() or _VISIBLE.fullmatch(path.name) or (path / STATE).exists():
        return path  # ours, even if its manifest was lost: `read` refuses it then
    if (path / CONFIG).exists() and ((path / MODEL).exists() or (path / INDEX).exists()):
        return path
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        _nothing(path, "holds only pickled weights, which are never read; save them as safetensors")
    _nothing(path, "is neither a run, nor a checkpoint, nor a Transformers directory")


def load(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> "tuple[Transformer, Tokenizer]":
    """Return (model in evaluation mode, tokenizer) of a run, a checkpoint or a Transformers directory.

    Raises CheckpointError: nothing there, corrupt, or model and tokenizer do not belong together.
    """
    from minimind.model.transformer import Transformer
    from minimind.tokenizer.bpe import Tokenizer

    directory = resolve(path)
    if (directory / CONFIG).exists() and not _is_ours(directory):
        expected, config, model_state = None, _read_config(directory), _read_transformers(directory)
        if config.tie_word_embeddings and torch.equal(
            model_state.get("lm_head.weight", torch.empty(0)),
            model_state.get("model.embed_tokens.weight", torch.empty(1)),
        ):
            del model_state["lm_head.weight"]
    else:
        checkpoint = read(directory)
        expected, config, model_state = checkpoint.tokenizer_sha256, checkpoint.model_config, checkpoint.model_state
    tokenizer = Tokenizer.load(directory)
    if expected is not None and tokenizer.sha256 != expected:
        raise CheckpointError(
            f"{directory}: tokenizer {tokenizer.sha256[:12]} is not {expected[:12]} it was trained with"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{directory}: {tokenizer.vocab_size} tokens do not fit a vocabulary of {config.vocab_size}"
        )
    model = Transformer(config)
    model.load_disk_state_dict({name: tensor.float() for name, tensor in model_state.items()})
    return model.to(device=device, dtype=dtype).eval(), tokenizer


def state_hash(*states: dict[str, Tensor]) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes of dictionaries of tensors: equal only if all bits are."""
    digest = hashlib.sha256()
    for state in states:
        for name in sorted(state):
            tensor = state[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- one file --------------------------------------------------------------------------------------------------------


def _is_ours(path: Path) -> bool:
    return (path / MANIFEST).exists() or (path / STATE).exists() or _VISIBLE.fullmatch(path.name) is not None


def _manifest_bytes(step: int, files: dict[str, dict[str, Any]]) -> bytes:
    body: dict[str, Any] = {"files": files, "format": FORMAT, "step": step}
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Return {file name: {bytes, sha256}}. Raises CheckpointError unless the manifest is byte for byte as written."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: {'is not a directory' if path.exists() else 'does not exist'}")
    body = _read_json(path / MANIFEST)
    try:
        step, files = int(body["step"]), dict(body["files"])
        is_as_written = _manifest_bytes(step, files) == (path / MANIFEST).read_bytes()
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST}: malformed: {error}") from error
    if not is_as_written or any(Path(name).name != name for name in files):
        raise CheckpointError(f"{path / MANIFEST}: altered since it was written")
    match = _VISIBLE.fullmatch(path.name)
    if match and int(match[1]) != step:
        raise CheckpointError(f"{path}: holds step {step}, another checkpoint's files")
    return files


def _check_file(path: Path, entry: dict[str, Any]) -> str:
    """Return what is wrong with one file, "" if nothing."""
    if not path.is_file():
        return f"{path}: missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path}: {size:,} bytes, written with {entry['bytes']:,}"
    return "" if _sha256(path) == entry["sha256"] else f"{path}: its sha256 is not the one it was written with"


def _check_identity(
    path: Path,
    state: dict[str, Any],
    config: ModelConfig,
    tokenizer_sha256: str | None,
    model_config: ModelConfig | None,
) -> None:
    if tokenizer_sha256 is not None and state.get("tokenizer_sha256") != tokenizer_sha256:
        raise CheckpointError(
            f"{path}: trained with tokenizer {str(state.get('tokenizer_sha256'))[:12]}, but this run has "
            f"{tokenizer_sha256[:12]}; give the same tokenizer, or start again with --fresh"
        )
    if model_config is not None:
        theirs, ours = config.to_hf(), model_config.to_hf()
        differing = [
            f"{key} {theirs.get(key)} (here {ours.get(key)})"
            for key in ours | theirs
            if theirs.get(key) != ours.get(key)
        ]
        if differing:
            raise CheckpointError(
                f"{path}: another model: {', '.join(differing)}; give the same, or start again with --fresh"
            )


def _read_config(path: Path) -> ModelConfig:
    try:
        return ModelConfig.from_hf(_read_json(path / CONFIG))
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path / CONFIG}: not a model this package knows: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, too large to be what its name says")
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, whose header is checked before it is parsed."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise CheckpointError(f"{path}: its header claims {header_bytes:,} bytes; not a whole safetensors file")
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _read_transformers(directory: Path) -> dict[str, Tensor]:
    """Return the weights of a Transformers directory, sharded or not, without the buffers old versions wrote."""
    names = [MODEL]
    if not (directory / MODEL).exists():
        weight_map = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or any(Path(str(n)).name != n for n in weight_map.values()):
            raise CheckpointError(f"{directory / INDEX}: no usable weight_map")
        names = sorted(set(weight_map.values()))
    tensors = {name: tensor for file in names for name, tensor in _read_tensors(directory / file).items()}
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(handle)  # some network file systems refuse it for directories
    finally:
        os.close(handle)


def _nothing(path: Path, why: str) -> NoReturn:
    """Raise CheckpointError that names the runs and checkpoints near `path`."""
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    runs = sorted(folder.parent for folder in (*parent.glob("*/checkpoints"), *parent.glob("*/*/checkpoints")))
    nearby = f"Runs near it: {', '.join(map(str, runs[:8]))}" if runs else f"There is no run in {parent} either"
    raise CheckpointError(f"{path}: {why}. {nearby}")
