"""The names of weights in `model.safetensors` against those in memory. Only mixtures of experts differ.

In memory every mixture is `mlp.gate`, `mlp.experts` (stacked) and `mlp.shared_experts`; on disk each family has the
names under which Transformers (any version) and vLLM look for it. Tensors are views where possible.
"""

import re

import torch
from torch import Tensor

from minimind.errors import CheckpointError
from minimind.model.families import Family

MODEL = "model.safetensors"
"""The file of a language model's weights."""

_GRANITE = {
    "mlp.gate.weight": "block_sparse_moe.router.layer.weight",
    "mlp.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
    "mlp.experts.down_proj": "block_sparse_moe.output_linear.weight",
    "mlp.shared_experts.down_proj.weight": "shared_mlp.output_linear.weight",
}
_GRANITE_SHARED = ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight")
_GRANITE_SHARED_DISK = "shared_mlp.input_linear.weight"

_ROUTED = {  # prefix on disk, then the three matrices of an expert: gate, up, down
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def to_disk(state: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Return `state` under the names of `family`'s files."""
    if family in ("llama", "qwen3"):
        return dict(state)
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, inner = _split(name)
        if not inner.startswith("mlp."):
            result[name] = tensor
        elif family == "granitemoeshared":
            if inner == _GRANITE_SHARED[0]:
                up = state[layer + _GRANITE_SHARED[1]]
                result[layer + _GRANITE_SHARED_DISK] = torch.cat((tensor, up))
            elif inner in _GRANITE:
                result[layer + _GRANITE[inner]] = tensor
        else:
            prefix, (gate, up, down) = _ROUTED[family]
            if inner == "mlp.gate.weight":
                result[f"{layer}{prefix}.gate.weight"] = tensor
                continue
            for index, expert in enumerate(tensor):
                where = f"{layer}{prefix}.experts.{index}"
                if inner == "mlp.experts.gate_up_proj":
                    result[f"{where}.{gate}.weight"], result[f"{where}.{up}.weight"] = expert.chunk(2)
                else:
                    result[f"{where}.{down}.weight"] = expert
    return result


def from_disk(state: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Return weights named as in `family`'s files under the names they have in memory."""
    if family in ("llama", "qwen3"):
        return dict(state)
    result: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}  # name on disk with the index cut out -> index -> matrix
    granite = {on_disk: inner for inner, on_disk in _GRANITE.items()}
    for name, tensor in state.items():
        layer, inner = _split(name)
        numbered = re.fullmatch(r"(.*\.experts\.)(\d+)\.(\w+)\.weight", name)
        if inner == _GRANITE_SHARED_DISK:
            for part, half in zip(_GRANITE_SHARED, tensor.chunk(2), strict=True):
                result[layer + part] = half
        elif numbered is not None:
            experts.setdefault(numbered[1] + numbered[3], {})[int(numbered[2])] = tensor
        elif family == "granitemoeshared":
            result[layer + granite.get(inner, inner)] = tensor
        else:
            result[layer + inner.replace("block_sparse_moe.", "mlp.")] = tensor
    if family != "granitemoeshared":
        _, (gate, up, down) = _ROUTED[family]
        for key, parts in experts.items():
            layer, inner = _split(key)
            stacked = torch.stack([parts[index] for index in range(len(parts))])  # (E, rows, columns)
            if key.endswith(gate):
                other = experts[key.removesuffix(gate) + up]
                ups = torch.stack([other[index] for index in range(len(other))])
                result[layer + "mlp.experts.gate_up_proj"] = torch.cat((stacked, ups), dim=1)
            elif key.endswith(down):
                result[layer + "mlp.experts.down_proj"] = stacked
    return result


def check(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless `state` has exactly the names and shapes of `expected`."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} is {tuple(tensor.shape)}, the model's is {tuple(expected[name].shape)}"
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    found = [
        f"{kind}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        if names
    ]
    if found:
        raise CheckpointError(
            "weights do not belong to this model; " + "; ".join(found) + ". Load them with the config.json beside them"
        )


def check_files(files: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    """Raise CheckpointError unless `files` has exactly the file names of `expected`."""
    if files.keys() != expected.keys():
        raise CheckpointError(
            f"the checkpoint's weights are {', '.join(sorted(files))}, this model's are {', '.join(sorted(expected))}: "
            "it was made by another kind of stage; give the run another --out, or start again with --fresh"
        )


def _split(name: str) -> tuple[str, str]:
    """Return ("model.layers.3.", rest), or ("", name) for what is in no layer."""
    match = re.match(r"model\.layers\.\d+\.", name)
    return (match[0], name[match.end() :]) if match else ("", name)
