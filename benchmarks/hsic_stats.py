"""Cases of HSIC statistics: the permutation test against hyppo's, and random features against plain torch.

hyppo draws other permutations, so only its statistic is compared: unbiased and normalised, with one bandwidth for both.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

import pyflow
from pyflow.stats import hsic_test
from pyflow.stats.hsic_test import _key, draw

from .registry import Call, Case, Outputs, Problem, available, compiled, normals, peer

PERMUTATIONS = 1000
FEATURES = 512


def _centred(x: Tensor) -> Tensor:
    """Return the U-centred Gram matrix at bandwidth 1, divided by its norm."""
    n = len(x)
    gram = (-torch.cdist(x, x).square() / 2).exp()
    gram.fill_diagonal_(0)
    rows = gram.sum(1) / (n - 2)
    gram = gram - rows - rows[:, None] + gram.sum() / ((n - 1) * (n - 2))
    gram.fill_diagonal_(0)
    return gram / gram.norm()


def permutation_test(shape: tuple[int, ...], device: torch.device) -> Problem:
    n, count = shape
    x, noise = normals((n, 1), device, 2)
    y = 0.1 * x + noise
    rows = draw(_key("hsic_test", 0, device), 0, count, n).long()

    def eager(x: Tensor = x, y: Tensor = y) -> Outputs:
        k, m = _centred(x), _centred(y)
        null = torch.stack([(k * m[p][:, p]).sum() for p in rows])
        return (k * m).sum().reshape(1), null

    def ours() -> Outputs:
        result = hsic_test(
            x, y, bandwidth=1.0, estimator="unbiased", normalize=True, permutations=count, progress=False
        )
        return torch.tensor([result.statistic]), torch.from_numpy(result.null)

    def statistic() -> Outputs:
        return eager(x.double(), y.double())[:1]

    def hyppo() -> Call:
        test = peer("hyppo", "hyppo.independence").Hsic(compute_kernel="gaussian", bias=False, gamma=0.5)
        arrays = x.cpu().double().numpy(), y.cpu().double().numpy()
        return lambda: (torch.tensor([test.test(*arrays, reps=count, workers=1, auto=False)[0]]),)

    theirs, missing = available({"hyppo": hyppo})
    calls = {"eager": eager, "pyflow": ours} | theirs
    # contenders that the harness adds (other instruction sets) compute the same as pyflow
    truth = defaultdict(lambda: lambda: eager(x.double(), y.double()), {"hyppo": statistic})
    # each permutation reads both matrices once
    return Problem(calls, truth, 8 * n * n * count, missing=missing, tolerance=1e-4)


def random_features(shape: tuple[int, ...], device: torch.device) -> Problem:
    n, dim = shape
    x, noise = normals(shape, device, 2)
    y = x + noise
    sigma = math.sqrt(dim)

    def features(z: Tensor, step: int) -> Tensor:
        frequencies = pyflow.ops.normal(
            (dim, FEATURES // 2), seed=0, step=step, purpose="monte_carlo", dtype=z.dtype, device=device
        )
        angle = z @ frequencies / sigma
        values = torch.cat((angle.cos(), angle.sin()), 1)
        return values - values.mean(0)

    def eager(x: Tensor = x, y: Tensor = y) -> Outputs:
        covariance = features(x, 0).T @ features(y, 1)
        return (covariance.square().sum().reshape(1) * (2 / FEATURES / (n - 1)) ** 2,)

    def ours() -> Outputs:
        value = pyflow.ops.hsic(
            x, y, bandwidth=sigma, bandwidth_y=sigma, approximate="rff", n_features=FEATURES, seed=0
        )
        return (value.reshape(1),)

    calls = {"eager": eager, "compile": compiled(eager), "pyflow": ours}
    truth = lambda: eager(x.double(), y.double())
    return Problem(calls, truth, x.nbytes + y.nbytes, tolerance=1e-4)


CASES = [
    Case(
        "hsic_stats/permutation test", permutation_test, (500, PERMUTATIONS), (20, 10),
        contenders=("eager", "hyppo", "pyflow"), peer="hyppo", quick=True,
    ),
    Case("hsic_stats/random features", random_features, (100_000, 16), (64, 3)),
]  # fmt: skip
