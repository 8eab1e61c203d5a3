"""Helpers of the vmap and double-backward rules of all families."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def batch_first(info: Any, in_dims: Sequence[Any], *tensors: Tensor | Sequence[Tensor] | None) -> list[Any]:
    """Move the vmapped dim of every tensor to the front, also within lists; expand tensors that have none."""
    out: list[Any] = []
    # in_dims also covers the options, which follow the tensors
    for tensor, dim in zip(tensors, in_dims, strict=False):
        if tensor is None:
            out.append(None)
        elif not isinstance(tensor, Tensor):
            out.append(batch_first(info, dim or [None] * len(tensor), *tensor))
        elif dim is None:
            out.append(tensor.expand(info.batch_size, *tensor.shape))
        else:
            out.append(tensor.movedim(dim, 0))
    return out


def one_by_one(
    info: Any,
    in_dims: Sequence[Any],
    op: Callable[..., Iterable[Tensor]],
    tensors: Sequence[Tensor | Sequence[Tensor] | None],
    *options: Any,
) -> tuple[Tensor, ...]:
    """Vmap rule for an operator without batch dims: call it on each slice and stack the outputs in front."""
    batched = batch_first(info, in_dims, *tensors)
    calls = [op(*(_slice(t, i) for t in batched), *options) for i in range(info.batch_size)]
    return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True))


def _slice(batched: Any, i: int) -> Any:
    return [t[i] for t in batched] if isinstance(batched, list) else None if batched is None else batched[i]


def vector_jacobian(
    formula: Callable[..., Iterable[Tensor]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Differentiable gradients of `formula(*inputs)` for the output gradients `grads`; None for inputs of None."""
    present = [i for i, tensor in enumerate(inputs) if tensor is not None]

    def of_present(*tensors: Tensor) -> tuple[Tensor, ...]:
        full = list(inputs)
        for i, tensor in zip(present, tensors, strict=True):
            full[i] = tensor
        return tuple(formula(*full))

    outputs, pull_back = torch.func.vjp(of_present, *(inputs[i] for i in present))[:2]
    filled = tuple(torch.zeros_like(o) if g is None else g.to(o.dtype) for o, g in zip(outputs, grads, strict=False))
    result: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(present, pull_back(filled), strict=True):
        result[i] = grad
    return result
