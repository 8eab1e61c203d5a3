"""What every family's vmap and double-backward rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def batch_first(info: object, in_dims: Sequence[object], *tensors: Tensor | Sequence[Tensor] | None) -> list[object]:
    """Every tensor, of lists too, with the vmapped dim in front, expanded where it was not batched."""
    out = []
    # in_dims goes on with those of the options
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
    info: object, in_dims: Sequence[object], op: Callable, tensors: Sequence[object], *options: object
) -> tuple[Tensor, ...]:
    """A vmap rule for an operator that has no dim to spare: a call per slice, outputs stacked in front."""
    batched = batch_first(info, in_dims, *tensors)
    calls = [op(*(_slice(t, i) for t in batched), *options) for i in range(info.batch_size)]
    return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True))


def _slice(batched: object, i: int) -> object:
    return [t[i] for t in batched] if isinstance(batched, list) else None if batched is None else batched[i]


def vector_jacobian(
    formula: Callable, inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of `formula(*inputs)` for the given output gradients, themselves differentiable; None stays None."""
    present = [i for i, tensor in enumerate(inputs) if tensor is not None]

    def of_present(*tensors: Tensor) -> tuple[Tensor, ...]:
        full = list(inputs)
        for i, tensor in zip(present, tensors, strict=True):
            full[i] = tensor
        return tuple(formula(*full))

    outputs, pull_back = torch.func.vjp(of_present, *(inputs[i] for i in present))
    filled = tuple(torch.zeros_like(o) if g is None else g.to(o.dtype) for o, g in zip(outputs, grads, strict=False))
    result: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(present, pull_back(filled), strict=True):
        result[i] = grad
    return result
