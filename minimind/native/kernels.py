"""The kernels of `kernels.cpp` on tensors, with their gradients: what lies between a CPU step's matrix products.

They know shapes, not models. Each has its definition in PyTorch where it is used, which is also what runs where
`usable` says no: on other devices and dtypes, under torch.compile, and without a C++ compiler.
"""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minimind.native.build import library

SOURCE = Path(__file__).with_name("kernels.cpp")

_SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_P, _N = c_void_p, c_int64
_ARGUMENTS = {
    "norm_forward": (_P, _P, _P, _P, _N, _N, c_float),
    "norm_backward": (_P, _P, _P, _P, _P, _P, _N, _N),
    "swiglu_forward": (_P, _P, _N, _N),
    "swiglu_backward": (_P, _P, _P, _N, _N),
    "cross_entropy": (_P, _P, _P, _P, _P, _N, _N, _N),
    "attention_forward": (*[_P] * 7, *[_N] * 5, c_float),
    "attention_backward": (*[_P] * 9, *[_N] * 5, c_float),
}
_HEAD_SIZES = range(16, 257, 16)
"""What `attention` takes."""


@cache
def _library() -> ctypes.CDLL | None:
    """Return `kernels.cpp`, compiled, with the types of its functions; None where it cannot be had."""
    code = library(SOURCE)
    if code is not None:
        for name, arguments in _ARGUMENTS.items():
            for suffix in _SUFFIX.values():
                function = getattr(code, f"{name}_{suffix}")
                function.restype, function.argtypes = None, arguments
        code.num_threads.restype = c_int64
    return code


def usable(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether the kernels can stand in for PyTorch on tensors of these dtypes on `device`."""
    if torch.compiler.is_compiling() or device.type != "cpu" or not all(dtype in _SUFFIX for dtype in dtypes):
        return False
    return _library() is not None


def takes_heads_of(size: int) -> bool:
    """Whether `attention` takes heads of this size."""
    return size in _HEAD_SIZES


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which autocast, where it is on, multiplies `x`; else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def rms_norm(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], eps: float, dtype: torch.dtype
) -> Float[Tensor, "*batch D"]:
    """Return x / sqrt(mean(x^2) + eps) * weight in `dtype`; `x` and `weight` are float32."""
    return _Norm.apply(x, weight, eps, dtype)


def swiglu(gate_up: Float[Tensor, "*batch F2"]) -> Float[Tensor, "*batch F"]:
    """Return silu(gate) * up, where the last axis holds the gates, then the ups."""
    return _SwiGLU.apply(gate_up)


def attention(
    qkv: Float[Tensor, "B T width"],
    cos: Float[Tensor, "rows T 1 half"],
    sin: Float[Tensor, "rows T 1 half"],
    spans: Int[Tensor, " documents_and_one"],
    num_heads: int,
    num_kv_heads: int,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Float[Tensor, "B T D"]:
    """Return the heads' outputs side by side: rotated queries and keys, causal attention inside each document.

    `qkv` holds each token's query heads, key heads, value heads. `spans`: 0, then where each document ends in the flat
    batch, int64. `norms`: weights (Dh) of an RMSNorm on queries and on keys before the rotation, and its eps. In
    bfloat16, products are summed in float32, and probabilities are rounded before they weigh values.
    """
    q_norm, k_norm, eps = norms or (None, None, 0.0)
    return _Attention.apply(qkv, cos, sin, spans, q_norm, k_norm, num_heads, num_kv_heads, eps)


def cross_entropy_(
    logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"], weights: Float[Tensor, " N"], *, needs_grad: bool
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return (weight * -log softmax(logits)[label], weight where the label is the first largest logit), float32.

    With `needs_grad` the gradient of the summed losses takes the place of `logits`.
    """
    labels, weights = labels.contiguous(), weights.contiguous()
    losses, hits = torch.empty_like(weights), torch.empty_like(weights)
    rows, size = logits.shape
    if rows and (int(labels.min()) < 0 or int(labels.max()) >= size):
        raise IndexError(f"a label is outside 0 .. {size - 1}")
    _call("cross_entropy", logits.dtype, logits, labels, weights, losses, hits, rows, size, needs_grad)
    return losses, hits


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x = x.contiguous()
        size = x.shape[-1]
        out = torch.empty(x.shape, dtype=dtype)
        scale = torch.empty(x.numel() // size)
        _call("norm_forward", dtype, x, weight, out, scale, scale.numel(), size, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad, size = grads[0].contiguous(), x.shape[-1]
        grad_x, partial = torch.empty_like(x), torch.zeros(_num_threads(), size)
        _call("norm_backward", grad.dtype, grad, x, weight, scale, grad_x, partial, scale.numel(), size)
        return grad_x, partial.sum(0), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        size = gate_up.shape[-1] // 2
        out = gate_up.new_empty((*gate_up.shape[:-1], size))
        _call("swiglu_forward", out.dtype, gate_up, out, out.numel() // size, size)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad, size = grads[0].contiguous(), gate_up.shape[-1] // 2
        grad_gate_up = torch.empty_like(gate_up)
        _call("swiglu_backward", grad.dtype, grad, gate_up, grad_gate_up, grad.numel() // size, size)
        return grad_gate_up


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        spans: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
    ) -> Tensor:
        inputs = (qkv.contiguous(), cos.contiguous(), sin.contiguous(), spans, q_norm, k_norm)
        size = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
        out = qkv.new_empty((*qkv.shape[:-1], num_heads * size))
        ctx.numbers = (spans.numel() - 1, num_heads, num_kv_heads, size, cos.shape[0] * cos.shape[1], eps)
        _call("attention_forward", qkv.dtype, *inputs, out, *ctx.numbers)
        ctx.save_for_backward(*inputs)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors  # once: gradient checkpointing computes them anew each time
        qkv, q_norm = inputs[0], inputs[4]
        grad, size = torch.empty_like(qkv), ctx.numbers[3]
        partial = torch.zeros(0 if q_norm is None else ctx.numbers[0] * ctx.numbers[2], 2, size)
        _call("attention_backward", qkv.dtype, *inputs, grads[0].contiguous(), grad, partial, *ctx.numbers)
        grad_norms = (None, None) if q_norm is None else partial.sum(0).unbind()
        return grad, None, None, None, *grad_norms, None, None, None


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
    for value in arguments:
        if isinstance(value, Tensor) and not value.is_contiguous():
            raise ValueError(f"{name}: a tensor of shape {tuple(value.shape)} is not contiguous")
    function = getattr(_library(), f"{name}_{_SUFFIX[dtype]}")
    function(*(value.data_ptr() if isinstance(value, Tensor) else value for value in arguments))


def _num_threads() -> int:
    code = _library()
    return code.num_threads() if code else 1
