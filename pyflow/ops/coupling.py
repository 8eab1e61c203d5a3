"""Coupling layers: the invertible elementwise step of NICE, RealNVP and Glow, with its log-determinant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._operators import register
from .._schemas import PACKINGS, SCALE_MAPS
from .._vmap import leading
from ..reference import compute_dtype
from ..reference import coupling as ref


def additive_coupling(x: Tensor, shift: Tensor, *, inverse: bool = False, mask: Tensor | None = None) -> Tensor:
    """Volume-preserving coupling step.

    y = x + shift, inverse y = x - shift.

    Args:
        x: (B, ...) the half that changes; float32, float64, bfloat16 or float16, any strides.
        shift: the network's output for that half; x's shape, any of these dtypes.
        inverse: undo the step.
        mask: broadcastable to x, bool or 0/1; elements where it is true pass through unchanged.

    Returns:
        y with x's dtype. The log-determinant is 0.

    Raises:
        TypeError: not a tensor, or an unsupported dtype.
        ValueError: shapes, devices or a mask that do not match x.

    Notes:
        Computed in float32 (float64 for float64 x) and rounded once, in one pass; differentiable any number of
        times. Without a mask, and with x and shift of one dtype, it runs torch's own addition.

    Source:
        Dinh et al. 2014, NICE, arXiv:1410.8516, equations 7 and 8.

    Example:
        >>> x, shift = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -1.0]])
        >>> y = additive_coupling(x, shift)
        >>> y, additive_coupling(y, shift, inverse=True)
        (tensor([[1.5000, 1.0000]]), tensor([[1., 2.]]))
    """
    op = "additive_coupling"
    dtype = check.float_tensor(op, "x", x)
    shift_dtype = check.like(op, "shift", shift, "x", x.shape, x.device)
    if inverse is not False and inverse is not True:
        inverse = check.flag(op, "inverse", inverse)
    if mask is None and shift_dtype is dtype:
        # one torch kernel: the same bits, and its autograd is native
        return x - shift if inverse else x + shift
    if mask is not None:
        mask = check.mask_for(op, mask, x)
    return _additive.pick(op, x)(x, shift, mask, inverse)


def affine_coupling(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    scale_map: str = "exp",
    clamp: float = 2.0,
    eps: float = 0.0,
    slope: float = 1e-3,
    shift_first: bool = False,
    inverse: bool = False,
    mask: Tensor | None = None,
    event_dims: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Affine coupling step and its log-determinant, in one pass.

    y = x * exp(g(scale)) + shift, logdet = sum g(scale); with `shift_first` y = (x + shift) * exp(g(scale)).

    Args:
        x: (B, ...) the half that changes; float32, float64, bfloat16 or float16, any strides.
        shift, scale: the network's outputs for that half; x's shape, any of these dtypes and strides.
        scale_map: the log-scale g(s): "exp" s; "sigmoid" log(sigmoid(s + 2) + eps); "sigmoid_inv" softplus(-(s + 2));
            "softplus" log(softplus(s) + eps); "tanh" clamp * tanh(s / clamp); "atan" clamp * 0.636 * atan(s);
            "softsign" s / (1 + |s| / c) with c = -log(slope); "softplus_clamp" log(min(softplus(s) + 1e-3, 3)), the
            general scale of nflows, with gradient 0 above.
        clamp: > 0, bound of "tanh" and "atan".
        eps: >= 0, for "sigmoid" and "softplus".
        slope: in (0, 1), for "softsign".
        shift_first: add the shift before the scale (Glow).
        inverse: undo the step; logdet is then -sum g(scale).
        mask: broadcastable to x, bool or 0/1; elements where it is true pass through and add nothing to logdet.
        event_dims: how many trailing dims one logdet sums over; default all but the first.

    Returns:
        (y, logdet): y with x's shape and dtype; logdet of shape x.shape[:-event_dims] in float32
        (float64 for float64 x).

    Raises:
        TypeError: not a tensor, or an unsupported dtype.
        ValueError: shapes, devices or a mask that do not match x; an unknown scale map; a constant out of range.

    Notes:
        Computed in float32 (float64 for float64 x). On a CPU the bits do not depend on thread count, instruction
        set or batch. Double backward works. The inverse of the forward result is within
        4 * 2**-23 * (|x| + |shift| * exp(-g)) of x for |g| <= 5.

    Source:
        Dinh et al. 2016, RealNVP, arXiv:1605.08803, equations 7 and 8; Kingma and Dhariwal 2018, arXiv:1807.03039.

    Example:
        >>> x, shift, scale = torch.ones(2, 3), torch.zeros(2, 3), torch.full((2, 3), 0.5)
        >>> y, logdet = affine_coupling(x, shift, scale)
        >>> logdet
        tensor([1.5000, 1.5000])
        >>> back, _ = affine_coupling(y, shift, scale, inverse=True)
        >>> torch.allclose(back, x)
        True
    """
    op = "affine_coupling"
    dtype = check.float_tensor(op, "x", x)
    shape, device = x.shape, x.device
    check.like(op, "shift", shift, "x", shape, device)
    check.like(op, "scale", scale, "x", shape, device)
    index, arg = scale_map_constant(op, scale_map, clamp, eps, slope, dtype)
    event_dims = check.event_dims(op, x, event_dims)
    if mask is not None:
        mask = check.mask_for(op, mask, x)
    if type(shift_first) is not bool or type(inverse) is not bool:
        shift_first, inverse = check.flag(op, "shift_first", shift_first), check.flag(op, "inverse", inverse)
    return _affine.pick(op, x)(x, shift, scale, mask, index, arg, shift_first, inverse, event_dims)


def affine_coupling_packed(
    x: Tensor,
    params: Tensor,
    *,
    packing: str = "shift_scale",
    dim: int = 1,
    scale_map: str = "exp",
    clamp: float = 2.0,
    eps: float = 0.0,
    slope: float = 1e-3,
    shift_first: bool = False,
    inverse: bool = False,
    mask: Tensor | None = None,
    event_dims: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`affine_coupling` with shift and scale in one tensor, as a network returns them.

    Args:
        x: (B, ...) the half that changes.
        params: x's shape, but twice as long along `dim`.
        packing: "shift_scale" (nflows), "scale_shift" (FrEIA, glow-pytorch) in halves of `dim`, or
            "interleaved" shift, scale, shift, ... (normflows).
        dim: the dim along which shift and scale are packed.

        The other arguments are the same as for `affine_coupling`.

    Returns:
        (y, logdet) as `affine_coupling`; params gets one gradient, written in one pass.

    Raises:
        TypeError, ValueError: as `affine_coupling`.

    Example:
        >>> y, logdet = affine_coupling_packed(torch.ones(2, 3), torch.zeros(2, 6))
        >>> y.shape, logdet.tolist()
        (torch.Size([2, 3]), [0.0, 0.0])
    """
    op = "affine_coupling_packed"
    dtype = check.float_tensor(op, "x", x)
    dim, shape = check.dim(op, dim, x.dim()), x.shape
    check.like(op, "params", params, "x doubled along dim", (*shape[:dim], 2 * shape[dim], *shape[dim + 1 :]), x.device)
    layout = check.choice(op, "packing", packing, PACKINGS)
    index, arg = scale_map_constant(op, scale_map, clamp, eps, slope, dtype)
    event_dims = check.event_dims(op, x, event_dims)
    if mask is not None:
        mask = check.mask_for(op, mask, x)
    if type(shift_first) is not bool or type(inverse) is not bool:
        shift_first, inverse = check.flag(op, "shift_first", shift_first), check.flag(op, "inverse", inverse)
    return _packed.pick(op, x)(x, params, mask, layout, dim, index, arg, shift_first, inverse, event_dims)


def scale_map_constant(
    op: str, scale_map: str, clamp: float, eps: float, slope: float, dtype: torch.dtype | None = None
) -> tuple[int, float]:
    """Return the index of the map and the constant it uses; all three constants are checked for every map."""
    index = check.choice(op, "scale_map", scale_map, SCALE_MAPS)
    clamp, eps = check.positive(op, "clamp", clamp), check.not_negative(op, "eps", eps)
    slope = check.number(op, "slope", slope)
    if not 0 < slope < 1:
        raise ValueError(f"{op}: slope must be in (0, 1), got {slope}")
    if scale_map in ("tanh", "atan"):
        if not 2.0**-100 <= clamp <= 2.0**100:
            check.moderate(op, "clamp", clamp, dtype)
        return index, clamp
    if scale_map in ("sigmoid", "softplus"):
        if eps > 2.0**100:
            check.moderate(op, "eps", eps, dtype, 0.0)
        return index, eps
    return index, -math.log(slope) if scale_map == "softsign" else 0.0


# registration with torch


def _additive_backward(grad, mask, inverse):
    grad_shift = -grad if inverse else grad
    return {"x": grad, "shift": grad_shift if mask is None else torch.where(mask, 0, grad_shift)}


_additive = register(
    "additive_coupling", "coupling", reference=ref.additive_coupling, vmap=leading, backward=_additive_backward,
    fake=lambda x, shift, mask, inverse: torch.empty_like(x),
)  # fmt: skip


def _fake(x, *rest):
    event_dims = rest[-1]
    logdet = x.new_empty(x.shape[: x.dim() - event_dims], dtype=compute_dtype(x.dtype))
    return torch.empty_like(x), logdet


def _affine_backward_reference(shift_dtype, **arguments):
    grad_x, grad_shift, grad_scale = ref.affine_coupling_backward(**arguments)
    return grad_x, None if shift_dtype is None else grad_shift.to(shift_dtype), grad_scale


def _affine_backward_fake(grad_y, grad_logdet, x, shift, scale, *options):
    shift_dtype = options[-1]
    grad_shift = x.new_empty(0) if shift_dtype is None else x.new_empty(x.shape, dtype=shift_dtype)
    return torch.empty_like(x), grad_shift, torch.empty_like(scale)


_affine_backward = register(
    "affine_coupling_backward", "coupling", reference=_affine_backward_reference, fake=_affine_backward_fake,
    vmap=leading,
)  # fmt: skip


def _affine_gradients(
    grad_y, grad_logdet, x, shift, scale, mask, scale_map, map_arg, shift_first, inverse, event_dims, shift_dtype
):
    grad_x, grad_shift, grad_scale = _affine_backward(
        grad_y, grad_logdet, x, shift, scale, mask, scale_map, map_arg, shift_first, inverse, event_dims, shift_dtype
    )
    if shift_dtype is None:
        grad_shift = grad_x if shift_first else grad_y
    return {"x": grad_x, "shift": grad_shift, "scale": grad_scale}


def _affine_kept(inputs, output):
    x, shift, _, mask, _, _, shift_first, inverse, _ = inputs
    # in the forward direction grad_shift equals grad_y or grad_x: the operator need not write it
    reused = not inverse and mask is None and (not shift_first or shift.dtype == x.dtype)
    # the backward needs shift only where scale multiplies it
    needed = shift if shift_first != inverse else None
    return x, needed, *inputs[2:], None if reused else shift.dtype


_affine = register(
    "affine_coupling", "coupling", reference=ref.affine_coupling, fake=_fake, vmap=leading,
    backward=_affine_gradients, keep=_affine_kept,
)  # fmt: skip
_packed_backward = register(
    "affine_coupling_packed_backward", "coupling", reference=ref.affine_coupling_packed_backward, vmap=leading,
    fake=lambda grad_y, grad_logdet, x, params, *options: (torch.empty_like(x), torch.empty_like(params)),
)  # fmt: skip
_packed = register(
    "affine_coupling_packed", "coupling", reference=ref.affine_coupling_packed, fake=_fake, vmap=leading,
    backward=_packed_backward,
)  # fmt: skip


def warmup(x: Tensor, *, scale_maps: Sequence[str], **other: Any) -> list[Tensor]:
    """Outputs of every operation for inputs like x, as in every file of a family; see `pyflow.warmup`."""
    params = x.new_zeros(len(x), 2 * x.shape[1]).requires_grad_()
    outputs = [additive_coupling(x, x)]
    for inverse in (False, True):
        for scale_map in scale_maps:
            outputs += affine_coupling(x, x, x, scale_map=scale_map, inverse=inverse)
            for packing in PACKINGS:
                options: dict[str, Any] = dict(packing=packing, scale_map=scale_map, inverse=inverse)
                outputs += affine_coupling_packed(x, params, **options)
    return outputs
