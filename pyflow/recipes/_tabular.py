"""Tables of scikit-learn in five splits, a Gaussian baseline, and how well a density is calibrated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from torch import Tensor

NAMES = ("diabetes", "wine", "breast-cancer")
FOLDS = 5
# penalties of the regression and amounts of shrinkage that the Gaussian chooses from
RIDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
SHRINKAGES = (1e-4, 1e-3, 3e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class Table:
    """Rows x (N, D) whose density is estimated, given the context (N, C) if there is one; float64."""

    name: str
    title: str
    columns: Sequence[str]
    # the two columns that the picture shows
    shown: tuple[int, int]
    x: Tensor
    context: Tensor | None = None

    @property
    def dim(self) -> int:
        return self.x.shape[1]

    @property
    def context_features(self) -> int:
        return 0 if self.context is None else self.context.shape[1]


@dataclass(frozen=True)
class Part:
    """Rows of one part of a split; `rows` are their numbers in the table."""

    x: Tensor
    context: Tensor | None
    rows: Tensor

    def all(self) -> tuple[Tensor, Tensor | None]:
        return self.x, self.context

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.x[chosen], None if self.context is None else self.context[chosen]


@dataclass(frozen=True)
class Split:
    """A split, standardised by its training rows: x = (raw - mean) / scale."""

    train: Part
    validation: Part
    test: Part
    mean: Tensor
    scale: Tensor


def load(name: str) -> Table:
    """Load a table of `NAMES`: diabetes has one column given ten features, the others are joint densities."""
    if name == "diabetes":
        # the features are standardised per split, as every column is
        data = load_diabetes(scaled=False)
        x, context = data.target[:, None], torch.from_numpy(data.data).double()
        title = "442 patients: disease progression after a year, given ten features"
        return Table(name, title, ("disease progression",), (0, 0), torch.from_numpy(x).double(), context)
    wine = name == "wine"
    data = load_wine() if wine else load_breast_cancer()
    columns = [str(column).replace("_", " ") for column in data.feature_names]
    first, second = ("malic acid", "flavanoids") if wine else ("mean area", "mean concavity")
    title = f"{len(data.data)} {'wines' if wine else 'tumours'}: joint density of {len(columns)} measurements"
    shown = columns.index(first), columns.index(second)
    return Table(name, title, columns, shown, torch.from_numpy(data.data).double())


def splits(table: Table, count: int = FOLDS) -> list[Split]:
    """Return the first `count` of five splits with fixed seeds; every row is held out in exactly one of the five."""
    order = torch.randperm(len(table.x), generator=torch.Generator().manual_seed(0))
    folds = order.tensor_split(FOLDS)
    return [_split(table, folds, number) for number in range(count)]


def _split(table: Table, folds: Sequence[Tensor], number: int) -> Split:
    rest = torch.cat([fold for k, fold in enumerate(folds) if k != number])
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(1 + number))]
    validation, train = rest.split([len(rest) // 10, len(rest) - len(rest) // 10])
    mean, scale = _moments(table.x[train])
    given = None if table.context is None else _moments(table.context[train])

    def part(rows: Tensor) -> Part:
        context = None
        if table.context is not None and given is not None:
            context = (table.context[rows] - given[0]) / given[1]
        return Part((table.x[rows] - mean) / scale, context, rows)

    return Split(part(train), part(validation), part(folds[number].sort().values), mean, scale)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.std(0)


@dataclass(frozen=True)
class Gaussian:
    """Gaussian N(mean + context weights, factor factor'), float64 on the CPU.

    Without context: full covariance, shrunk towards its diagonal. With context: ridge regression. Shrinkage and penalty
    are those that score best on the validation rows.
    """

    mean: Tensor
    weights: Tensor | None
    factor: Tensor

    @classmethod
    def fit(cls, split: Split) -> Gaussian:
        candidates = _regressions(split.train) if split.train.context is not None else _covariances(split.train)
        x, context = split.validation.x, split.validation.context
        return max(candidates, key=lambda candidate: candidate.log_prob(x, context).mean().item())

    def latent(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return z, standard normal if x is distributed as this says."""
        mean = self.mean
        if context is not None and self.weights is not None:
            mean = mean + context.double().cpu() @ self.weights
        return torch.linalg.solve_triangular(self.factor, (x.double().cpu() - mean).mT, upper=False).mT

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Return the x that `latent` maps to z."""
        x = z.double().cpu() @ self.factor.mT + self.mean
        return x if context is None or self.weights is None else x + context.double().cpu() @ self.weights

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        volume = self.factor.diagonal().log().sum() + 0.5 * len(self.mean) * math.log(2 * math.pi)
        return -0.5 * self.latent(x, context).square().sum(1) - volume


def _covariances(train: Part) -> list[Gaussian]:
    mean, covariance = train.x.mean(0), torch.cov(train.x.mT)
    diagonal = torch.diag(covariance.diagonal())
    return [Gaussian(mean, None, torch.linalg.cholesky((1 - a) * covariance + a * diagonal)) for a in SHRINKAGES]


def _regressions(train: Part) -> list[Gaussian]:
    x, context = train.x, train.context
    assert context is not None
    n, features = context.shape
    # context and x are centred on the training rows
    second, cross = context.mT @ context / n, context.mT @ x / n
    fits = []
    for ridge in RIDGES:
        weights = torch.linalg.solve(second + ridge * torch.eye(features).to(second), cross)
        residual = x - context @ weights
        covariance = residual.mT @ residual / (n - features - 1)
        fits.append(Gaussian(x.mean(0), weights, torch.linalg.cholesky(covariance)))
    return fits


@dataclass(frozen=True)
class Whitened:
    """A split whose rows are the z of its Gaussian, float32: a flow that is the identity equals the Gaussian.

    `volume` is what is subtracted from the log-density of z to get that of the raw row.
    """

    split: Split
    gaussian: Gaussian
    train: Part
    validation: Part
    test: Part
    volume: float

    @classmethod
    def of(cls, split: Split, device: torch.device) -> Whitened:
        gaussian = Gaussian.fit(split)

        def part(given: Part) -> Part:
            context = None if given.context is None else given.context.to(device, torch.float32)
            z = gaussian.latent(given.x, given.context).to(device, torch.float32)
            return Part(z, context, given.rows.to(device))

        volume = split.scale.log().sum() + gaussian.factor.diagonal().log().sum()
        return cls(split, gaussian, part(split.train), part(split.validation), part(split.test), volume.item())

    def white(self, raw: Tensor, context: Tensor | None) -> Tensor:
        z = self.gaussian.latent((raw - self.split.mean) / self.split.scale, context)
        return z.to(self.test.x)

    def raw(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.gaussian.inverse(z, context) * self.split.scale + self.split.mean


def deviation(z: Tensor, grid: Tensor) -> Tensor:
    """Return how far the distribution of Phi(z), over all elements, lies above the uniform one at the grid's points."""
    u = torch.special.ndtr(z.double().flatten()).sort().values
    return torch.searchsorted(u, grid, right=True) / len(u) - grid


def band(n: int, grid: Tensor, level: float = 0.95, draws: int = 2000) -> Tensor:
    """Return the half width within which n uniform numbers deviate at all points of the grid, with this probability."""
    generator = torch.Generator().manual_seed(0)
    width = (grid * (1 - grid) / n).sqrt()
    # counts of n uniform numbers between the points of the grid, as they fall
    edges = torch.cat((grid, grid.new_ones(1))).diff(prepend=grid.new_zeros(1))
    counts = torch.stack([_counts(n, edges, generator) for _ in range(draws)])
    off = (counts.cumsum(1)[:, :-1] / n - grid).abs() / width
    return width * off.amax(1).quantile(level)


def _counts(n: int, probabilities: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.multinomial(probabilities, n, replacement=True, generator=generator)
    return drawn.bincount(minlength=len(probabilities)).double()
