"""Reverse-time samplers: every method is a table of scalars a, b, c for one fused step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import _progress
from ..ops import langevin_step, sde_step
from ..ops.noise import seed_tensor
from ._score import Lent, Score, checked, in_micro_batches
from .equations import SDE, Grid, Row, seeds_for

METHODS = ("euler_maruyama", "reverse_diffusion", "ancestral", "pc", "probability_flow")
PREDICTORS = ("euler_maruyama", "reverse_diffusion", "ancestral", "probability_flow")
CORRECTORS = ("langevin", "none")
NORMS = ("marginal", "sample", "batch")


def sample(
    sde: SDE,
    score_fn: Score,
    shape: Sequence[int],
    *,
    steps: int = 1000,
    method: str = "euler_maruyama",
    predictor: str | None = None,
    corrector: str = "langevin",
    corrector_steps: int = 1,
    snr: float = 0.16,
    step_size: float | None = None,
    norm: str = "marginal",
    eps: float = 1e-3,
    denoise: bool = True,
    micro_batch: int | None = None,
    seed: int | Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    callback: Callable[[int, float, Tensor], object] | None = None,
    check_finite: bool = False,
) -> Tensor:
    """Draw samples from a score model by solving the SDE backwards from its prior.

    Every step is x' = a x + b score + c z. The times are linspace(T, eps, steps), with T = 1 for every SDE of pyflow.

    Args:
        sde: `VPSDE`, `SubVPSDE`, `VESDE`, `from_marginals(...)` or a subclass of `SDE`.
        score_fn: called as score_fn(x, t) with x (B, ...) in `dtype` and t (B,) float32; returns the score in x's
            shape, in any float dtype. A function or a module. It may write into t, and into x if it does so
            from the first call on.
        shape: shape of the result, (B, ...).
        steps: number of steps. The discrete methods of VPSDE, and "pc" for VPSDE and SubVPSDE, need more than
            beta_max.
        method: "euler_maruyama", "reverse_diffusion", "ancestral" (VPSDE and VESDE), "pc" (a Langevin corrector
            before every predictor step) or "probability_flow" (no noise after the prior).
        predictor: for "pc" any other method, default "reverse_diffusion"; for "probability_flow" the SDE step whose
            score term is halved, "euler_maruyama" (default) or "reverse_diffusion".
        corrector: for "pc", "langevin" or "none".
        corrector_steps: Langevin steps per predictor step.
        snr: signal-to-noise ratio r in the corrector's step size 2 alpha (r std(t))**2.
        step_size: fixed step size of the corrector, in place of the rule with snr.
        norm: "marginal" uses std(t) in that rule; the others use |z| / |score| in place of std(t). "sample" takes the
            norms of each sample; use it in many dimensions only, since a score near 0 makes a huge step. "batch" takes
            their means over the batch, as in the paper, which makes samples depend on each other.
        eps: time of the last step, in (0, T).
        denoise: add no noise in the last step, so that it returns the mean.
        micro_batch: evaluate the score on this many samples at a time; the last micro-batch is padded.
        seed: an integer, from which `pyflow.ops.sample_seeds` makes one seed per sample, or (B,) int64, one seed per
            sample; None draws an integer from torch's default generator.
        device: default the device of seed, or of score_fn's parameters.
        dtype: dtype of x; a, b, c and t are always float32.
        progress: show a bar, if tqdm is installed.
        callback: called as callback(i, t, x) after step i, which starts at time t; x is the new state, or a copy if the
            callback writes into x. Writes do not change the result.
        check_finite: stop when x is not finite. This synchronises with the device after every step.

    Returns:
        Samples in the given shape and dtype, without a graph.

    Raises:
        TypeError: score_fn is not callable, wrong dtype, or a count is not an integer.
        ValueError: unknown method, predictor, corrector or norm; steps < 1; eps outside (0, T); a method that the SDE
            does not define; a schedule with steps that are not finite; a score_fn or callback that writes into x, but
            not in its first call.
        FloatingPointError: check_finite found NaN or an infinity; the text names the step.

    Notes:
        Noise and update have the same bits in any batch, on any number of ranks (each passes
        `sample_seeds(seed, n, start=...)`) and on every backend. The bits of the score depend on the network: GEMMs and
        convolutions change them with the batch size. With `micro_batch` every call has the same shape, and sample k
        is row k % micro_batch of its call. Samples are equal bit for bit with micro_batch=1, and between ranks that
        start at multiples of micro_batch. A sample in another row is equal only if the network's kernels compute all
        rows alike. A CPU activation does not if the number of elements of a micro-batch is no multiple of the vector
        width, because a scalar loop computes the last ones.

    Source:
        Song et al. 2021, arXiv:2011.13456, appendices D, E, F and G; norm="marginal" is the step size of
        annealed Langevin dynamics, Song and Ermon 2019, arXiv:1907.05600.

    Example:
        >>> import pyflow
        >>> sde = pyflow.sde.VPSDE()
        >>> def score(x, t):  # score of standard normal data
        ...     return -x
        >>> x = sample(sde, score, (2, 3), steps=50, seed=0, progress=False)
        >>> bool((x[1] == sample(sde, score, (4, 3), steps=50, seed=0, progress=False)[1]).all())
        True
    """
    plan = _Plan.checked(
        "sample", sde, score_fn, method, predictor, corrector, corrector_steps, snr, step_size, norm, steps, eps,
        denoise, micro_batch,
    )  # fmt: skip
    return Step(plan, score_fn, plan.advance(score_fn)).sample(
        shape, seed=seed, device=device, dtype=dtype, progress=progress, callback=callback, check_finite=check_finite
    )


def make_step(
    sde: SDE,
    score_fn: Score,
    method: str = "euler_maruyama",
    *,
    steps: int = 1000,
    predictor: str | None = None,
    corrector: str = "langevin",
    corrector_steps: int = 1,
    snr: float = 0.16,
    step_size: float | None = None,
    norm: str = "marginal",
    eps: float = 1e-3,
    denoise: bool = True,
    micro_batch: int | None = None,
    **compile_options: Any,
) -> Step:
    """Return one step of a sampler, with score and update compiled into one graph for all times.

    Args:
        sde, score_fn, method, steps, predictor, ..., micro_batch: as for `sample`.
        compile_options: options of `torch.compile`, for example mode="reduce-overhead"; fullgraph is always on.

    Returns:
        `Step`: `step(x, i, seed) -> x'` for i = 0 ... steps - 1, and `step.sample(shape, seed=..., ...)` for all steps.

    Raises:
        TypeError, ValueError: as for `sample`.

    Notes:
        Time, scalars and step number are 0-d tensors on x's device, so one graph serves all steps and the host reads
        nothing. Another shape of x recompiles.

    Example:
        >>> import pyflow
        >>> sde = pyflow.sde.VPSDE()
        >>> step = make_step(sde, lambda x, t: -x, "ancestral", steps=100, backend="eager")
        >>> step(torch.zeros(2, 3), 99, torch.zeros(2, dtype=torch.int64)).shape
        torch.Size([2, 3])
    """
    plan = _Plan.checked(
        "make_step", sde, score_fn, method, predictor, corrector, corrector_steps, snr, step_size, norm, steps, eps,
        denoise, micro_batch,
    )  # fmt: skip
    if "fullgraph" in compile_options:
        raise TypeError("make_step: fullgraph is always on")
    return Step(plan, score_fn, torch.compile(plan.advance(score_fn), fullgraph=True, **compile_options))


class Step:
    """One step of a sampler at any of its times, and the loop over all steps; made by `make_step`."""

    def __init__(self, plan: _Plan, score_fn: Score, advance: Callable[..., Tensor]) -> None:
        self._plan, self._score_fn, self._advance = plan, score_fn, advance
        self.times = plan.times
        self._rows: dict[torch.device, list[tuple]] = {}

    def __call__(self, x: Tensor, i: int, seed: Tensor) -> Tensor:
        """Return x after step i, given x before it; seed: (B,) int64, or 0-d for one noise stream over the batch."""
        check.float_tensor("step", "x", x)
        if x.dim() == 0:
            raise ValueError("step: x must have at least one dim, the batch, got a scalar")
        if not 0 <= check.at_least("step", "i", i, 0) < len(self.times):
            raise ValueError(f"step: i must be below the number of steps, {len(self.times)}, got {i}")
        if isinstance(seed, Tensor):
            # here, because errors inside the compiled step are reported by the compiler
            seed_tensor("step", seed, x.shape, x.device)
        # outside inference mode a score function can use autograd, and tensors count writes in place
        normal = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
        with normal, torch.no_grad():
            return self._take(x.clone() if x.is_inference() else x, i, seed)

    def _take(self, x: Tensor, i: int, seed: Tensor) -> Tensor:
        rows = self._rows.get(x.device) or self._load(x.device)
        return self._advance(x, seed, *rows[i])

    def sample(
        self,
        shape: Sequence[int],
        *,
        seed: int | Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        progress: bool = True,
        callback: Callable[[int, float, Tensor], object] | None = None,
        check_finite: bool = False,
    ) -> Tensor:
        """Draw samples by taking all steps from the prior; takes the same arguments as `pyflow.sde.sample`."""
        op = "sample"
        shape, dtype = check.batch_shape(op, shape), check.float_dtype(op, dtype)
        if callback is not None and not callable(callback):
            raise TypeError(f"{op}: callback must be callable, got {type(callback).__name__}")
        check_finite = check.flag(op, "check_finite", check_finite)
        if device is None and not isinstance(seed, Tensor):
            device = _device_of(self._score_fn)
        show = None if callback is None else Lent(op, "callback", lambda x, i, t: callback(i, t, x))
        with torch.inference_mode(False), torch.no_grad():
            seed = seeds_for(op, shape[0], seed, device)
            x = self._plan.sde.prior_sample(shape, seed, dtype=dtype)
            if self._plan.start != 1:
                x *= self._plan.start
            steps = len(self.times)
            for i, t in enumerate(_progress.tracked(self.times, "step", progress, mininterval=0.2)):
                x = self._take(x, i, seed)
                if check_finite and not bool(x.isfinite().all()):
                    raise FloatingPointError(f"{op}: x is not finite after step {i} of {steps}, t = {t:.4g}")
                if show is not None:
                    show(x, i, t)
        return x

    def _load(self, device: torch.device) -> list[tuple]:
        rows = self._rows[device] = self._plan.rows(device)
        return rows


@dataclass(frozen=True, eq=False)
class _Plan:
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
        if not isinstance(sde, SDE):
            raise TypeError(f"{op}: sde must be a pyflow.sde.SDE, got {type(sde).__name__}")
        if not callable(score_fn):
            raise TypeError(f"{op}: score_fn must be callable, got {type(score_fn).__name__}")
        check.at_least(op, "steps", steps, 1)
        denoise = check.flag(op, "denoise", denoise)
        if not 0 < check.number(op, "eps", eps) < sde.T:
            raise ValueError(f"{op}: eps must be in (0, {sde.T:g}), got {eps}")
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

    def rows(self, device: torch.device) -> list[tuple]:
        """Return (t, a, b, c, size, step, (numbers of the corrector's steps)) of every step, as 0-d tensors."""
        # 16 bytes apart, because compiled code copies inputs that are not aligned
        scalars = self.table.new_zeros(*self.table.shape, 4)
        scalars[..., 0] = self.table
        steps = len(self.times)
        counters = torch.zeros(steps, 1 + self.corrector_steps, 2, dtype=torch.int64, device="cpu")
        counters[:, 0, 0] = torch.arange(steps, device="cpu")
        counters[:, 1:, 0] = torch.arange(steps * self.corrector_steps, device="cpu").view(steps, -1)
        scalars, counters = scalars.to(device)[..., 0], counters.to(device)[..., 0]
        columns = [column.unbind() for column in scalars]
        counts = [row.unbind() for row in counters]
        return [(*row, step, tuple(rest)) for *row, (step, *rest) in zip(*columns, counts, strict=True)]

    def advance(self, score_fn: Score) -> Callable[..., Tensor]:
        score_fn = checked(self.op, Lent(self.op, "score_fn", score_fn))
        if self.micro_batch:
            score_fn = in_micro_batches(score_fn, self.micro_batch)
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


def _device_of(score_fn: Score) -> torch.device:
    parameter = next(score_fn.parameters(), None) if isinstance(score_fn, nn.Module) else None
    return torch.get_default_device() if parameter is None else parameter.device
