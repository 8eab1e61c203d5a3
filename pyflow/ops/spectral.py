"""Spectral normalisation of many layers in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._backend import register, runs_reference
from ..reference import compute_dtype
from ..reference import spectral as ref
from ._transforms import one_by_one, vector_jacobian

Lists = tuple[list[Tensor], list[Tensor | None], list[Tensor | None], list[Tensor]]


def spectral_normalize(
    weights: Sequence[Tensor],
    u: Sequence[Tensor | None],
    v: Sequence[Tensor | None],
    *,
    n_iter: int = 1,
    through_iteration: bool = False,
) -> Lists:
    """Normalise all weights in one call: W / sigma(W) by power iteration, with W flattened to (out, -1).

    One round is u = Wv / |Wv|, v = W'u / |W'u|; then sigma = u'Wv. For a weight of one dim, sigma is its norm.

    Args:
        weights: tensors of one dim or more; float32, float64, bfloat16 or float16, any strides, one device.
        u: (out,) estimate of the left singular vector of every weight; None for a weight of one dim.
        v: (weight[0].numel(),) estimate of the right singular vector, where a round starts; None for one dim.
        n_iter: rounds of power iteration; with 0, u and v are used unchanged.
        through_iteration: differentiate through the rounds, also with respect to u and v. By default u and v are
            constants of the backward.

    Returns:
        (weights, u, v, sigmas): normalised weights with the dtypes and strides of the inputs, new u and v (the inputs
        are not modified), and 0-d sigmas, float32 (float64 for float64 weights).

    Raises:
        TypeError: not a list, not a tensor, or a wrong dtype.
        ValueError: an empty list, lists of different lengths, u or v of the wrong size or device, n_iter < 0.

    Notes:
        Start from random vectors: if v is orthogonal to the leading right singular vector (for example v = ones and a
        singular vector that sums to 0), the iteration converges to a smaller singular value.
        Norms and sigma have a lower limit of 1e-12: a zero matrix stays zero and keeps its u and v.
        One round reads W once: W'(Wv) is accumulated row by row, and sigma is the ratio of two norms, so sigma^2 must
        fit into float32 (sigma < 1e19). Sums use fixed blocks: on a CPU the same bits for any thread count and
        instruction set. The backward is dW = g / sigma + (g_sigma - sum(g W) / sigma^2) u v'; double backward works.
        `through_iteration` runs the plain-torch reference, whose backward stores the vectors of every round.

    Source:
        Miyato et al. 2018, Spectral normalization for GANs, arXiv:1802.05957, algorithm 1.

    Example:
        >>> w = torch.diag(torch.tensor([3.0, 1.0]))
        >>> weights, u, v, sigmas = spectral_normalize([w], [torch.ones(2)], [torch.ones(2)], n_iter=20)
        >>> sigmas[0], weights[0].diagonal()
        (tensor(3.), tensor([1.0000, 0.3333]))
    """
    op = "spectral_normalize"
    weights, u, v = _checked(op, weights, u, v)
    n_iter = check.at_least(op, "n_iter", n_iter, 0)
    through_iteration = check.flag(op, "through_iteration", through_iteration)
    if through_iteration or runs_reference(op, weights[0]):
        lists = ref.spectral_normalize(weights, u, v, n_iter=n_iter, through_iteration=through_iteration)
    else:
        flat, n = torch.ops.pyflow.spectral_normalize.default(weights, u, v, n_iter), len(weights)
        lists = tuple(flat[i * n : (i + 1) * n] for i in range(4))
    scaled, new_u, new_v, sigmas = lists
    vectors = [w.dim() == 1 for w in weights]
    return (
        scaled,
        [None if vector else x for vector, x in zip(vectors, new_u, strict=True)],
        [None if vector else x for vector, x in zip(vectors, new_v, strict=True)],
        sigmas,
    )


def _checked(op: str, *lists: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Check the three lists and return them, with empty tensors in place of None in u and v."""
    for name, values in zip(("weights", "u", "v"), lists, strict=True):
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{op}: {name} must be a list, got {type(values).__name__}")
        if len(values) != len(lists[0]):
            raise ValueError(f"{op}: {name} must be as many as weights, {len(lists[0])}, got {len(values)}")
    if not lists[0]:
        raise ValueError(f"{op}: weights must hold at least one tensor, got an empty list")
    for i, (weight, *vectors) in enumerate(zip(*lists, strict=True)):
        check.float_tensor(op, f"weights[{i}]", weight)
        if weight.dim() == 0:
            raise ValueError(f"{op}: weights[{i}] must have at least one dim, got a scalar")
        if weight.device != lists[0][0].device:
            raise ValueError(f"{op}: weights must be on one device, {lists[0][0].device}, got {weight.device}")
        rows, size = weight.shape[0], weight.numel()
        if weight.dim() > 1 and size == 0:
            raise ValueError(f"{op}: weights[{i}] must not be empty, got shape {tuple(weight.shape)}")
        for name, vector, length in zip("uv", vectors, (rows, size // max(rows, 1)), strict=True):
            if weight.dim() == 1:
                if vector is not None:
                    raise ValueError(f"{op}: {name}[{i}] must be None, weights[{i}] is a vector")
                continue
            check.float_tensor(op, f"{name}[{i}]", vector)
            if vector.shape != (length,):
                raise ValueError(f"{op}: {name}[{i}] must have shape ({length},), got {tuple(vector.shape)}")
            if vector.device != weight.device:
                raise ValueError(f"{op}: {name}[{i}] must be on the device of weights, got {vector.device}")
    weights, u, v = lists
    empty: Any = weights[0].new_empty(0) if any(x is None for x in u) else None
    return list(weights), [empty if x is None else x for x in u], [empty if x is None else x for x in v]


# registration with torch; arguments are in the order of the schemas


def _parts(tensors, count):
    """Split a flat list into `count` lists of equal length."""
    n = len(tensors) // count
    return [list(tensors[i * n : (i + 1) * n]) for i in range(count)]


def _like(weights, values):
    return [torch.empty_like(w).copy_(x) for w, x in zip(weights, values, strict=True)]


def _reference(weights, u, v, n_iter):
    scaled, *rest = ref.spectral_normalize(weights, u, v, n_iter=n_iter)
    return [*_like(weights, scaled), *(x.clone() for values in rest for x in values)]


def _fake(weights, u, v, n_iter):
    vectors = [x.new_empty(x.shape) for x in (*u, *v)]
    return [
        *(torch.empty_like(w) for w in weights), *vectors,
        *(w.new_empty((), dtype=compute_dtype(w.dtype)) for w in weights),
    ]  # fmt: skip


def _setup(ctx, inputs, output):
    weights, n = inputs[0], len(inputs[0])
    ctx.mark_non_differentiable(*output[n : 3 * n])
    ctx.save_for_backward(*weights, *output[n:])


def _backward(ctx, grads):
    weights, u, v, sigmas = _parts(ctx.saved_tensors, 4)
    n = len(weights)
    grads, grad_sigmas = (_present(g, like) for g, like in ((grads[:n], weights), (grads[3 * n :], sigmas)))
    result = torch.ops.pyflow.spectral_normalize_backward.default(grads, grad_sigmas, weights, u, v, sigmas)
    return list(result), [None] * n, [None] * n, None


def _present(grads, like):
    """Dense gradients, with zeros in place of None; the gradient of an embedding may be sparse."""
    grads = [t.new_zeros(()).expand(t.shape) if g is None else g for g, t in zip(grads, like, strict=True)]
    return [g if g.layout == torch.strided else g.to_dense() for g in grads]


def _one_by_one(info, in_dims, op, lists, *options):
    outputs = one_by_one(info, in_dims, op, lists, *options)
    return list(outputs), [0] * len(outputs)


def _vmap(info, in_dims, weights, u, v, n_iter):
    return _one_by_one(info, in_dims, torch.ops.pyflow.spectral_normalize, (weights, u, v), n_iter)


def _backward_reference(grads, grad_sigmas, weights, u, v, sigmas):
    return _like(weights, ref.spectral_normalize_backward(grads, grad_sigmas, weights, u, v, sigmas))


def _backward_fake(grads, grad_sigmas, weights, u, v, sigmas):
    return [torch.empty_like(w) for w in weights]


def _backward_setup(ctx, inputs, output):
    ctx.save_for_backward(*(x for values in inputs for x in values))


def _backward_backward(ctx, grads):
    def formula(*tensors):
        return ref.spectral_normalize_backward(*_parts(tensors, 6))

    return tuple(_parts(vector_jacobian(formula, ctx.saved_tensors, grads), 6))


def _backward_vmap(info, in_dims, *lists):
    return _one_by_one(info, in_dims, torch.ops.pyflow.spectral_normalize_backward, lists)


register(
    "spectral_normalize", "spectral", reference=_reference, fake=_fake, vmap=_vmap,
    setup_context=_setup, backward=_backward,
)  # fmt: skip
register(
    "spectral_normalize_backward", "spectral", reference=_backward_reference, fake=_backward_fake,
    vmap=_backward_vmap, setup_context=_backward_setup, backward=_backward_backward,
)  # fmt: skip
