"""Rules for torch.func.vmap, a word per operator: where the operator takes a batch, if it takes one at all.

A rule takes the operator, its signature, `info` and `in_dims` of torch.library.register_vmap, and the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._autograd import Signature


def one_by_one(op: Callable, signature: Signature, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """Call an operator without batch dims on each slice."""
    batched = _batched(0, info, in_dims, args)
    calls = [op(*(_slice(value, i) for value in batched)) for i in range(info.batch_size)]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    kind = list if signature.returns_list else tuple
    outputs = kind(torch.stack(each) for each in zip(*calls, strict=True))
    return outputs, kind(0 for _ in outputs)


def leading(op: Callable, signature: Signature, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """Put the batch in front of the dims; an argument `dim` counts from the front."""
    batched = _batched(0, info, in_dims, args)
    if "dim" in signature.types:
        batched[signature.arguments.index("dim")] += 1
    return _at(op(*batched), lambda output: 0)


def after_channels(
    op: Callable, signature: Signature, info: Any, in_dims: Sequence[Any], *args: Any
) -> tuple[Any, Any]:
    """Put the batch of codes behind their first dim, the channels; indices have none. Other tensors are shared."""
    tensors = [(value, dim) for value, dim in zip(args, in_dims, strict=True) if isinstance(value, Tensor)]
    if any(dim is not None and not value.is_floating_point() for value, dim in tensors):
        return one_by_one(op, signature, info, in_dims, *args)
    return _at(op(*_batched(1, info, in_dims, args)), lambda output: int(output.is_floating_point()))


def flattened(op: Callable, signature: Signature, info: Any, in_dims: Sequence[Any], x: Tensor) -> tuple[Tensor, int]:
    """Flatten the batch and the rows of the only argument into rows."""
    x = x.movedim(in_dims[0], 0)
    return op(x.flatten(0, 1)).unflatten(0, x.shape[:2]), 0


def _batched(at: int, info: Any, in_dims: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Move the batch of every tensor, also within lists, to dim `at`; expand tensors that have none.

    Integer tensors without a batch stay as they are if the batch is not in front.
    """
    out: list[Any] = []
    for value, dim in zip(args, in_dims, strict=True):
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            value = _batched(at, info, dim or [None] * len(value), value)
        elif isinstance(value, Tensor) and dim is not None:
            value = value.movedim(dim, at)
        elif isinstance(value, Tensor) and (at == 0 or value.is_floating_point()):
            value = value.unsqueeze(at).expand(*value.shape[:at], info.batch_size, *value.shape[at:])
        out.append(value)
    return out


def _slice(value: Any, i: int) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [tensor[i] for tensor in value]
    return value[i] if isinstance(value, Tensor) else value


def _at(outputs: Any, place: Callable[[Tensor], int]) -> tuple[Any, Any]:
    """Return the outputs with the place of their batch; an output of shape (0,) stands for none and has no batch."""
    if outputs is None or isinstance(outputs, Tensor):
        return outputs, None if outputs is None else place(outputs)
    return outputs, tuple(None if output.shape == (0,) else place(output) for output in outputs)
