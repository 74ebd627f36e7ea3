"""A shared library out of one C++ file: compiled once per machine by the system's compiler, kept in the user's cache.

The name holds a digest of the source, the compiler, its options and the processor, so a change of any of them builds
anew. Two processes may build at once. Where anything fails there is no library: one line of the log says why.
`MINIMIND_NATIVE=0` does without.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

_log = logging.getLogger("minimind.native")

_OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-Wno-psabi")
_SECONDS = 120
"""How long a compiler may take."""


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """Return the library of `source`, built if need be, or None; tried once per process."""
    if os.environ.get("MINIMIND_NATIVE", "1") == "0":
        return None
    try:
        return ctypes.CDLL(str(built(source, cache_folder())))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s: not built, PyTorch does it instead (%s)", source.name, _in_one_line(error))
        return None


def built(source: Path, folder: Path) -> Path:
    """Return the path of the library in `folder`, compiled if it is not there. OSError or SubprocessError if it fails.

    With OpenMP where the compiler has it: its threads are then those of PyTorch, which links the same runtime.
    """
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: install one, or name it in CXX")
    options = (*_OPTIONS, "-march=native" if platform.machine() in {"x86_64", "AMD64"} else "-mcpu=native")
    program = Path(compiler).resolve()
    made_of = (source.read_bytes(), str(program), program.stat().st_mtime_ns, options, _processor())
    target = folder / f"{source.stem}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:20]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unfinished = Path(scratch) / target.name
        words = [compiler, *options, str(source), "-o", str(unfinished)]
        try:
            _compile([*words, "-fopenmp"])
        except subprocess.CalledProcessError:
            _compile(words)
        unfinished.replace(target)  # in one stroke: whoever looks finds a whole library or none
    _log.info("%s: compiled in %.1f s, kept in %s", source.name, time.perf_counter() - start, folder)
    return target


def cache_folder() -> Path:
    """Return the folder of this user in which what was built is kept."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "minimind"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "minimind"


def _compile(words: list[str]) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=_SECONDS)


def _processor() -> str:
    """Return what `-march=native` may depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    wanted = ("model", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), platform.processor(), *sorted({x for x in lines if x.startswith(wanted)})])


def _in_one_line(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        complaints = [line for line in str(error.stderr).splitlines() if "error" in line] or ["no message"]
        return f"exit code {error.returncode}: {complaints[0]}"
    return " ".join(str(error).split())
