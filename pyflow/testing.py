"""Helpers of tests and benchmarks: error bounds, memory layouts of views, poisoned memory, bitwise equality."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .reference import compute_dtype as compute_dtype

# unit roundoff: the relative error of one rounding
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# smallest positive subnormal number: the absolute error of one rounding near 0
TINY = {torch.float64: 5e-324, torch.float32: 1.5e-45, torch.bfloat16: 9.2e-41, torch.float16: 6e-8}


def sum_error(terms: int, magnitudes: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound the error of a sum of `terms` rounded terms, added in sixteen lanes and chunks of 512."""
    steps = min(terms, 512) / 16 + 6
    return steps * UNIT[dtype] * magnitudes


def assert_within(actual: Tensor, expected: Tensor, error: Tensor | float, name: str = "") -> None:
    """Assert |actual - expected| <= error elementwise, in float64, plus one rounding to actual's dtype.

    NaN matches only NaN, and an infinity only the same infinity.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    a, e = actual.detach().double(), expected.detach().double()
    limit = torch.finfo(actual.dtype).max
    e = torch.where(e.abs() > limit, e.sign() * torch.inf, e)  # overflow of actual's dtype
    assert torch.equal(a.isnan(), e.isnan()), f"{name}: NaN in other places"
    same = (a == e) | a.isnan()
    bound = error + UNIT[actual.dtype] * e.abs() + TINY[actual.dtype]
    excess = torch.where(same, 0, (a - e).abs() - bound)
    worst = excess.argmax() if excess.numel() else None
    assert worst is None or excess.flatten()[worst] <= 0, (
        f"{name}: got {a.flatten()[worst].item()!r}, expected {e.flatten()[worst].item()!r}, "
        f"which is {(excess.flatten()[worst]).item():.3e} more than the error allowed"
    )


def assert_same_bits(actual: Tensor, expected: Tensor, name: str = "") -> None:
    """Assert that both have the same bits, except that any NaN equals any NaN."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{name}: dtype or shape differs"
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[actual.element_size()]
    a, e = actual.detach().contiguous(), expected.detach().contiguous()
    same = (a.view(integer) == e.view(integer)) | (a.isnan() & e.isnan())
    assert bool(same.all()), f"{name}: {int((~same).sum())} of {same.numel()} elements differ in bits"


def ulp_error(actual: Tensor, exact: Tensor) -> Tensor:
    """Return |actual - exact| in float32 ulps of `exact`, which is float64."""
    exponent = torch.frexp(exact).exponent.clamp(min=-125)
    return (actual.double() - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent - 24)


# name -> function that copies a tensor into this memory layout; covers the layouts that views produce
LAYOUTS = {
    "contiguous": lambda values: values.clone(),
    "half": lambda values: torch.cat((values, values), -1)[..., : values.shape[-1]],
    "stepped": lambda values: values.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda values: values.transpose(0, -1).contiguous().transpose(0, -1),
    "offset": lambda values: torch.cat((values[:1], values))[1:],
    "channels_last": lambda values: values.movedim(1, -1).contiguous().movedim(-1, 1),
}


def laid_out(values: Tensor, layout: str) -> Tensor:
    """Return `values` in the named memory layout."""
    return LAYOUTS[layout](values)


def gradient_layouts(grad: Tensor) -> dict[str, Tensor]:
    """Return gradients in the layouts that autograd produces: dense, stride 0 from a sum, transposed, sliced."""
    return {
        "contiguous": grad.contiguous(),
        "expanded": grad.flatten()[0].expand(grad.shape),
        "transposed": laid_out(grad, "transposed"),
        "sliced": laid_out(grad, "stepped"),
    }


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill newly allocated tensors with NaN, in Python and C++, so that unwritten outputs are found."""
    deterministic: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode()
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
