"""Check the inputs of HSIC and convert each one, with its `KernelSpec`, into a `Variable`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._schemas import HSIC_KERNELS
from ..reference import compute_dtype
from .distances import distance_variable
from .kernels import KernelSpec, Variable, all_rows_equal, unit_diagonal
from .powers import is_ordinary, reduced, sizes_of
from .products import product_variable


def variable(op: str, name: str, x: Tensor, spec: KernelSpec) -> Variable:
    """Check one input and its kernel, and convert it."""
    spec.check(op, name)
    return converted(op, name, x, spec)


def converted(op: str, name: str, x: Tensor, spec: KernelSpec) -> Variable:
    """Check one input, whose kernel has been checked, and convert it."""
    kernel = spec.name
    if kernel == "delta":
        return _label_variable(op, name, x)
    if isinstance(x, torch.Tensor) and not x.is_floating_point() and not x.is_complex():
        raise TypeError(
            f"{op}: {name} must be float32, float64, bfloat16 or float16, got {check.short(x.dtype)}; class labels "
            "need the kernel delta"
        )
    check.float_tensor(op, name, x)
    if x.dim() < 2:
        raise ValueError(f"{op}: {name} must be (..., n, d), got a tensor of shape {tuple(x.shape)}")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must have at least one column, got shape {tuple(x.shape)}")
    sizes = sizes_of(x)
    if sizes is not None and not math.isfinite(sizes[1]):
        raise ValueError(f"{op}: {name} must be finite, got NaN or infinity")
    x = x.to(compute_dtype(x.dtype))
    if kernel == "precomputed":
        return _matrix_variable(op, name, x, sizes)
    if kernel in ("linear", "polynomial"):
        return product_variable(x, sizes, spec)
    return distance_variable(op, name, x, sizes, spec)


def variables(op: str, x: Tensor, y: Tensor, specs: tuple[KernelSpec, KernelSpec]) -> list[Variable]:
    """Check x and y and convert them to variables with one dtype and the same leading dims."""
    return together(op, [variable(op, "x", x, specs[0]), variable(op, "y", y, specs[1])])


def together(op: str, every: list[Variable]) -> list[Variable]:
    """Convert the variables to one dtype and expand them to the same leading dims."""
    first = every[0].z
    for other in every[1:]:
        if other.z.device != first.device:
            raise ValueError(f"{op}: all inputs must be on one device, got {first.device} and {other.z.device}")
        if other.z.shape[-2] != first.shape[-2]:
            raise ValueError(
                f"{op}: all inputs must have the same number of rows, got {first.shape[-2]} and {other.z.shape[-2]}"
            )
    if all(v.z.dim() == 2 and v.z.dtype == first.dtype for v in every):
        return every
    try:
        batch = torch.broadcast_shapes(*(v.z.shape[:-2] for v in every))
    except RuntimeError:
        shapes = ", ".join(str(tuple(v.z.shape[:-2])) for v in every)
        raise ValueError(f"{op}: leading dims must broadcast, got {shapes}") from None
    dtype = torch.float64 if any(v.z.dtype == torch.float64 for v in every) else torch.float32
    return [
        v._replace(
            z=v.z.to(dtype).expand(*batch, *v.z.shape[-2:]),
            scale=v.scale.to(dtype).expand(batch),
            diagonal=v.diagonal.expand(*batch, -1),
            exponent=None if v.exponent is None else v.exponent.expand(batch),
            constant=None if v.constant is None else v.constant.expand(batch),
        )
        for v in every
    ]


def result_dtype(*inputs: Tensor) -> torch.dtype:
    """Return the dtype of results: float64 if an input is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def _matrix_variable(op: str, name: str, x: Tensor, sizes: tuple[float, float] | None) -> Variable:
    """Variable of a precomputed kernel matrix."""
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{op}: {name} must be square with a precomputed kernel, got shape {tuple(x.shape)}")
    if sizes is not None:
        error = (x - x.mT).abs().amax((-2, -1))
        if bool((error > 1e-5 * x.abs().amax((-2, -1))).any()):
            raise ValueError(
                f"{op}: {name} must be symmetric with a precomputed kernel, off by {error.amax().item():.3g}"
            )
    constant, exponent = all_rows_equal(x, sizes is not None), None
    if not is_ordinary(sizes):
        x, exponent = reduced(x)
    # a constant does not change HSIC; smaller entries make the sums more accurate
    z = x - x.detach().mean((-2, -1), keepdim=True)
    diagonal = z.diagonal(dim1=-2, dim2=-1).double()
    index = HSIC_KERNELS.index("precomputed")
    return Variable(z, z.new_ones(()), index, 1, diagonal, exponent=exponent, constant=constant)


def comparable(x: Tensor) -> Tensor:
    """Reinterpret labels of unsigned dtypes, which torch has no arithmetic for, as signed; equality is preserved."""
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
    return x.view(signed[x.dtype]) if x.dtype in signed else x


def _label_variable(op: str, name: str, x: Any) -> Variable:
    """Variable of the delta kernel; x holds labels."""
    check.tensor(op, name, x)
    if x.is_complex():
        raise TypeError(f"{op}: {name} must not be complex, got {check.short(x.dtype)}")
    if x.dim() == 0:
        raise ValueError(f"{op}: {name} must be (n,) or (..., n, d), got a scalar")
    x = x.unsqueeze(-1) if x.dim() == 1 else x
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must have at least one column, got shape {tuple(x.shape)}")
    if x.is_floating_point():
        if check.values_are_checked(x) and not bool(x.isfinite().all()):
            raise ValueError(f"{op}: {name} must be finite labels, got NaN or infinity")
        z = x.detach().to(compute_dtype(x.dtype))
    else:
        x = comparable(x)
        # pieces of 24 bits are exact in float32
        pieces = [x & 0xFFFFFF, x >> 24 & 0xFFFFFF, x >> 48] if x.dtype in (torch.int64, torch.int32) else [x]
        z = torch.cat([piece.float() for piece in pieces], -1)
    constant = all_rows_equal(z, z.numel() > 0 and check.values_are_checked(z))
    return Variable(z, z.new_ones(()), HSIC_KERNELS.index("delta"), 1, unit_diagonal(z), constant=constant)
