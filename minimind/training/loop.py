"""The one training loop. Every stage hands it a model, an objective and batches; it knows no text and no algorithm.

    loss of a step = sum of loss_sum over micro-batches and ranks / their weight + mean of the model's aux_loss

The divisor is known before the forward, so the split into micro-batches and ranks changes memory only (`step.py`). A
step is counted when its update is done. Whatever a run needs to go on bit for bit is in its checkpoint.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from minimind import checkpoint
from minimind.batch import Batch
from minimind.config import check, to_dict
from minimind.model.config import ModelConfig
from minimind.runtime import distributed
from minimind.runtime.device import peak_memory_bytes, pick_device, pick_dtype
from minimind.runtime.integrity import sha256_of_tensors
from minimind.runtime.log import add_file, get_logger, remove_file
from minimind.runtime.seed import rng_state, seed_all, set_rng_state
from minimind.training.config import LoopConfig, OptimConfig
from minimind.training.metrics import Metrics
from minimind.training.optim import Optimizer
from minimind.training.prefetch import Ahead
from minimind.training.progress import Clock, Display, peak_flops
from minimind.training.run import RunDirectory
from minimind.training.signals import Cut, Signals
from minimind.training.step import Objective, Stepper, is_compiling_worth_it

if TYPE_CHECKING:
    from minimind.model.weights import WeightsOnDisk
    from minimind.tokenizer.bpe import Tokenizer

_log = get_logger("training")


class BatchSource(Protocol):
    """Where batches come from. A source with state of its own (reinforcement learning) also has `load_state(saved)`,
    and `numbers()` that belong into the row of each step."""

    prefetch: bool
    """`micro_batches` is a pure function of the step: it may be called ahead of time from another thread."""

    def micro_batches(self, step: int) -> Sequence[Batch]:
        """Return this rank's micro-batches of optimizer step `step` (from 0); every rank returns equally many."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, JSON-able."""
        ...

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raise DataError when `saved` belongs to other data."""
        ...


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a finished run comes to."""

    steps: int
    tokens: int
    """Real (not padding) tokens trained on, over all ranks and all sessions of the run."""
    seconds: float
    """Time spent in the loop, over all sessions of the run."""
    metrics: dict[str, float]
    """The newest training row and the newest validation row in one."""
    checkpoint: Path
    state_hash: str
    """sha256 over parameters and optimizer state: equal only if every bit is."""


@dataclass(slots=True)
class Position:
    """How far a run is."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    saved_step: int = -1
    looked_step: int = -1
    """The last step at which validation and samples were made."""
    newest: dict[str, float] = field(default_factory=dict[str, float])


def fit(
    model: "WeightsOnDisk",
    objective: Objective,
    batches: BatchSource,
    *,
    run: RunDirectory,
    loop: LoopConfig,
    optim: OptimConfig,
    model_config: ModelConfig,
    tokenizer: "Tokenizer",
    validate: Callable[[], dict[str, float]] | None = None,
    sample: Callable[[int], list[dict[str, Any]]] | None = None,
    on_step: Callable[[int, dict[str, Any]], None] | None = None,
) -> FitResult:
    """Train until `loop.steps`, from the newest good checkpoint of `run` if there is one, and return what came of it.

    `validate` returns named numbers, `sample` rows for samples.jsonl; `on_step` sees the numbers of every step. Under
    torchrun every rank calls `fit` alike.

    Raises ConfigError, CheckpointError (nothing good to resume from, or another model's or tokenizer's), DataError (the
    data changed), DivergedError, OutOfResourcesError, Preempted and Interrupted (saved after a signal).
    """
    check(loop)
    check(optim)
    device = pick_device(loop.device)
    distributed.init(device)
    with run, Signals() as signals, contextlib.ExitStack() as stack:
        log_file = add_file(run.log)
        stack.callback(remove_file, log_file)
        training = _Training(model, objective, batches, run, loop, optim, model_config, tokenizer, device)
        at, clock = training.at, Clock(training.at.seconds)
        metrics = stack.enter_context(Metrics(run.metrics, trackers=loop.trackers, keep_until=at.saved_step))
        run.cut_samples_after(at.saved_step)
        display = stack.enter_context(Display(loop.steps, start=at.step, log_file=log_file))
        next_batches = batches.micro_batches
        numbers_of_source: Callable[[], dict[str, Any]] = getattr(batches, "numbers", dict)
        if batches.prefetch:
            next_batches = stack.enter_context(Ahead(batches.micro_batches, range(at.step, loop.steps))).take

        def look_up() -> None:
            """Validate and sample where that is due; a signal cuts it short, and the resumed run does it again."""
            is_end, is_alone = at.step in (0, loop.steps), distributed.world_size() == 1
            with clock.stopped(), contextlib.suppress(Cut):
                if validate and (is_end or _is_due(loop.eval_every, at.step)):
                    with training.undisturbed(), signals.cuttable(enabled=is_alone):
                        numbers = validate()
                    metrics.write({"step": at.step, **numbers})
                    display.say({"step": at.step, **numbers})
                    at.newest |= numbers
                if sample and loop.sample_every and (is_end or _is_due(loop.sample_every, at.step)):
                    with training.undisturbed(), signals.cuttable(enabled=is_alone):
                        rows = sample(at.step)
                    run.append_samples({"step": at.step, **row} for row in rows)
                at.looked_step = at.step

        if at.looked_step != at.step:
            look_up()
        while at.step < loop.steps:
            if _on_any_rank(signals.received != 0):
                training.save(metrics, clock)
                signals.raise_outcome(f"step {at.step} of {loop.steps} in {run.path}")
            micro_batches = next_batches(at.step)
            row: dict[str, Any] = training.stepper.update(at.step, micro_batches)
            row |= numbers_of_source()
            at.step += 1
            at.tokens += row["step_tokens"]
            clock.tick(row["step_tokens"])
            if at.step in (1, loop.steps) or _is_due(loop.log_every, at.step):
                speed = clock.tokens_per_second()
                row |= {"tokens": at.tokens, "seconds": clock.seconds(), "tokens_per_second": speed}
                row |= training.cost(speed, context=micro_batches[0].input_ids.shape[1])
                metrics.write(row)
                display.show(row, eta_seconds=clock.seconds_per_step() * (loop.steps - at.step))
                at.newest |= row
            if on_step:
                on_step(at.step, row)
            look_up()
            if at.step == loop.steps or _is_due(loop.save_every, at.step):
                with clock.stopped():
                    training.save(metrics, clock)
        if at.looked_step != at.step:  # the last validation was cut short: the same command makes it
            signals.raise_outcome(f"all {loop.steps} steps in {run.path}, but not the last validation")
        return training.result()


class _Training:
    """A run's moving parts, put where the newest good checkpoint left them."""

    def __init__(
        self,
        model: "WeightsOnDisk",
        objective: Objective,
        batches: BatchSource,
        run: RunDirectory,
        loop: LoopConfig,
        optim: OptimConfig,
        model_config: ModelConfig,
        tokenizer: "Tokenizer",
        device: torch.device,
    ) -> None:
        self.model, self.batches, self.run, self.loop, self.optim = model, batches, run, loop, optim
        self.model_config, self.tokenizer, self.device = model_config, tokenizer, device
        seed_all(loop.seed + distributed.rank())
        found = checkpoint.read_latest(run.path, tokenizer_sha256=tokenizer.sha256, model_config=model_config)
        self.at = Position(**found.state["position"]) if found else Position()
        model.to(device).train()
        self.optimizer = Optimizer(model, optim)
        if found:
            _log.info("resuming %s at step %d of %d", found.path, self.at.step, loop.steps)
            batches.check_state(found.state["batches"])
            if load_state := getattr(batches, "load_state", None):
                load_state(found.state["batches"])
            model.load_files(found.files)
            self.optimizer.load_state_dict(found.optimizer_state)
        self.stepper = Stepper(  # after loading: DDP hands the weights of rank 0 around when it is made
            model,
            objective,
            self.optimizer,
            optim,
            steps=loop.steps,
            device=device,
            dtype=pick_dtype(loop.dtype, device, num_parameters=model_config.num_parameters()[0]),
            is_compiled=is_compiling_worth_it(loop.compile, device),
            inspection_dir=run.path / "diverged",
        )
        if found:
            self._take_over(found.state)

    def _take_over(self, saved: dict[str, Any]) -> None:
        """Put scaler and random state back, and say which settings changed since."""
        self.stepper.scaler.load_state_dict(saved["scaler"])
        if distributed.rank() < len(saved["rng"]):  # a rank that is new keeps the seed it was given
            set_rng_state(saved["rng"][distributed.rank()])
        then, now = saved["settings"], self._settings()
        changed = [f"{key} {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]]
        if changed:
            _log.warning("settings changed since the checkpoint, so the run is another one now: %s", ", ".join(changed))

    def save(self, metrics: Metrics, clock: Clock) -> None:
        """Write a checkpoint of this moment, unless there is one. Every rank must come here."""
        if self.at.saved_step == self.at.step:
            return
        self.at.saved_step, self.at.seconds = self.at.step, clock.seconds()
        rng = distributed.all_gather_object(rng_state())
        if distributed.is_main():
            metrics.sync()
            checkpoint.save(
                self.run.path,
                self.at.step,
                model=self.model,
                model_config=self.model_config,
                tokenizer=self.tokenizer,
                optimizer_state=self.optimizer.state_dict(),
                state={
                    "position": asdict(self.at),
                    "batches": self.batches.state(),
                    "rng": rng,
                    "scaler": self.stepper.scaler.state_dict(),
                    "settings": self._settings(),
                },
                keep=self.loop.keep,
            )
        distributed.barrier()

    def result(self) -> FitResult:
        """Return what the run has come to."""
        digest = sha256_of_tensors(*self.model.files_for_disk().values(), self.optimizer.state_dict())
        where = self.run.path / "checkpoints" / f"step-{self.at.step:06d}"
        _log.info("done: %s  state %s", where, digest)
        return FitResult(self.at.step, self.at.tokens, self.at.seconds, self.at.newest, where, digest)

    @contextlib.contextmanager
    def undisturbed(self) -> Generator[None]:
        """Let the block use the model and random numbers without any effect on training."""
        before = rng_state()
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()
            set_rng_state(before)

    def cost(self, tokens_per_second: float, *, context: int) -> dict[str, float]:
        """Return memory, and on a known GPU the share of its peak that the model's own arithmetic uses (MFU)."""
        cost: dict[str, float] = {"memory_bytes": peak_memory_bytes(self.device)}
        peak = peak_flops(self.device)
        if peak:
            flops = self.model_config.flops_per_token(context)
            cost["mfu"] = tokens_per_second * flops / (peak * distributed.world_size())
        return cost

    def _settings(self) -> dict[str, Any]:
        return {"steps": self.loop.steps, "seed": self.loop.seed, "dtype": self.loop.dtype, **to_dict(self.optim)}


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _on_any_rank(here: bool) -> bool:
    """Whether `here` holds on any rank: all ranks stop at the same step, whichever got the signal."""
    return bool(distributed.all_reduce_sum(torch.tensor(float(here))) > 0)
