"""Errors of HSIC in float32 against float64, from narrow to wide bandwidths, on data far from zero.

python -m pyflow.benchmarks.hsic_accuracy prints the table. Errors are relative to the larger of |HSIC| and a hundredth
of sqrt(HSIC(x, x) HSIC(y, y)), because the unbiased value can be zero; pyflow's bound is 1e-5.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

import pyflow

from .registry import Missing, peer

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SIZES = (64, 256, 1024, 4096)
DIM = 4
OFFSET = 1e3
ABSENT = "not installed"


class Row(NamedTuple):
    """One way to compute HSIC.

    Attributes:
        contender, estimator: names in the table.
        call: (x, y, sigma) -> HSIC for float32 x and y.
        truth: the value that the result is compared with: "biased", "unbiased" or "correlation".
    """

    contender: str
    estimator: str
    call: Callable[[Tensor, Tensor, float], float]
    truth: str


class Truth(NamedTuple):
    """A value in float64, and the scale of its errors."""

    value: float
    scale: float

    def error(self, got: float) -> float:
        """Return the relative error of a result; infinite if it is not finite."""
        error = abs(got - self.value) / self.scale
        return error if math.isfinite(error) else math.inf


def data(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return float32 x and y, (n, DIM), with equal median distances and shifted by OFFSET; y depends on x."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn((2, n, DIM), generator=generator, dtype=torch.float64)
    y = x.abs() + 0.5 * noise
    # equal median distances, because hyppo has one bandwidth for both
    y = y * (median_distance(x) / median_distance(y))
    return (x + OFFSET).float(), (y + OFFSET).float()


def median_distance(z: Tensor) -> float:
    """Return the median distance, for an even count the lower of the two middle ones."""
    return torch.pdist(z).median().item()


def bandwidth(x: Tensor, factor: float) -> float:
    """Return factor times the median distance, rounded to float32."""
    return torch.tensor(factor * median_distance(x.double())).float().item()


def squared_distances(z: Tensor) -> Tensor:
    """Return squared distances, (n, n) float64, from column-wise differences of centred data."""
    z = z.double()
    z = z - z.mean(0)
    distances = z.new_zeros((len(z), len(z)))
    for column in z.T:
        distances += (column[:, None] - column).square_()
    return distances


def gram(z: Tensor, sigma: float) -> Tensor:
    """Return the rbf matrix K, (n, n) float64; at wide bandwidths K - 1, which has the same HSIC and more precision."""
    exponent = squared_distances(z).div_(-2 * sigma**2)
    return exponent.expm1_() if exponent.mean() > -1 else exponent.exp_()


def definition(k: Tensor, m: Tensor, estimator: str) -> float:
    """Return HSIC of two kernel matrices; a constant added to either does not change it."""
    n = len(k)
    if estimator == "unbiased":
        a, b = k.diagonal(), m.diagonal()
        rows_k, rows_m = k.sum(1) - a, m.sum(1) - b
        product = rows_k.sum() * rows_m.sum() / ((n - 1) * (n - 2))
        trace = (k * m).sum() - (a * b).sum()
        return ((trace + product - 2 / (n - 2) * (rows_k * rows_m).sum()) / (n * (n - 3))).item()
    rows = k.mean(1)
    centred = k - rows - rows[:, None] + rows.mean()
    return (centred.mul_(m).sum() / (n - 1) ** 2).item()


def truths(x: Tensor, y: Tensor, sigma: float) -> dict[str, Truth]:
    """Return both estimates and the unbiased normalised one, in float64 from the float32 data."""
    k, m = gram(x, sigma), gram(y, sigma)
    known = {}
    for estimator in ("biased", "unbiased"):
        value = definition(k, m, estimator)
        own = math.sqrt(definition(k, k, estimator) * definition(m, m, estimator))
        known[estimator] = Truth(value, max(abs(value), 1e-2 * own))
    known["correlation"] = Truth(value / own, max(abs(value / own), 1e-2))
    return known


def naive_gram(z: Tensor, sigma: float) -> Tensor:
    """Return the rbf matrix by the usual code, without centring the data."""
    squares = z.square().sum(1)
    distances = squares[:, None] + squares - 2 * (z @ z.T)
    return torch.exp(-distances.clamp(min=0) / (2 * sigma**2))


def naive_biased(x: Tensor, y: Tensor, sigma: float) -> float:
    """Return tr(K H L H) / (n - 1)^2."""
    n = len(x)
    h = torch.eye(n) - 1 / n
    return (torch.trace(naive_gram(x, sigma) @ h @ naive_gram(y, sigma) @ h) / (n - 1) ** 2).item()


def naive_unbiased(x: Tensor, y: Tensor, sigma: float) -> float:
    """Return the unbiased estimate by the formula of Song et al. 2012."""
    n = len(x)
    k, m = (naive_gram(z, sigma).fill_diagonal_(0) for z in (x, y))
    product = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return (((k * m).sum() + product - 2 / (n - 2) * (k.sum(0) * m.sum(0)).sum()) / (n * (n - 3))).item()


def torch_cka(x: Tensor, y: Tensor, sigma: float) -> float:
    """Return torch-cka's HSIC of correctly rounded float32 matrices: it has no rbf kernel."""
    formula = peer("torch-cka", "torch_cka").CKA._HSIC
    k, m = (squared_distances(z).div_(-2 * sigma**2).exp_().float().fill_diagonal_(0) for z in (x, y))
    return formula(SimpleNamespace(device="cpu"), k, m)


def hyppo(x: Tensor, y: Tensor, sigma: float) -> float:
    """Return the statistic of hyppo's test, which casts its input to float64."""
    test = peer("hyppo", "hyppo.independence").Hsic(compute_kernel="rbf", gamma=1 / (2 * sigma**2)).test
    # with more than 20 rows this draws no permutations
    return float(test(x.numpy(), y.numpy(), auto=True).stat)


def ours(estimator: str) -> Callable[[Tensor, Tensor, float], float]:
    """Return pyflow.ops.hsic with this estimator."""
    return lambda x, y, sigma: pyflow.ops.hsic(x, y, bandwidth=sigma, estimator=estimator).item()


ROWS = (
    Row("pyflow", "biased", ours("biased"), "biased"),
    Row("pyflow", "unbiased", ours("unbiased"), "unbiased"),
    Row("naive float32", "biased", naive_biased, "biased"),
    Row("naive float32", "unbiased", naive_unbiased, "unbiased"),
    Row("torch-cka", "unbiased", torch_cka, "unbiased"),
    Row("hyppo", "unbiased, normalised", hyppo, "correlation"),
)

NOTES = """\
naive float32: squared distances |a|^2 + |b|^2 - 2 a.b of the data without centring, both n x n matrices, tr(KHLH) and
the unbiased formula of Song et al. 2012.

torch-cka: `CKA._HSIC` in float32. It supports linear kernels only, so it gets rbf matrices computed in float64 and
rounded to float32: its error comes from its formula and this rounding, not from the distances.

hyppo: `Hsic(compute_kernel="rbf", gamma=1 / (2 sigma^2)).test(x, y)` returns unbiased HSIC(x, y) / sqrt(HSIC(x, x)
HSIC(y, y)) and is compared with that value, |error| / max(|value|, 1e-2). It casts the float32 data to float64, so this
row is computed in float64. `statistic()` of hyppo 0.5.2 does not cast and raises numba's TypingError on float32."""


def worst_errors(sizes: Sequence[int], seed: int = 0, rows: Sequence[Row] = ROWS) -> dict[Row, list[float] | None]:
    """Return the largest error over the sizes for every factor; None if the package is missing."""
    errors: dict[Row, list[float] | None] = {row: [0.0] * len(FACTORS) for row in rows}
    for n in sizes:
        x, y = data(n, seed)
        for i, factor in enumerate(FACTORS):
            sigma = bandwidth(x, factor)
            known = truths(x, y, sigma)
            for row in rows:
                try:
                    error = known[row.truth].error(row.call(x, y, sigma))
                except Missing:
                    errors[row] = None
                else:
                    worst = errors[row]
                    assert worst is not None
                    worst[i] = max(worst[i], error)
    return errors


def table(errors: Mapping[Row, Sequence[float] | None]) -> str:
    """Return a markdown table of errors with a row for each contender and estimator."""
    head = ["contender", "estimator", *(f"{factor:g}x" for factor in FACTORS)]
    lines = ["| " + " | ".join(head) + " |", "|---|---" + "|---:" * len(FACTORS) + "|"]
    for row, of in errors.items():
        cells = [ABSENT] * len(FACTORS) if of is None else [f"{error:.1e}" for error in of]
        lines.append("| " + " | ".join([row.contender, row.estimator, *cells]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pyflow.benchmarks.hsic_accuracy", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of samples")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sizes = ", ".join(map(str, args.sizes))
    print(
        f"largest error of HSIC in float32 over n = {sizes}, by sigma / median distance; "
        f"rbf, {DIM} columns shifted by {OFFSET:g}, seed {args.seed}, torch {torch.__version__}\n"
    )
    print(table(worst_errors(args.sizes, args.seed)))
    print(f"\n{NOTES}")


if __name__ == "__main__":
    main()
