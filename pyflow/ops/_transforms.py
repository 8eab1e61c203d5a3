"""What every family's vmap and double-backward rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def batch_first(info: object, in_dims: Sequence[int | None], *tensors: Tensor | None) -> list[Tensor | None]:
    """Every tensor with the vmapped dim in front, expanded where it was not batched."""
    out = []
    for tensor, dim in zip(tensors, in_dims):
        if tensor is None:
            out.append(None)
        elif dim is None:
            out.append(tensor.expand(info.batch_size, *tensor.shape))
        else:
            out.append(tensor.movedim(dim, 0))
    return out


def one_by_one(
    info: object, in_dims: Sequence[int | None], op: Callable, tensors: Sequence[Tensor | None], *options: object
) -> tuple[Tensor, ...]:
    """A vmap rule for an operator that has no dim to spare: a call per slice, outputs stacked in front."""
    batched = batch_first(info, in_dims, *tensors)
    calls = [op(*(None if t is None else t[i] for t in batched), *options) for i in range(info.batch_size)]
    return tuple(torch.stack(outputs) for outputs in zip(*calls))


def vector_jacobian(
    formula: Callable, inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of `formula(*inputs)` for the given output gradients, themselves differentiable; None stays None."""
    present = [i for i, tensor in enumerate(inputs) if tensor is not None]

    def of_present(*tensors: Tensor) -> tuple[Tensor, ...]:
        full = list(inputs)
        for i, tensor in zip(present, tensors):
            full[i] = tensor
        return tuple(formula(*full))

    outputs, pull_back = torch.func.vjp(of_present, *(inputs[i] for i in present))
    filled = tuple(torch.zeros_like(o) if g is None else g.to(o.dtype) for o, g in zip(outputs, grads))
    result: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(present, pull_back(filled)):
        result[i] = grad
    return result
