"""Where tensors live and in which precision they are multiplied. It knows no model, only how large one is."""

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from minimind.errors import ConfigError

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
"""The names `--dtype` takes besides `auto`."""

LARGE_ON_CPU = 500_000
"""From how many parameters `auto` takes bfloat16 on a processor that multiplies it natively; below, casts cost more.

Measured on one Zen 4 core, forward and backward of 4 x 256 tokens: 1M parameters 1.6 times as fast as float32, 26M 2.8.
"""


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name` (`auto`, `cpu`, `cuda`, `cuda:1`, `mps`); `auto` takes the fastest one present.

    Under torchrun, `auto` and `cuda` mean this process's own GPU (LOCAL_RANK). Raises ConfigError when it is not there.
    """
    from minimind.runtime.distributed import local_rank

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not known: use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = device.index if ":" in name else local_rank()
        if index >= count:
            raise ConfigError(f"device {name!r}: PyTorch sees {count} CUDA devices here; use auto or cpu")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device {name!r} is not available here; use auto or cpu")
    if device.type not in {"cpu", "cuda", "mps"}:
        raise ConfigError(f"device {name!r} is not supported: use auto, cpu, cuda, cuda:N or mps")
    return device


def pick_dtype(name: str, device: torch.device, *, num_parameters: int = 0) -> torch.dtype:
    """Return the dtype that matrix products run in; masters stay float32 whatever comes back.

    `auto` is bfloat16 on a GPU that has it, float16 on an older GPU, and float32 on a CPU, except that a model of
    `LARGE_ON_CPU` parameters or more uses bfloat16 on a processor that multiplies it natively. Raises ConfigError.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"dtype {name!r} is not known: use auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and num_parameters >= LARGE_ON_CPU and has_native_bfloat16():
        return torch.bfloat16
    return torch.float32


def has_native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware (AMX or AVX512-BF16 on x86, BF16 on Arm)."""
    flags = _processor_flags()
    return bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return the context in which matrix products run in `dtype`; for float32 it does nothing."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most bytes in use so far: allocated on the GPU, or resident for this process on a CPU.

    0 on Windows, whose counter the standard library does not reach.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: Linux hands its high-water mark down from the parent through exec
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return set()
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in {"flags", "Features"}:
            return set(value.split())
    return set()
