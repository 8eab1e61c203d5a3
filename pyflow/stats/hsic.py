"""HSIC of many samples: in parts with a progress bar, over several processes, or approximated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks as check
from ..hsic.estimators import Pairs, TileSums, ratio, rows_needed, values, whole
from ..hsic.features import approximation, check_options
from ..hsic.inputs import converted, together
from ..hsic.kernels import Bandwidth, KernelSpec, Variable, kernel_specs
from ..ops.hsic import sums
from ._inputs import bar, check_kernels, samples

# number of parts that the tiles are split into; powers of 2, so that 1, 2, 4, ... processes sum over the same tree
PARTS, PARTS_OF_MANY, MANY = 8, 64, 10_000


class HSIC(NamedTuple):
    """HSIC and the error of its approximation; the error is 0 for the exact value."""

    value: float
    error: float


def hsic(
    x: object,
    y: object,
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
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
) -> HSIC:
    """`pyflow.ops.hsic` for large n: with a progress bar, over several processes, or approximated with an error.

    Args:
        x: (n, d_x) or (n,) array, list, tensor or pandas table; (n, n) for the kernel "precomputed"; labels of any type
            for "delta". Rows of tables are paired by position.
        y: (n, d_y) or (n,) likewise.
        kernel, bandwidth, kernel_y, bandwidth_y, estimator, normalize, degree, gamma, coef0, allow_tf32: as for
            `pyflow.ops.hsic`.
        approximate: None, "rff" (random Fourier features; rbf and laplacian) or "nystrom" (landmark rows): time
            O(n n_features^2), memory O(n_features^2).
        n_features, seed: options of the approximation; "rff" needs at least 4 features for its error.
        group: a process group of torch.distributed (`torch.distributed.group.WORLD`). Every process passes its part of
            the rows, any number, in rank order. The rows are gathered and the pairs of rows divided.
        progress: show a bar for calls longer than a second, where tqdm is installed.

    Returns:
        `HSIC` with value, the same on every process, and error. For "rff" the error is a standard error over the draw
        of frequencies. For "nystrom" it is a bound: the exact biased value lies between value and value + error (an
        estimate for the unbiased value). With normalize, only the error of the numerator counts.

    Raises:
        TypeError, ValueError: as for `pyflow.ops.hsic`; group with approximate or a precomputed kernel; processes
            with different numbers of columns or dtypes.

    Notes:
        Memory O(n (d_x + d_y)) on every process. 1, 2, 4 and 8 processes give the same bits on a CPU; other numbers of
        processes differ by the rounding of float64 sums. Not differentiable: use `pyflow.ops.hsic` for gradients.

    Example:
        >>> x = torch.linspace(-1, 1, 50)
        >>> value, error = hsic(x, x**2, normalize=True)
        >>> round(value, 3), error
        (0.322, 0.0)
    """
    op = "hsic"
    specs = of_x, of_y = kernel_specs(kernel, bandwidth, kernel_y, bandwidth_y, degree, gamma, coef0)
    check_kernels(op, specs)
    normalize, allow_tf32 = check.flag(op, "normalize", normalize), check.flag(op, "allow_tf32", allow_tf32)
    check_options(op, approximate, n_features, seed)
    x, y = samples(op, "x", x, of_x.name), samples(op, "y", y, of_y.name)
    if group is not None:
        if approximate is not None:
            raise ValueError(f"{op}: group must be None with approximate, got {approximate!r}")
        if "precomputed" in (of_x.name, of_y.name):
            raise ValueError(f"{op}: group must be None with a precomputed kernel, whose rows need all columns")
        x, y = gathered(op, x, y, group)
    pair = pair_of(op, x, y, specs, estimator)
    if approximate is None:
        return HSIC(exact(op, pair, estimator, normalize, allow_tf32, visitor(group, progress)), 0.0)
    with torch.no_grad():
        value, error = approximation(
            op, pair, estimator=estimator, normalize=normalize, approximate=approximate, n_features=n_features,
            seed=seed, with_error=True,
        )  # fmt: skip
    return HSIC(value.item(), 0.0 if error is None else error.item())


def pair_of(op: str, x: Tensor, y: Tensor, specs: tuple[KernelSpec, KernelSpec], estimator: str) -> list[Variable]:
    """Return samples as the variables of their kernels, enough rows for the estimator."""
    pair = together(op, [converted(op, name, rows, spec) for name, rows, spec in zip("xy", (x, y), specs, strict=True)])
    rows_needed(op, len(pair[0].z), estimator)
    return pair


@torch.no_grad()
def exact(op: str, pair: list[Variable], estimator: str, normalize: bool, allow_tf32: bool, visit: TileSums) -> float:
    """Return HSIC of two variables, from sums that `visit` computes."""
    pairs = [(0, 1), (0, 0), (1, 1)] if normalize else [(0, 1)]
    estimates = values(Pairs(op, pair, pairs, estimator, allow_tf32, visit))
    return float((ratio(*estimates) if normalize else whole(estimates[0], *pair)).item())


def visitor(group: dist.ProcessGroup | None, progress: bool) -> TileSums:
    """Return a function like `sums` that visits the tiles in parts with a progress bar, divided over the processes."""
    rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def visit(
        op: str, every: Sequence[Variable], pairs: Sequence[tuple[int, int]], allow_tf32: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        # at least one part per process
        parts = max(PARTS_OF_MANY if every[0].z.shape[-2] >= MANY else PARTS, 1 << (world - 1).bit_length())
        first, last = (parts * r // world for r in (rank, rank + 1))

        shift: Tensor

        def part(number: int) -> tuple[Tensor, Tensor]:
            nonlocal shift
            # the shift depends on the data only: every part has the same
            rows, cross, shift = sums(op, every, pairs, allow_tf32, number, parts)
            done(1)
            return rows, cross

        with bar(last - first, "part", progress and rank == 0) as done:
            rows, cross = tree(part, first, last)
        if group is None:
            return rows, cross, shift
        flat = torch.cat((rows.flatten(), cross.flatten()))
        flats = [torch.empty_like(flat) for _ in range(world)]
        dist.all_gather(flats, flat, group=group)
        (total,) = tree(lambda r: (flats[r],), 0, world)
        return total[: rows.numel()].view(rows.shape), total[rows.numel() :].view(cross.shape), shift

    return visit


def tree(part: Callable[[int], tuple[Tensor, ...]], first: int, last: int) -> tuple[Tensor, ...]:
    """Return the pairwise sum of part(first) to part(last - 1); holds as many parts at a time as the tree is deep."""
    if last - first == 1:
        return part(first)
    middle = (first + last) // 2
    left, right = tree(part, first, middle), tree(part, middle, last)
    return tuple(a + b for a, b in zip(left, right, strict=True))


def gathered(op: str, x: Tensor, y: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the rows of all processes in rank order."""
    if not dist.is_initialized():
        raise ValueError(f"{op}: group must be of an initialised torch.distributed, which it is not")
    world = dist.get_world_size(group)
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16,
              torch.int8, torch.uint8, torch.bool]  # fmt: skip
    for name, value in (("x", x), ("y", y)):
        if value.dtype not in dtypes:
            raise TypeError(f"{op}: {name} must hold numbers, got {check.short(value.dtype)}")
    mine = torch.tensor(
        [len(x), len(y), x.shape[1], y.shape[1], dtypes.index(x.dtype), dtypes.index(y.dtype)], device=x.device
    )
    shapes = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(shapes, mine, group=group)
    table = torch.stack(shapes).cpu()
    if bool((table[:, 0] != table[:, 1]).any()):
        rows = table[:, :2].tolist()
        raise ValueError(f"{op}: x and y must have the same number of rows on every process, got {rows}")
    if bool((table[:, 2:] != table[:1, 2:]).any()):
        raise ValueError(f"{op}: all processes must pass the same numbers of columns and dtypes, got others")
    counts = table[:, 0].tolist()
    return _rows(x, counts, group), _rows(y, counts, group)


def _rows(mine: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    # padded to one length: gloo gathers tensors of equal shapes only
    padded = mine.new_zeros((max(counts), mine.shape[1]))
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
