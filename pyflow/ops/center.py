"""Centred Gram matrices H K H."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._operators import Operator, register
from .._vmap import leading
from ..reference import center as ref


def center_gram(gram: Tensor, *, inplace: bool = False) -> Tensor:
    """Return H K H with H = I - 1/n, whose rows and columns sum to zero, with one read and one write of memory.

    Args:
        gram: (..., n, n) float32, float64, bfloat16 or float16; need not be symmetric.
        inplace: write into gram, which must not require a gradient.

    Returns:
        (..., n, n) of gram's dtype; gram itself if inplace.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: not square; inplace on a tensor that requires a gradient or whose elements share memory.

    Notes:
        Sums are float64 in a fixed order: on a CPU the same bits for any thread count, instruction set and batch.

    Example:
        >>> center_gram(torch.eye(2))
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  0.5000]])
    """
    op = "center_gram"
    check.float_tensor(op, "gram", gram)
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"{op}: gram must be (..., n, n), got shape {tuple(gram.shape)}")
    if check.flag(op, "inplace", inplace):
        if gram.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: inplace must not be used on a tensor that requires a gradient")
        if _overlaps(gram):
            raise ValueError(f"{op}: inplace must not be used on a tensor whose elements share memory")
        operator = _center_in_place.pick(op, gram)
        operator(gram)
        # the operator skips autograd, which would have increased the version counter
        if operator is _center_in_place and not torch.compiler.is_compiling() and not gram.is_inference():
            torch.autograd.graph.increment_version(gram)
        return gram
    return _center.pick(op, gram)(gram)


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements that differ in one or two dims have the same address."""
    if not tensor.numel():
        return False
    dims = [(size, step) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    if any(step == 0 for _, step in dims):
        return True
    steps = ((a, b, math.gcd(a[1], b[1])) for i, a in enumerate(dims) for b in dims[:i])
    return any(b[1] // common < a[0] and a[1] // common < b[0] for a, b, common in steps)


def _center_reference(gram):
    return ref.center_gram(gram.double()).to(gram.dtype).contiguous()


def _center_backward(grad):
    return {"gram": _center(grad)}


_center: Operator = register(
    "center_gram", "center", reference=_center_reference, fake=lambda gram: gram.new_empty(gram.shape), vmap=leading,
    backward=_center_backward, cuda=False,
)  # fmt: skip
_center_in_place = register(
    "center_gram_", "center", reference=lambda gram: gram.copy_(_center_reference(gram)), fake=lambda gram: None,
    vmap=leading, cuda=False,
)  # fmt: skip


def warmup(x: Tensor, **other: Any) -> list[Tensor]:
    return [center_gram(x[:, :2])]
