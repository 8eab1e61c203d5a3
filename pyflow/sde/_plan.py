"""Plans of samplers: their checked arguments, and the scalars of every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks as check
from ..ops import langevin_step, sde_step
from ..ops.sde import NORMS
from ._score import Lent, Score, checked, in_micro_batches
from .equations import SDE, Grid, Row

METHODS = ("euler_maruyama", "reverse_diffusion", "ancestral", "pc", "probability_flow")
PREDICTORS = ("euler_maruyama", "reverse_diffusion", "ancestral", "probability_flow")
CORRECTORS = ("langevin", "none")


def check_model(op: str, sde: SDE, score_fn: object, eps: object) -> None:
    """Require a process, a score function and a last time within it."""
    if not isinstance(sde, SDE):
        raise TypeError(f"{op}: sde must be a pyflow.sde.SDE, got {type(sde).__name__}")
    check.function(op, "score_fn", score_fn)
    if not 0 < check.number(op, "eps", eps) < sde.T:
        raise ValueError(f"{op}: eps must be in (0, {sde.T:g}), got {eps}")


@dataclass(frozen=True, eq=False)
class Plan:
    """Checked arguments of a sampler, with a, b, c and the corrector's step size of every step."""

    op: str
    sde: SDE
    times: tuple[float, ...]
    start: float  # factor of the prior
    table: Tensor  # (5, steps): t, a, b, c and the corrector's step size, or its alpha if norms is set
    noisy: bool
    corrector_steps: int
    norms: dict[str, object] | None
    micro_batch: int | None

    @classmethod
    @torch.no_grad()
    def checked(
        cls, op, sde, score_fn, method, predictor, corrector, corrector_steps, snr, step_size, norm, steps, eps,
        denoise, micro_batch,
    ):  # fmt: skip
        check_model(op, sde, score_fn, eps)
        check.at_least(op, "steps", steps, 1)
        denoise = check.flag(op, "denoise", denoise)
        if micro_batch is not None:
            check.at_least(op, "micro_batch", micro_batch, 1)
        predictor = _predictor(op, method, predictor)
        corrected = check.choice(op, "corrector", corrector, CORRECTORS) == 0 and method == "pc"
        check.choice(op, "norm", norm, NORMS)
        snr = check.positive(op, "snr", snr)
        if step_size is not None:
            step_size = check.positive(op, "step_size", step_size)
        check.at_least(op, "corrector_steps", corrector_steps, 1)
        grid = sde.grid(steps, float(eps))
        a, b, c = _row(sde, method, predictor, grid)
        if denoise:
            c = torch.cat((c[:-1], c.new_zeros(1)))
        # alpha of the corrector's rule
        size = sde.corrector_alpha(grid) if corrected else torch.ones_like(a)
        norms = {"snr": snr, "norm": norm} if step_size is None and norm != "marginal" else None
        if step_size is not None:
            size = torch.full_like(size, step_size)
        elif norms is None:
            size = 2 * size * (snr * sde.marginal(grid.times)[1]) ** 2
        table = torch.stack((grid.times, a, b, c, size)).float()
        finite = table.isfinite().all(0)
        if not bool(finite.all()):
            t, *row = table[:, ~finite][:, 0].tolist()
            raise ValueError(f"{op}: the steps of sde must be finite, got a, b, c, size = {row} at t = {t:.4g}")
        # the first time is below T if the schedule skips times with alpha 0
        start = sde.marginal(grid.times[0])[1].item() / sde.prior_std if grid.times[0] < sde.T else 1.0
        noisy = "probability_flow" not in (method, predictor)
        return cls(
            op, sde, tuple(grid.times.tolist()), start, table, noisy, corrector_steps * corrected, norms, micro_batch
        )

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return t, a, b, c, size and the numbers of the steps and of the corrector's, with a first dim of the steps.

        They are the first along the last dim, so that they are 16 bytes apart: compiled code copies inputs that are not
        aligned.
        """
        steps = len(self.times)
        scalars = self.table.new_zeros(steps, len(self.table), 4)
        scalars[..., 0] = self.table.T
        counters = torch.zeros(steps, 1 + self.corrector_steps, 2, dtype=torch.int64, device="cpu")
        counters[:, 0, 0] = torch.arange(steps, device="cpu")
        counters[:, 1:, 0] = torch.arange(steps * self.corrector_steps, device="cpu").view(steps, -1)
        return scalars.to(device), counters.to(device)

    def rows(self, device: torch.device) -> list[tuple]:
        """Return (t, a, b, c, size, step, (numbers of the corrector's steps)) of every step, as 0-d tensors."""
        scalars, counters = self.tables(device)
        columns = [column.unbind() for column in scalars[..., 0].unbind(1)]
        counts = [row.unbind() for row in counters[..., 0]]
        return [(*row, step, tuple(rest)) for *row, (step, *rest) in zip(*columns, counts, strict=True)]

    @staticmethod
    def row_of(scalars: Tensor, counters: Tensor) -> tuple:
        """Return one of `rows`, of one entry of the tables."""
        step, *rest = counters[:, 0].unbind()
        return *scalars[:, 0].unbind(), step, tuple(rest)

    def score(self, score_fn: Score) -> Score:
        """Return the score function as the steps call it."""
        score_fn = checked(self.op, Lent(self.op, "score_fn", score_fn))
        return in_micro_batches(score_fn, self.micro_batch) if self.micro_batch else score_fn

    def advance(self, score_fn: Score) -> Callable[..., Tensor]:
        score_fn = self.score(score_fn)
        norms, noisy = self.norms, self.noisy

        def advance(x, seed, t, a, b, c, size, step, corrector_steps):
            n = x.shape[0]
            for number in corrector_steps:
                rule = {"step_size": size} if norms is None else {"alpha": size, **norms}
                x = langevin_step(x, score_fn(x, t.expand(n).clone()), seed=seed, step=number, **rule)
            score = score_fn(x, t.expand(n).clone())
            # c is 0 for a probability flow, so the score stands in for the noise and none is drawn
            return sde_step(x, score, a, b, c, seed=seed, step=step, noise=None if noisy else score)

        return advance


def _predictor(op: str, method: str, predictor: str | None) -> str:
    check.choice(op, "method", method, METHODS)
    if predictor is not None:
        check.choice(op, "predictor", predictor, PREDICTORS)
    if method == "pc":
        return predictor or "reverse_diffusion"
    if method == "probability_flow":
        if predictor in ("ancestral", "probability_flow"):
            raise ValueError(f"{op}: predictor of probability_flow must be euler_maruyama or reverse_diffusion, got "
                             f"{predictor!r}")  # fmt: skip
        return predictor or "euler_maruyama"
    if predictor is not None:
        raise ValueError(f"{op}: predictor goes with pc and probability_flow, got method {method!r}")
    return method


def _row(sde: SDE, method: str, predictor: str, grid: Grid) -> Row:
    if predictor == "probability_flow":
        method, predictor = predictor, "euler_maruyama"
    return sde.probability_flow(grid, predictor) if method == "probability_flow" else getattr(sde, predictor)(grid)
