"""Coupling layers in plain torch, twice differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import compute_dtype


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)). torch's softplus returns x above 20, which is off by 2e-9."""
    return -logsigmoid(-x)


def log_scale(s: Tensor, scale_map: str, arg: float) -> Tensor:
    """The log-scale g(s); `arg` is the constant of the map (clamp, eps or c)."""
    if scale_map == "exp":
        return s
    if scale_map == "sigmoid":
        return torch.log(torch.sigmoid(s + 2) + arg) if arg > 0 else logsigmoid(s + 2)
    if scale_map == "sigmoid_inv":
        return softplus(-(s + 2))
    if scale_map == "softplus":
        if arg > 0:
            return torch.log(softplus(s) + arg)
        small = s < -15  # log(softplus) and its gradient underflow there
        return torch.where(small, s - 0.5 * torch.exp(s), torch.log(softplus(torch.where(small, 0, s))))
    if scale_map == "tanh":
        return arg * torch.tanh(s / arg)
    if scale_map == "atan":
        return arg * 0.636 * torch.atan(s)
    if scale_map == "softsign":
        return s / (1 + s.abs() / arg)
    if scale_map == "softplus_clamp":
        return torch.log((softplus(s) + 1e-3).clamp(max=3))
    raise ValueError(f"unknown scale map {scale_map!r}")


def log_scale_slope(s: Tensor, scale_map: str, arg: float) -> Tensor:
    """dg/ds of `log_scale` in closed form."""
    if scale_map == "exp":
        return torch.ones_like(s)
    if scale_map == "sigmoid":
        p, q = torch.sigmoid(s + 2), torch.sigmoid(-(s + 2))
        return p * q / (p + arg) if arg > 0 else q
    if scale_map == "sigmoid_inv":
        return -torch.sigmoid(-(s + 2))
    if scale_map == "softplus":
        if arg > 0:
            return torch.sigmoid(s) / (softplus(s) + arg)
        small = s < -15
        safe = torch.where(small, 0, s)
        return torch.where(small, 1 - 0.5 * torch.exp(s), torch.sigmoid(safe) / softplus(safe))
    if scale_map == "tanh":
        return 1 - torch.tanh(s / arg) ** 2
    if scale_map == "atan":
        return arg * 0.636 / (1 + s * s)
    if scale_map == "softsign":
        return 1 / (1 + s.abs() / arg) ** 2
    if scale_map == "softplus_clamp":
        p = softplus(s) + 1e-3
        return torch.where(p > 3, 0, torch.sigmoid(s) / p)
    raise ValueError(f"unknown scale map {scale_map!r}")


def unpack(params: Tensor, packing: str, dim: int) -> tuple[Tensor, Tensor]:
    """Return the (shift, scale) views of packed parameters."""
    if packing == "interleaved":
        dim %= params.dim()
        pairs = params.reshape(*params.shape[:dim], params.shape[dim] // 2, 2, *params.shape[dim + 1 :])
        return pairs.select(dim + 1, 0), pairs.select(dim + 1, 1)
    first, second = params.chunk(2, dim)
    return (first, second) if packing == "shift_scale" else (second, first)


def pack(shift: Tensor, scale: Tensor, packing: str, dim: int) -> Tensor:
    """The inverse of `unpack`."""
    if packing == "interleaved":
        dim %= shift.dim()
        # the vmap of is_grads_batched has no rule for flatten and unflatten
        return torch.stack((shift, scale), dim + 1).reshape(
            *shift.shape[:dim], 2 * shift.shape[dim], *shift.shape[dim + 1 :]
        )
    return torch.cat((shift, scale) if packing == "shift_scale" else (scale, shift), dim)


def additive_coupling(x: Tensor, shift: Tensor, *, inverse: bool = False, mask: Tensor | None = None) -> Tensor:
    dtype = compute_dtype(x.dtype)
    y = x.to(dtype) - shift.to(dtype) if inverse else x.to(dtype) + shift.to(dtype)
    y = y.to(x.dtype)
    return y if mask is None else torch.where(mask, x, y)


def affine_coupling(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    scale_map: str,
    map_arg: float,
    shift_first: bool,
    inverse: bool,
    mask: Tensor | None,
    event_dims: int,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x.dtype)
    x_, t, s = (v.to(dtype) for v in _seen(mask, x, shift, scale))
    g = log_scale(s, scale_map, map_arg)
    if inverse:
        y = x_ * torch.exp(-g) - t if shift_first else (x_ - t) * torch.exp(-g)
        g = -g
    else:
        y = (x_ + t) * torch.exp(g) if shift_first else x_ * torch.exp(g) + t
    y = y.to(x.dtype)
    if mask is not None:
        y, g = torch.where(mask, x, y), torch.where(mask, 0, g)
    return y, g.sum(tuple(range(x.dim() - event_dims, x.dim()))) if event_dims else g


def _seen(mask: Tensor | None, *tensors: Tensor | None) -> list[Any]:
    """Set masked elements to 0: their values reach neither the result nor a gradient of any order."""
    if mask is None:
        return list(tensors)
    return [t if t is None else torch.where(mask, torch.zeros((), dtype=t.dtype, device=t.device), t) for t in tensors]


def affine_coupling_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    *,
    scale_map: str,
    map_arg: float,
    shift_first: bool,
    inverse: bool,
    mask: Tensor | None,
    event_dims: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (x, shift, scale); the gradient of shift has the compute dtype.

    `shift` may be None if the formula does not contain it (forward with scale first, inverse with shift first).
    """
    dtype = compute_dtype(x.dtype)
    if grad_y is None:
        # only logdet has a gradient, and y may have overflowed
        x, shift = torch.zeros_like(x), None if shift is None else torch.zeros_like(shift)
    converted: list[Any] = [v if v is None else v.to(dtype) for v in _seen(mask, x, shift, scale)]
    x_, t, s = converted
    g, slope = log_scale(s, scale_map, map_arg), log_scale_slope(s, scale_map, map_arg)
    gy = torch.zeros_like(x_) if grad_y is None else grad_y.to(dtype)
    if grad_y is None:
        g = torch.zeros_like(g)
    gl = torch.zeros((), dtype=dtype, device=x.device) if grad_logdet is None else grad_logdet.to(dtype)
    gl = gl.reshape(gl.shape + (1,) * event_dims)
    if inverse:
        gx = gy * torch.exp(-g)
        gt = -gy if shift_first else -gx
        gs = -(gx * (x_ if shift_first else x_ - t) + gl) * slope
    else:
        gx = gy * torch.exp(g)
        gt = gx if shift_first else gy
        gs = (gx * (x_ + t if shift_first else x_) + gl) * slope
    if mask is not None:
        gx, gt, gs = torch.where(mask, gy, gx), torch.where(mask, 0, gt), torch.where(mask, 0, gs)
    return gx.to(x.dtype), gt, gs.to(scale.dtype)


def affine_coupling_packed(
    x: Tensor, params: Tensor, *, packing: str, dim: int, **options: Any
) -> tuple[Tensor, Tensor]:
    shift, scale = unpack(params, packing, dim)
    return affine_coupling(x, shift, scale, **options)


def affine_coupling_packed_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    x: Tensor,
    params: Tensor,
    *,
    packing: str,
    dim: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    shift, scale = unpack(params, packing, dim)
    gx, gt, gs = affine_coupling_backward(grad_y, grad_logdet, x, shift, scale, **options)
    return gx, pack(gt.to(params.dtype), gs, packing, dim)
