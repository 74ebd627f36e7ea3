"""The settings of the optimizer and of the loop. Values only: no torch, and nothing about any stage."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OptimConfig:
    """How weights move."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon on the matrices of the layers, AdamW on embeddings, norms, routers and head."""
    lr: float = 5e-4
    """Highest learning rate of AdamW."""
    muon_lr: float = 0.02
    """Highest learning rate of Muon (times sqrt(max(1, rows / columns)) of each matrix)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices; norms, embeddings and other vectors are not decayed."""
    beta1: float = 0.9
    """AdamW: memory of the gradient."""
    beta2: float = 0.95
    """AdamW: memory of the squared gradient."""
    eps: float = 1e-8
    """AdamW: added to the root of the squared gradient."""
    momentum: float = 0.95
    """Muon: memory of the gradient (Nesterov)."""
    muon_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Muon: precision of its Newton-Schulz iteration; auto is bfloat16 where the device multiplies it natively. In
    float32 another split into micro-batches or processes moves losses by less than 1e-6, in bfloat16 by some 1e-5."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate over the run: cosine, wsd (warm up, stay, decay at the end), or constant."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises in a straight line."""
    decay_fraction: float = 0.2
    """wsd: share of the run at its end in which the rate falls."""
    min_lr_ratio: float = 0.1
    """Share of the highest rate that is left at the end."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = [
            f"{name} = {getattr(self, name)}: must not be negative"
            for name in ("lr", "muon_lr", "weight_decay", "clip", "warmup_steps")
            if not getattr(self, name) >= 0
        ]
        found += [
            f"{name} = {getattr(self, name)}: must be at least 0 and below 1"
            for name in ("beta1", "beta2", "momentum")
            if not 0 <= getattr(self, name) < 1
        ]
        found += [
            f"{name} = {getattr(self, name)}: must lie between 0 and 1"
            for name in ("decay_fraction", "min_lr_ratio")
            if not 0 <= getattr(self, name) <= 1
        ]
        if not self.eps > 0:
            found.append(f"eps = {self.eps}: must be above 0")
        return found


@dataclass(frozen=True)
class LoopConfig:
    """How long the loop runs, how often it looks up, and on what it runs."""

    steps: int = 0
    """Optimizer steps of the whole run, counted from its beginning (a resumed run makes the rest)."""
    save_every: int = 500
    """Steps between checkpoints; 0 saves only the last step, which is always saved."""
    eval_every: int = 500
    """Steps between validations; 0 validates only before the first and after the last step."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl and lines of the log."""
    sample_every: int = 0
    """Steps between samples; 0 takes none."""
    keep: int = 2
    """Checkpoints kept."""
    dtype: Literal["auto", "float32", "fp32", "bfloat16", "bf16", "float16", "fp16"] = "auto"
    """Precision of the matrix products; weights and optimizer state stay float32."""
    device: str = "auto"
    """cpu, cuda, cuda:N, mps, or auto."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on a GPU."""
    seed: int = 0
    """Seed of everything random in the loop (dropout); the order of the data has its own copy in the source."""
    trackers: tuple[str, ...] = ()
    """Where metrics go besides metrics.jsonl: wandb, swanlab, tensorboard. They never stop a run."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = [
            f"{name} = {getattr(self, name)}: must not be negative"
            for name in ("save_every", "eval_every", "sample_every", "seed")
            if getattr(self, name) < 0
        ]
        if self.steps < 1:
            found.append(f"steps = {self.steps}: at least 1")
        if self.log_every < 1:
            found.append(f"log_every = {self.log_every}: at least 1")
        if self.keep < 2:
            found.append(f"keep = {self.keep}: at least 2, so that a good checkpoint exists at all times")
        unknown = sorted(set(self.trackers) - {"wandb", "swanlab", "tensorboard"})
        if unknown:
            found.append(f"trackers = {', '.join(unknown)}: not known; use wandb, swanlab or tensorboard")
        return found
