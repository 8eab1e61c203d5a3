"""Power of the HSIC tests: the fraction of data sets in which they find a dependence.

python -m pyflow.benchmarks.hsic_power prints the table. The simulations, one-dimensional x and y with noise, are from
Panda et al. 2019, hyppo: A Multivariate Hypothesis Testing Python Package.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pyflow.stats import hsic_test

Data = tuple[np.ndarray, np.ndarray]


def linear(n: int, rng: np.random.Generator) -> Data:
    x = rng.uniform(-1, 1, n)
    return x, x + rng.normal(size=n)


def circle(n: int, rng: np.random.Generator) -> Data:
    angle = np.pi * rng.uniform(-1, 1, n)
    return np.cos(angle) + 0.4 * rng.normal(size=n), np.sin(angle)


def spiral(n: int, rng: np.random.Generator) -> Data:
    radius = rng.uniform(0, 5, n)
    return radius * np.cos(np.pi * radius), radius * np.sin(np.pi * radius) + 0.4 * rng.normal(size=n)


def sine(n: int, rng: np.random.Generator) -> Data:
    x = rng.uniform(-1, 1, n) + 0.02 * rng.normal(size=n)
    return x, np.sin(4 * np.pi * x) + rng.normal(size=n)


def independent_clouds(n: int, rng: np.random.Generator) -> Data:
    x, y = (rng.normal(size=n) / 3 + 2 * rng.integers(0, 2, n) - 1 for _ in range(2))
    return x, y


SIMULATIONS: dict[str, Callable[[int, np.random.Generator], Data]] = {
    "linear": linear, "circle": circle, "spiral": spiral, "sine": sine, "independent clouds": independent_clouds,
}  # fmt: skip


def rejections(
    simulation: Callable[[int, np.random.Generator], Data],
    n: int,
    datasets: int,
    *,
    level: float = 0.05,
    seed: int = 0,
    **options: Any,
) -> float:
    """Return the fraction of data sets with a p-value of at most `level`: power, or size for independent data."""
    rng = np.random.default_rng(seed)
    found = sum(
        hsic_test(*simulation(n, rng), seed=seed + i, progress=False, **options).pvalue <= level
        for i in range(datasets)
    )
    return found / datasets


def power(
    sizes: Sequence[int], datasets: int, tests: Mapping[str, Mapping[str, Any]], seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """Return test -> simulation -> rates for all sizes."""
    return {
        test: {
            name: [rejections(simulation, n, datasets, seed=seed, **options) for n in sizes]
            for name, simulation in SIMULATIONS.items()
        }
        for test, options in tests.items()
    }


def table(sizes: Sequence[int], rates: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return a markdown table of rates with a row for each test and simulation."""
    lines = ["| test | data | " + " | ".join(f"n = {n}" for n in sizes) + " |", "|---" * (2 + len(sizes)) + "|"]
    for test, of in rates.items():
        lines += [f"| {test} | {name} | " + " | ".join(f"{r:.1%}" for r in row) + " |" for name, row in of.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pyflow.benchmarks.hsic_power", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 50, 100, 200], help="numbers of samples")
    parser.add_argument("--datasets", type=int, default=500, help="data sets per size and simulation")
    parser.add_argument("--permutations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tests = {"permutation": {"permutations": args.permutations}, "gamma": {"method": "gamma"}}
    print(f"rate of p <= 0.05 over {args.datasets} data sets, {args.permutations} permutations, seed {args.seed}\n")
    print(table(args.sizes, power(args.sizes, args.datasets, tests, args.seed)))


if __name__ == "__main__":
    main()
