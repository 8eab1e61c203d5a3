"""Tables of real numbers that ship with scikit-learn, and the Gaussian that flows of them start from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# values and, for a conditional density, their context
Rows = tuple[Tensor, "Tensor | None"]


@dataclass(frozen=True)
class Table:
    """Rows x (N, D) and, for a conditional density, what is known of each row, context (N, C)."""

    name: str
    x: Tensor
    context: Tensor | None
    features: list[str]

    def rows(self, index: Tensor) -> Rows:
        return self.x[index], None if self.context is None else self.context[index]

    @property
    def sizes(self) -> tuple[int, int]:
        return self.x.shape[1], 0 if self.context is None else self.context.shape[1]


@dataclass(frozen=True)
class Gaussian:
    """Normal density with the mean a + context W and covariance L L^T, float64: the baseline, and what flows refine."""

    mean: Tensor
    weight: Tensor | None
    factor: Tensor

    @classmethod
    def fit(cls, train: Rows, validation: Rows) -> Gaussian:
        """Fit to the training rows, with the ridge and the shrinkage that score best on the validation rows."""
        candidates = [cls._fit(*train, ridge, shrinkage) for ridge in (1.0, 10.0, 50.0) for shrinkage in
                      (1e-4, 1e-3, 0.01, 0.05, 0.1, 0.2)]  # fmt: skip
        return max(candidates, key=lambda candidate: candidate.log_prob(*validation).mean().item())

    @classmethod
    def _fit(cls, x: Tensor, context: Tensor | None, ridge: float, shrinkage: float) -> Gaussian:
        mean, weight, rest = x.mean(0), None, x - x.mean(0)
        if context is not None:
            # rows are standardised: the intercept is the mean
            eye = torch.eye(context.shape[1], dtype=x.dtype)
            weight = torch.linalg.solve(context.mT @ context + ridge * eye, context.mT @ rest)
            rest = rest - context @ weight
        covariance = rest.mT @ rest / len(rest)
        covariance = (1 - shrinkage) * covariance + shrinkage * torch.diag(covariance.diagonal())
        return cls(mean, weight, torch.linalg.cholesky(covariance))

    @property
    def logdet(self) -> float:
        return self.factor.diagonal().log().sum().item()

    def center(self, context: Tensor | None) -> Tensor:
        return self.mean if context is None or self.weight is None else self.mean + context.double() @ self.weight

    def whiten(self, x: Tensor, context: Tensor | None) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, (x - self.center(context)).mT, upper=False).mT

    def color(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.center(context) + z.double() @ self.factor.mT

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        z = self.whiten(x, context)
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1) - self.logdet


def load() -> list[Table]:
    """Return two tables of scikit-learn: diabetes (a target given ten features) and breast cancer (30 columns)."""
    from sklearn import datasets

    diabetes, cancer = datasets.load_diabetes(), datasets.load_breast_cancer()
    target, features = (torch.as_tensor(a, dtype=torch.float64) for a in (diabetes.target, diabetes.data))
    columns = torch.as_tensor(cancer.data, dtype=torch.float64)
    return [
        Table("diabetes", target[:, None], features, ["progression"]),
        Table("breast cancer", columns, None, [str(name) for name in cancer.feature_names]),
    ]


def standardised(table: Table, parts: tuple[Tensor, ...]) -> list[Rows]:
    """Return the rows of each part, every column by the mean and standard deviation of the first part."""
    x, context = table.rows(parts[0])

    def scaled(values: Tensor, by: Tensor) -> Tensor:
        return (values - by.mean(0)) / by.std(0)

    result: list[Rows] = []
    for part in parts:
        values, given = table.rows(part)
        result.append((scaled(values, x), None if given is None or context is None else scaled(given, context)))
    return result
