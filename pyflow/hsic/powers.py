"""Sizes of data, and exact multiplication by powers of two, which keeps products of entries in range."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._torch import tracing, transform

# products of two values between 2**-ORDINARY and 2**ORDINARY, and sums of such products, fit into float32
ORDINARY = 50
# `levelled` cuts rows off at 2**BEYOND
BEYOND = 400
# FINITE: the largest e for which 2**e and 2**-e are both normal; TINY: the smallest normal number
FINITE = {torch.float32: 126, torch.float64: 1022}
TINY = {dtype: torch.finfo(dtype).tiny for dtype in FINITE}


def times_two_to(value: Tensor, exponent: Tensor) -> Tensor:
    """value * 2**exponent in float64, exact."""
    # in four factors, each of which fits into float64
    for part in range(4):
        quarter = (exponent + part) // 4
        value = value * two_to(quarter.clamp(-1022, 1023), torch.float64)
    return value


def exponent_of(x: Tensor) -> Tensor:
    """Return int64 e with 2**e <= x < 2**(e + 1); subnormal x counts as the smallest normal number."""
    x = x.clamp(min=torch.finfo(x.dtype).tiny)
    if _batched():
        return torch.frexp(x).exponent.long() - 1
    if x.dtype == torch.float64:
        return (x.view(torch.int64) >> 52) - 1023
    return (x.view(torch.int32) >> 23).long() - 127


def two_to(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2**exponent, for exponents of normal numbers."""
    if _batched():
        return torch.exp2(exponent.to(dtype))
    if dtype == torch.float64:
        return (exponent + 1023 << 52).view(dtype)
    return ((exponent + 127).int() << 23).view(dtype)


def _batched() -> bool:
    """Whether view(dtype) is missing: in torch.func transforms (torch 2.11) and in jit.trace."""
    return transform() is not None or tracing()


def sizes_of(x: Tensor) -> tuple[float, float] | None:
    """Return min and max over the batch of each item's largest absolute value, or None if values may not be read."""
    if not x.numel() or not check.values_are_checked(x):
        return None
    if x.dim() == 2:
        low, high = (end.item() for end in x.aminmax())
        size = max(-low, high)
        return size, size
    items = x.reshape(-1, x.shape[-2] * x.shape[-1])
    # amin and amax are eight times as fast as aminmax along a dim
    least, largest = torch.maximum(-items.amin(-1), items.amax(-1)).aminmax()
    return least.item(), largest.item()


def is_ordinary(sizes: tuple[float, float] | None) -> bool:
    """Whether products of two entries are known to stay in the range of float32."""
    return sizes is not None and sizes[0] >= 2.0**-ORDINARY and sizes[1] <= 2.0**ORDINARY


def reduced(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide rows (*batch, n, d) by a power of two, so that they are below 2; return them and its exponent (*batch)."""
    if not x.numel():
        return x, torch.zeros(x.shape[:-2], dtype=torch.int64, device=x.device)
    # NaN gives some finite exponent and stays in the rows
    exponent = exponent_of(x.detach().abs().amax((-2, -1))).clamp(max=FINITE[x.dtype])
    return x * two_to(-exponent, x.dtype)[..., None, None], exponent


def levelled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide rows (*batch, n, d) by a power of two near their median size; return them in float64, and its exponent.

    Entries are cut off at 2**BEYOND: in these units they are far from most rows.
    """
    size = x.detach().abs().amax(-1)
    middle = torch.where(size > 0, size, torch.nan).nanmedian(-1).values
    exponent = exponent_of(middle.nan_to_num(1.0).double())
    rows = times_two_to(x.double(), -exponent[..., None, None])
    return rows.clamp(-(2.0**BEYOND), 2.0**BEYOND), exponent
