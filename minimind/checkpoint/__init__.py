"""The checkpoint: a directory on disk (`directory`, `adapter`), and what can be started from (`loading`)."""

from minimind.checkpoint.adapter import base_directory, base_of, check_same_adapter, is_adapter, read_adapter
from minimind.checkpoint.directory import (
    FAULT_POINTS,
    Checkpoint,
    check_identity,
    checkpoints_of,
    find_latest,
    read,
    read_latest,
    save,
    verify,
)
from minimind.checkpoint.loading import load, load_reward_model, load_with_adapters, resolve

__all__ = [
    "FAULT_POINTS",
    "Checkpoint",
    "base_directory",
    "base_of",
    "check_identity",
    "check_same_adapter",
    "checkpoints_of",
    "find_latest",
    "is_adapter",
    "load",
    "load_reward_model",
    "load_with_adapters",
    "read",
    "read_adapter",
    "read_latest",
    "resolve",
    "save",
    "verify",
]
