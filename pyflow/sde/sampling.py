"""Reverse-time samplers: every method is a table of scalars a, b, c for one fused step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import _progress
from .._torch import compiler_error
from ..ops.noise import seed_tensor
from . import _graph
from ._plan import Plan
from ._score import Lent, Score
from .equations import SDE, seeds_for


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
    cuda_graph: bool = False,
) -> Tensor:
    """Draw samples from a score model by solving the SDE backwards from its prior.

    Every step is x' = a x + b score + c z. The times are linspace(T, eps, steps), with T = 1 for every SDE of pyflow.

    Args:
        sde: `VPSDE`, `SubVPSDE`, `VESDE`, `from_marginals(...)` or a subclass of `SDE`.
        score_fn: called as score_fn(x, t) with x (B, ...) in `dtype` and t (B,) float32; returns the score in x's
            shape, in any float dtype. A function or a module. It runs under `no_grad`; one that differentiates an
            energy or a classifier does so under `torch.enable_grad()`. It may write into t, and into x if it does
            so from the first call on.
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
        cuda_graph: on an NVIDIA GPU, capture the fourth step as a CUDA graph and replay it for all later ones, without
            the launch cost of the network. score_fn must then do the same work on the GPU in every step; its Python
            code runs in the first four only, and must not read values of tensors.

    Returns:
        Samples in the given shape and dtype, without a graph.

    Raises:
        TypeError: score_fn is not callable, wrong dtype, or a count is not an integer.
        ValueError: unknown method, predictor, corrector or norm; steps < 1; eps outside (0, T); a method that the SDE
            does not define; a schedule with steps that are not finite; a score_fn or callback that writes into x, but
            not in its first call; cuda_graph with a callback or without a GPU.
        RuntimeError: score_fn cannot be captured as a CUDA graph.
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
    plan = Plan.checked(
        "sample", sde, score_fn, method, predictor, corrector, corrector_steps, snr, step_size, norm, steps, eps,
        denoise, micro_batch,
    )  # fmt: skip
    return Step(plan, score_fn, plan.advance(score_fn)).sample(
        shape, seed=seed, device=device, dtype=dtype, progress=progress, callback=callback, check_finite=check_finite,
        cuda_graph=cuda_graph,
    )  # fmt: skip


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
    plan = Plan.checked(
        "make_step", sde, score_fn, method, predictor, corrector, corrector_steps, snr, step_size, norm, steps, eps,
        denoise, micro_batch,
    )  # fmt: skip
    if "fullgraph" in compile_options:
        raise TypeError("make_step: fullgraph is always on")
    advance = _explained(plan, score_fn, torch.compile(plan.advance(score_fn), fullgraph=True, **compile_options))
    return Step(plan, score_fn, advance, captures=_captures(**compile_options))


def _explained(plan: Plan, score_fn: Score, advance: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the compiled step, in which a mistake of the score is an error of its own and not the compiler's page."""
    score, errors = plan.score(score_fn), compiler_error()

    def step(x: Tensor, seed: Tensor, t: Tensor, *rest: Any) -> Tensor:
        try:
            return advance(x, seed, t, *rest)
        except errors as error:
            failed = error
        score(x, t.expand(len(x)).clone())
        # by itself the score runs: the compiler cannot take it
        raise failed

    return step


def _captures(mode: str | None = None, options: Mapping[str, Any] | None = None, **other: Any) -> bool:
    """Whether torch.compile with these options makes CUDA graphs."""
    return mode in ("reduce-overhead", "max-autotune") or bool((options or {}).get("triton.cudagraphs"))


class Step:
    """One step of a sampler at any of its times, and the loop over all steps; made by `make_step`.

    `captures`: whether `advance` is a CUDA graph already.
    """

    def __init__(self, plan: Plan, score_fn: Score, advance: Callable[..., Tensor], *, captures: bool = False) -> None:
        self._plan, self._score_fn, self._advance = plan, score_fn, advance
        self.times, self.captures = plan.times, captures
        self._rows: dict[torch.device, list[tuple]] = {}

    def __call__(self, x: Tensor, i: int, seed: Tensor) -> Tensor:
        """Return x after step i, given x before it; seed: (B,) int64, or 0-d for one noise stream over the batch."""
        check.float_tensor("step", "x", x)
        check.batch("step", "x", x)
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
        cuda_graph: bool = False,
    ) -> Tensor:
        """Draw samples by taking all steps from the prior; takes the same arguments as `pyflow.sde.sample`."""
        op = "sample"
        shape, dtype = check.batch_shape(op, shape), check.float_dtype(op, dtype)
        if callback is not None:
            check.function(op, "callback", callback)
        check_finite = check.flag(op, "check_finite", check_finite)
        cuda_graph = check.flag(op, "cuda_graph", cuda_graph)
        if cuda_graph and callback is not None:
            raise ValueError(f"{op}: cuda_graph and callback exclude each other, got both")
        if cuda_graph and self.captures:
            raise ValueError(f"{op}: cuda_graph must be False for a step whose compiled code captures graphs, got True")
        if device is None and not isinstance(seed, Tensor):
            device = _device_of(self._score_fn)
        place = seed.device if isinstance(seed, Tensor) and device is None else check.device(op, device)
        if cuda_graph and place.type != "cuda":
            raise ValueError(f"{op}: cuda_graph needs a device of type cuda, got {place}")
        show = None if callback is None else Lent(op, "callback", lambda x, i, t: callback(i, t, x))
        with torch.inference_mode(False), torch.no_grad():
            seed = seeds_for(op, shape[0], seed, device)
            x = self._plan.sde.prior_sample(shape, seed, dtype=dtype)
            if self._plan.start != 1:
                x *= self._plan.start
            if cuda_graph:
                with _graph.own_stream(x.device):
                    x = self._all(op, x, seed, self._replay(op, x.device), progress, check_finite)
                return _graph.given_back(x)
            return self._all(op, x, seed, self._take, progress, check_finite, show)

    def _all(
        self,
        op: str,
        x: Tensor,
        seed: Tensor,
        take: Callable[[Tensor, int, Tensor], Tensor],
        progress: bool,
        check_finite: bool,
        show: Callable[[Tensor, int, float], object] | None = None,
    ) -> Tensor:
        steps = len(self.times)
        for i, t in enumerate(_progress.tracked(self.times, "step", progress, mininterval=0.2)):
            x = take(x, i, seed)
            if check_finite and not bool(x.isfinite().all()):
                raise FloatingPointError(f"{op}: x is not finite after step {i} of {steps}, t = {t:.4g}")
            if show is not None:
                show(x, i, t)
        return x

    def _replay(self, op: str, device: torch.device) -> _graph.Replay:
        return _graph.Replay(op, self._advance, *self._plan.tables(device), Plan.row_of)

    def _load(self, device: torch.device) -> list[tuple]:
        rows = self._rows[device] = self._plan.rows(device)
        return rows


def _device_of(score_fn: Score) -> torch.device:
    parameter = next(score_fn.parameters(), None) if isinstance(score_fn, nn.Module) else None
    return torch.get_default_device() if parameter is None else parameter.device
