"""Rational-quadratic splines in plain torch, twice differentiable."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._schemas import TAILS
from . import compute_dtype
from .coupling import softplus


class Options(NamedTuple):
    """How parameters become knots: arguments of the operator by their names, `form` that of the variant."""

    bound: float
    bins: int
    tails: Sequence[int]  # none; one for all features; or one per feature of the last dim of x
    form: str
    param_scale: float
    min_bin: float
    min_slope: float


class Spline(NamedTuple):
    """A spline per element: K + 1 knots (..., K + 1), their slopes, and the softmax of widths and heights."""

    xs: Tensor
    ys: Tensor
    slopes: Tensor
    parts: tuple[Tensor, Tensor]


class Place(NamedTuple):
    """Where an element is: its bin k (..., 1), the corner, size and slopes of the bin, and theta = (x - x0) / w."""

    k: Tensor
    x0: Tensor
    y0: Tensor
    w: Tensor
    h: Tensor
    d0: Tensor
    d1: Tensor
    theta: Tensor


def rq_spline(
    x: Tensor, params: Tensor, bounds: Tensor | None, mask: Tensor | None, *, inverse: bool, event_dims: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (y, logdet)."""
    o = Options(**options)
    low, high = _ends(x, bounds, o)
    used, outside = _used(x, low, high, mask, o)
    x_, p = _seen(x, params, used, low, high)
    spline = spline_of(p, low, high, o)
    place = _place(x_, spline, inverse, o)
    _, _, w, h, d0, d1, theta = place[1:]
    s = h / w
    rest = theta * (1 - theta)
    over = s + (d0 + d1 - 2 * s) * rest
    slope = d1 * theta.square() + 2 * s * rest + d0 * (1 - theta).square()
    g = 2 * s.log() + slope.log() - 2 * over.log()
    y = place.x0 + theta * w if inverse else place.y0 + h * (s * theta.square() + d0 * rest) / over
    y, g = torch.where(used, y.to(x.dtype), x), torch.where(used, -g if inverse else g, 0)
    if not o.tails:
        # NaN in the gradients too
        nan = (x.to(g.dtype) + params.to(g.dtype).sum(-1)) * torch.where(outside, math.nan, 1)
        y, g = torch.where(outside, nan.to(x.dtype), y), torch.where(outside, nan, g)
    return y, g.sum(tuple(range(x.dim() - event_dims, x.dim()))) if event_dims else g


def rq_spline_backward(
    grad_y: Tensor | None, grad_logdet: Tensor | None, x: Tensor, params: Tensor, bounds: Tensor | None,
    mask: Tensor | None, *, inverse: bool, event_dims: int, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x and params."""
    o = Options(**options)
    dtype = compute_dtype(x.dtype)
    low, high = _ends(x, bounds, o)
    used, outside = _used(x, low, high, mask, o)
    x_, p = _seen(x, params, used, low, high)
    spline = spline_of(p, low, high, o)
    k, _, _, w, h, d0, d1, theta = _place(x_, spline, inverse, o)
    gy = torch.zeros_like(x_) if grad_y is None else grad_y.to(dtype)
    gl = torch.zeros((), dtype=dtype, device=x.device) if grad_logdet is None else grad_logdet.to(dtype)
    gl = gl.reshape(gl.shape + (1,) * event_dims)
    passed, gy, gl = gy, torch.where(used, gy, 0), torch.where(used, gl, 0)
    s, rest, step = h / w, theta * (1 - theta), 1 - 2 * theta
    q = d0 + d1 - 2 * s
    top, over = s * theta.square() + d0 * rest, s + q * rest
    slope = d1 * theta.square() + 2 * s * rest + d0 * (1 - theta).square()
    rise = slope * (s / over).square()  # dy/dx
    # derivatives of log(dy/dx)
    of_theta = 2 * (d1 * theta + s * step - d0 * (1 - theta)) / slope - 2 * q * step / over
    gx = None
    if inverse:
        # x(y) solves y(x) = y: a change of params moves x by -dy / rise
        gx = (gy - gl * of_theta / w) / rise
        gy, gl = -gx, -gl
    per = gy * h / over.square()
    g_theta = gy * w * rise + gl * of_theta
    g_s = per * (theta.square() * over - top * (1 - 2 * rest))
    g_s = g_s + gl * (2 / s + 2 * rest / slope - 2 * (1 - 2 * rest) / over)
    g_d0 = per * rest * (over - top) + gl * ((1 - theta).square() / slope - 2 * rest / over)
    g_d1 = -per * rest * top + gl * (theta.square() / slope - 2 * rest / over)
    g_w = -(g_theta * theta + g_s * s) / w
    g_h = gy * top / over + g_s / w
    gx = g_theta / w if gx is None else gx
    ends_x, ends_y = (-g_theta / w - g_w, g_w), (gy - g_h, g_h)
    grads = [
        _of_logits(ends, k, part, logits, high - low, o)
        for ends, part, logits in zip((ends_x, ends_y), spline.parts, p.split(o.bins, -1), strict=False)
    ]
    grads.append(_of_slopes(g_d0, g_d1, k, p[..., 2 * o.bins :], o))
    gx = torch.where(outside, math.nan, torch.where(used, gx, passed))
    g_params = torch.where(used[..., None], torch.cat(grads, -1), 0)
    return gx.to(x.dtype), torch.where(outside[..., None], math.nan, g_params).to(params.dtype)


def _ends(x: Tensor, bounds: Tensor | None, o: Options) -> tuple[Tensor, Tensor]:
    """Return the ends of the domain, which are those of the range too."""
    dtype = compute_dtype(x.dtype)
    if bounds is None or not o.tails:
        bounds = torch.full((), o.bound if o.tails else 1.0, dtype=dtype, device=x.device)
    bounds = bounds.to(dtype)
    return -bounds if o.tails else torch.zeros_like(bounds), bounds


def _used(x: Tensor, low: Tensor, high: Tensor, mask: Tensor | None, o: Options) -> tuple[Tensor, Tensor]:
    """Return which elements the spline transforms, and which have no result: outside the domain without tails."""
    x_ = x.to(low.dtype)
    # zuko's domain does not contain its lower end
    inside = (x_ > low if o.form == "zuko" and o.tails else x_ >= low) & (x_ <= high)
    open_ = torch.ones_like(inside) if mask is None else ~mask
    return inside & open_, torch.zeros_like(inside) if o.tails else ~inside & open_


def _seen(x: Tensor, params: Tensor, used: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Replace what is not transformed: its values reach neither the result nor a gradient of any order."""
    x_, p = x.to(low.dtype), params.to(low.dtype)
    return torch.where(used, x_, (low + high) / 2), torch.where(used[..., None], p, 0)


def spline_of(p: Tensor, low: Tensor, high: Tensor, o: Options) -> Spline:
    """Return knots and slopes from params."""
    widths, heights, slopes = p.split((o.bins, o.bins, p.shape[-1] - 2 * o.bins), -1)
    parts = _squeezed(widths, o).softmax(-1), _squeezed(heights, o).softmax(-1)
    xs, ys = (_knots(part, low, high, o) for part in parts)
    return Spline(xs, ys, _slopes(slopes, o), parts)


def _place(x: Tensor, spline: Spline, inverse: bool, o: Options) -> Place:
    knots = (spline.ys if inverse else spline.xs)[..., 1:-1]
    # a knot belongs to the bin on its right, in zuko to the one on its left
    below = x[..., None] > knots if o.form == "zuko" else x[..., None] >= knots
    k = below.sum(-1, keepdim=True)
    x0, x1, y0, y1, d0, d1 = (v.gather(-1, k + i).squeeze(-1) for v in spline[:3] for i in (0, 1))
    w, h = x1 - x0, y1 - y0
    theta = _root(x - y0, h, h / w, d0, d1) if inverse else (x - x0) / w
    return Place(k, x0, y0, w, h, d0, d1, theta)


def _root(u: Tensor, h: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    """Return theta at the height u in a bin: a root of a t^2 + b t + c, by the formula that does not cancel."""
    q = d0 + d1 - 2 * s
    a, b, c = h * (s - d0) + u * q, h * d0 - u * q, -s * u
    square = b.square() - 4 * a * c
    positive = square > 0
    r = torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)
    falls = b >= 0
    # a + b = h s > 0: without b, a is not 0
    under = torch.where(falls, -b - r, -1)
    under = torch.where(under == 0, -1, under)
    theta = torch.where(falls, 2 * c / under, (r - b) / torch.where(falls, 1, 2 * a))
    # the gradient of a place that rounding has put past the end of its bin is that of the end
    return theta + (theta.clamp(0, 1) - theta).detach()


def _squeezed(logits: Tensor, o: Options) -> Tensor:
    return _saturated(logits, math.log(o.min_slope) / 2) if o.form == "zuko" else logits * o.param_scale


def _saturated(logits: Tensor, limit: float) -> Tensor:
    return logits / (1 + (logits / limit).abs())


def _min_bin(o: Options) -> float:
    return 0.0 if o.form == "zuko" else o.min_bin


def _knots(part: Tensor, low: Tensor, high: Tensor, o: Options) -> Tensor:
    """Return the K + 1 ends of bins, the outer ones exactly low and high."""
    least = _min_bin(o)
    parts = least + (1 - o.bins * least) * part[..., :-1]
    inner = low[..., None] + (high - low)[..., None] * _running_sums(parts)
    first, last = (end[..., None].expand(*inner.shape[:-1], 1) for end in (low, high))
    return torch.cat((first, inner, last), -1)


def _running_sums(parts: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        return parts.cumsum(-1)
    # Inductor (torch 2.11 to 2.13, CPU) gives wrong gradients of the cumsum of a softmax
    return torch.stack([*itertools.accumulate(parts.unbind(-1))], -1)


def _of_logits(
    ends: tuple[Tensor, Tensor], k: Tensor, part: Tensor, logits: Tensor, length: Tensor, o: Options
) -> Tensor:
    """Return the gradient of widths or heights from those of the two knots of the bin."""
    # knots 0 and K are fixed
    left = torch.where(k > 0, ends[0][..., None], 0)
    right = torch.where(k + 1 < o.bins, ends[1][..., None], 0)
    i = torch.arange(o.bins, device=k.device)
    grad = torch.where(i < k, left + right, torch.where(i == k, right, 0))
    grad = grad * (1 - o.bins * _min_bin(o)) * length[..., None]
    grad = part * (grad - (part * grad).sum(-1, keepdim=True))
    if o.form != "zuko":
        return grad * o.param_scale
    return grad / (1 + (2 * logits / math.log(o.min_slope)).abs()).square()


def _slopes(logits: Tensor, o: Options) -> Tensor:
    """Return the slopes at the K + 1 knots, from K - 1, K or K + 1 numbers."""
    zuko = o.form == "zuko"
    slopes = _saturated(logits, math.log(o.min_slope)).exp() if zuko else o.min_slope + softplus(logits)
    count = logits.shape[-1]
    if count == o.bins - 1:
        return pad(slopes, (1, 1), value=1.0)
    if count == o.bins:
        return torch.cat((slopes, slopes[..., :1]), -1)
    if not o.tails:
        return slopes
    linear = _linear_features(o, logits)
    first = torch.where(linear, 1, slopes[..., :1])
    return torch.cat((first, slopes[..., 1:-1], first), -1)


def _of_slopes(g_d0: Tensor, g_d1: Tensor, k: Tensor, logits: Tensor, o: Options) -> Tensor:
    """Return the gradient of the numbers behind the slopes from those of the two slopes of the bin."""
    i = torch.arange(o.bins + 1, device=k.device)
    grad = torch.where(i == k, g_d0[..., None], 0) + torch.where(i == k + 1, g_d1[..., None], 0)
    first, inner, last = grad.split((1, o.bins - 1, 1), -1)
    count = logits.shape[-1]
    if count == o.bins - 1:
        grad = inner
    elif count == o.bins:
        grad = torch.cat((first + last, inner), -1)
    elif o.tails:
        # the last number is not used
        both = torch.where(_linear_features(o, logits), 0, first + last)
        grad = torch.cat((both, inner, torch.zeros_like(last)), -1)
    if o.form != "zuko":
        return grad * torch.sigmoid(logits)
    rest = 1 + (logits / math.log(o.min_slope)).abs()
    return grad * (logits / rest).exp() / rest.square()


def _linear_features(o: Options, like: Tensor) -> Tensor:
    return torch.tensor([TAILS[tail] == "linear" for tail in o.tails], device=like.device)[:, None]
