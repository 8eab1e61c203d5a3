"""Parts of training loops, and one Euler-Maruyama loop timed four ways: eager torch, pyflow, and each compiled."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyflow.ops import normal, sample_seeds
from pyflow.sde import VPSDE, make_step, sample

from ._demo import synchronize

Score = Callable[[Tensor, Tensor], Tensor]

LOOPS = ("eager torch", "torch.compile", "pyflow", "pyflow, compiled")


@dataclass(frozen=True)
class Case:
    """Input on which the loops are timed."""

    name: str
    shape: tuple[int, ...]
    network: bool
    steps: int


CASES = (
    Case("with the network, 64 digits", (64, 64), True, 100),
    Case("without, 64 digits", (64, 64), False, 100),
    Case("without, (16, 3, 256, 256)", (16, 3, 256, 256), False, 10),
)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, weight: float) -> None:
    """Move the parameters of the average towards the model's by the fraction `weight`."""
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(p, weight)


def cosine_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, times a half cosine that ends at 0."""
    start = min(1.0, (step + 1) / warmup)
    return peak * start * 0.5 * (1 + math.cos(math.pi * step / steps))


def plain_rows(sde: VPSDE, steps: int, eps: float, device: torch.device) -> list[tuple[Tensor, ...]]:
    """Return (t, a, b, c) of every step as 0-d tensors, so that torch.compile compiles only once."""
    t = torch.linspace(1, eps, steps, dtype=torch.float64)
    beta = sde.beta(t) / steps
    # the last step adds no noise
    c = torch.cat((beta[:-1].sqrt(), beta.new_zeros(1)))
    columns = torch.stack((t, 1 + beta / 2, beta, c)).float().to(device)
    return [*zip(*(column.unbind() for column in columns), strict=True)]


def plain_step(score: Score, noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Callable[..., Tensor]:
    """x' = a x + b score + c z in torch."""

    def step(x: Tensor, t: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return a * x + b * score(x, t) + c * noise(x)

    return step


@torch.no_grad()
def plain_loop(step: Callable[..., Tensor], x: Tensor, rows: Sequence[tuple[Tensor, ...]]) -> Tensor:
    for t, *row in rows:
        x = step(x, t.expand(len(x)), *row)
    return x


def pace(
    sde: VPSDE, net: Score, case: Case, *, eps: float, rounds: int, compiled: bool, device: torch.device
) -> dict[str, float]:
    """Return steps per second of every loop, drawing the prior included: medians over rounds that run all loops."""
    zero = torch.zeros(case.shape, device=device)
    score = net if case.network else lambda x, t: zero
    rows = plain_rows(sde, case.steps, eps, device)

    def in_torch(step: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: plain_loop(step, torch.randn(case.shape, device=device), rows)

    loops = {
        "eager torch": in_torch(plain_step(score)),
        "pyflow": lambda: sample(
            sde, score, case.shape, steps=case.steps, eps=eps, seed=0, device=device, progress=False
        ),
    }
    if compiled:
        step = make_step(sde, score, steps=case.steps, eps=eps)
        loops["torch.compile"] = in_torch(torch.compile(plain_step(score), fullgraph=True))
        loops["pyflow, compiled"] = lambda: step.sample(case.shape, seed=0, device=device, progress=False)
    seconds: dict[str, list[float]] = {name: [] for name in LOOPS if name in loops and works(name, loops[name])}
    for _ in range(rounds):
        for name, taken in seconds.items():
            synchronize(device)
            began = time.perf_counter()
            loops[name]()
            synchronize(device)
            taken.append(time.perf_counter() - began)
    return {name: case.steps / statistics.median(taken) for name, taken in seconds.items()}


def works(name: str, loop: Callable[[], Tensor]) -> bool:
    """Run a loop once; returns False for a compiled loop that fails, as it does without a compiler."""
    try:
        loop()
    except RuntimeError as error:
        if "compile" not in name:
            raise
        print(f"{name} is off: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return False
    return True


def difference(sde: VPSDE, score: Score, shape: tuple[int, ...], steps: int, eps: float, device: torch.device) -> float:
    """Return the largest difference between samples of `sample` and of the eager loop given the same noise."""
    seeds = sample_seeds(0, shape[0]).to(device)
    numbers = iter(range(steps))
    step = plain_step(score, lambda x: normal(x.shape, seed=seeds, step=next(numbers)))
    theirs = plain_loop(step, normal(shape, seed=seeds, purpose="prior"), plain_rows(sde, steps, eps, device))
    ours = sample(sde, score, shape, steps=steps, eps=eps, seed=seeds, progress=False)
    return (ours - theirs).abs().max().item()


def table(paces: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table of steps per second and speed-ups over eager torch."""
    lines = [f"{'steps/s, Euler-Maruyama':<28}" + "".join(f"{name:>22}" for name in LOOPS)]
    for name, speeds in paces.items():
        cells = (
            f"{speeds[loop]:,.0f}{speeds[loop] / speeds['eager torch']:>8.2f} x" if loop in speeds else "not timed"
            for loop in LOOPS
        )
        lines.append(f"{name:<28}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)
