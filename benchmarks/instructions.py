"""SASS instructions per element of the elementwise Triton kernels, and the times they predict for an H100.

    python -m pyflow.benchmarks.instructions [part of a case's name ...]

Needs a checkout (run it in its root) and no GPU: kernels are compiled ahead of time for sm_90, recorded and specialised
as tests/triton/aot does. A thread's instructions are those outside loops once, and those of a loop body times
its trips (TILE.segment / TILE.cols, block_rows / TILE.rows, or the tiles of an fsq program; one for any other loop).
Slow paths after the last exit do not count. Issue time assumes one instruction per cycle and scheduler, so half-rate
ones are underestimated.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

F32, BF16 = torch.float32, torch.bfloat16
SHAPE, IMAGES, POSITIONS = (65536, 1024), (64, 4, 512, 512), 2**24

SCHEDULERS, CLOCK, BANDWIDTH = 132 * 4, 1.7e9, 3.35e12  # H100 SXM; a scheduler issues for 32 lanes


class Row(NamedTuple):
    case: str
    instructions: float  # per element of the largest tensor
    registers: int
    spills: int  # bytes of stack and local memory
    issue: float  # seconds for the whole tensor
    memory: float


def cases() -> dict[str, Callable[[], Any]]:
    """Map names to functions that return one recorded launch."""
    from pyflow._schemas import SCALE_MAPS
    from tests.triton import aot

    families = aot.families()

    def coupling(scale_map: str, index: int, dtype: torch.dtype = F32) -> Callable[[], Any]:
        options = (SCALE_MAPS.index(scale_map), 2.0)
        x, shift, scale = (torch.empty(SHAPE, dtype=dtype, device="meta") for _ in range(3))
        return lambda: families["coupling"].affine(x, shift, scale, scale_map=options)[index]

    def interleaved(index: int) -> Any:
        return families["coupling"].packed(torch.empty(SHAPE), torch.empty(SHAPE[0], 2 * SHAPE[1]), 2, 1)[index]

    def noise(kind: int) -> Any:
        # a seed in memory is known only to the kernel
        return families["noise"].drawn(IMAGES, torch.empty((), dtype=torch.int64), F32, kind)[-1]

    def sde(name: str, index: int = 0) -> Any:
        x, scalars, seed = torch.empty(IMAGES), [torch.empty(64)] * 3, torch.empty((), dtype=torch.int64)
        return [one for one in families["sde"].stepped(x, x, seed, scalars) if one.name == f"sde.{name}"][index]

    def fsq(levels: tuple[int, ...], index: int, first: bool = False, dtype: torch.dtype = F32) -> Any:
        d = len(levels)
        shape = (64, d, POSITIONS // 64) if first else (POSITIONS, d)
        return families["fsq"].quantizer(torch.empty(shape, dtype=dtype).movedim(1, 0), levels, "vqp")[index]

    def spline(index: int, bins: int = 8, **options: Any) -> Any:
        return families["spline"].splines(*families["spline"].of(bins, shape=(2**20, 8)), **options)[index]

    named: dict[str, Callable[[], Any]] = {}
    for scale_map in ("exp", "tanh", "sigmoid"):
        named[f"coupling {scale_map} forward"] = coupling(scale_map, 0)
        named[f"coupling {scale_map} backward"] = coupling(scale_map, 1)
    four, five = (8, 5, 5, 5), (7, 5, 5, 5, 5)
    critic = lambda: families["gan_qp"].critic(torch.empty(512, 3, 256, 256), None, torch.empty(512))
    head = lambda: families["flow_head"].head(torch.empty(SHAPE), torch.empty(SHAPE[1]), 0)
    chain = lambda: families["energy"].chained(SHAPE, F32, torch.empty((), dtype=torch.int64), torch.empty(()))
    return named | {
        "coupling tanh forward bf16": coupling("tanh", 0, BF16),
        "coupling tanh backward bf16": coupling("tanh", 1, BF16),
        "coupling interleaved forward": lambda: interleaved(0),
        "coupling interleaved backward": lambda: interleaved(1),
        "sde_step": lambda: sde("step_kernel", 1),
        "normal": lambda: noise(1),
        "uniform": lambda: noise(0),
        "denoising loss": lambda: sde("loss_kernel"),
        "denoising loss backward": lambda: sde("loss_kernel", 1),
        "fsq 8-5-5-5": lambda: fsq(four, 0),
        "fsq 8-5-5-5 bf16": lambda: fsq(four, 0, dtype=BF16),
        "fsq 7-5-5-5-5": lambda: fsq(five, 0),
        "fsq 8-5-5-5 channels first": lambda: fsq(four, 0, first=True),
        "fsq 8-5-5-5 backward": lambda: fsq(four, 2),
        "fsq 8-5-5-5 decode": lambda: fsq(four, 3),
        "flow head forward": lambda: head()[0],
        "flow head backward": lambda: next(one for one in head() if "backward" in one.name),
        "gan_qp distances": lambda: next(one for one in critic() if one.name == "gan_qp.sums_kernel"),
        "spline 8 forward": lambda: spline(0),
        "spline 8 inverse": lambda: spline(0, inverse=True),
        "spline 8 backward": lambda: spline(1),
        "spline 16 forward": lambda: spline(0, 16),
        "mala accept": lambda: chain()[0],
    }


def elements_of(constants: dict[str, Any]) -> tuple[int, int]:
    """Return the elements of a program and the trips of its loop, over columns or, with `block_rows`, over rows."""
    tile = constants["TILE"]
    if hasattr(tile, "positions"):
        return tile.positions * tile.channels * tile.steps, tile.steps
    rows = constants.get("block_rows", tile.rows)
    return rows * tile.segment, rows // tile.rows * (tile.segment // tile.cols)


def per_thread(code: list[Any], trips: int) -> int:
    """Count the instructions that a thread executes."""
    loops = [(one.target, one.address) for one in code if one.target is not None and one.target < one.address]
    inside = sum(any(first <= one.address <= last for first, last in loops) for one in code)
    return len(code) - inside + trips * inside


def bytes_of(launch: Any) -> int:
    """Count the bytes of all tensors once, an expanded dim once; a view at one index of a dim stands for the whole."""
    whole = (t._base if t._base is not None and t._base.dim() > t.dim() else t for t in launch.tensors)
    unique = {id(t): t for t in whole}.values()
    return sum(t.element_size() * math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s) for t in unique)


def measured(case: str, launch: Any) -> Row:
    from tests.triton import aot

    kernel = aot.compiled(launch, "sm_90")
    elements, trips = elements_of(launch.constants)
    used = aot.resources(kernel)
    each = per_thread(aot.sass(kernel), trips) * 32 * kernel.metadata.num_warps / elements
    largest = max(t.numel() for t in launch.tensors)
    issue = largest * each / 32 / (SCHEDULERS * CLOCK)
    return Row(case, each, used.registers, used.stack + used.local, issue, bytes_of(launch) / BANDWIDTH)


def rows(names: list[str]) -> list[Row]:
    chosen = {case: make for case, make in cases().items() if not names or any(n in case for n in names)}
    found = []
    for case, make in chosen.items():
        with torch.device("meta"):
            launch = make()
        found.append(measured(case, launch))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*")
    print("| case | instructions per element | registers | spills | issue, H100 | memory, H100 | bound by |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for row in rows(parser.parse_args().cases):
        times = f"{row.issue * 1e6:.0f} µs | {row.memory * 1e6:.0f} µs"
        bound = "issue" if row.issue > row.memory else "memory"
        print(f"| {row.case} | {row.instructions:.1f} | {row.registers} | {row.spills} B | {times} | {bound} |")


if __name__ == "__main__":
    main()
