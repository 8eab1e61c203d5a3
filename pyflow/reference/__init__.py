"""Every operation in plain torch: the specification in code."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operation computes, and returns sums, for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype under autocast too, as its gradients are."""
    kind, traced = a.device.type, torch.compiler.is_compiling()
    # torch 2.11 does not trace the question what is available
    available = kind != "meta" if traced else torch.amp.is_autocast_available(kind)
    if not available or not torch.is_autocast_enabled(kind):
        return a @ b
    # a trace takes no function with a forward mode, and traces the gradient here
    if traced:
        with torch.autocast(kind, enabled=False):
            return a @ b
    return _Matmul.apply(a, b)


class _Matmul(torch.autograd.Function):
    """Autocast casts what a backward multiplies as well."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            return a @ b

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        of_a, of_b = ctx.needs_input_grad
        return (
            matmul(grad, b.mT).sum_to_size(a.shape) if of_a else None,
            matmul(a.mT, grad).sum_to_size(b.shape) if of_b else None,
        )

    @staticmethod
    def jvp(ctx: object, along_a: Tensor, along_b: Tensor) -> Tensor:
        a, b = ctx.saved_tensors
        return matmul(along_a, b) + matmul(a, along_b)
