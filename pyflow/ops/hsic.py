"""Hilbert-Schmidt independence criterion and centred kernel alignment, without an n x n matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .._backend import call, register, runs_reference
from .._schemas import HSIC_KERNELS
from ..reference import hsic as ref
from ..reference import matmul
from ._features import approximation
from ._transforms import one_by_one, vector_jacobian
from ._variables import Bandwidth, Variable, ratio, rows_needed, together, variable, variables, whole

EPS = torch.finfo(torch.float64).eps


class Estimate(NamedTuple):
    """HSIC of two variables, (*batch) float64; of a variable with itself also what it is worth."""

    value: Tensor
    lost: Tensor | None = None  # whether it may be rounding alone; None: it is not
    added: Tensor | None = None  # the sum of the absolute values of its terms


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
    """How dependent x and y are: tr(K H L H) / (n - 1)**2, zero where they are independent.

    Kernels: "rbf" exp(-|a - b|^2 / (2 sigma^2)), "laplacian" exp(-|a - b|_1 / sigma), "linear" a.b, "polynomial"
    (gamma a.b + coef0)^degree, "delta" (all entries equal), "precomputed" (x itself is the matrix).

    Args:
        x: (..., n, d_x) float32, float64, bfloat16 or float16; (..., n, n) symmetric for "precomputed"; for "delta"
            any dtype, or labels (n,).
        y: (..., n, d_y) likewise; leading dims broadcast.
        kernel, kernel_y: of x and of y; None: the same.
        bandwidth, bandwidth_y: sigma, a normal number of x's dtype, or a tensor of such that broadcasts to the leading
            dims (differentiable), or
            "median": the median distance between two rows, of each variable on its own, on 1,000 rows above that, no
            gradient through it; the mean distance where it is 0. bandwidth_y None: the same as for x.
        estimator: "biased" (over (n - 1)**2), "biased_n2" (over n**2) or "unbiased" (Song et al. 2012).
        normalize: divide by sqrt(hsic(x, x) hsic(y, y)), 0 where one of these is no larger than its rounding.
        degree, gamma, coef0: of the polynomial kernel; gamma None is 1 / d, a degree is at most 100.
        allow_tf32: let a GPU round the factors of dot products to 10 bits.
        approximate: None, "rff" (random Fourier features; rbf and laplacian) or "nystrom" (landmark rows).
        n_features, seed: of the approximation.

    Returns:
        (...) float32 (float64 if an input is). All rows equal: 0.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: different n, too few rows (2, unbiased 4), unknown words, a bandwidth that is not positive or not
            normal, a precomputed matrix that is not square or not symmetric, values that are not finite.

    Notes:
        Memory O(n (d_x + d_y)): tiles of both matrices are made, used and dropped, forward and backward. Products in
        float32, K - 1 in place of K at wide bandwidths, sums in float64. On a CPU the same bits for any thread count,
        instruction set and batch. The backward visits all pairs again; double backward makes the matrices.
        Linear kernels use d_x x d_y covariances where these are cheaper. Data are divided by a power of two where
        their products would leave the dtype: what is normalised does not depend on the unit of x.
        Rows far from all others, in bandwidths, cost these no digits; on a GPU, and in the features of an
        approximation, only a few such rows may be far. The polynomial kernel is not one of differences: of data whose
        mean is 1,000 deviations or more from 0 it keeps few digits in float32, and normalised it is 0 where it keeps
        none, so subtract the mean first where the kernel need not be that of the data as they are.

    Source:
        Gretton et al. 2005, Measuring Statistical Dependence with Hilbert-Schmidt Norms; Song et al. 2012, Feature
        Selection via Dependence Maximization.

    Example:
        >>> x = torch.linspace(-1, 1, 50).unsqueeze(1)
        >>> round(hsic(x, x**2, normalize=True).item(), 3), round(hsic(x, x, normalize=True).item(), 3)
        (0.322, 1.0)
    """
    return _dependence(
        "hsic", x, y, kernel, bandwidth, kernel_y, bandwidth_y, estimator, normalize, degree, gamma, coef0, allow_tf32,
        approximate, n_features, seed,
    )  # fmt: skip


# its options and what they are where they are not given
OPTIONS = dict(hsic.__kwdefaults__)


def cka(x: Tensor, y: Tensor, **options: object) -> Tensor:
    """Centred kernel alignment: `hsic` with normalize=True, which is 1 for y = x.

    Args:
        x, y, options: as for `hsic`, without normalize.

    Returns:
        (...) float32 (float64 if an input is).

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
    return _dependence("cka", x, y, **{**OPTIONS, **options, "normalize": True})


def _dependence(
    op, x, y, kernel, bandwidth, kernel_y, bandwidth_y, estimator, normalize, degree, gamma, coef0, allow_tf32,
    approximate, n_features, seed,
):  # fmt: skip
    """`hsic` in the name of `op`."""
    pair = variables(op, x, y, kernel, bandwidth, kernel_y, bandwidth_y, degree, gamma, coef0)
    rows_needed(op, pair[0].z.shape[-2], estimator)
    if approximate is not None:
        result, _ = approximation(
            op, pair, estimator=estimator, normalize=normalize, approximate=approximate, n_features=n_features,
            seed=seed,
        )  # fmt: skip
    elif normalize:
        xy, xx, yy = values(op, pair, [(0, 1), (0, 0), (1, 1)], estimator, allow_tf32).unbind(-1)
        result = ratio(xy, xx, yy)
    else:
        result = whole(values(op, pair, [(0, 1)], estimator, allow_tf32).squeeze(-1), *pair)
    return result.to(pair[0].z.dtype)


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
    """HSIC of every x with every y, representations of the same n samples, each Gram tile made once.

    Args:
        xs, ys: lists of (..., n, d) tensors with the same leading dims; d may differ. The rest as for `hsic`.

    Returns:
        (..., len(xs), len(ys)) float32 (float64 if an input is).

    Raises:
        TypeError, ValueError: as for `hsic`, or an empty list.

    Example:
        >>> x = torch.eye(5)
        >>> hsic_matrix([x, x[:, :2]], [x], kernel="linear", normalize=True).shape
        torch.Size([2, 1])
    """
    op = "hsic_matrix"
    for name, tensors in (("xs", xs), ("ys", ys)):
        if not isinstance(tensors, Iterable) or (isinstance(tensors, Tensor) and not tensors.dim()):
            raise TypeError(f"{op}: {name} must be a list of tensors, got {type(tensors).__name__}")
    xs, ys = list(xs), list(ys)
    if not xs or not ys:
        raise ValueError(f"{op}: xs and ys must not be empty, got {len(xs)} and {len(ys)} tensors")
    kernel_y = kernel if kernel_y is None else kernel_y
    bandwidth_y = bandwidth if bandwidth_y is None else bandwidth_y
    every = [variable(op, "x", x, kernel, bandwidth, degree, gamma, coef0) for x in xs]
    every += [variable(op, "y", y, kernel_y, bandwidth_y, degree, gamma, coef0) for y in ys]
    every = together(op, every)
    rows_needed(op, every[0].z.shape[-2], estimator)
    p, q = len(xs), len(ys)
    pairs = [(i, p + j) for i in range(p) for j in range(q)]
    if normalize:
        pairs += [(m, m) for m in range(p + q)]
    result = values(op, every, pairs, estimator, allow_tf32)
    if normalize:
        own = result[..., p * q :]
        cross = ratio(result[..., : p * q].unflatten(-1, (p, q)), own[..., :p, None], own[..., None, p:])
    else:
        parts = [whole(value, every[a], every[b]) for value, (a, b) in zip(result.unbind(-1), pairs, strict=True)]
        cross = torch.stack(parts, -1).unflatten(-1, (p, q))
    return cross.to(every[0].z.dtype)


def center_gram(gram: Tensor, *, inplace: bool = False) -> Tensor:
    """H K H with H = I - 1/n: rows and columns that sum to zero, in one read and one write.

    Args:
        gram: (..., n, n) float32, float64, bfloat16 or float16; need not be symmetric.
        inplace: write into gram, which then must not require a gradient.

    Returns:
        (..., n, n) of gram's dtype; gram itself if inplace.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: not square; inplace on a tensor that requires a gradient or whose elements share memory.

    Notes:
        Sums in fixed order, in float64: the same bits for any thread count, instruction set and batch on a CPU.

    Example:
        >>> center_gram(torch.eye(2))
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  0.5000]])
    """
    op = "center_gram"
    check.float_tensor(op, "gram", gram)
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"{op}: gram must be (..., n, n), got shape {tuple(gram.shape)}")
    if inplace:
        if gram.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: inplace must not be used on a tensor that requires a gradient")
        if _overlaps(gram):
            raise ValueError(f"{op}: inplace must not be used on a tensor whose elements share memory")
        if runs_reference(op, gram, cuda=False):
            return gram.copy_(_center_reference(gram))
        call("center_gram_", gram)
        # below autograd nobody counts what is written
        if not torch.compiler.is_compiling() and not gram.is_inference():
            torch.autograd.graph.increment_version(gram)
        return gram
    if runs_reference(op, gram, cuda=False):
        return _center_reference(gram)
    return call("center_gram", gram)


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements lie at one address, by a step along one or two dims."""
    if not tensor.numel():
        return False
    dims = [(size, step) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    if any(step == 0 for _, step in dims):
        return True
    steps = ((a, b, math.gcd(a[1], b[1])) for i, a in enumerate(dims) for b in dims[:i])
    return any(b[1] // common < a[0] and a[1] // common < b[0] for a, b, common in steps)


def values(
    op: str,
    every: Sequence[Variable],
    pairs: Sequence[tuple[int, int]],
    estimator: str,
    allow_tf32: bool,
    visit: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Tensor:
    """(*batch, P) the estimate of every pair of variables, of the kernels of z, float64.

    0 with a variable whose rows are all equal, and of a variable with itself where it is no larger than its rounding.
    `visit` stands in for `sums`.
    """
    result = []
    for (a, b), (value, lost, _) in zip(pairs, estimates(op, every, pairs, estimator, allow_tf32, visit), strict=True):
        if lost is not None:
            value = torch.where(lost, 0.0, value)
        for m in {a, b}:
            if every[m].constant is not None:
                value = torch.where(every[m].constant, 0.0, value)
        result.append(value)
    return torch.stack(result, -1)


def estimates(
    op: str,
    every: Sequence[Variable],
    pairs: Sequence[tuple[int, int]],
    estimator: str,
    allow_tf32: bool,
    visit: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
    with_added: bool = False,
) -> list[Estimate]:
    """Of every pair of variables, of the kernels of z; `added` not of covariances."""
    n = every[0].z.shape[-2]
    if all(v.linear for v in every):
        used = [every[m] for pair in pairs for m in pair]
        widths = [(a.z.shape[-1], b.z.shape[-1]) for a, b in zip(used[::2], used[1::2], strict=True)]
        if sum(a * b for a, b in widths) < n * sum(v.z.shape[-1] for v in every) / 2:
            return [_of_covariance(every[a], every[b], estimator, a == b) for a, b in pairs]
    rows, cross, shift = (visit or sums)(op, every, pairs, allow_tf32)
    diagonals = [v.diagonal - shift[..., m, None] for m, v in enumerate(every)]
    result = []
    for p, (a, b) in enumerate(pairs):
        more, less, over = _terms(
            cross[..., p], rows[..., a, :], rows[..., b, :], diagonals[a], diagonals[b], estimator
        )
        value = (more - less) / over
        if a != b:
            result.append(Estimate(value))
        else:
            added = (more + less) / over if with_added else None
            result.append(Estimate(value, _lost(every[a], more, less, over), added))
    return result


def _lost(v: Variable, more: Tensor, less: Tensor, over: int) -> Tensor:
    """Whether (more - less) / over, HSIC of v with itself, may be rounding alone."""
    n = v.z.shape[-2]
    # n^2 terms are added in float64; each has the rounding of an entry, whose squares add up
    entry = (v.degree * torch.finfo(v.z.dtype).eps) ** 2
    rounding = chain(n) + entry
    most = more * ((1 - rounding) / (1 + rounding))
    if HSIC_KERNELS[v.kernel] == "polynomial":
        # of a dot product it is relative to both lengths
        most = most - entry * over * (v.diagonal.sum(-1) / n).square()
    return less >= most


def chain(n: int) -> float:
    """Of sums over n^2 terms, rows first: twice the rounding of both chains, relative to the absolute values."""
    return 4 * EPS * (2 * n)


def sums(
    op: str,
    every: Sequence[Variable],
    pairs: Sequence[tuple[int, int]],
    allow_tf32: bool = False,
    part: int = 0,
    parts: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums (*batch, M, n), sums of products (*batch, P) over i != j of K - shift, and shift (*batch, M); float64.

    HSIC is the same for any shift. Of the tiles only part `part` of `parts` is visited: row sums and sums of products
    of all parts add up.
    """
    batch = every[0].z.shape[:-2]
    z = [v.z.reshape(-1, *v.z.shape[-2:]) for v in every]
    scale = torch.stack([v.scale for v in every], -1).reshape(-1, len(every))
    kernels, degrees = [v.kernel for v in every], [v.degree for v in every]
    flat = [m for pair in pairs for m in pair]
    operator = _reference if runs_reference(op, z[0], cuda=False) else torch.ops.pyflow.hsic_sums.default
    made = operator(z, scale, kernels, degrees, flat, allow_tf32, part, parts)
    rows, cross, shift = (t.reshape(*batch, *t.shape[1:]) for t in made)
    return rows, cross, shift


def _terms(
    cross: Tensor, k: Tensor, m: Tensor, diag_k: Tensor, diag_l: Tensor, estimator: str
) -> tuple[Tensor, Tensor, int]:
    """HSIC is the first less the second over the third; all are positive where K is L.

    From the sum of K_ij L_ij over i != j, both row sums without and both diagonals, float64.
    """
    n = k.shape[-1]
    if estimator == "unbiased":
        product = k.sum(-1) * m.sum(-1) / ((n - 1) * (n - 2))
        return cross + product, 2 / (n - 2) * (k * m).sum(-1), n * (n - 3)
    k, m = k + diag_k, m + diag_l
    more = cross + (diag_k * diag_l).sum(-1) + k.sum(-1) * m.sum(-1) / n**2
    return more, 2 / n * (k * m).sum(-1), n**2 if estimator == "biased_n2" else (n - 1) ** 2


def _of_covariance(x: Variable, y: Variable, estimator: str, same: bool) -> Estimate:
    """HSIC of linear kernels: the squares of the covariances."""
    n = x.z.shape[-2]
    total = matmul(x.z.mT, y.z).double().square().sum((-2, -1))
    if estimator != "unbiased":
        return Estimate(total / (n**2 if estimator == "biased_n2" else (n - 1) ** 2))
    a, b = x.diagonal, y.diagonal
    ab, over = (a * b).sum(-1), n * (n - 3)
    product, less = a.sum(-1) * b.sum(-1) / ((n - 1) * (n - 2)), 2 / (n - 2) * ab
    value = (total - ab + product - less) / over
    # the sums of products are of the dtype of x
    eps = torch.finfo(x.z.dtype).eps
    return Estimate(value, ab + less >= (total + product) * ((1 - eps) / (1 + eps)) if same else None)


def permuted(gram_x: Tensor, gram_y: Tensor, permutations: Tensor) -> Tensor:
    """(R,) sum over i != j of K[i, j] L[p[i], p[j]], float64, for every row p of permutations (R, n) int32."""
    if runs_reference("hsic_permuted", gram_x, cuda=False):
        return ref.hsic_permuted(gram_x, gram_y, permutations)
    return call("hsic_permuted", gram_x, gram_y, permutations)


# what torch must know of each operator, arguments in the order of its schema


def _reference(z, scale, kernels, degrees, pairs, allow_tf32, part, parts):
    rows, cross, shift = ref.hsic_sums(z, scale, kernels, degrees, pairs)
    # all matrices are made whole: the first part has everything
    return (rows, cross, shift) if part == 0 else (torch.zeros_like(rows), torch.zeros_like(cross), shift)


def _fake(z, scale, kernels, degrees, pairs, allow_tf32, part, parts):
    rows = scale.new_empty((scale.shape[0], len(z), z[0].shape[1]), dtype=torch.float64)
    return rows, rows.new_empty((scale.shape[0], len(pairs) // 2)), rows.new_empty(scale.shape)


def _setup(ctx, inputs, output):
    z, scale, *ctx.grams, _part, ctx.parts = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*z, scale)


def _backward(ctx, grad_rows, grad_cross, _):
    if ctx.parts != 1:
        raise RuntimeError("hsic: a part of the tiles has no gradient")
    *z, scale = ctx.saved_tensors
    if any(torch._C._functorch.is_legacy_batchedtensor(g) for g in (grad_rows, grad_cross)):
        # is_grads_batched of torch.autograd.grad knows no rule for lists of tensors
        grads = _sums_gradient(grad_rows, grad_cross, z, scale, *ctx.grams)
    else:
        grads = torch.ops.pyflow.hsic_sums_backward.default(grad_rows, grad_cross, z, scale, *ctx.grams)
    grad_scale = _of_scale(grads, z, scale) if ctx.needs_input_grad[1] else None
    return list(grads), grad_scale, *[None] * (len(ctx.grams) + 2)


def _of_scale(grads, z, scale):
    """Gradient of the scales: that of z scales with them."""
    # a kernel of distances does not change where all rows move, so centring is free
    dots = [(grad * ref.centred(part)).sum((-2, -1)) for grad, part in zip(grads, z, strict=True)]
    return torch.stack(dots, -1) / scale


def _vmap(info, in_dims, z, scale, *options):
    return one_by_one(info, in_dims, torch.ops.pyflow.hsic_sums, (z, scale), *options), (0, 0, 0)


def _sums_gradient(grad_rows, grad_cross, z, scale, kernels, degrees, pairs, allow_tf32):
    formula = lambda *z: ref.hsic_sums(z, scale, kernels, degrees, pairs)[:2]
    return vector_jacobian(formula, z, (grad_rows, grad_cross))


def _backward_reference(grad_rows, grad_cross, z, scale, *grams):
    with torch.no_grad():
        return [grad.contiguous() for grad in _sums_gradient(grad_rows, grad_cross, z, scale, *grams)]


def _backward_fake(grad_rows, grad_cross, z, scale, *grams):
    return [variable.new_empty(variable.shape) for variable in z]


def _backward_setup(ctx, inputs, output):
    grad_rows, grad_cross, z, scale, *ctx.grams = inputs
    ctx.save_for_backward(grad_rows, grad_cross, *z, scale)


def _backward_backward(ctx, grads):
    def formula(grad_rows, grad_cross, *tensors):
        return _sums_gradient(grad_rows, grad_cross, tensors[:-1], tensors[-1], *ctx.grams)

    of_rows, of_cross, *of_z, of_scale = vector_jacobian(formula, ctx.saved_tensors, grads)
    return of_rows, of_cross, of_z, of_scale, *[None] * len(ctx.grams)


def _backward_vmap(info, in_dims, *args):
    grads = one_by_one(info, in_dims, torch.ops.pyflow.hsic_sums_backward, args[:4], *args[4:])
    return list(grads), [0] * len(grads)


register("hsic_sums", "hsic", reference=_reference, fake=_fake, vmap=_vmap, setup_context=_setup, backward=_backward)
register(
    "hsic_sums_backward", "hsic", reference=_backward_reference, fake=_backward_fake, vmap=_backward_vmap,
    setup_context=_backward_setup, backward=_backward_backward,
)  # fmt: skip


def _permuted_vmap(info, in_dims, *tensors):
    single = lambda *slices: (torch.ops.pyflow.hsic_permuted(*slices),)
    return one_by_one(info, in_dims, single, tensors)[0], 0


register(
    "hsic_permuted", "hsic", reference=ref.hsic_permuted, vmap=_permuted_vmap,
    fake=lambda gram_x, gram_y, permutations: gram_x.new_empty(permutations.shape[:1], dtype=torch.float64),
)  # fmt: skip


def _center_reference(gram):
    return ref.center_gram(gram.double()).to(gram.dtype).contiguous()


def _center_vmap(info, in_dims, gram):
    return torch.ops.pyflow.center_gram(gram.movedim(in_dims[0], 0)), 0


def _center_inplace_reference(gram):
    gram.copy_(_center_reference(gram))


def _center_inplace_vmap(info, in_dims, gram):
    torch.ops.pyflow.center_gram_(gram.movedim(in_dims[0], 0))
    return None, None


register(
    "center_gram", "hsic", reference=_center_reference, fake=lambda gram: gram.new_empty(gram.shape),
    vmap=_center_vmap, setup_context=lambda ctx, inputs, output: None,
    backward=lambda ctx, grad: call("center_gram", grad),
)  # fmt: skip
register("center_gram_", "hsic", reference=_center_inplace_reference, fake=lambda gram: None, vmap=_center_inplace_vmap)
