"""The checkpoint: a directory on disk (`directory`), and what can be started from (`loading`)."""

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
from minimind.checkpoint.loading import load, load_reward_model, resolve

__all__ = [
    "FAULT_POINTS",
    "Checkpoint",
    "check_identity",
    "checkpoints_of",
    "find_latest",
    "load",
    "load_reward_model",
    "read",
    "read_latest",
    "resolve",
    "save",
    "verify",
]
