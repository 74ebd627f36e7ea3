"""Bytes that can be trusted: hashes, fsync, and bounded reading of JSON and safetensors. It knows no file's meaning."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minimind.errors import CheckpointError

MAX_JSON_BYTES = 256 << 20
MAX_HEADER_BYTES = 100 << 20
"""Larger claims are not parsed: no file of ours or of Transformers comes near."""


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_tensors(*states: dict[str, Tensor]) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes of dictionaries of tensors: equal only if all bits are."""
    digest = hashlib.sha256()
    for state in states:
        for name in sorted(state):
            tensor = state[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk before anything after this call is."""
    # Some systems can neither open nor fsync a directory; a file that cannot be is an error.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises CheckpointError: missing, unreadable, too large, or something else."""
    try:
        size = path.stat().st_size
        content = json.loads(path.read_bytes()) if size <= MAX_JSON_BYTES else None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: {size:,} bytes that are not a JSON object of sensible size")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises CheckpointError; the header is measured before it is parsed."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path}: its header claims {header_bytes:,} of {size:,} bytes; not a whole safetensors file"
            )
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
