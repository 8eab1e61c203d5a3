"""The test registered in causal-learn: its p-values, in searches, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("causallearn", reason="causal-learn is not installed")

from causallearn.search.ConstraintBased.FCI import fci
from causallearn.search.ConstraintBased.PC import pc
from causallearn.utils.cit import CIT

from pyflow.integrations.causal_learn import register
from pyflow.stats import hsic_test

register()


def circle(n=200):
    """Two causes whose effect correlates with neither."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, n))
    return np.stack((x, y, x**2 + y**2 + 0.1 * rng.normal(size=n)), 1)


def edges(graph):
    return sorted(map(str, graph.get_graph_edges()))


def test_p_is_that_of_hsic_test():
    data = circle()
    test = CIT(data, "pyflow_hsic", permutations=99, seed=4, kernel="laplacian")
    want = hsic_test(data[:, 0], data[:, 2], permutations=99, seed=4, kernel="laplacian").pvalue
    # causal-learn orders the columns
    assert test(0, 2) == test(np.int64(2), 0, ()) == want


def test_p_is_computed_once(monkeypatch):
    test = CIT(circle(), "pyflow_hsic", permutations=99)
    p = test(0, 1)
    monkeypatch.setattr("pyflow.integrations.causal_learn.hsic_test", None)
    assert test(1, 0) == p


def test_searches_with_empty_conditioning_sets():
    data = circle()
    options = {"permutations": 99, "show_progress": False}
    want = ["X1 --> X3", "X2 --> X3"]
    assert edges(pc(data, 0.05, "pyflow_hsic", max_k=0, **options).G) == want
    assert not edges(pc(data, 0.05, "fisherz", max_k=0, show_progress=False).G)
    assert not edges(pc(data[:, :2], 0.05, "pyflow_hsic", **options).G)
    found = fci(data, "pyflow_hsic", 0.05, depth=0, **options)[1]
    assert sorted(map(str, found)) == ["X1 o-> X3", "X2 o-> X3"]


def test_conditioning_sets_are_refused():
    text = (
        "^pyflow_hsic: condition_set must be empty, since HSIC tests no conditional independence: "
        r"call pc with max_k=0 or fci with depth=0, got \[1\]$"
    )
    with pytest.raises(ValueError, match=text):
        CIT(circle(), "pyflow_hsic")(0, 2, (1,))
    with pytest.raises(ValueError, match=text):
        pc(circle(), 0.05, "pyflow_hsic", permutations=99, show_progress=False)


def test_wrong_data():
    data = circle()
    data[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"^hsic_test: x must be finite, got NaN or infinity$"):
        CIT(data, "pyflow_hsic")(1, 2)
