"""Plain-torch implementation of every operation. It defines what the kernels compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic and of returned sums for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b and its gradients in the dtype of the inputs, even under autocast."""
    kind, traced = a.device.type, torch.compiler.is_compiling()
    # dynamo of torch 2.11 does not trace is_autocast_available
    available = kind != "meta" if traced else torch.amp.is_autocast_available(kind)
    if not available or not torch.is_autocast_enabled(kind):
        return a @ b
    if b.dim() == 1:
        return matmul(a, b.unsqueeze(-1)).squeeze(-1)
    # dynamo does not trace autograd functions with a jvp; it traces the backward under this block too
    if traced:
        with torch.autocast(kind, enabled=False):
            return a @ b
    return _Matmul.apply(a, b)


class _Matmul(torch.autograd.Function):
    """a @ b without autocast, in the backward too, where autocast would cast the factors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        return (
            matmul(grad, b.mT).sum_to_size(a.shape) if needs_a else None,
            matmul(a.mT, grad).sum_to_size(b.shape) if needs_b else None,
        )

    @staticmethod
    def jvp(ctx: Any, tangent_a: Tensor, tangent_b: Tensor) -> Tensor:
        a, b = ctx.saved_tensors
        return matmul(tangent_a, b) + matmul(a, tangent_b)
