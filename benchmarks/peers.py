"""The environment of the peers: their pinned versions in `.peers`, beside ours and never mixed with it.

Made on first use and reused while the pins are the same. torch is the very build that runs this script; where that is a
CPU build and the configured index has none, name one: TORCH_INDEX=URL. Needs the standard library only.
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

FOLDER = Path(__file__).parent.parent / ".peers"
PINS = ("transformers==5.23.0", "trl==1.16.0", "lightning>=2.6.1", "jsonargparse[signatures]>=4.37,<=4.41", "gguf")
WITHOUT_DEPENDENCIES = ("litgpt==0.5.13",)
"""litgpt asks for huggingface-hub < 1.4, transformers 5.23 for >= 1.31; its model and its training need neither."""
LLAMA_CPP = "llama-cpp-python==0.3.36"
"""Compiled from source for this machine: needs cmake and a C++ compiler (`apt-get install cmake g++`), some minutes."""
NAMED = ("torch", "transformers", "trl", "litgpt", "llama-cpp-python")


def python(*, has_llama_cpp: bool = False) -> Path:
    """Return the peers' interpreter, with everything installed (and llama.cpp where asked for)."""
    interpreter, marker = FOLDER / "bin" / "python", FOLDER / "installed.json"
    pip = [str(interpreter), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    torch = f"torch=={metadata.version('torch')}"
    index = ["--index-url", os.environ["TORCH_INDEX"]] if "TORCH_INDEX" in os.environ else []
    wanted = [torch, *PINS, *WITHOUT_DEPENDENCIES]
    if not marker.exists() or json.loads(marker.read_text()) != wanted:
        print(f"Installing the peers into {FOLDER.name} (once) ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
        subprocess.run([*pip, *index, torch], check=True)
        subprocess.run([*pip, torch, *PINS], check=True)
        subprocess.run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
        marker.write_text(json.dumps(wanted))
    if has_llama_cpp and "llama-cpp-python" not in versions():
        print("Compiling llama.cpp (once, some minutes) ...", file=sys.stderr)
        flags = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
        subprocess.run([*pip, LLAMA_CPP], check=True, env=os.environ | flags)
    return interpreter


def versions() -> dict[str, str]:
    """Return the versions that stand in the peers' environment."""
    folders = [str(folder) for folder in (FOLDER / "lib").glob("python*/site-packages")]
    found = {
        str(one.metadata["Name"]).replace("_", "-").lower(): one.version for one in metadata.distributions(path=folders)
    }
    return {name: found[name] for name in NAMED if name in found}


if __name__ == "__main__":
    print(python(), *(f"{name} {version}" for name, version in versions().items()), sep="\n")
