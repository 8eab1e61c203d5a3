"""Check the inputs of HSIC and convert each one into a `Variable`, the form that the operators take.

Distance kernels (rbf, laplacian) are functions of z times `scale`. The factors of the other kernels are multiplied into
z, so that autograd computes their gradients.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .._schemas import HSIC_KERNELS
from .._torch import tracing, transform
from ..reference import compute_dtype
from ..reference import hsic as ref
from .noise import uniform

KERNELS = ("rbf", "laplacian", "linear", "polynomial", "delta", "precomputed")
MEDIAN_ROWS = 1000
# the operators compute powers by repeated multiplication; larger degrees leave the range of float32 anyway
MOST_DEGREE = 100
ESTIMATORS = ("biased", "biased_n2", "unbiased")
# products of two values between 2**-ORDINARY and 2**ORDINARY, and sums of such products, fit into float32
ORDINARY = 50
# Exponents of rows divided by the bandwidth. Below NEAREST, K - 1 is proportional to the distance (laplacian) or its
# square (rbf). Above FARTHEST, float32 cannot hold the squares of these rows and the digits of the others; float64 can
# up to BEYOND, where rows are cut off: K is 0 between them and the others.
NEAREST, FARTHEST, BEYOND = -30, 50, 400
# Median distances below the first number may come from squares that underflow, if there are entries below the second:
# others are equal or differ by more.
UNDERFLOW = {torch.float32: (2.0**-50, 2.0**-25), torch.float64: (2.0**-480, 2.0**-426)}
# FINITE: the largest e for which 2**e and 2**-e are both normal; TINY: the smallest normal number
FINITE = {torch.float32: 126, torch.float64: 1022}
TINY = {dtype: torch.finfo(dtype).tiny for dtype in FINITE}

Bandwidth = float | Tensor | str


class Variable(NamedTuple):
    """One checked input of HSIC: rows and kernel as `hsic_sums` takes them; `batch` are leading dims.

    Rows whose products would leave the range of their dtype are divided by a power of two. The user's kernel matrix K,
    up to an additive constant, is then 2**exponent times the kernel matrix of z.
    """

    z: Tensor  # (*batch, n, d)
    scale: Tensor  # (*batch) 1 / bandwidth
    kernel: int  # index into HSIC_KERNELS
    degree: int
    diagonal: Tensor  # (*batch, n) diagonal of the kernel matrix of z, float64
    linear: bool = False
    exponent: Tensor | None = None  # (*batch) int64; None means 0
    constant: Tensor | None = None  # (*batch) bool: all rows are equal, so HSIC is 0; None: no or not needed


def variable(
    op: str,
    name: str,
    x: Tensor,
    kernel: str,
    bandwidth: Bandwidth,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
) -> Variable:
    """Check one input and convert it."""
    check.choice(op, "kernel" if name == "x" else "kernel_y", kernel, KERNELS)
    if kernel == "delta":
        return _labels(op, name, x)
    check.float_tensor(op, name, x)
    if x.dim() < 2:
        raise ValueError(f"{op}: {name} must be (..., n, d), got a tensor of shape {tuple(x.shape)}")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must have at least one column, got shape {tuple(x.shape)}")
    sizes = _sizes(x)
    if sizes is not None and not math.isfinite(sizes[1]):
        raise ValueError(f"{op}: {name} must be finite, got NaN or infinity")
    x = x.to(compute_dtype(x.dtype))
    if kernel == "precomputed":
        return _matrix(op, name, x, sizes)
    if kernel in ("linear", "polynomial"):
        return _products(op, x, sizes, kernel, degree, gamma, coef0)
    return _distances(op, name, x, sizes, kernel, bandwidth)


def variables(
    op: str,
    x: Tensor,
    y: Tensor,
    kernel: str,
    bandwidth: Bandwidth,
    kernel_y: str | None,
    bandwidth_y: Bandwidth | None,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
) -> list[Variable]:
    """Check x and y and convert them to variables with one dtype and the same leading dims."""
    kernel_y = kernel if kernel_y is None else kernel_y
    bandwidth_y = bandwidth if bandwidth_y is None else bandwidth_y
    return together(
        op,
        [
            variable(op, "x", x, kernel, bandwidth, degree, gamma, coef0),
            variable(op, "y", y, kernel_y, bandwidth_y, degree, gamma, coef0),
        ],
    )


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


def rows_needed(op: str, n: int, estimator: str) -> None:
    check.choice(op, "estimator", estimator, ESTIMATORS)
    least = 4 if estimator == "unbiased" else 2
    if n < least:
        raise ValueError(f"{op}: the {estimator} estimator needs at least {least} rows, got {n}")


def whole(value: Tensor, *every: Variable) -> Tensor:
    """Convert (*batch) float64 HSIC of the kernels of z into HSIC of the user's kernels."""
    exponents = [v.exponent for v in every if v.exponent is not None]
    return times_two_to(value, sum(exponents[1:], exponents[0])) if exponents else value


def times_two_to(value: Tensor, exponent: Tensor) -> Tensor:
    """value * 2**exponent in float64, exact."""
    # in four factors, each of which fits into float64
    for part in range(4):
        quarter = (exponent + part) // 4
        value = value * _power(quarter.clamp(-1022, 1023), torch.float64)
    return value


def _sizes(x: Tensor) -> tuple[float, float] | None:
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


def _ordinary(sizes: tuple[float, float] | None) -> bool:
    """Whether products of two entries are known to stay in the range of float32."""
    return sizes is not None and sizes[0] >= 2.0**-ORDINARY and sizes[1] <= 2.0**ORDINARY


def _exponent(x: Tensor) -> Tensor:
    """Return int64 e with 2**e <= x < 2**(e + 1); subnormal x counts as the smallest normal number."""
    x = x.clamp(min=torch.finfo(x.dtype).tiny)
    if _batched():
        return torch.frexp(x).exponent.long() - 1
    if x.dtype == torch.float64:
        return (x.view(torch.int64) >> 52) - 1023
    return (x.view(torch.int32) >> 23).long() - 127


def _reduced(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide rows (*batch, n, d) by a power of two, so that they are below 2; return them and its exponent (*batch)."""
    if not x.numel():
        return x, torch.zeros(x.shape[:-2], dtype=torch.int64, device=x.device)
    # NaN gives some finite exponent and stays in the rows
    exponent = _exponent(x.detach().abs().amax((-2, -1))).clamp(max=FINITE[x.dtype])
    return x * _power(-exponent, x.dtype)[..., None, None], exponent


def _levelled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide rows (*batch, n, d) by a power of two near their median size; return them in float64, and its exponent.

    Entries are cut off at 2**BEYOND: in these units they are far from most rows.
    """
    size = x.detach().abs().amax(-1)
    middle = torch.where(size > 0, size, torch.nan).nanmedian(-1).values
    exponent = _exponent(middle.nan_to_num(1.0).double())
    rows = times_two_to(x.double(), -exponent[..., None, None])
    return rows.clamp(-(2.0**BEYOND), 2.0**BEYOND), exponent


def _batched() -> bool:
    """Whether view(dtype) is missing: in torch.func transforms (torch 2.11) and in jit.trace."""
    return transform() is not None or tracing()


def _power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2**exponent, for exponents of normal numbers."""
    if _batched():
        return torch.exp2(exponent.to(dtype))
    if dtype == torch.float64:
        return (exponent + 1023 << 52).view(dtype)
    return ((exponent + 127).int() << 23).view(dtype)


def _constant(x: Tensor) -> Tensor | None:
    """Return (*batch) whether all rows are equal, or None if they are known to differ."""
    if not x.numel():
        return None
    if x.dim() == 2 and check.values_are_checked(x) and not x.select(0, 0).equal(x.select(0, -1)):
        return None
    return (x == x[..., :1, :]).all(-1).all(-1)


def _distances(
    op: str, name: str, x: Tensor, sizes: tuple[float, float] | None, kernel: str, bandwidth: Bandwidth
) -> Variable:
    """Variable of an rbf or laplacian kernel."""
    p, exponent, ordinary = (1 if kernel == "laplacian" else 2), None, _ordinary(sizes)
    if isinstance(bandwidth, str):
        if bandwidth != "median":
            raise ValueError(f"{op}: bandwidth must be a number, a tensor or 'median', got {bandwidth!r}")
        level, unit = (x, None) if ordinary or sizes is None else _levelled(x)
        if not ordinary:
            x, exponent_of_x = _reduced(x)
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
            x, row_exponent = _reduced(x)
            scale = 1 / sigma.double()
            scale_exponent = _exponent(scale.detach())
            reach = row_exponent + scale_exponent
            scale = times_two_to(scale, reach.clamp(min=NEAREST) - scale_exponent).to(x.dtype)
            exponent = p * (reach - NEAREST).clamp(max=0)
    return Variable(x, scale, HSIC_KERNELS.index(kernel), 1, _ones(x), exponent=exponent)


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
    row_exponent = _exponent(x.detach().abs().amax((-2, -1)).double())
    scale_exponent = _exponent(scale.detach())
    reach = row_exponent + scale_exponent
    more = (NEAREST - reach).clamp(min=0)
    rows = times_two_to(x.double(), (scale_exponent + more)[..., None, None])
    rows = rows.clamp(-(2.0**BEYOND), 2.0**BEYOND)
    return rows, times_two_to(scale, -scale_exponent).expand(reach.shape), -p * more


def _ones(x: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.float64, device=x.device).expand(x.shape[:-1])


def _bandwidth(op: str, name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """Check a bandwidth and return it as a tensor of x's dtype."""
    least = TINY[x.dtype]
    if not isinstance(value, Tensor):
        if not least <= check.positive(op, name, value) <= 1 / least:
            raise _out_of_range(op, name, x.dtype, value)
        return torch.full((), float(value), dtype=x.dtype, device=x.device)
    check.float_tensor(op, name, value)
    batch = x.shape[:-2]
    fits = value.dim() <= len(batch) and all(
        m in (1, n) for m, n in zip(reversed(value.shape), reversed(batch), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{op}: {name} must broadcast to the batch dims {tuple(batch)}, got shape {tuple(value.shape)}"
        )
    if check.values_are_checked(value):
        if not bool(((value > 0) & value.isfinite()).all()):
            raise ValueError(f"{op}: {name} must be positive and finite, got other values")
        if not bool(((value >= least) & (value <= 1 / least)).all()):
            raise _out_of_range(op, name, x.dtype, "other values")
    return value.to(x.device, x.dtype)


def _out_of_range(op: str, name: str, dtype: torch.dtype, value: object) -> ValueError:
    least = TINY[dtype]
    return ValueError(f"{op}: {name} must be from {least:.3g} to {1 / least:.3g} in {check.short(dtype)}, got {value}")


def _products(
    op: str,
    x: Tensor,
    sizes: tuple[float, float] | None,
    kernel: str,
    degree: int,
    gamma: float | None,
    coef0: float,
) -> Variable:
    """Variable of a linear or polynomial kernel."""
    linear = kernel == "linear"
    if linear:
        degree, gamma, coef0 = 1, 1.0, 0.0
    else:
        degree = check.at_least(op, "degree", degree, 1)
        if degree > MOST_DEGREE:
            raise ValueError(f"{op}: degree must be at most {MOST_DEGREE}, got {degree}")
        gamma = 1 / x.shape[-1] if gamma is None else check.positive(op, "gamma", gamma)
        coef0 = check.number(op, "coef0", coef0)
        if not 0 <= coef0 < math.inf:
            raise ValueError(f"{op}: coef0 must be at least 0 and finite, got {coef0}")
    constant, exponent = _constant(x), None
    if sizes is None or not _ordinary_products(sizes, x.shape[-1], degree, gamma, coef0):
        x, exponent = _reduced(x)
    if linear:
        z = x - x.mean(-2, keepdim=True)
    else:
        factor, more = math.sqrt(gamma), math.sqrt(coef0)
        if exponent is None:
            rows, column = x * factor, x.new_full((*x.shape[:-1], 1), more)
        else:
            factors, exponent = _together_reduced(exponent, factor, more, x)
            rows, column = x * factors[0], factors[1].expand(*x.shape[:-1], 1)
        # an extra column of sqrt(coef0) adds coef0 to every dot product
        z = torch.cat((rows, column), -1)
    if exponent is not None:
        exponent = 2 * degree * exponent
    diagonal = z.double().square().sum(-1)
    diagonal = diagonal if degree == 1 else diagonal**degree
    return Variable(z, z.new_ones(()), HSIC_KERNELS.index("polynomial"), degree, diagonal, linear, exponent, constant)


def _ordinary_products(sizes: tuple[float, float], d: int, degree: int, gamma: float, coef0: float) -> bool:
    """Whether kernel values of the largest rows are in range."""
    limit = 2.0 ** (ORDINARY / degree)
    return 1 / limit <= gamma * sizes[0] * sizes[0] + coef0 and gamma * d * sizes[1] * sizes[1] + coef0 <= limit


def _together_reduced(exponent: Tensor, factor: float, column: float, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Rescale factor and column of a polynomial kernel so that no row is longer than 1.

    `exponent` is the exponent that the rows were reduced by. Return the factor of the reduced rows and the value of the
    extra column, and the total exponent that both are divided by.
    """
    given = [torch.full((), v, dtype=torch.float64, device=x.device) for v in (factor, column, x.shape[-1] + 1)]
    factor_exponent, column_exponent, width_exponent = (_exponent(v) + 1 for v in given)
    total = torch.maximum(exponent + 1 + factor_exponent, column_exponent) + (width_exponent + 1) // 2
    factors = [
        times_two_to(v, e).to(x.dtype)[..., None, None] for v, e in zip(given, (exponent - total, -total), strict=False)
    ]
    return factors, total


def _matrix(op: str, name: str, x: Tensor, sizes: tuple[float, float] | None) -> Variable:
    """Variable of a precomputed kernel matrix."""
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{op}: {name} must be square with a precomputed kernel, got shape {tuple(x.shape)}")
    if sizes is not None:
        error = (x - x.mT).abs().amax((-2, -1))
        if bool((error > 1e-5 * x.abs().amax((-2, -1))).any()):
            raise ValueError(
                f"{op}: {name} must be symmetric with a precomputed kernel, off by {error.amax().item():.3g}"
            )
    constant, exponent = _constant(x), None
    if not _ordinary(sizes):
        x, exponent = _reduced(x)
    # a constant does not change HSIC; smaller entries make the sums more accurate
    z = x - x.detach().mean((-2, -1), keepdim=True)
    diagonal = z.diagonal(dim1=-2, dim2=-1).double()
    index = HSIC_KERNELS.index("precomputed")
    return Variable(z, z.new_ones(()), index, 1, diagonal, exponent=exponent, constant=constant)


def comparable(x: Tensor) -> Tensor:
    """Reinterpret labels of unsigned dtypes, which torch has no arithmetic for, as signed; equality is preserved."""
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
    return x.view(signed[x.dtype]) if x.dtype in signed else x


def _labels(op: str, name: str, x: Any) -> Variable:
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
        if check.values_are_checked(x) and bool(x.isnan().any()):
            raise ValueError(f"{op}: {name} must be labels that equal themselves, got NaN")
        z = x.detach().to(compute_dtype(x.dtype))
    else:
        x = comparable(x)
        # pieces of 24 bits are exact in float32
        pieces = [x & 0xFFFFFF, x >> 24 & 0xFFFFFF, x >> 48] if x.dtype in (torch.int64, torch.int32) else [x]
        z = torch.cat([piece.float() for piece in pieces], -1)
    constant = _constant(z)
    return Variable(z, z.new_ones(()), HSIC_KERNELS.index("delta"), 1, _ones(z), constant=constant)


def points(v: Variable) -> Tensor:
    """Return the rows (..., n, d) for `between`; rows of distance kernels are centred and divided by the bandwidth."""
    if HSIC_KERNELS[v.kernel] not in ("rbf", "laplacian"):
        return v.z
    return ref.centred(v.z) * v.scale[..., None, None]


def between(v: Variable, a: Tensor, b: Tensor, shift: Tensor | None = None, direct: bool = False) -> Tensor:
    """Return the kernel (..., m, n) between `points` a (..., m, d) and b (..., n, d) minus shift (...), in float64.

    Not for precomputed kernels; `shift` is 0 or 1. `direct` computes distances from differences instead of dot
    products, which is accurate for close rows far from the others, but not twice differentiable.
    """
    a, b = a.double(), b.double()
    name = HSIC_KERNELS[v.kernel]
    if name == "polynomial":
        return (a @ b.mT) ** v.degree
    if name == "delta":
        return (torch.cdist(a, b, p=0) == 0).double()
    if name == "laplacian":
        exponent = -torch.cdist(a, b, p=1)
    elif direct:
        exponent = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square() / -2
    else:
        half = [t.square().sum(-1) / 2 for t in (a, b)]
        exponent = (a @ b.mT - (half[0].unsqueeze(-1) + half[1].unsqueeze(-2))).clamp(max=0)
    value = exponent.exp()
    return value if shift is None else torch.where(shift[..., None, None] != 0, exponent.expm1(), value)


def ratio(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """xy / sqrt(xx yy), or 0 where xx or yy is not positive."""
    undefined = (xx <= 0) | (yy <= 0)
    # replaced before the division, so that gradients contain no NaN
    xx, yy = xx.masked_fill(undefined, 1), yy.masked_fill(undefined, 1)
    return (xy / (xx.sqrt() * yy.sqrt())).masked_fill(undefined, 0)


def median_distance(x: Tensor, p: float = 2.0) -> Tensor:
    """Return the median distance between rows (as numpy.median), or their mean if it is 0, or 1 if both are 0.

    Args:
        x: (..., n, d); above 1,000 rows, 1,000 fixed random rows are used, the same for every batch item.
        p: 2 for Euclidean distances, 1 for sums of absolute differences.

    Returns:
        (...) of x's dtype.
    """
    n = x.shape[-2]
    if n < 2:
        return x.new_ones(x.shape[:-2])
    if n > MEDIAN_ROWS:
        rows = uniform((n,), seed=0, device=x.device).topk(MEDIAN_ROWS).indices
        x = x.index_select(-2, rows)
    flat = [_median_distance(one, p) for one in x.reshape(-1, *x.shape[-2:])]
    return torch.stack(flat).reshape(x.shape[:-2]) if flat else x.new_ones(x.shape[:-2])


def _median_distance(x: Tensor, p: float) -> Tensor:
    distances = torch.pdist(x, p)
    count = len(distances)
    upper = distances.kthvalue(count // 2 + 1).values
    if count % 2 == 0:
        below = distances < upper
        largest_below = torch.where(below, distances, 0.0).amax()
        lower = torch.where(below.sum() == count // 2, largest_below, upper)
        upper = (lower + upper) / 2
    if check.values_are_checked(x) and upper.item() < UNDERFLOW[x.dtype][0]:
        size = x.abs()
        if bool(((size > 0) & (size < UNDERFLOW[x.dtype][1])).any()):
            upper = _small_median(x, p)
    mean = distances.mean()
    return torch.where(upper > 0, upper, torch.where(mean > 0, mean, torch.ones_like(mean)))


def _small_median(x: Tensor, p: float) -> Tensor:
    """Return the median distance of rows whose squared distances underflow next to the largest row."""
    rows, exponent = _levelled(x)
    distances = torch.pdist(rows, p)
    count = len(distances)
    middle = distances.sort().values[(count - 1) // 2 : count // 2 + 1].mean()
    return times_two_to(middle, exponent).to(x.dtype)
