"""What a training step holds: measured peak of a process beside the arithmetic, recomputing activations and not.

    python benchmarks/memory.py [--preset small] [--rows 8] [--length 512] [--steps 3]

Each case is a process of its own, which builds the model, makes whole optimizer steps (forward, backward, clip, AdamW)
on random tokens and reports the most memory that was resident. What Python and torch take before there is a model is
measured too. Written to `benchmarks/results/memory.json`.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minimind import __version__
from minimind.batch import Batch
from minimind.model.config import ModelConfig
from minimind.model.transformer import Transformer
from minimind.objectives.cross_entropy import CHUNK, cross_entropy
from minimind.runtime.device import DTYPES, peak_memory_bytes
from minimind.training.config import OptimConfig
from minimind.training.optim import Optimizer
from minimind.training.step import Stepper

RESULTS = Path(__file__).parent / "results" / "memory.json"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One process."""

    preset: str
    rows: int
    length: int
    dtype: str
    gradient_checkpointing: bool


def arithmetic(case: Case) -> dict[str, int]:
    """Return what a step of a dense model must hold on a CPU, in bytes: for good, and until the backward has used it.

    Per token and layer: the residual stream in float32 before each norm; both norms' outputs, queries, keys and values,
    the heads' output, gates and ups, and their product in the dtype of the products; for good 16 bytes a weight
    (weight, gradient, two moments). Weights are copied once into the layout and dtype of their product.
    """
    config, tokens = ModelConfig.from_preset(case.preset), case.rows * case.length
    width, inner, size = config.hidden_size, config.feed_forward_size, DTYPES[case.dtype].itemsize
    heads = config.size_per_head * config.num_attention_heads
    joint = heads + 2 * config.size_per_head * config.num_key_value_heads  # queries, keys, values
    layer = tokens * (2 * 4 * width + size * (2 * width + joint + heads + 3 * inner))
    copies = size * (width * joint + 2 * width * inner + (size < 4) * (heads * width + inner * width))
    layers = config.num_hidden_layers
    kept = layers * tokens * 4 * width + layer + copies if case.gradient_checkpointing else layers * (layer + copies)
    chunk = min(tokens, CHUNK)
    loss = size * chunk * config.vocab_size + 4 * tokens * width + (4 + size) * config.vocab_size * width
    parameters = config.num_parameters()[0]
    return {"weights and moments": 12 * parameters, "gradients": 4 * parameters, "activations": kept, "loss": loss}


def expected_peak(parts: dict[str, int]) -> int:
    """Return the larger of the two peaks: as the backward begins, all activations; as it ends, all gradients."""
    return parts["weights and moments"] + max(parts["activations"] + parts["loss"], parts["gradients"])


def measure(case: Case, steps: int) -> dict[str, int]:
    """Return (resident before there is a model, most resident so far), in bytes, after some steps in this process."""
    before = peak_memory_bytes(CPU)
    torch.manual_seed(0)
    config, shape = ModelConfig.from_preset(case.preset), (case.rows, case.length)
    model = Transformer(config).train()
    model.gradient_checkpointing = case.gradient_checkpointing
    optim = OptimConfig()
    stepper = Stepper(
        model,
        cross_entropy,
        Optimizer(model, optim),
        optim,
        steps=steps,
        device=CPU,
        dtype=DTYPES[case.dtype],
        is_compiled=False,
        inspection_dir=Path(tempfile.gettempdir()),
    )
    ids = torch.randint(config.vocab_size, (case.rows, case.length + 1))
    positions, documents = torch.arange(case.length).expand(shape), torch.zeros(shape, dtype=torch.long)
    batch = Batch(ids[:, :-1], ids[:, 1:], positions, documents, torch.ones(shape), float(case.rows * case.length))
    for step in range(steps):
        stepper.update(step, [batch])
    return {"before": before, "peak": peak_memory_bytes(CPU)}


def main() -> None:
    """Run every case in a process of its own, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="small", help="a dense preset")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--case", help="used by the script itself: one case as JSON, measured here")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(Case(**json.loads(options.case)), options.steps)))
        return
    found: list[dict[str, object]] = []
    print("dtype     recompute   arithmetic    measured - before   (MB)")
    for dtype in ("float32", "bfloat16"):
        for recompute in (False, True):
            case = Case(options.preset, options.rows, options.length, dtype, recompute)
            words = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--steps", str(options.steps)]
            output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            numbers, parts = json.loads(output.splitlines()[-1]), arithmetic(case)
            expected, used = expected_peak(parts), numbers["peak"] - numbers["before"]
            print(
                f"{dtype:9} {'yes' if recompute else 'no':9} {expected / 1e6:10.0f} "
                f"{used / 1e6:10.0f} = {numbers['peak'] / 1e6:.0f} - {numbers['before'] / 1e6:.0f}"
            )
            found.append(asdict(case) | {"arithmetic": parts, "expected": expected, "used": used} | numbers)
    versions = {"minimind": __version__, "torch": torch.__version__, "python": platform.python_version()}
    RESULTS.write_text(json.dumps({"unit": "bytes", "versions": versions, "cases": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
