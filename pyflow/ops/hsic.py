"""Hilbert-Schmidt independence criterion (HSIC) and centred kernel alignment (CKA) without n x n matrices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._operators import register
from ..hsic.estimators import Pairs, ratio, rows_needed, values, whole
from ..hsic.features import approximation, check_options
from ..hsic.inputs import result_dtype, together, variable, variables
from ..hsic.kernels import KERNEL_OPTIONS, Bandwidth, KernelSpec, Variable, kernel_specs
from ..reference import hsic as ref


def hsic(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "rbf",
    bandwidth: Bandwidth = "median",
    kernel_y: str | None = None,
    bandwidth_y: Bandwidth | None = None,
    estimator: str = "biased",
    normalize: bool = False,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    allow_tf32: bool = False,
    approximate: str | None = None,
    n_features: int = 512,
    seed: int = 0,
) -> Tensor:
    """Return HSIC, a measure of the dependence of x and y: tr(K H L H) / (n - 1)**2, near 0 if they are independent.

    Kernels: "rbf" exp(-|a - b|^2 / (2 sigma^2)), "laplacian" exp(-|a - b|_1 / sigma), "linear" a.b, "polynomial"
    (gamma a.b + coef0)^degree, "delta" (1 if a = b, else 0), "precomputed" (x itself is the kernel matrix).

    Args:
        x: (..., n, d_x) float32, float64, bfloat16 or float16; (..., n, n) symmetric for "precomputed"; for "delta"
            any dtype, or labels (n,).
        y: (..., n, d_y) likewise; leading dims broadcast.
        kernel: kernel of x.
        bandwidth: sigma of x: a positive normal number of x's dtype; a tensor of them that broadcasts to the leading
            dims of x (differentiable); or "median": the median distance between the rows of each variable (of 1,000
            rows if there are more), without a gradient, or the mean distance if the median is 0.
        kernel_y, bandwidth_y: of y; None: as for x.
        estimator: "biased" (divides by (n - 1)**2), "biased_n2" (by n**2) or "unbiased" (Song et al. 2012).
        normalize: divide by sqrt(hsic(x, x) hsic(y, y)); 0 if one of the two is not above its rounding error.
        degree, gamma, coef0: of the polynomial kernel; gamma None means 1 / d, degree is at most 100.
        allow_tf32: allow TF32 (10-bit mantissas) in the dot products on a GPU.
        approximate: None, "rff" (random Fourier features; rbf and laplacian) or "nystrom" (landmark rows).
        n_features, seed: of the approximation.

    Returns:
        (...) float32 (float64 if an input is float64); 0 if all rows of x or of y are equal.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: different n, too few rows (2, unbiased 4), an unknown kernel or estimator, a bandwidth that is not
            positive or not normal, a precomputed matrix that is not square or not symmetric, values that are not
            finite.

    Notes:
        Memory O(n (d_x + d_y)): tiles of both kernel matrices are computed, used and discarded, forward and backward.
        Products are float32, sums float64; K - 1 replaces K at wide bandwidths. On a CPU the same bits for any thread
        count, instruction set and batch. The backward computes all tiles again; double backward stores the matrices.
        Linear kernels use the d_x x d_y covariance if that is cheaper. Data whose products would overflow or underflow
        are divided by a power of two, so that normalised values do not depend on the unit of x.
        Rows that are many bandwidths away from all others do not reduce the accuracy for these others; on a GPU and
        with `approximate` this holds for a few such rows. The polynomial kernel is not translation invariant: in
        float32 it keeps few digits if the mean of the data is 1,000 standard deviations or more from 0 (normalised: 0
        if it keeps none), and where gamma times the squared rows is below a thousandth of coef0: choose a smaller
        coef0 there. Subtract the mean first if your application allows it. In float64 it keeps its digits on a
        CPU: from 128 standard deviations on, its sums are torch's, slower, and their last bits depend on the number of
        threads. Elsewhere and under `torch.compile` and vmap float64 keeps few digits from about 3,000 on.

    Source:
        Gretton et al. 2005, Measuring Statistical Dependence with Hilbert-Schmidt Norms; Song et al. 2012, Feature
        Selection via Dependence Maximization.

    Example:
        >>> x = torch.linspace(-1, 1, 50).unsqueeze(1)
        >>> round(hsic(x, x**2, normalize=True).item(), 3), round(hsic(x, x, normalize=True).item(), 3)
        (0.322, 1.0)
    """
    specs = kernel_specs(kernel, bandwidth, kernel_y, bandwidth_y, degree, gamma, coef0)
    return _dependence("hsic", x, y, specs, estimator, normalize, allow_tf32, approximate, n_features, seed)


# options of `hsic` and their defaults
OPTIONS: dict[str, Any] = dict(hsic.__kwdefaults__ or {})


def cka(x: Tensor, y: Tensor, **options: object) -> Tensor:
    """Return the centred kernel alignment: `hsic` with normalize=True, which is 1 for y = x.

    Args:
        x, y, options: as for `hsic`, without normalize.

    Returns:
        (...) float32 (float64 if an input is float64).

    Source:
        Kornblith et al. 2019, Similarity of Neural Network Representations Revisited, arXiv:1905.00414.

    Example:
        >>> x = torch.eye(6)
        >>> round(cka(x, 3 * x, kernel="linear").item(), 4)
        1.0
    """
    if "normalize" in options:
        raise TypeError("cka: normalize is always on")
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"cka: options must be those of hsic, got {name}")
    rest = {**OPTIONS, **options, "normalize": True}
    specs = kernel_specs(*[rest.pop(name) for name in KERNEL_OPTIONS])
    return _dependence("cka", x, y, specs, **rest)


def _dependence(
    op: str,
    x: Tensor,
    y: Tensor,
    specs: tuple[KernelSpec, KernelSpec],
    estimator: str,
    normalize: bool,
    allow_tf32: bool,
    approximate: str | None,
    n_features: int,
    seed: int,
) -> Tensor:
    """Compute `hsic` for the public function `op`, which appears in error texts."""
    normalize, allow_tf32 = check.flag(op, "normalize", normalize), check.flag(op, "allow_tf32", allow_tf32)
    check_options(op, approximate, n_features, seed)
    pair = variables(op, x, y, specs)
    rows_needed(op, pair[0].z.shape[-2], estimator)
    if approximate is not None:
        result, _ = approximation(
            op, pair, estimator=estimator, normalize=normalize, approximate=approximate, n_features=n_features,
            seed=seed,
        )  # fmt: skip
    elif normalize:
        three = Pairs(op, pair, [(0, 1), (0, 0), (1, 1)], estimator, allow_tf32, sums)
        xy, xx, yy = values(three).unbind(-1)
        result = ratio(xy, xx, yy)
    else:
        result = whole(values(Pairs(op, pair, [(0, 1)], estimator, allow_tf32, sums)).squeeze(-1), *pair)
    return result.to(result_dtype(x, y))


def hsic_matrix(
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    *,
    kernel: str = "rbf",
    bandwidth: Bandwidth = "median",
    kernel_y: str | None = None,
    bandwidth_y: Bandwidth | None = None,
    estimator: str = "biased",
    normalize: bool = False,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    allow_tf32: bool = False,
) -> Tensor:
    """Return HSIC of every x with every y for representations of the same n samples. Each tile is computed once.

    Args:
        xs, ys: lists of (..., n, d) tensors with the same leading dims; d may differ. Other arguments: as for `hsic`.

    Returns:
        (..., len(xs), len(ys)) float32 (float64 if an input is float64).

    Raises:
        TypeError, ValueError: as for `hsic`, or an empty list.

    Example:
        >>> x = torch.eye(5)
        >>> hsic_matrix([x, x[:, :2]], [x], kernel="linear", normalize=True).shape
        torch.Size([2, 1])
    """
    op = "hsic_matrix"
    normalize, allow_tf32 = check.flag(op, "normalize", normalize), check.flag(op, "allow_tf32", allow_tf32)
    for name, tensors in (("xs", xs), ("ys", ys)):
        if not isinstance(tensors, Iterable) or (isinstance(tensors, Tensor) and not tensors.dim()):
            raise TypeError(f"{op}: {name} must be a list of tensors, got {type(tensors).__name__}")
    xs, ys = list(xs), list(ys)
    if not xs or not ys:
        raise ValueError(f"{op}: xs and ys must not be empty, got {len(xs)} and {len(ys)} tensors")
    of_x, of_y = kernel_specs(kernel, bandwidth, kernel_y, bandwidth_y, degree, gamma, coef0)
    every = [variable(op, "x", x, of_x) for x in xs] + [variable(op, "y", y, of_y) for y in ys]
    every = together(op, every)
    rows_needed(op, every[0].z.shape[-2], estimator)
    p, q = len(xs), len(ys)
    pairs = [(i, p + j) for i in range(p) for j in range(q)]
    if normalize:
        pairs += [(m, m) for m in range(p + q)]
    result = values(Pairs(op, every, pairs, estimator, allow_tf32, sums))
    if normalize:
        own = result[..., p * q :]
        cross = ratio(result[..., : p * q].unflatten(-1, (p, q)), own[..., :p, None], own[..., None, p:])
    else:
        parts = [whole(value, every[a], every[b]) for value, (a, b) in zip(result.unbind(-1), pairs, strict=True)]
        cross = torch.stack(parts, -1).unflatten(-1, (p, q))
    return cross.to(result_dtype(*xs, *ys))


def sums(
    op: str,
    every: Sequence[Variable],
    pairs: Sequence[tuple[int, int]],
    allow_tf32: bool = False,
    part: int = 0,
    parts: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row sums (*batch, M, n) and sums of products (*batch, P) of K - shift, and shift (*batch, M), float64.

    Sums run over i != j; HSIC does not depend on the shift. Only the tiles of part `part` of `parts` are computed: the
    row sums and sums of products of all parts add up.
    """
    batch = every[0].z.shape[:-2]
    z = [v.z.reshape(-1, *v.z.shape[-2:]) for v in every]
    scale = torch.stack([v.scale for v in every], -1).reshape(-1, len(every))
    kernels, degrees = [v.kernel for v in every], [v.degree for v in every]
    flat = [m for pair in pairs for m in pair]
    made = _sums.pick(op, z[0])(z, scale, kernels, degrees, flat, allow_tf32, part, parts)
    rows, cross, shift = (t.reshape(*batch, *t.shape[1:]) for t in made)
    return rows, cross, shift


def permuted(gram_x: Tensor, gram_y: Tensor, permutations: Tensor) -> Tensor:
    """(R,) float64 sums over i != j of K[i, j] L[p[i], p[j]], one for each row p of permutations (R, n) int32."""
    return _permuted.pick("hsic_permuted", gram_x)(gram_x, gram_y, permutations)


# registration with torch


def _sums_reference(z, scale, kernels, degrees, pairs, allow_tf32, part, parts):
    rows, cross, shift = ref.hsic_sums(z, scale, kernels, degrees, pairs)
    # the reference does not use tiles: the first part has the complete sums
    return (rows, cross, shift) if part == 0 else (torch.zeros_like(rows), torch.zeros_like(cross), shift)


def _sums_fake(z, scale, kernels, degrees, pairs, allow_tf32, part, parts):
    rows = scale.new_empty((scale.shape[0], len(z), z[0].shape[1]), dtype=torch.float64)
    return rows, rows.new_empty((scale.shape[0], len(pairs) // 2)), rows.new_empty(scale.shape)


def _sums_backward_reference(grad_rows, grad_cross, z, scale, kernels, degrees, pairs, allow_tf32):
    rows_and_cross = lambda *z: ref.hsic_sums(z, scale, kernels, degrees, pairs)[:2]
    return list(torch.func.vjp(rows_and_cross, *z)[1]((grad_rows, grad_cross)))


_sums_backward = register(
    "hsic_sums_backward", "hsic", reference=_sums_backward_reference, cuda=False,
    fake=lambda grad_rows, grad_cross, z, *rest: [variable.new_empty(variable.shape) for variable in z],
)  # fmt: skip


def _sums_gradients(grad_rows, grad_cross, z, scale, kernels, degrees, pairs, allow_tf32, parts):
    if parts != 1:
        raise RuntimeError("hsic: a part of the tiles has no gradient")
    if grad_rows is None:
        grad_rows = grad_cross.new_zeros((len(scale), len(z), z[0].shape[1]))
    if grad_cross is None:
        grad_cross = grad_rows.new_zeros((len(scale), len(pairs) // 2))
    backward = _sums_backward.for_gradients(grad_rows, grad_cross)
    grads = backward(grad_rows, grad_cross, z, scale, kernels, degrees, pairs, allow_tf32)
    return {"z": list(grads), "scale": _of_scale(grads, z, scale) if scale.requires_grad else None}


def _of_scale(grads, z, scale):
    """Return the gradient of the scales, sum(grad_z * z) / scale, because the kernel depends on z * scale only."""
    # distances do not change if all rows are translated; centred rows give a smaller rounding error
    dots = [(grad * ref.centred(part)).sum((-2, -1)) for grad, part in zip(grads, z, strict=True)]
    # that of a linear kernel is 0
    return torch.stack(dots, -1) / torch.where(scale == 0, 1, scale)


_sums = register(
    "hsic_sums", "hsic", reference=_sums_reference, fake=_sums_fake, backward=_sums_gradients, cuda=False,
)  # fmt: skip
_terms_backward = register(
    "hsic_terms_backward", "hsic", reference=ref.hsic_terms_backward, cuda=False,
    fake=lambda grad_more, grad_less, rows, shift, diagonals, totals, pairs, unbiased: (
        rows.new_empty(rows.shape), rows.new_empty(len(rows), len(pairs) // 2), rows.new_empty(rows.shape)
    ),
)  # fmt: skip
register(
    "hsic_terms", "hsic", reference=ref.hsic_terms, backward=_terms_backward, cuda=False,
    fake=lambda rows, cross, shift, diagonals, pairs, unbiased: (
        cross.new_empty(cross.shape), cross.new_empty(cross.shape), rows.new_empty(rows.shape[:2])
    ),
)  # fmt: skip
_permuted = register(
    "hsic_permuted", "hsic", reference=ref.hsic_permuted, cuda=False,
    fake=lambda gram_x, gram_y, permutations: gram_x.new_empty(permutations.shape[:1], dtype=torch.float64),
)  # fmt: skip


def warmup(x: Tensor, **other: Any) -> list[Tensor]:
    outputs = []
    for kernel in ("rbf", "laplacian", "polynomial"):
        for columns in (8, 64):
            rows = x.new_zeros(8, columns).requires_grad_()
            outputs.append(hsic(rows, rows[:, :8], kernel=kernel, bandwidth=1.0))
    return outputs
