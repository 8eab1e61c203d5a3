"""HSIC behind the interface of `hyppo.independence`: the import changes, the calls stay."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .. import _checks as check
from ..hsic.kernels import kernel_specs
from ..ops.noise import seed_number
from ._inputs import check_kernels, samples
from .hsic import exact, pair_of, visitor
from .hsic_test import hsic_test

OP = "Hsic"
# hyppo's names of kernels, which are scikit-learn's, and the parameters of each
KERNELS = {
    "gaussian": "rbf", "rbf": "rbf", "laplacian": "laplacian", "linear": "linear", "poly": "polynomial",
    "polynomial": "polynomial", "precomputed": "precomputed",
}  # fmt: skip
PARAMETERS = {"rbf": ("gamma",), "laplacian": ("gamma",), "polynomial": ("degree", "gamma", "coef0")}
# hyppo approximates p for more rows
PERMUTED_ROWS = 20
SEEDS = 2**63 - 1


class IndependenceTestOutput(NamedTuple):
    """The statistic and the p-value of `Hsic.test`."""

    stat: float
    pvalue: float


class Hsic:
    """Test of independence with the interface of `hyppo.independence.Hsic`.

    statistic = HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)), unbiased; with `bias` the square root of the biased ratio.

    Args:
        compute_kernel: "gaussian" or "rbf", exp(-gamma |a - b|^2), where gamma is 1 / (2 median^2) of each variable's
            own distances; "laplacian", exp(-gamma |a - b|_1); "linear"; "polynomial" or "poly"; None or "precomputed",
            if x and y are kernel matrices; or a function from a (n, d) NumPy array to its kernel matrix (n, n).
        bias: use the biased estimator.
        **kwargs: gamma, and for "polynomial" degree and coef0, with scikit-learn's defaults, for x and y alike; a
            function takes all of them.

    Attributes:
        stat, pvalue: the last results; None before.
        null_dist: (reps,) float64, the statistics of permuted data; None where p is approximated.

    Raises:
        TypeError: samples that are not numbers, a kernel's unknown parameter, a random_state that is no seed.
        ValueError: an unknown kernel, different n, fewer than 4 rows (biased: 2), missing or infinite values.

    Notes:
        Samples are arrays, lists, tensors, or pandas tables, whose rows are paired by position. Results differ from
        those of hyppo 0.5 where it ignores random_state; uses x's bandwidth for y; adds diagonals of kernel matrices to
        unbiased sums, in permutations and for kernels without k(x, x) = 1; takes x and y for kernel matrices in every
        call after a test with permutations; and approximates p with bias=True, where p is below 0.01 for independent
        samples. Above 1,000 rows the median is that of 1,000 of them. A constant variable has statistic 0 and p 1,
        where hyppo raises. `hsic_test` has kernels for labels, other estimators and a progress bar.

    Source:
        Panda et al. 2019, hyppo: A Multivariate Hypothesis Testing Python Package, arXiv:1907.02088; Shen, Panda and
        Vogelstein 2022, The Chi-Square Test of Distance Correlation, arXiv:1912.12150.

    Example:
        >>> x = np.arange(100)
        >>> stat, pvalue = Hsic().test(x, x)
        >>> round(stat, 6), round(pvalue, 6)
        (1.0, 0.0)
        >>> Hsic().test(x[:20], x[:20] ** 2, reps=200, random_state=0).pvalue < 0.01
        True
    """

    def __init__(
        self, compute_kernel: str | Callable[..., Any] | None = "gaussian", bias: bool = False, **kwargs: Any
    ) -> None:
        self.compute_kernel, self.kwargs = compute_kernel, kwargs
        self.bias = check.flag(OP, "bias", bias)
        self.stat: float | None = None
        self.pvalue: float | None = None
        self.null_dist: np.ndarray | None = None
        self._kernel = "precomputed"
        if callable(compute_kernel):
            return
        if compute_kernel is not None:
            check.choice(OP, "compute_kernel", compute_kernel, tuple(KERNELS))
            self._kernel = KERNELS[compute_kernel]
        allowed = PARAMETERS.get(self._kernel, ())
        for name in kwargs:
            if name not in allowed:
                known = ", ".join(allowed) or "none"
                raise TypeError(f"{OP}: parameters of {compute_kernel} must be of {known}, got {name}")

    def statistic(self, x: object, y: object) -> float:
        """Return the statistic of x (n, d_x) or (n,) and y (n, d_y) or (n,)."""
        return self._statistic(self._samples("x", x), self._samples("y", y))

    def test(
        self,
        x: object,
        y: object,
        reps: int = 1000,
        workers: int = 1,
        auto: bool = True,
        random_state: int | np.random.RandomState | np.random.Generator | None = None,
    ) -> IndependenceTestOutput:
        """Return the statistic and its p-value.

        Args:
            x, y: (n, d_x) or (n,) and (n, d_y) or (n,).
            reps: number of permutations, at least 1.
            workers: ignored: threads are torch's (`torch.set_num_threads`), and p does not depend on them.
            auto: above 20 rows, unless bias, p = P(chi^2 with 1 degree of freedom > n statistic + 1), an upper bound of
                p for large n and p < 0.05, without permutations.
            random_state: seed of the permutations, or a NumPy generator to draw it from; None: NumPy's global one.
        """
        reps, auto = check.at_least(OP, "reps", reps, 1), check.flag(OP, "auto", auto)
        x, y = self._samples("x", x), self._samples("y", y)
        stat, n = self._statistic(x, y), len(x)
        if auto and n > PERMUTED_ROWS and not self.bias:
            constant = any(bool((v == v[:1]).all()) for v in (x, y))
            self.pvalue = 1.0 if constant else math.erfc(math.sqrt(max(n * stat + 1, 0) / 2))
            self.null_dist = None
        else:
            result = hsic_test(
                x, y, permutations=reps, seed=_seed(random_state), normalize=True, progress=False, **self._options(x, y)
            )
            null = np.asarray(result.null)
            self.pvalue, self.null_dist = result.pvalue, np.sqrt(null.clip(min=0)) if self.bias else null
        return IndependenceTestOutput(stat, self.pvalue)

    def _samples(self, name: str, value: object) -> Tensor:
        """Return samples as rows of a tensor (n, d), or the kernel matrix (n, n)."""
        if not callable(self.compute_kernel):
            return samples(OP, name, value, self._kernel)
        rows = samples(OP, name, value, "linear")
        return samples(OP, name, self.compute_kernel(rows.cpu().numpy(), **self.kwargs), self._kernel).to(rows.device)

    def _options(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Return the kernels as arguments of `hsic` and `hsic_test`."""
        options: dict[str, Any] = {"kernel": self._kernel, "estimator": "biased" if self.bias else "unbiased"}
        if self._kernel == "polynomial":
            return options | self.kwargs
        gamma = self.kwargs.get("gamma")
        if gamma is not None and self._kernel in PARAMETERS:
            gamma = check.positive(OP, "gamma", gamma)
            return options | {"bandwidth": 1 / gamma if self._kernel == "laplacian" else (2 * gamma) ** -0.5}
        # scikit-learn's default gamma is 1 / columns
        return options | ({"bandwidth": x.shape[1], "bandwidth_y": y.shape[1]} if self._kernel == "laplacian" else {})

    def _statistic(self, x: Tensor, y: Tensor) -> float:
        options = self._options(x, y)
        estimator = options.pop("estimator")
        specs = kernel_specs(**options)
        check_kernels(OP, specs)
        value = exact(OP, pair_of(OP, x, y, specs, estimator), estimator, True, False, visitor(None, False))
        self.stat = math.sqrt(max(value, 0.0)) if self.bias else value
        return self.stat


def _seed(random_state: object) -> int:
    """Return a seed, drawn if a generator is given."""
    if random_state is None:
        return int(np.random.randint(SEEDS, dtype=np.int64))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(SEEDS, dtype=np.int64))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(SEEDS))
    if isinstance(random_state, numbers.Integral) and not isinstance(random_state, bool):
        return seed_number(OP, int(random_state), "random_state")
    raise TypeError(
        f"{OP}: random_state must be None, an integer or a NumPy generator, got {type(random_state).__name__}"
    )
