"""The kernel of one variable: as users name it (`KernelSpec`), as operators take it (`Variable`), and its values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .._schemas import HSIC_KERNELS
from ..reference import hsic as ref

# powers are repeated products; larger degrees leave the range of float32 anyway
MOST_DEGREE = 100
KERNELS = ("rbf", "laplacian", "linear", "polynomial", "delta", "precomputed")
UNIT_DIAGONAL = ("rbf", "laplacian", "delta")  # their matrices have ones on the diagonal

Bandwidth = float | Tensor | str


class KernelSpec(NamedTuple):
    """The kernel of one variable and its parameters, as the user gave them.

    Attributes:
        name: one of KERNELS.
        bandwidth: of rbf and laplacian: a number, a tensor or "median".
        degree, gamma, coef0: of polynomial.
    """

    name: str
    bandwidth: Bandwidth = "median"
    degree: int = 3
    gamma: float | None = None
    coef0: float = 1.0

    def check(self, op: str, name: str) -> None:
        """Check what does not depend on the rows, parameters that this kernel does not use included."""
        suffix = "" if name == "x" else "_y"
        check.choice(op, f"kernel{suffix}", self.name, KERNELS)
        if isinstance(self.bandwidth, str):
            if self.bandwidth != "median":
                raise ValueError(f"{op}: bandwidth must be a number, a tensor or 'median', got {self.bandwidth!r}")
        elif isinstance(self.bandwidth, Tensor):
            check.float_tensor(op, f"bandwidth{suffix}", self.bandwidth)
        else:
            check.positive(op, f"bandwidth{suffix}", self.bandwidth)
        check.at_least(op, "degree", self.degree, 1, MOST_DEGREE)
        if self.gamma is not None:
            check.positive(op, "gamma", self.gamma)
        check.not_negative(op, "coef0", self.coef0)


# the arguments of `kernel_specs`, which public functions take by these names
KERNEL_OPTIONS = ("kernel", "bandwidth", "kernel_y", "bandwidth_y", "degree", "gamma", "coef0")


def kernel_specs(
    kernel: str,
    bandwidth: Bandwidth = "median",
    kernel_y: str | None = None,
    bandwidth_y: Bandwidth | None = None,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
) -> tuple[KernelSpec, KernelSpec]:
    """Return the kernels of x and y; where those of y are None, they are as for x."""
    of_x = KernelSpec(kernel, bandwidth, degree, gamma, coef0)
    if kernel_y is None and bandwidth_y is None:
        return of_x, of_x
    kernel_y = kernel if kernel_y is None else kernel_y
    bandwidth_y = bandwidth if bandwidth_y is None else bandwidth_y
    return of_x, KernelSpec(kernel_y, bandwidth_y, degree, gamma, coef0)


class Variable(NamedTuple):
    """One checked input of HSIC: rows and kernel as `hsic_sums` takes them; `batch` are leading dims.

    Rows whose products would leave the range of their dtype are divided by a power of two. The user's kernel matrix K,
    up to an additive constant, is then 2**exponent times the kernel matrix of z.
    """

    z: Tensor  # (*batch, n, d)
    scale: Tensor  # (*batch) 1 / bandwidth; polynomial: the kernel of zeros, which is subtracted from K
    kernel: int  # index into HSIC_KERNELS
    degree: int
    diagonal: Tensor  # (*batch, n) diagonal of the kernel matrix of z, float64
    linear: bool = False
    exponent: Tensor | None = None  # (*batch) int64; None means 0
    constant: Tensor | None = None  # (*batch) bool: all rows are equal, so HSIC is 0; None: no or not needed


def all_rows_equal(x: Tensor, readable: bool) -> Tensor | None:
    """Return (*batch) whether all rows are equal, or None if they are known to differ.

    `readable`: x is not empty, and its values may be read.
    """
    if not readable and not x.numel():
        return None
    # indexing by numbers takes two thirds of the time of `select`
    if readable and x.dim() == 2 and not x[0].equal(x[-1]):
        return None
    return (x == x[..., :1, :]).all(-1).all(-1)


def unit_diagonal(x: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.float64, device=x.device).expand(x.shape[:-1])


def kernel_of(v: Variable) -> str:
    """Return the user's name of the kernel: linear kernels are polynomial ones to the operators."""
    return "linear" if v.linear else HSIC_KERNELS[v.kernel]


def points(v: Variable) -> Tensor:
    """Return the rows (..., n, d) for `between`; rows of distance kernels are centred and divided by the bandwidth."""
    if HSIC_KERNELS[v.kernel] not in ("rbf", "laplacian"):
        return v.z
    return ref.centred(v.z) * v.scale[..., None, None]


def between(v: Variable, a: Tensor, b: Tensor, shift: Tensor | None = None, direct: bool = False) -> Tensor:
    """Return the kernel (..., m, n) between `points` a (..., m, d) and b (..., n, d) minus shift (...), in float64.

    Not for precomputed kernels; `shift` is that of `reference.hsic.shift_of`. `direct` computes distances from
    differences instead of dot products, which is accurate for close rows far from the others, but not twice
    differentiable.
    """
    a, b = a.double(), b.double()
    name = HSIC_KERNELS[v.kernel]
    if name == "polynomial":
        value = (a @ b.mT) ** v.degree
        return value if shift is None else value - shift[..., None, None]
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
