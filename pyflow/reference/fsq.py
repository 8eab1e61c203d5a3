"""Finite scalar quantisation in plain torch. Channels are the first dim.

Codes have the straight-through gradient: the gradient of the bounded value before rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from . import compute_dtype

# variants that clamp, instead of a tanh or a sigmoid
CLAMPED = ("hard", "symmetric_hard", "bounded")


class Constants(NamedTuple):
    """Constants per channel, exact in float32: the bound is half * f(z + shift) - offset, digits are 0 to top."""

    half: list[float]
    shift: list[float]
    offset: list[float]
    width: list[int]  # L // 2, the divisor of the code
    top: list[int]  # L - 1
    step: list[float]  # 2 / (L - 1)


def constants(levels: Sequence[int], variant: str) -> Constants:
    """Return the constants, rounded to float32 after every operation as vector-quantize-pytorch does."""
    single = np.float32
    margin = single(1 - 1e-3 if variant == "paper" else 1 + 1e-3)
    half = [single(n - 1) * margin / single(2) for n in levels]
    offset = [single(0.5 if n % 2 == 0 else 0.0) for n in levels]
    unbound = {"paper": math.tan, "hard": float}.get(variant, math.atanh)
    needs_shift = variant in ("vqp", "paper", "hard")
    shift = [float(single(unbound(float(o / h)))) if needs_shift else 0.0 for o, h in zip(offset, half, strict=True)]
    step = [float(single(2) / single(n - 1)) for n in levels]
    return Constants(
        [float(h) for h in half], shift, [float(o) for o in offset], [n // 2 for n in levels],
        [n - 1 for n in levels], step,
    )  # fmt: skip


def basis(levels: Sequence[int]) -> list[int]:
    """Return the index stride of each channel; the first channel varies fastest."""
    out = [1]
    for n in levels[:-1]:
        out.append(out[-1] * n)
    return out


def index_dtype(levels: Sequence[int]) -> torch.dtype:
    return torch.int32 if math.prod(levels) <= 2**31 else torch.int64


def _columns(values: Sequence[float], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device).reshape(-1, *(1,) * (like.dim() - 1))


def _squash(z: Tensor, levels: Sequence[int], variant: str) -> Tensor:
    """Map z into (-1, 1), or (0, 1) for the variant sigmoid, in the compute dtype."""
    z = z.to(compute_dtype(z.dtype))
    if variant in ("vqp", "paper", "hard"):
        z = z + _columns(constants(levels, variant).shift, z, z.dtype)
    if variant in CLAMPED:
        return z.clamp(-1, 1)
    return torch.sigmoid(z) if variant == "sigmoid" else torch.tanh(z)


def _spread(squashed: Tensor, levels: Sequence[int], variant: str) -> Tensor:
    c, dtype = constants(levels, variant), squashed.dtype
    if variant == "sigmoid":
        return _columns(c.top, squashed, dtype) * squashed
    if variant in ("symmetric", "symmetric_hard"):
        return _columns(c.top, squashed, dtype) * (squashed + 1) / 2
    return squashed * _columns(c.half, squashed, dtype) - _columns(c.offset, squashed, dtype)


def bound(z: Tensor, levels: Sequence[int], variant: str) -> Tensor:
    """Return the bounded value. Its rounding is the digit (minus L // 2 for vqp, paper and hard)."""
    return _spread(_squash(z, levels, variant), levels, variant)


def _code(digits: Tensor, levels: Sequence[int], variant: str) -> Tensor:
    c, dtype = constants(levels, variant), digits.dtype
    if variant == "sigmoid":
        return digits / _columns(c.top, digits, dtype)
    if variant in ("symmetric", "symmetric_hard"):
        return digits * _columns(c.step, digits, dtype) - 1
    width = _columns(c.width, digits, dtype)
    return (digits - width) / width


def _digits(b: Tensor, levels: Sequence[int], variant: str) -> Tensor:
    c = constants(levels, variant)
    if variant in ("symmetric", "symmetric_hard"):
        digits = torch.floor(b + 0.5)
    else:
        digits = torch.round(b)
        if variant != "sigmoid":
            digits = digits + _columns(c.width, b, b.dtype)
    return torch.minimum(digits.clamp(min=0), _columns(c.top, b, b.dtype))


def _indices(digits: Tensor, levels: Sequence[int], dtype: torch.dtype) -> Tensor:
    whole = digits.nan_to_num(0).long() * _columns(basis(levels), digits, torch.int64)
    return torch.where(digits.isnan().any(0), -1, whole.sum(0)).to(dtype)


@overload
def fsq(
    z: Tensor, levels: Sequence[int], *, variant: str, return_indices: Literal[True] = ...
) -> tuple[Tensor, Tensor]: ...


@overload
def fsq(z: Tensor, levels: Sequence[int], *, variant: str, return_indices: bool) -> tuple[Tensor, Tensor | None]: ...


def fsq(z: Tensor, levels: Sequence[int], *, variant: str, return_indices: bool = True) -> tuple[Tensor, Tensor | None]:
    squashed = _squash(z, levels, variant)
    b = _spread(squashed, levels, variant)
    digits = _digits(b.detach(), levels, variant)
    centred = variant in ("vqp", "paper", "hard", "bounded")
    soft = b / _columns(constants(levels, variant).width, b, b.dtype) if centred else squashed
    codes = (soft - soft.detach() + _code(digits, levels, variant)).to(z.dtype)
    return codes, _indices(digits, levels, index_dtype(levels)) if return_indices else None


def slope(z: Tensor, levels: Sequence[int], variant: str) -> Tensor:
    """d code / dz, ignoring the rounding."""
    dtype = compute_dtype(z.dtype)
    c = constants(levels, variant)
    z = z.to(dtype)
    if variant == "sigmoid":
        return torch.sigmoid(z) * torch.sigmoid(-z)
    if variant == "symmetric":
        return 1 - torch.tanh(z) ** 2
    if variant == "symmetric_hard":
        return ((z >= -1) & (z <= 1)).to(dtype)
    gain = _columns(c.half, z, dtype) / _columns(c.width, z, dtype)
    u = z + _columns(c.shift, z, dtype)
    if variant in CLAMPED:
        return torch.where((u >= -1) & (u <= 1), gain, 0)
    return gain * (1 - torch.tanh(u) ** 2)


def _through(grad: Tensor, slope: Tensor, variant: str) -> Tensor:
    """grad * slope; a clamped value passes no gradient, not even an infinite one."""
    grad = grad.to(slope.dtype)
    return torch.where(slope == 0, 0, grad * slope) if variant in CLAMPED else grad * slope


def fsq_backward(grad: Tensor, z: Tensor, levels: Sequence[int], *, variant: str) -> Tensor:
    """The straight-through gradient of z."""
    return _through(grad, slope(z, levels, variant), variant).to(z.dtype)


def fsq_decode(indices: Tensor, levels: Sequence[int], *, variant: str, dtype: torch.dtype) -> Tensor:
    """Codes (d, ...) of indices (...); an index outside the codebook gives NaN."""
    known = (indices >= 0) & (indices <= math.prod(levels) - 1)
    whole = torch.where(known, indices, 0).long()
    shape = (len(levels), *(1,) * indices.dim())
    columns = [torch.tensor(v, device=indices.device).reshape(shape) for v in (basis(levels), list(levels))]
    digits = whole // columns[0] % columns[1]
    codes = _code(digits.to(compute_dtype(dtype)), levels, variant)
    return torch.where(known, codes, torch.nan).to(dtype)


def scales(levels: Sequence[int], stages: int) -> list[list[float]]:
    """Return the size of one digit, L**-stage in float32, for every stage and channel."""
    return [[float(np.float32(float(n) ** -stage)) for n in levels] for stage in range(stages)]


def residual_fsq(
    x: Tensor, levels: Sequence[int], *, variant: str, stages: int, active: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Quantise x, then the residual, once per stage; indices (..., stages) are -1 from stage `active` on."""
    dtype = compute_dtype(x.dtype)
    residual, out, indices = x.to(dtype), torch.zeros_like(x, dtype=dtype), []
    for stage, factors in enumerate(scales(levels, stages)):
        factor = _columns(factors, x, dtype)
        quantized, index = fsq(residual / factor, levels, variant=variant)
        quantized = quantized * factor
        if active is not None:
            on = stage < active
            quantized, index = torch.where(on, quantized, 0), torch.where(on, index.long(), -1)
        residual, out = residual - quantized.detach(), out + quantized
        indices.append(index)
    return out.to(x.dtype), torch.stack(indices, -1)


def residual_fsq_backward(
    grad: Tensor, x: Tensor, levels: Sequence[int], *, variant: str, stages: int, active: Tensor | None
) -> Tensor:
    """Return the straight-through gradient of x: grad times the sum of the stages' slopes."""
    dtype = compute_dtype(x.dtype)
    residual, total = x.to(dtype), torch.zeros_like(x, dtype=dtype)
    for stage, factors in enumerate(scales(levels, stages)):
        factor = _columns(factors, x, dtype)
        scaled = residual / factor
        quantized = fsq(scaled, levels, variant=variant, return_indices=False)[0].detach() * factor
        here = slope(scaled, levels, variant)
        if active is not None:
            quantized, here = torch.where(stage < active, quantized, 0), torch.where(stage < active, here, 0)
        residual, total = residual - quantized, total + here
    return _through(grad, total, variant).to(x.dtype)
