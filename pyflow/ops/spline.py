"""Rational-quadratic splines: the monotone elementwise step of neural spline flows, with its log-determinant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._operators import register
from .._schemas import SPLINE_VARIANTS, TAILS
from .._vmap import leading, one_by_one
from ..reference import compute_dtype
from ..reference import spline as ref

# what the kernels take; larger calls run the reference
MOST_BINS = 32
MOST_FEATURES = 2048  # in a list of tails


def rq_spline(
    x: Tensor,
    params: Tensor,
    *,
    bins: int,
    bound: float | Tensor = 1.0,
    tails: str | Sequence[str] | None = "linear",
    variant: str = "nflows",
    param_scale: float = 1.0,
    min_bin: float = 1e-3,
    min_slope: float = 1e-3,
    inverse: bool = False,
    mask: Tensor | None = None,
    event_dims: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Monotone rational-quadratic spline of every element and its log-determinant, in one pass.

    y = y_k + h (s t^2 + d_k t (1 - t)) / (s + (d_k + d_{k+1} - 2 s) t (1 - t)), logdet = sum log dy/dx, in the bin of
    width w, height h and slope s = h / w that begins at (x_k, y_k), with t = (x - x_k) / w.

    Args:
        x: (B, ...) float32, float64, bfloat16 or float16, any strides.
        params: x.shape + (P,), the network's K widths, K heights and slopes of every element, K = bins; any of these
            dtypes and strides. P is 3 K - 1 for linear tails (the outer slopes are 1), 3 K for circular ones (the
            outer slopes are equal), 3 K + 1 without tails or with a list of them.
        bins: number of bins K, at least 2.
        bound: > 0, B: bins cover [-B, B] in x and y; a number, or (D,) with one per feature, where D = x.shape[-1].
            Not used without tails.
        tails: what holds outside [-B, B]: "linear" or "circular" (both the identity; nothing wraps around), or a list
            of D of these, one per feature, where linear features ignore their outer slopes and circular ones the last.
            None: x must lie in [0, 1], which is the domain and the range.
        variant: how parameters become bins. "nflows" and "normflows": w = min_bin + (1 - K min_bin) softmax(widths),
            heights alike, slope = min_slope + softplus(s). "zuko": v / (1 + |2 v / log min_slope|) before the softmax,
            slope = exp(s / (1 + |s / log min_slope|)); a knot belongs to the bin on its left.
        param_scale: > 0, factor of widths and heights; not used by "zuko".
        min_bin: >= 0 and < 1 / K, least part of the domain that a bin takes; not used by "zuko". With 0 a bin may
            vanish in float arithmetic; what is NaN then are elements in its image and, if it is the last one, x = B.
        min_slope: in [0, 1], least slope; in (0, 1) for "zuko".
        inverse: undo the step; logdet is then -sum log dy/dx.
        mask: broadcastable to x, bool or 0/1; elements where it is true pass through and add nothing to logdet.
        event_dims: how many trailing dims one logdet sums over; default all but the first.

    Returns:
        (y, logdet): y with x's shape and dtype; logdet of shape x.shape[:-event_dims] in float32
        (float64 for float64 x).

    Raises:
        TypeError: not a tensor, or an unsupported dtype.
        ValueError: shapes, devices or a mask that do not match x; an unknown variant or tail; a constant out of range;
            without tails, on a CPU, an x outside [0, 1] (on an accelerator the result is NaN).

    Notes:
        Computed in float32 (float64 for float64 x). Outside the bounds the gradients of params are 0. On a CPU the bits
        do not depend on thread count, instruction set or batch. Double backward works. `bound` has no gradient. The
        inverse of the forward result is within 4 * 2**-23 * (B (1 + 1 / m) + w (d_k + d_{k+1} + s) / m) of x, where m
        is the smaller of the slopes dy/dx at both. More than 32 bins, or a list of more than 2048 tails, run the
        plain-torch reference.

    Source:
        Durkan et al. 2019, Neural spline flows, arXiv:1906.04032, equations 4 to 8.

    Example:
        >>> x, params = torch.tensor([[-0.5, 0.0, 3.0]]), torch.zeros(1, 3, 11)
        >>> params[..., 8:] = 0.5413  # softplus(0.5413) is 1
        >>> y, logdet = rq_spline(x, params, bins=4, min_slope=0.0)
        >>> torch.allclose(y, x, atol=1e-4), torch.allclose(logdet, torch.zeros(1), atol=1e-4)
        (True, True)
        >>> params[..., :4] = torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> y, logdet = rq_spline(x, params, bins=4)
        >>> back, _ = rq_spline(y, params, bins=4, inverse=True)
        >>> torch.allclose(back, x, atol=1e-6)
        True
    """
    op = "rq_spline"
    check.float_tensor(op, "x", x)
    shape, dtype = x.shape, x.dtype
    bins = check.at_least(op, "bins", bins, 2)
    form = check.choice(op, "variant", variant, SPLINE_VARIANTS)
    features = shape[-1] if shape else 1
    indices = _tails(op, tails, features)
    slopes = slopes_of(bins, tails)
    text = ("3 bins - 1", "3 bins", "3 bins + 1")[slopes - bins + 1]
    check.like(op, "params", params, f"x with {text} numbers per element", (*shape, 2 * bins + slopes), x.device)
    param_scale, min_bin, min_slope = constants(op, bins, variant, param_scale, min_bin, min_slope, dtype)
    bounds, bound = _bounds(op, bound, features, x)
    if tails is None:
        bounds, bound = None, 1.0
    event_dims = check.event_dims(op, x, event_dims)
    if mask is not None:
        mask = check.mask_for(op, mask, x)
    inverse = check.flag(op, "inverse", inverse)
    if tails is None and x.numel() and check.values_are_checked(x):
        _check_domain(op, x, mask)
    run = _spline.pick(op, x)
    if bins > MOST_BINS or len(indices) > MOST_FEATURES:
        run = _spline.reference
    return run(
        x, params, bounds, mask, bound, bins, indices, form, param_scale, min_bin, min_slope, inverse, event_dims
    )


def _tails(op: str, tails: Any, features: int) -> tuple[int, ...]:
    """Return the indices of the tails in TAILS: none, one, or one per feature."""
    if tails is None:
        return ()
    if isinstance(tails, str):
        return (check.choice(op, "tails", tails, TAILS),)
    if not isinstance(tails, (list, tuple)):
        raise TypeError(f"{op}: tails must be a name, a list of names or None, got {type(tails).__name__}")
    if len(tails) != features:
        raise ValueError(f"{op}: tails must name one per feature of x, {features}, got {len(tails)}")
    return tuple(check.choice(op, "tails", name, TAILS) for name in tails)


def slopes_of(bins: int, tails: Any) -> int:
    """Return how many parameters of a spline are slopes; a list of tails has those at both ends."""
    return bins - 1 if tails == "linear" else bins if tails == "circular" else bins + 1


def constants(
    op: str, bins: int, variant: str, param_scale: Any, min_bin: Any, min_slope: Any, dtype: torch.dtype
) -> tuple[float, float, float]:
    """Return param_scale, min_bin and min_slope, checked."""
    param_scale = check.positive(op, "param_scale", param_scale)
    check.moderate(op, "param_scale", param_scale, dtype)
    min_bin, min_slope = check.number(op, "min_bin", min_bin), check.number(op, "min_slope", min_slope)
    if not 0 <= min_bin < 1 / bins:
        raise ValueError(f"{op}: min_bin must be at least 0 and less than 1 / bins, {1 / bins:.4g}, got {min_bin}")
    if variant == "zuko":
        if not 0 < min_slope < 1:
            raise ValueError(f"{op}: min_slope must be in (0, 1) for zuko, got {min_slope}")
        check.moderate(op, "min_slope", min_slope, dtype)
    elif not 0 <= min_slope <= 1:
        # the slope of a spline as a whole
        raise ValueError(f"{op}: min_slope must be in [0, 1], got {min_slope}")
    check.moderate(op, "min_slope", min_slope, dtype, 0.0)
    return param_scale, min_bin, min_slope


def one_bound(op: str, bound: Any, dtype: torch.dtype) -> float:
    bound = check.positive(op, "bound", bound)
    # the inverse squares heights
    check.moderate(op, "bound", bound, dtype, 2.0**-40, 2.0**40)
    return bound


def _bounds(op: str, bound: Any, features: int, x: Tensor) -> tuple[Tensor | None, float]:
    """Return bounds of the features, or None and the bound of all of them."""
    if not isinstance(bound, Tensor):
        return None, one_bound(op, bound, x.dtype)
    check.like(op, "bound", bound, "the last dim of x", (features,), x.device)
    if bound.requires_grad:
        raise ValueError(f"{op}: bound must not require a gradient, which is not computed")
    if check.values_are_checked(bound) and not bool(((bound > 0) & (bound < float("inf"))).all()):
        raise ValueError(f"{op}: bound must be positive and finite, got other values")
    return bound.to(compute_dtype(x.dtype)), 1.0


def _check_domain(op: str, x: Tensor, mask: Tensor | None) -> None:
    outside = (x < 0) | (x > 1)
    if mask is not None:
        outside &= ~mask
    if bool(outside.any()):
        raise ValueError(f"{op}: x must lie in [0, 1] without tails, got {x[outside][0].item():.6g}")


# registration with torch


def _vmap(op, signature, info, in_dims, *args):
    at = signature.arguments.index("bounds")
    bounds = args[at]
    if bounds is not None and in_dims[at] is not None:
        return one_by_one(op, signature, info, in_dims, *args)
    # one per feature, whatever the batch
    shared = lambda *args: op(*args[:at], bounds, *args[at + 1 :])
    return leading(shared, signature, info, in_dims, *args[:at], None, *args[at + 1 :])


def _fake(x, params, *rest):
    event_dims = rest[-1]
    logdet = x.new_empty(x.shape[: x.dim() - event_dims], dtype=compute_dtype(x.dtype))
    return torch.empty_like(x), logdet


_backward = register(
    "rq_spline_backward", "spline", reference=ref.rq_spline_backward, vmap=_vmap,
    fake=lambda grad_y, grad_logdet, x, params, *rest: (torch.empty_like(x), torch.empty_like(params)),
)  # fmt: skip
_spline = register(
    "rq_spline", "spline", reference=ref.rq_spline, fake=_fake, vmap=_vmap, backward=_backward
)  # fmt: skip


def warmup(x: Tensor, **other: Any) -> list[Tensor]:
    bins = 8
    outputs: list[Tensor] = []
    params = x.new_zeros(*x.shape, 3 * bins - 1).requires_grad_()
    for variant in SPLINE_VARIANTS:
        for inverse in (False, True):
            outputs += rq_spline(x, params, bins=bins, variant=variant, inverse=inverse)
    return outputs
