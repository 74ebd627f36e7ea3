"""What every test may use: one thread per process, types checked at run time, the optional outside data."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two test processes on two cores must not fight for them
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("COLUMNS", "80")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def public_data() -> Path:
    """The folder of real texts that some tests read; skips where it is not there."""
    folder = Path(os.environ.get("MINIMIND_PUBLIC_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("needs real texts: set MINIMIND_PUBLIC_DATA to their folder")
    return folder
