"""Devices, precisions and memory; the GPU's half runs where there is one."""

import subprocess
import sys

import pytest
import torch

from minimind.errors import ConfigError
from minimind.runtime import device as devices
from minimind.runtime.device import LARGE_ON_CPU, autocast, peak_memory_bytes, pick_device, pick_dtype

CPU = torch.device("cpu")


def test_pick_device() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else pick_device().type)
    with pytest.raises(ConfigError, match="device 'gpu' is not known: use auto, cpu, cuda"):
        pick_device("gpu")
    with pytest.raises(ConfigError, match=r"device 'meta' is not supported"):
        pick_device("meta")
    with pytest.raises(ConfigError, match=r"device 'cuda:99': PyTorch sees \d+ CUDA devices"):
        pick_device("cuda:99")


def test_local_rank_chooses_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 3)
    assert pick_device("cuda:1") == torch.device("cuda", 1)


def test_pick_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_dtype("bf16", CPU) is pick_dtype("bfloat16", CPU) is torch.bfloat16
    assert pick_dtype("fp16", CPU) is torch.float16
    with pytest.raises(ConfigError, match="dtype 'int8' is not known: use auto, float32"):
        pick_dtype("int8", CPU)
    monkeypatch.setattr(devices, "has_native_bfloat16", lambda: True)
    assert pick_dtype("auto", CPU, num_parameters=LARGE_ON_CPU - 1) is torch.float32
    assert pick_dtype("auto", CPU, num_parameters=LARGE_ON_CPU) is torch.bfloat16
    monkeypatch.setattr(devices, "has_native_bfloat16", lambda: False)
    assert pick_dtype("auto", CPU, num_parameters=LARGE_ON_CPU) is torch.float32


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_pick_dtype_on_a_gpu(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert pick_dtype("auto", torch.device("cuda")) is expected


def test_autocast_multiplies_in_the_dtype_and_keeps_float32_alone() -> None:
    x = torch.ones(2, 2)
    with autocast(CPU, torch.bfloat16):
        assert (x @ x).dtype is torch.bfloat16
        with autocast(CPU, torch.float32):
            pass
    with autocast(CPU, torch.float32):
        assert (x @ x).dtype is torch.float32


def test_peak_memory_is_a_high_water_mark_of_this_process_only() -> None:
    ballast = bytearray(300 << 20)  # forces the parent's mark up; a child must not inherit it
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])
    here = peak_memory_bytes(CPU)
    assert here > 300 << 20
    del ballast
    assert peak_memory_bytes(CPU) > 300 << 20
    code = (
        "import torch; from minimind.runtime.device import peak_memory_bytes as p; c = torch.device('cpu'); a = p(c)\n"
        "x = torch.ones(50 << 18); print(a, p(c))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(int, shown.split())
    assert 40 << 20 < after - before < 80 << 20
    assert before < here


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_the_gpu() -> None:
    device = pick_device("cuda")
    before = peak_memory_bytes(device)
    x = torch.ones(50 << 18, device=device)
    assert peak_memory_bytes(device) >= before
    assert peak_memory_bytes(device) >= x.nbytes
