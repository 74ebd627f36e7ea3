"""AdamW and Muon behind one small face: groups chosen by name and shape, state as tensors by parameter name.

Muon (https://kellerjordan.github.io/posts/muon/): for a matrix W with gradient G,

    B <- mu B + (1 - mu) G;  U = mu B + (1 - mu) G;  W <- (1 - eta lambda) W - eta sqrt(max(1, rows / columns)) NS(U)

where NS(U) replaces the singular values of U by values near 1 through five Newton-Schulz iterations,
X <- a X + b (X X^T) X + c (X X^T)^2 X. Matrices of one shape are stacked and iterated together. Embeddings, head,
routers, norms and other vectors go to AdamW. The module knows no schedule and no loop; rates arrive with each step.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from minimind.errors import CheckpointError
from minimind.runtime.device import has_native_bfloat16
from minimind.training.config import OptimConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""a, b, c of the quintic, chosen by Keller Jordan for the steepest slope at zero."""
NEWTON_SCHULZ_STEPS = 5
NOT_FOR_MUON = ("embed", "lm_head", "router", "mlp.gate.", "value_head", "score")
"""Parts of names whose matrices AdamW takes: their rows are looked up, compared or read out one by one."""


class Part(Protocol):
    """One optimizer over some named parameters."""

    def step(self, factor: float) -> None:
        """Update with `factor` times the highest rate."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return every tensor a resumed run needs, by kind and parameter name."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned."""
        ...


class Optimizer:
    """The parts that together update every trainable parameter of a model."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.config = config
        self.parts: list[Part] = []
        for rate, parameters in _by_rate(self.parameters, getattr(model, "rates", {})).items():
            own = replace(config, lr=config.lr * rate, muon_lr=config.muon_lr * rate)
            on_muon = {
                name: p
                for name, p in parameters.items()
                if config.name == "muon" and p.ndim >= 2 and not any(part in name for part in NOT_FOR_MUON)
            }
            rest = {name: p for name, p in parameters.items() if name not in on_muon}
            self.parts += [AdamW(rest, own)] if rest else []
            self.parts += [Muon(on_muon, own)] if on_muon else []

    def step(self, factor: float) -> None:
        """Update every parameter from its `.grad` with `factor` times the highest rates."""
        for part in self.parts:
            part.step(factor)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.parameters.values():
            p.grad = None

    def gradients(self) -> list[Tensor]:
        """Return the gradients that exist, in the order of the parameters."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of all parts, `kind/parameter name` -> tensor."""
        return {name: tensor for part in self.parts for name, tensor in part.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned, bit for bit. Raises CheckpointError when it is another optimizer's."""
        own = self.state_dict()
        if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
            odd = sorted(own.keys() ^ state.keys()) or [n for n in sorted(own) if own[n].shape != state[n].shape]
            raise CheckpointError(
                f"the checkpoint's optimizer state is not that of {self.config.name}: {len(odd)} tensors differ, "
                f"the first is {odd[0]}; train with the optimizer it was made with, or start again with --fresh"
            )
        for part in self.parts:
            part.load_state_dict(state)


def _by_rate(parameters: dict[str, nn.Parameter], rates: dict[str, float]) -> dict[float, dict[str, nn.Parameter]]:
    """Return the parameters that share a multiple of the rate; `rates` are by the beginning of their names."""
    found: dict[float, dict[str, nn.Parameter]] = {}
    for name, p in parameters.items():
        rate = next((rate for prefix, rate in rates.items() if name.startswith(prefix)), 1.0)
        found.setdefault(rate, {})[name] = p
    return found


class AdamW:
    """AdamW (arXiv 1711.05101) by torch's fused kernel; only matrices but embeddings decay.

    The kernel is called directly: torch.optim.AdamW, which calls the same, first imports torch's compiler (a second).
    """

    def __init__(self, parameters: dict[str, nn.Parameter], config: OptimConfig) -> None:
        self.parameters, self.config = parameters, config
        self.decayed = {name for name, p in parameters.items() if p.ndim >= 2 and "embed" not in name}
        self.state = {
            name: {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
            for name, p in parameters.items()
        }

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update with `factor` times the highest rate; a parameter without gradient stays as it is."""
        config = self.config
        with_gradient = [name for name, p in self.parameters.items() if p.grad is not None]
        for decay, is_decayed in ((config.weight_decay, True), (0.0, False)):
            names = [name for name in with_gradient if (name in self.decayed) is is_decayed]
            if not names:
                continue
            steps = [self.state[name]["step"] for name in names]
            torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            torch._fused_adamw_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] - see above
                [self.parameters[name] for name in names],
                [_gradient(self.parameters[name]) for name in names],
                [self.state[name]["exp_avg"] for name in names],
                [self.state[name]["exp_avg_sq"] for name in names],
                [],
                steps,
                lr=config.lr * factor,
                beta1=config.beta1,
                beta2=config.beta2,
                weight_decay=decay,
                eps=config.eps,
                amsgrad=False,
                maximize=False,
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Return `adamw.exp_avg/NAME`, `adamw.exp_avg_sq/NAME` and `adamw.step/NAME`."""
        return {f"adamw.{kind}/{name}": tensor for name, own in self.state.items() for kind, tensor in own.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the saved tensors into place."""
        for name, own in self.state_dict().items():
            own.copy_(state[name])


class Muon:
    """Muon over matrices (2-D parameters) and stacks of matrices (3-D: the experts of a layer).

    Matrices of one shape, lying or standing, share one stack in which the longer side is last.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], config: OptimConfig) -> None:
        self.lr, self.momentum, self.weight_decay = config.muon_lr, config.momentum, config.weight_decay
        self.groups: dict[tuple[int, int], dict[str, nn.Parameter]] = {}
        for name, p in parameters.items():
            self.groups.setdefault((min(p.shape[-2:]), max(p.shape[-2:])), {})[name] = p
        first = next(iter(parameters.values()))
        self.buffers: dict[tuple[int, int], Tensor] = {}
        for shape, group in self.groups.items():
            num_matrices = sum(p.numel() for p in group.values()) // (shape[0] * shape[1])
            self.buffers[shape] = torch.zeros(num_matrices, *shape, device=first.device)
        is_fast = first.is_cuda or (first.device.type == "cpu" and has_native_bfloat16())
        is_narrow = is_fast if config.muon_dtype == "auto" else config.muon_dtype == "bfloat16"
        self.dtype = torch.bfloat16 if is_narrow else torch.float32

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update with `factor` times the highest rate."""
        lr = self.lr * factor
        for shape, group in self.groups.items():
            gradients = torch.cat([_lying(_gradient(p)) for p in group.values()])  # (n, shorter, longer)
            self.buffers[shape].lerp_(gradients, 1 - self.momentum)
            update = orthogonalize(gradients.lerp_(self.buffers[shape], self.momentum), self.dtype)
            for p, part in zip(group.values(), _split(update, group), strict=True):
                rows, columns = p.shape[-2:]
                if self.weight_decay:
                    p.mul_(1 - lr * self.weight_decay)
                p.add_(part, alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def state_dict(self) -> dict[str, Tensor]:
        """Return `muon.momentum/NAME`, views of the stacked buffers in the shapes of the parameters."""
        return {
            f"muon.momentum/{name}": part
            for shape, group in self.groups.items()
            for name, part in zip(group, _split(self.buffers[shape], group), strict=True)
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the saved tensors into place."""
        for name, own in self.state_dict().items():
            own.copy_(state[name])


def orthogonalize(matrices: Tensor, dtype: torch.dtype, *, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """Return a stack (n, rows, columns) with the same singular vectors and all singular values near 1 (0.7 to 1.2).

    Iterated in `dtype`, in which it is returned; bfloat16 is enough, since the values are only approximately 1 anyway.
    """
    a, b, c = NEWTON_SCHULZ
    x = _lying(matrices).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (n, shorter, shorter)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


class LossScaler:
    """Dynamic scaling of the loss for float16, whose gradients would underflow (arXiv 1710.03740); else inert at 1."""

    GROWTH_STEPS = 2000
    SMALLEST = 2.0**-14

    def __init__(self, *, enabled: bool) -> None:
        self.is_enabled = enabled
        self.scale = 2.0**16 if enabled else 1.0
        self.good_steps = 0

    def update(self, *, is_finite: bool) -> bool:
        """Adapt the scale to a step's gradients. Returns False when there is nothing left to halve: it has diverged."""
        if not self.is_enabled:
            return is_finite
        self.good_steps = self.good_steps + 1 if is_finite else 0
        if not is_finite:
            self.scale /= 2
        elif self.good_steps % self.GROWTH_STEPS == 0:
            self.scale *= 2
        return self.scale >= self.SMALLEST

    def state_dict(self) -> dict[str, float]:
        """Return JSON-able state."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over what `state_dict` returned."""
        if self.is_enabled:
            self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])


def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm over all gradients as if they were one vector."""
    return nn.utils.get_total_norm(list(gradients))


def _gradient(p: nn.Parameter) -> Tensor:
    return p.grad if p.grad is not None else torch.zeros_like(p)


def _lying(matrices: Tensor) -> Tensor:
    """Return one matrix or a stack as (n, shorter, longer), contiguous."""
    stack = matrices if matrices.ndim == 3 else matrices[None]
    return stack if stack.shape[1] <= stack.shape[2] else stack.mT.contiguous()


def _split(stack: Tensor, group: dict[str, nn.Parameter]) -> list[Tensor]:
    """Return the parts of a stack (n, shorter, longer) that belong to the parameters, in their shapes."""
    parts = stack.split([len(p) if p.ndim == 3 else 1 for p in group.values()])
    turned = (part if p.shape[-2] <= p.shape[-1] else part.mT for p, part in zip(group.values(), parts, strict=True))
    return [part if p.ndim == 3 else part[0] for p, part in zip(group.values(), turned, strict=True)]
