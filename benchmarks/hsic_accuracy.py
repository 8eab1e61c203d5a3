"""How far HSIC in float32 is from float64, from narrow bandwidths to wide ones, on data far from zero.

python -m pyflow.benchmarks.hsic_accuracy prints the table. Errors are relative to the larger of |HSIC| and a hundredth
of sqrt(HSIC(x, x) HSIC(y, y)), since the unbiased value crosses zero; pyflow promises 1e-5.
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
        contender, estimator: its names in the table.
        call: (x, y, sigma) -> HSIC, x and y float32.
        truth: "biased", "unbiased" or "correlation", what the result is compared with.
    """

    contender: str
    estimator: str
    call: Callable[[Tensor, Tensor, float], float]
    truth: str


class Truth(NamedTuple):
    """A value in float64, and what an error of it is relative to."""

    value: float
    scale: float

    def error(self, got: float) -> float:
        """Of a result; what is not finite is infinitely wrong."""
        error = abs(got - self.value) / self.scale
        return error if math.isfinite(error) else math.inf


def data(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(n, DIM) float32 x and y, half a function of x and half noise, of the same median distance, both at OFFSET."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn((2, n, DIM), generator=generator, dtype=torch.float64)
    y = x.abs() + 0.5 * noise
    # hyppo has one bandwidth for both
    y = y * (median_distance(x) / median_distance(y))
    return (x + OFFSET).float(), (y + OFFSET).float()


def median_distance(z: Tensor) -> float:
    """The lower of two medians where there are two: any scale near it serves here."""
    return torch.pdist(z).median().item()


def bandwidth(x: Tensor, factor: float) -> float:
    """factor times the median distance, a number of float32."""
    return torch.tensor(factor * median_distance(x.double())).float().item()


# the truth


def squared_distances(z: Tensor) -> Tensor:
    """(n, n) float64 from the differences of every column of centred data."""
    z = z.double()
    z = z - z.mean(0)
    return sum((column[:, None] - column).square_() for column in z.T)


def gram(z: Tensor, sigma: float) -> Tensor:
    """(n, n) float64 rbf matrix, less 1 at wide bandwidths: HSIC is the same, and K there hardly differs from 1."""
    exponent = squared_distances(z).div_(-2 * sigma**2)
    return exponent.expm1_() if exponent.mean() > -1 else exponent.exp_()


def definition(k: Tensor, m: Tensor, estimator: str) -> float:
    """HSIC of two kernel matrices, less any constant each."""
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
    """Both estimates, and the unbiased one over its own for x and y, from the float32 data widened."""
    k, m = gram(x, sigma), gram(y, sigma)
    known = {}
    for estimator in ("biased", "unbiased"):
        value = definition(k, m, estimator)
        own = math.sqrt(definition(k, k, estimator) * definition(m, m, estimator))
        known[estimator] = Truth(value, max(abs(value), 1e-2 * own))
    known["correlation"] = Truth(value / own, max(abs(value / own), 1e-2))
    return known


# the contenders


def naive_gram(z: Tensor, sigma: float) -> Tensor:
    """The rbf matrix as it is usually written, nothing centred."""
    squares = z.square().sum(1)
    distances = squares[:, None] + squares - 2 * (z @ z.T)
    return torch.exp(-distances.clamp(min=0) / (2 * sigma**2))


def naive_biased(x: Tensor, y: Tensor, sigma: float) -> float:
    """tr(K H L H) / (n - 1)^2."""
    n = len(x)
    h = torch.eye(n) - 1 / n
    return (torch.trace(naive_gram(x, sigma) @ h @ naive_gram(y, sigma) @ h) / (n - 1) ** 2).item()


def naive_unbiased(x: Tensor, y: Tensor, sigma: float) -> float:
    """The formula of Song et al. 2012."""
    n = len(x)
    k, m = (naive_gram(z, sigma).fill_diagonal_(0) for z in (x, y))
    product = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return (((k * m).sum() + product - 2 / (n - 2) * (k.sum(0) * m.sum(0)).sum()) / (n * (n - 3))).item()


def torch_cka(x: Tensor, y: Tensor, sigma: float) -> float:
    """Its formula on matrices that are right to the last bit of float32: it has no rbf kernel of its own."""
    formula = peer("torch-cka", "torch_cka").CKA._HSIC
    k, m = (squared_distances(z).div_(-2 * sigma**2).exp_().float().fill_diagonal_(0) for z in (x, y))
    return formula(SimpleNamespace(device="cpu"), k, m)


def hyppo(x: Tensor, y: Tensor, sigma: float) -> float:
    """The statistic of its test, which casts its input to float64."""
    test = peer("hyppo", "hyppo.independence").Hsic(compute_kernel="rbf", gamma=1 / (2 * sigma**2)).test
    # above 20 rows this draws no permutations
    return float(test(x.numpy(), y.numpy(), auto=True).stat)


def ours(estimator: str) -> Callable[[Tensor, Tensor, float], float]:
    """pyflow.ops.hsic with this estimator."""
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
naive float32: squared distances |a|^2 + |b|^2 - 2 a.b of the data where they are, both n x n matrices, tr(KHLH) and
the unbiased formula of Song et al. 2012.

torch-cka: its own `CKA._HSIC` in float32. It has linear kernels only, so it is given rbf matrices made in float64 and
rounded to float32 once: the error is that of its formula and of this rounding, none of it that of distances.

hyppo: `Hsic(compute_kernel="rbf", gamma=1 / (2 sigma^2)).test(x, y)` gives unbiased HSIC(x, y) / sqrt(HSIC(x, x)
HSIC(y, y)) and is compared with that, |error| / max(|value|, 1e-2). It is given the float32 data and casts them to
float64: this row is float64 computation. `statistic()` of hyppo 0.5.2, which does not cast, raises numba's TypingError
on float32."""


def worst_errors(sizes: Sequence[int], seed: int = 0, rows: Sequence[Row] = ROWS) -> dict[Row, list[float] | None]:
    """The largest error over the sizes at every factor; None where the package is missing."""
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
                    errors[row][i] = max(errors[row][i], error)
    return errors


def table(errors: Mapping[Row, Sequence[float] | None]) -> str:
    """Errors in markdown, a row for each contender and estimator."""
    head = ["contender", "estimator", *(f"{factor:g}x" for factor in FACTORS)]
    lines = ["| " + " | ".join(head) + " |", "|---|---" + "|---:" * len(FACTORS) + "|"]
    for row, of in errors.items():
        cells = [ABSENT] * len(FACTORS) if of is None else [f"{error:.1e}" for error in of]
        lines.append("| " + " | ".join([row.contender, row.estimator, *cells]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pyflow.benchmarks.hsic_accuracy", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="samples of a data set")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sizes = ", ".join(map(str, args.sizes))
    print(
        f"largest error of HSIC in float32 over n = {sizes}, by sigma over the median distance; "
        f"rbf, {DIM} columns at {OFFSET:g}, seed {args.seed}, torch {torch.__version__}\n"
    )
    print(table(worst_errors(args.sizes, args.seed)))
    print(f"\n{NOTES}")


if __name__ == "__main__":
    main()
