"""The permutation test of HSIC as an independence test of causal-learn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from causallearn.utils.cit import CIT_Base, register_ci_test

from ..stats import hsic_test

NAME = "pyflow_hsic"


class HSICIndependence(CIT_Base):
    """Tests whether two columns of a data set are independent, by `pyflow.stats.hsic_test`.

    Args:
        data: (n, columns) NumPy array.
        cache_path: a .json file of p-values, or None, as in causal-learn.
        **options: arguments of `hsic_test`, such as permutations and seed, which `pc` and `fci` hand on; not `method`,
            which is causal-learn's name of the test.

    Raises:
        TypeError, ValueError: as `hsic_test`; a conditioning set that is not empty.

    Notes:
        A p-value is computed once for a pair of columns. HSIC tests no conditional independence, so searches must stop
        at empty conditioning sets: `pc(..., max_k=0)` with its default rules for colliders, or `fci(..., depth=0)`,
        returns the graph of pairwise dependence with its colliders.
    """

    def __init__(self, data: Any, cache_path: str | None = None, **options: Any) -> None:
        super().__init__(data, cache_path)
        self.options = {"progress": False} | options
        self.check_cache_method_consistent(NAME, repr(sorted(options.items())))

    def __call__(self, X: int, Y: int, condition_set: Iterable[int] | None = None) -> float:
        """Return the p-value of columns X and Y."""
        (x,), (y,), conditions, key = self.get_formatted_XYZ_and_cachekey(X, Y, condition_set)
        if conditions:
            raise ValueError(
                f"{NAME}: condition_set must be empty, since HSIC tests no conditional independence: call pc with "
                f"max_k=0 or fci with depth=0, got {conditions}"
            )
        if key not in self.pvalue_cache:
            self.pvalue_cache[key] = hsic_test(self.data[:, x], self.data[:, y], **self.options).pvalue
        return self.pvalue_cache[key]


def register() -> None:
    """Register the test in causal-learn under the name "pyflow_hsic".

    Source:
        causal-learn 0.1.4, `causallearn.utils.cit.register_ci_test`.

    Example:
        >>> import numpy as np
        >>> from causallearn.search.ConstraintBased.PC import pc
        >>> register()
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.normal(size=(2, 200))
        >>> data = np.stack((x, y, x**2 + y**2 + 0.1 * rng.normal(size=200)), 1)  # without correlations
        >>> graph = pc(data, 0.05, "pyflow_hsic", max_k=0, permutations=200, show_progress=False)
        >>> sorted(str(edge) for edge in graph.G.get_graph_edges())
        ['X1 --> X3', 'X2 --> X3']
    """
    register_ci_test(NAME, HSICIndependence)
