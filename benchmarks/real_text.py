"""Train on real public text: pretraining on English and Chinese, fine-tuning with tools and several turns.

    python benchmarks/real_text.py --data FOLDER --out runs/real-text [--tokens 1500000]

FOLDER holds `tinystories/`, `zh_classics/`, `sft_llamafactory/` and `sft_kdconv_zh/` as published. Each run must end
with a lower validation loss than it began with. The figures go to `benchmarks/results/real_text.json`, the samples stay
in the runs' `samples.jsonl`. Only commands that a user types are called.
"""

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from minimind import __version__
from minimind.cli import main as minimind

RESULTS = Path(__file__).parent / "results" / "real_text.json"
ROW_LENGTH = 512
BATCH_TOKENS = 4096
SHAPE = ("--model.preset", "", "--model.hidden-size", "256", "--model.num-hidden-layers", "6")


def train(command: str, out: Path, files: list[Path], tokens: int, rate: float, *more: str) -> dict[str, Any]:
    """Run one training command to its end and return its first and last validation and its cost."""
    steps = max(4, tokens // BATCH_TOKENS)
    numbers = {"steps": steps, "batch-tokens": BATCH_TOKENS, "save-every": steps, "eval-every": max(1, steps // 6)}
    numbers |= {"sample-every": max(1, steps // 3), "eval-tokens": 100_000, "optim.muon-lr": rate, "optim.lr": rate / 5}
    flags = [part for name, value in numbers.items() for part in (f"--{name}", str(value))]
    names = [str(file) for file in files]
    fixed = ["--data.row-length", str(ROW_LENGTH), "--optim.name", "muon", "--optim.warmup-steps", str(steps // 20)]
    words = [command, "--out", str(out), "--data", *names, *flags, *fixed, *more]
    code = minimind(words)
    if code:
        sys.exit(f"minimind {' '.join(words)} ended with {code}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    validations = [row for row in rows if "val_loss" in row]
    steps_done = [row for row in rows if "train_loss" in row]
    first, last = validations[0], validations[-1]
    print(f"{out.name}: validation loss {first['val_loss']:.3f} -> {last['val_loss']:.3f}")
    return {
        "command": "minimind " + " ".join(words),
        "val_loss": [first["val_loss"], last["val_loss"]],
        "val_bits_per_byte": [first["val_bits_per_byte"], last["val_bits_per_byte"]],
        "falls": last["val_loss"] < first["val_loss"],
        "steps": steps,
        "tokens": steps_done[-1]["tokens"],
        "seconds": round(steps_done[-1]["seconds"]),
        "memory_bytes": steps_done[-1].get("memory_bytes"),
    }


def main() -> None:
    """Make all runs and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/real-text"))
    parser.add_argument("--tokens", type=int, default=1_500_000, help="training tokens of each run")
    options = parser.parse_args()
    english = sorted((options.data / "tinystories").glob("*.txt"))
    chinese = [file for file in sorted((options.data / "zh_classics").glob("*.txt")) if "LICENSE" not in file.name]
    tools = sorted((options.data / "sft_llamafactory").glob("*.json*"))
    turns = sorted((options.data / "sft_kdconv_zh").glob("*.json"))
    tokenizer = options.out / "tokenizer"
    if minimind(["train-tokenizer", "--data", *map(str, [*english, *chinese, *tools]), "--out", str(tokenizer)]):
        sys.exit("train-tokenizer failed")
    new = ("--tokenizer", str(tokenizer), *SHAPE)
    runs = {
        "pretrain tinystories": train("pretrain", options.out / "stories", english, options.tokens, 0.02, *new),
        "pretrain zh_classics": train("pretrain", options.out / "classics", chinese, options.tokens, 0.02, *new),
    }
    start = ("--init-from", str(options.out / "classics"), "--data.validation-fraction", "0.05")
    runs["sft llamafactory"] = train("sft", options.out / "tools", tools, options.tokens // 3, 0.01, *start)
    runs["sft kdconv_zh"] = train("sft", options.out / "turns", turns, options.tokens // 3, 0.01, *start)
    for run in runs.values():  # the folders of the machine say nothing
        run["command"] = run["command"].replace(str(options.data), "DATA").replace(str(options.out), "OUT")
    versions = {"minimind": __version__, "torch": torch.__version__, "python": platform.python_version()}
    RESULTS.write_text(json.dumps({"versions": versions, "runs": runs}, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if not all(run["falls"] for run in runs.values()):
        sys.exit("a validation loss did not fall")


if __name__ == "__main__":
    main()
