"""What every test may use: one thread per process, annotations checked at run time, the optional outside data."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two test processes on two cores must not fight for them
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["COLUMNS"] = "80"

import jaxtyping
import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Tensors' shapes and dtypes are part of these rooms' contracts, so every call in every test checks them.
jaxtyping.install_import_hook(["minimind.batch", "minimind.model", "minimind.objectives"], "typecheck.check")

ROOT = Path(__file__).resolve().parent.parent


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their length: two test processes must agree on names, and a compressed file may hold the time."""
    return f"{argname}:{len(val)} bytes" if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def unchecked_when_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop checking annotations for the rest of a test that calls torch.compile, which cannot trace the checks."""
    compile_ = torch.compile

    def compile_unchecked(*args: Any, **options: Any) -> Any:
        jaxtyping.config.update("jaxtyping_disable", True)
        return compile_(*args, **options)

    monkeypatch.setattr(torch, "compile", compile_unchecked)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


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
