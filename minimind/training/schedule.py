"""Learning rate over a run, as pure functions of the step: each returns a factor of the highest rate.

They know no optimizer. `step` is the number of updates made before the one in question: from 0 to `steps - 1`.
"""

import math

from minimind.training.config import OptimConfig


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Return the factor, in [0, 1], that `config.schedule` gives update `step` of `steps`."""
    if config.schedule == "cosine":
        return cosine(step, steps, warmup_steps=config.warmup_steps, min_ratio=config.min_lr_ratio)
    if config.schedule == "wsd":
        return warmup_stable_decay(
            step,
            steps,
            warmup_steps=config.warmup_steps,
            decay_fraction=config.decay_fraction,
            min_ratio=config.min_lr_ratio,
        )
    return warmup(step, config.warmup_steps)


def warmup(step: int, warmup_steps: int) -> float:
    """Return (step + 1) / warmup_steps while that is below 1, then 1: the first update moves already."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def cosine(step: int, steps: int, *, warmup_steps: int = 0, min_ratio: float = 0.1) -> float:
    """Return r + (1 - r) (1 + cos(pi p)) / 2 with p running from 0 after the warmup to 1 at the end (arXiv 1608.03983).

    Without warmup and with r = 0.1 this is MiniMind's historical curve, 0.1 + 0.45 (1 + cos(pi t / T)).
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(
    step: int, steps: int, *, warmup_steps: int = 0, decay_fraction: float = 0.2, min_ratio: float = 0.1
) -> float:
    """Return 1 after the warmup until the last `decay_fraction` of the run, then r + (1 - r) (1 - sqrt(p)).

    The 1 - sqrt shape of the decay is the best of those compared in arXiv 2405.18392.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    decay_steps = max(1, round(steps * decay_fraction))
    progress = (step - (steps - decay_steps)) / decay_steps
    if progress <= 0:
        return 1.0
    return min_ratio + (1 - min_ratio) * (1 - math.sqrt(min(1.0, progress)))
