"""One optimizer step: forward and backward over the micro-batches, the exact mean, the refusal of NaN, the update.

It knows no run and no checkpoint; where it must leave something for inspection it is told a directory.
"""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from minimind.batch import PAD_DOCUMENT, Batch, Output
from minimind.errors import ConfigError, DivergedError, OutOfResourcesError
from minimind.native.build import cache_folder
from minimind.runtime import distributed
from minimind.runtime.device import autocast
from minimind.runtime.log import get_logger
from minimind.training.config import OptimConfig
from minimind.training.optim import LossScaler, Optimizer, global_norm
from minimind.training.schedule import lr_factor

if TYPE_CHECKING:
    from minimind.model.weights import WeightsOnDisk

_log = get_logger("training")

Objective = Callable[[Output, Batch], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class Totals:
    """What the micro-batches of one step hold together, over all ranks; known before the forward."""

    weight: float
    rows: float
    tokens: int


class Stepper:
    """Makes the updates of one run. Every rank makes the same one, or none makes any."""

    def __init__(
        self,
        model: "WeightsOnDisk",
        objective: Objective,
        optimizer: Optimizer,
        config: OptimConfig,
        *,
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
        is_compiled: bool,
        inspection_dir: Path,
    ) -> None:
        self.objective, self.optimizer, self.config, self.steps = objective, optimizer, config, steps
        self.device, self.dtype, self.inspection_dir = device, dtype, inspection_dir
        self.scaler = LossScaler(enabled=dtype == torch.float16)
        if is_compiled:  # read by torch when it compiles; its own default is lost when the machine starts anew
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
        self.must_compile = is_compiled
        # The wrappers stay in here: whoever saves, validates or samples has the bare model, whose names have no prefix.
        self.forward: torch.nn.Module = torch.compile(model) if is_compiled else model  # pyright: ignore[reportAttributeAccessIssue] - a module comes back for a module
        if distributed.world_size() > 1:
            self.forward = DistributedDataParallel(
                self.forward, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
            )

    def update(self, step: int, micro_batches: Sequence[Batch]) -> dict[str, Any]:
        """Make update number `step` (from 0) and return its numbers.

        Raises DivergedError, on every rank and with no weight changed on any, when loss or gradient is not finite.
        """
        totals = self._totals(micro_batches)
        start = time.perf_counter()
        try:
            sums = self._accumulate(micro_batches, totals)
        except torch.OutOfMemoryError as error:
            rows, length = micro_batches[0].input_ids.shape
            raise OutOfResourcesError(
                f"step {step + 1}: {self.device} has no memory for a micro-batch of {rows} x {length} tokens; "
                f"halve --micro-batch-tokens, which changes no number. {str(error).splitlines()[0]}"
            ) from error
        if self.must_compile:
            self.must_compile = False
            seconds, where = time.perf_counter() - start, os.environ["TORCHINDUCTOR_CACHE_DIR"]
            _log.info("compiled, with the first step, in %.0f s; kept for the next run in %s", seconds, where)
        gradients, scale = self.optimizer.gradients(), self.scaler.scale
        # The one moment of a step in which the processor waits for the device.
        *means, norm = torch.stack([*sums.values(), global_norm(gradients).to(torch.float32)]).tolist()
        norm, numbers = norm / scale, dict(zip(sums, means, strict=True))
        is_finite, goes_on = math.isfinite(norm), self.scaler.update(is_finite=math.isfinite(norm))
        if not math.isfinite(numbers["train_loss"]) or not goes_on:
            self._refuse(step, micro_batches, numbers["train_loss"], norm)
        factor = lr_factor(step, self.steps, self.config)
        if is_finite:
            coefficient = (min(1.0, self.config.clip / (norm + 1e-6)) if self.config.clip else 1.0) / scale
            if coefficient != 1.0:
                torch._foreach_mul_(gradients, coefficient)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] - one kernel
            self.optimizer.step(factor)
        self.optimizer.zero_grad()
        lr = factor * (self.config.muon_lr if self.config.name == "muon" else self.config.lr)
        row = {"step": step + 1, **numbers, "lr": lr, "grad_norm": norm if is_finite else None}
        row |= {"step_tokens": totals.tokens, "step_weight": totals.weight}
        return row | ({"loss_scale": scale, "is_skipped": not is_finite} if self.scaler.is_enabled else {})

    def _totals(self, micro_batches: Sequence[Batch]) -> Totals:
        rows = [int((batch.documents != PAD_DOCUMENT).any(dim=1).sum()) for batch in micro_batches]
        own = [sum(batch.weight for batch in micro_batches), sum(rows), sum(b.num_tokens for b in micro_batches)]
        shared = torch.tensor([*own, len(micro_batches), 1.0], dtype=torch.float64)
        weight, all_rows, tokens, count, ranks = distributed.all_reduce_sum(shared).tolist()
        if not micro_batches or count != len(micro_batches) * ranks:
            raise ConfigError(
                f"rank {distributed.rank()} has {len(micro_batches)} micro-batches, all ranks {count:.0f}"
            )
        # A step in which nothing is learned has sums of 0; any divisor but 0 keeps them 0.
        return Totals(weight or 1.0, all_rows or 1.0, int(tokens))

    def _accumulate(self, micro_batches: Sequence[Batch], totals: Totals) -> dict[str, Tensor]:
        """Leave the step's exact gradient (times the loss scale) in `.grad`; return the exact means over all ranks."""
        ranks = distributed.world_size()
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(micro_batches, start=1):
            batch = batch.to(self.device)
            is_last = number == len(micro_batches)
            ddp = self.forward if isinstance(self.forward, DistributedDataParallel) else None
            with contextlib.nullcontext() if is_last or ddp is None else ddp.no_sync():
                with autocast(self.device, self.dtype):
                    output = self.forward(batch.input_ids, positions=batch.positions, documents=batch.documents)
                    loss_sum, metric_sums = self.objective(output, batch)
                num_rows = (batch.documents != PAD_DOCUMENT).any(dim=1).sum()  # a row of padding has no balance to keep
                loss, aux_loss = loss_sum / totals.weight, output.aux_loss * (num_rows / totals.rows)
                # DDP takes the mean over ranks, but these are shares of one sum: hence times the number of ranks.
                ((loss + aux_loss) * (ranks * self.scaler.scale)).backward()
            shares = {"train_loss": loss, "aux_loss": aux_loss}
            shares |= {name: value / totals.weight for name, value in sorted(metric_sums.items())}
            for name, share in shares.items():
                share = share.detach().to(torch.float32)
                sums[name] = sums[name] + share if name in sums else share
        together = distributed.all_reduce_sum(torch.stack(list(sums.values())))
        return dict(zip(sums, together.unbind(), strict=True))

    def _refuse(self, step: int, micro_batches: Sequence[Batch], loss: float, norm: float) -> NoReturn:
        """Keep this rank's micro-batches and raise DivergedError."""
        self.optimizer.zero_grad()
        stem = self.inspection_dir / f"step-{step + 1:06d}-rank-{distributed.rank()}"
        tensors: dict[str, Tensor] = {}
        for number, batch in enumerate(micro_batches):
            fields = {
                name: getattr(batch, name) for name in ("input_ids", "labels", "positions", "documents", "loss_weights")
            }
            for name, tensor in {**fields, **batch.extras}.items():
                tensors[f"{number}/{name}"] = tensor.detach().cpu().clone()
        stem.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, stem.with_suffix(".safetensors"))
        facts = {"step": step + 1, "train_loss": str(loss), "grad_norm": str(norm), "loss_scale": self.scaler.scale}
        stem.with_suffix(".json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
        distributed.barrier()
        raise DivergedError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}. No weight was changed; the batch is kept "
            f"in {stem}.safetensors. Look at it, or lower the learning rate; the same command resumes"
        )


def is_compiling_worth_it(mode: str, device: torch.device) -> bool:
    """Whether to compile: unless on or off is asked for, on a GPU with a C++ compiler, which the back end calls.

    Not on a CPU: what compiling would fuse there, the kernels of `minimind.native` do, and a compiled step is slower.
    """
    if mode != "auto":
        return mode == "on"
    return device.type == "cuda" and any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))
