"""Rows of distance kernels (rbf, laplacian): their bandwidth, and scaling so that distances keep their digits.

The kernel is a function of z times `Variable.scale`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._schemas import HSIC_KERNELS
from .kernels import KernelSpec, Variable, unit_diagonal
from .median import median_distance
from .powers import BEYOND, TINY, exponent_of, is_ordinary, levelled, reduced, times_two_to

# Exponents of rows divided by the bandwidth. Below NEAREST, K - 1 is proportional to the distance (laplacian) or its
# square (rbf). Above FARTHEST, float32 cannot hold the squares of these rows and the digits of the others; float64 can
# up to BEYOND, where rows are cut off: K is 0 between them and the others.
NEAREST, FARTHEST = -30, 50


def distance_variable(op: str, name: str, x: Tensor, sizes: tuple[float, float] | None, spec: KernelSpec) -> Variable:
    """Variable of an rbf or laplacian kernel."""
    p, exponent, ordinary = (1 if spec.name == "laplacian" else 2), None, is_ordinary(sizes)
    bandwidth = spec.bandwidth
    if isinstance(bandwidth, str):
        level, unit = (x, None) if ordinary or sizes is None else levelled(x)
        if not ordinary:
            x, exponent_of_x = reduced(x)
            level = x if unit is None else level
        median = sigma = median_distance(level.detach(), float(p))
        if unit is not None:
            sigma = times_two_to(median, unit - exponent_of_x).to(x.dtype)
        # the largest entry of reduced rows is below 2
        if sizes is None or _near((1, sizes[1] if ordinary else 2), sigma, None):
            scale = 1 / sigma
        else:
            x, scale, _ = _far(level, 1 / median.double(), p)
    else:
        sigma = _bandwidth(op, "bandwidth" if name == "x" else "bandwidth_y", bandwidth, x)
        # without reading values (on an accelerator), rows and bandwidth are not rescaled
        if sizes is None or (ordinary and _near(sizes, bandwidth)):
            scale = 1 / sigma
        elif not _near((sizes[1], sizes[1]), bandwidth, None):
            x, scale, exponent = _far(x, 1 / sigma.double(), p)
        else:
            x, row_exponent = reduced(x)
            scale = 1 / sigma.double()
            scale_exponent = exponent_of(scale.detach())
            reach = row_exponent + scale_exponent
            scale = times_two_to(scale, reach.clamp(min=NEAREST) - scale_exponent).to(x.dtype)
            exponent = p * (reach - NEAREST).clamp(max=0)
    return Variable(x, scale, HSIC_KERNELS.index(spec.name), 1, unit_diagonal(x), exponent=exponent)


def _near(sizes: tuple[float, float], bandwidth: float | Tensor, nearest: int | None = NEAREST) -> bool:
    """Whether the exponents of rows divided by the bandwidth lie between `nearest` (None: any) and FARTHEST."""
    if not isinstance(bandwidth, Tensor):
        least = largest = float(bandwidth)
    elif not bandwidth.numel():
        return True
    else:
        least, largest = (end.item() for end in bandwidth.detach().aminmax())
    return (nearest is None or 2.0**nearest * largest <= sizes[0]) and sizes[1] <= 2.0**FARTHEST * least


def _far(x: Tensor, scale: Tensor, p: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, scale and exponent of a distance kernel in float64, for rows of which some are far from the others.

    The rows are in units of about a bandwidth, and cut off at 2**BEYOND.
    """
    row_exponent = exponent_of(x.detach().abs().amax((-2, -1)).double())
    scale_exponent = exponent_of(scale.detach())
    reach = row_exponent + scale_exponent
    more = (NEAREST - reach).clamp(min=0)
    rows = times_two_to(x.double(), (scale_exponent + more)[..., None, None])
    rows = rows.clamp(-(2.0**BEYOND), 2.0**BEYOND)
    return rows, times_two_to(scale, -scale_exponent).expand(reach.shape), -p * more


def _bandwidth(op: str, name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """Check a bandwidth and return it as a tensor of x's dtype."""
    least = TINY[x.dtype]
    if not isinstance(value, Tensor):
        if not least <= check.positive(op, name, value) <= 1 / least:
            raise _out_of_range(op, name, x.dtype, value)
        return torch.full((), float(value), dtype=x.dtype, device=x.device)
    check.float_tensor(op, name, value)
    # torch takes one number of the CPU beside tensors of any device
    if value.device != x.device and not (value.is_cpu and value.dim() == 0):
        raise ValueError(f"{op}: {name} must be on the device of its rows, {x.device}, got {value.device}")
    batch = x.shape[:-2]
    fits = value.dim() <= len(batch) and all(
        m in (1, n) for m, n in zip(reversed(value.shape), reversed(batch), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{op}: {name} must broadcast to the batch dims {tuple(batch)}, got shape {tuple(value.shape)}"
        )
    if check.values_are_checked(value):
        wrong = value[~((value > 0) & value.isfinite())]
        if wrong.numel():
            raise ValueError(f"{op}: {name} must be positive and finite, got {wrong[0].item():.6g}")
        wrong = value[(value < least) | (value > 1 / least)]
        if wrong.numel():
            raise _out_of_range(op, name, x.dtype, f"{wrong[0].item():.6g}")
    return value.to(x.device, x.dtype)


def _out_of_range(op: str, name: str, dtype: torch.dtype, value: object) -> ValueError:
    least = TINY[dtype]
    return ValueError(f"{op}: {name} must be from {least:.3g} to {1 / least:.3g} in {check.short(dtype)}, got {value}")
