"""Spectral normalisation of many layers in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._operators import register
from ..reference import compute_dtype
from ..reference import spectral as ref

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
    if through_iteration:
        lists = ref.spectral_normalize(weights, u, v, n_iter=n_iter, through_iteration=True)
    else:
        lists = _parts(_normalize.pick(op, weights[0])(weights, u, v, n_iter), 4)
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


# registration with torch


def _parts(tensors, count):
    """Split a flat list into `count` lists of equal length."""
    n = len(tensors) // count
    return [tensors[i * n : (i + 1) * n] for i in range(count)]


def _reference(weights, u, v, n_iter):
    return [x for values in ref.spectral_normalize(weights, u, v, n_iter=n_iter) for x in values]


def _fake(weights, u, v, n_iter):
    vectors = [x.new_empty(x.shape) for x in (*u, *v)]
    return [
        *(torch.empty_like(w) for w in weights), *vectors,
        *(w.new_empty((), dtype=compute_dtype(w.dtype)) for w in weights),
    ]  # fmt: skip


_normalize_backward = register(
    "spectral_normalize_backward", "spectral", reference=ref.spectral_normalize_backward,
    fake=lambda grads, grad_sigmas, weights, u, v, sigmas: [torch.empty_like(w) for w in weights],
)  # fmt: skip


def _gradients(grad, weights, lists):
    u, v, sigmas = _parts(lists, 3)
    of_weights, _, _, of_sigmas = _parts(grad, 4)
    grads, grad_sigmas = _present(of_weights, weights), _present(of_sigmas, sigmas)
    backward = _normalize_backward.for_gradients(*grads, *grad_sigmas)
    return {"weights": backward(grads, grad_sigmas, weights, u, v, sigmas)}


def _present(grads, like):
    """Dense gradients, with zeros in place of None; the gradient of an embedding may be sparse."""
    grads = [t.new_zeros(()).expand(t.shape) if g is None else g for g, t in zip(grads, like, strict=True)]
    return [g if g.layout == torch.strided else g.to_dense() for g in grads]


_normalize = register(
    "spectral_normalize", "spectral", reference=_reference, fake=_fake, backward=_gradients,
    # the backward needs all outputs but the weights, and u and v are its constants
    keep=lambda inputs, lists: (inputs[0], lists[len(inputs[0]) :]),
    constant=lambda lists: lists[len(lists) // 4 : 3 * len(lists) // 4],
)  # fmt: skip


def warmup(x: Tensor, **other: Any) -> list[Tensor]:
    u, v = x.detach()[:, 0], x.detach()[0]
    layers = [x, x[0]], [u, None], [v, None]
    return [w for n_iter in (0, 2) for w in spectral_normalize(*layers, n_iter=n_iter)[0]]
