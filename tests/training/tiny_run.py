"""A run small enough for tests: one tiny model, batches that are a function of the step, and a script to kill.

As a script (`python tiny_run.py RUN [--steps N ...]`) it trains in a process of its own, exits as the command line
does, and prints its state hash.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from minimind.batch import Batch
from minimind.errors import DataError, MinimindError
from minimind.model.config import ModelConfig
from minimind.model.transformer import Transformer
from minimind.objectives.cross_entropy import cross_entropy
from minimind.runtime import distributed
from minimind.runtime.seed import seed_all
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.train import MIN_VOCAB_SIZE, train
from minimind.training.config import LoopConfig, OptimConfig
from minimind.training.loop import FitResult, fit
from minimind.training.run import RunDirectory

DENSE = ModelConfig(
    vocab_size=MIN_VOCAB_SIZE,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=32,
    max_position_embeddings=64,
)
MOE = replace(DENSE, use_moe=True, moe_intermediate_size=16)


def tiny_tokenizer() -> Tokenizer:
    """A tokenizer without merges."""
    return train(["ab"], MIN_VOCAB_SIZE)


@dataclass
class TinySource:
    """`rows` rows of `length` tokens a step, cut in micro-batches of `micro_rows`, shared among the ranks."""

    rows: int = 8
    micro_rows: int = 8
    length: int = 12
    fingerprint: str = "tiny"
    prefetch: bool = True
    poison_step: int = -1
    delay: float = 0.0

    def micro_batches(self, step: int) -> Sequence[Batch]:
        """The rows of a step follow a pattern, so that there is something to learn."""
        if self.delay:
            time.sleep(self.delay)
        generator = torch.Generator().manual_seed(1000 + step)
        start = torch.randint(20, 60, (self.rows, 1), generator=generator)
        stride = torch.randint(1, 4, (self.rows, 1), generator=generator)
        ids = start + stride * torch.arange(self.length + 1)
        weights = (torch.rand(self.rows, self.length, generator=generator) > 0.3).float()  # unequal micro-batches
        if step == self.poison_step and distributed.rank() == distributed.world_size() - 1:
            weights[-1] = float("nan")
        share = self.rows // distributed.world_size()
        size, first = min(self.micro_rows, share), share * distributed.rank()
        return [batch_of(ids[i : i + size], weights[i : i + size]) for i in range(first, first + share, size)]

    def state(self) -> dict[str, Any]:
        """The fingerprint."""
        return {"fingerprint": self.fingerprint}

    def check_state(self, saved: dict[str, Any]) -> None:
        """Refuse other data."""
        if saved["fingerprint"] != self.fingerprint:
            raise DataError(f"data changed: {saved['fingerprint']} in the checkpoint, {self.fingerprint} here")


def batch_of(ids: torch.Tensor, weights: torch.Tensor) -> Batch:
    """One document per row, shifted."""
    rows, length = weights.shape
    return Batch(
        input_ids=ids[:, :-1],
        labels=ids[:, 1:],
        positions=torch.arange(length).expand(rows, length),
        documents=torch.zeros(rows, length, dtype=torch.long),
        loss_weights=weights,
        weight=float(weights.nan_to_num().sum()),
    )


def tiny_fit(
    path: Path,
    *,
    steps: int = 10,
    source: TinySource | None = None,
    config: ModelConfig = DENSE,
    optim: OptimConfig | None = None,
    seed: int = 0,
    **options: Any,
) -> FitResult:
    """Train the tiny model in `path`; `options` go to LoopConfig, or to fit."""
    extra = {key: options.pop(key) for key in ("validate", "sample", "on_step", "tokenizer") if key in options}
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "compile": "off", "log_every": 1, "save_every": 5}
    seed_all(seed)
    return fit(
        Transformer(config),
        cross_entropy,
        source or TinySource(),
        run=RunDirectory(path),
        loop=LoopConfig(steps=steps, seed=seed, **(settings | options)),
        optim=optim or OptimConfig(lr=3e-3, warmup_steps=2),
        model_config=config,
        tokenizer=extra.pop("tokenizer", None) or tiny_tokenizer(),
        **extra,
    )


def slow_validation() -> dict[str, float]:
    """Takes longer than any test waits."""
    time.sleep(60)
    return {"val_loss": 1.0}


def start(run: Path, *flags: str, fault: str = "") -> BaseProcess:
    """Start the script in a process of its own, forked from a clean one in which torch is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.tiny_run"])
    tests = Path(__file__).parents[1]
    with mock.patch.dict(os.environ, {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}):
        process = context.Process(target=_run_script, args=([str(run), *flags], fault))
        process.start()
    return process


def _run_script(argv: list[str], fault: str) -> None:
    os.environ["MINIMIND_FAULT"] = fault
    log = Path(argv[0]).with_suffix(".stderr").open("a")
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(main(argv))


def main(argv: list[str] | None = None) -> int:
    """Train as the flags say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--micro-rows", type=int, default=8)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--poison-step", type=int, default=-1)
    parser.add_argument("--optim", default="adamw")
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--slow-validation", action="store_true")
    flags = parser.parse_args(argv)
    source = TinySource(micro_rows=flags.micro_rows, delay=flags.delay, poison_step=flags.poison_step)
    try:
        result = tiny_fit(
            flags.run,
            steps=flags.steps,
            save_every=flags.save_every,
            source=source,
            config=MOE if flags.moe else DENSE,
            validate=slow_validation if flags.slow_validation else None,
            optim=OptimConfig(name=flags.optim, lr=3e-3, muon_lr=0.01, muon_dtype="float32", warmup_steps=2),
        )
    except MinimindError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        distributed.shutdown()
    print(result.state_hash)
    return 0


if __name__ == "__main__":
    sys.exit(main())
