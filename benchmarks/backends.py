"""Both GPU backends, Triton and CUDA C++, by size: what the choice in `_backend` rests on, and each family's limit.

    python -m pyflow.benchmarks.backends [--out FOLDER] [part of a case's name ...]

Every case takes about n values, 2**11 to 2**26, parameters of splines included. Two times per call: its kernels, as the
replay of a CUDA graph with a cold L2 cache, and its launch, the wall time of a call made from Python, back to back.
Processes compile the kernels beforehand, side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pyflow
from pyflow import _backend, ops

from . import machine, report
from .gpu import BACKENDS, Clock, Gpu
from .measure import reason
from .registry import Outputs, bind, normals

POWERS = (11, 14, 17, 20, 23, 26)
TRITON_ALONE = ("center_gram",)
LAUNCHES = 50
F32, BF16 = torch.float32, torch.bfloat16


class Work(NamedTuple):
    """A call, and the bytes that it reads and writes if each tensor is read and written once."""

    call: Callable[[], object]
    bytes: int


Make = Callable[[int, torch.device], Work]


class Row(NamedTuple):
    case: str
    power: int
    backend: str
    seconds: float
    launch: float
    bytes: int


def matrix(n: int) -> tuple[int, int]:
    """Return (rows, columns) of n values, a power of two: 32 columns for small n, at most 1024."""
    columns = min(1024, 1 << (n.bit_length() - 1) // 2)
    return n // columns, columns


def images(n: int) -> tuple[int, int, int]:
    """Return (batch, channels, pixels) of n values."""
    batch = min(64, n // 1024)
    return batch, 4, n // 4 // batch


def _op(
    function: Callable[..., Any], count: int, moved: int, n: int, device: torch.device, *, dtype: torch.dtype = F32,
    backward: bool = False, shape: tuple[int, ...] | None = None, widths: tuple[int, ...] = (),
) -> Work:  # fmt: skip
    """A function of `count` tensors of n values; `moved` is how many such tensors are read and written.

    `widths` are the last dims of the tensors, as multiples of the shape's.
    """
    shape = shape or matrix(n)
    inputs = tuple(normals((*shape[:-1], shape[-1] * width), device, 1, dtype)[0] for width in widths or (1,) * count)

    def outputs(*tensors: Tensor) -> Outputs:
        result = function(*tensors)
        return tuple(t for t in result if t is not None) if isinstance(result, tuple) else (result,)

    cotangents = tuple(torch.ones_like(t) for t in outputs(*inputs)) if backward else None
    return Work(bind(outputs, inputs, cotangents), moved * n * dtype.itemsize)


def _spline(n: int, device: torch.device, *, moved: int, backward: bool = False, **options: Any) -> Work:
    shape = (max(1, n // 32 // 8), 8)
    x, params = normals(shape, device, 1)[0], normals((*shape, 23), device, 1)[0]
    function = partial(ops.rq_spline, bins=8, bound=3.0, **options)
    cotangents = (torch.ones_like(x), torch.ones(shape[:1], device=device)) if backward else None
    return Work(bind(function, (x, params), cotangents), moved * 4 * x.numel())


def _quantizer(
    n: int, device: torch.device, *, levels: tuple[int, ...] = (8, 5, 5, 5), dim: int = -1, backward: bool = False,
    dtype: torch.dtype = F32,
) -> Work:  # fmt: skip
    d = len(levels)
    shape = (n // d, d) if dim == -1 else (images(n)[0], d, n // d // images(n)[0])
    (z,) = normals(shape, device, 1, dtype)
    if backward:
        work = bind(lambda z: (ops.fsq(z, levels, dim=dim)[0],), (z,), (torch.ones_like(z),))
        return Work(work, 5 * z.nbytes)
    return Work(lambda: ops.fsq(z, levels, dim=dim), 2 * z.nbytes + 4 * z.numel() // d)


def _noise(n: int, device: torch.device, *, draw: Callable[..., Tensor]) -> Work:
    shape = images(n)
    seed = torch.tensor(5, device=device)
    return Work(lambda: draw(shape, seed=seed, step=1), 4 * n)


def _step(n: int, device: torch.device, *, dtype: torch.dtype = F32) -> Work:
    function = lambda x, score: ops.sde_step(x, score, 1.01, 0.05, 0.3, seed=5, step=7)
    return _op(function, 2, 3, n, device, shape=images(n), dtype=dtype)


def _loss(n: int, device: torch.device, *, backward: bool = False) -> Work:
    std = torch.linspace(0.1, 1.0, images(n)[0], device=device)
    function = lambda pred: ops.denoising_loss(pred, std, seed=5, step=7)
    return _op(function, 1, 3 if backward else 1, n, device, shape=images(n), backward=backward)


def _accept(n: int, device: torch.device) -> Work:
    z, new, grad, grad_new = normals(matrix(n), device, 4)
    u, u_new = normals((matrix(n)[0],), device, 2)
    return Work(lambda: ops.mala_accept(z, new, u, u_new, grad, grad_new, 0.01, seed=5, step=7), 6 * z.nbytes)


def _gan(n: int, device: torch.device) -> Work:
    real, fake = normals((images(n)[0], n // 2 // images(n)[0]), device, 2)
    values = normals(real.shape[:1], device, 2)
    function = lambda a, b: (ops.gan_qp_loss(a, b, real, fake, lam=10.0),)
    return Work(bind(function, values, (torch.ones((), device=device),)), 2 * real.nbytes)


def _center(n: int, device: torch.device) -> Work:
    _, side = matrix(n)
    (gram,) = normals((n // side**2, side, side), device, 1)
    return Work(lambda: ops.center_gram(gram), 2 * gram.nbytes)


def _coupling(scale_map: str, inverse: bool = False) -> Callable[..., Any]:
    return partial(ops.affine_coupling, scale_map=scale_map, inverse=inverse)


CASES: dict[str, Make] = {
    "coupling additive": partial(_op, ops.additive_coupling, 2, 3),
    "coupling exp": partial(_op, _coupling("exp"), 3, 4),
    "coupling exp inverse": partial(_op, _coupling("exp", True), 3, 4),
    "coupling tanh": partial(_op, _coupling("tanh"), 3, 4),
    "coupling sigmoid": partial(_op, _coupling("sigmoid"), 3, 4),
    "coupling tanh bf16": partial(_op, _coupling("tanh"), 3, 4, dtype=BF16),
    "coupling tanh forward+backward": partial(_op, _coupling("tanh"), 3, 9, backward=True),
    "coupling interleaved": partial(
        _op, partial(ops.affine_coupling_packed, packing="interleaved", scale_map="exp"), 2, 4, widths=(1, 2)
    ),
    "flow head gaussian": partial(_op, ops.flow_log_prob, 1, 1),
    "flow head gaussian forward+backward": partial(_op, ops.flow_log_prob, 1, 3, backward=True),
    "flow head logistic": partial(_op, partial(ops.flow_log_prob, prior="logistic"), 1, 1),
    "fsq 8-5-5-5": _quantizer,
    "fsq 7-5-5-5-5": partial(_quantizer, levels=(7, 5, 5, 5, 5)),
    "fsq 8-5-5-5 bf16": partial(_quantizer, dtype=BF16),
    "fsq 8-5-5-5 forward+backward": partial(_quantizer, backward=True),
    "fsq 8-5-5-5 channel first": partial(_quantizer, dim=1),
    "fsq 8-5-5-5 channel first forward+backward": partial(_quantizer, dim=1, backward=True),
    "normal": partial(_noise, draw=ops.normal),
    "uniform": partial(_noise, draw=ops.uniform),
    "sde step": _step,
    "sde step bf16": partial(_step, dtype=BF16),
    "denoising loss": _loss,
    "denoising loss forward+backward": partial(_loss, backward=True),
    "gradient penalty": partial(_op, ops.grad_norm_penalty, 1, 1),
    "mala accept": _accept,
    "gan_qp l1 forward+backward": _gan,
    "center_gram": _center,
    # x, y and 23 parameters; backward reads x, the parameters and the gradient of y and writes 24 gradients
    "spline": partial(_spline, moved=25),
    "spline inverse": partial(_spline, moved=25, inverse=True),
    "spline zuko": partial(_spline, moved=25, variant="zuko"),
    "spline forward+backward": partial(_spline, moved=74, backward=True),
}


def chosen(names: list[str]) -> Iterator[tuple[str, int]]:
    """Yield (case, power) of the cases whose name contains one of the names; all without names."""
    for case in CASES:
        if not names or any(name in case for name in names):
            yield from ((case, power) for power in POWERS)


def build(case: str, power: int, device: torch.device) -> Work:
    return CASES[case](1 << power, device)


def compile_all(names: list[str], share: int, shares: int) -> None:
    """Run each `shares`-th case of Triton once, which compiles its kernels."""
    for case, power in list(chosen(names))[share::shares]:
        with pyflow.backend("triton"):
            build(case, power, torch.device("cuda")).call()
    torch.cuda.synchronize()


def compile_side_by_side(names: list[str], shares: int) -> None:
    command = [sys.executable, "-m", "pyflow.benchmarks.backends", *names, "--compile"]
    running = [subprocess.Popen([*command, str(share), str(shares)]) for share in range(shares)]
    for one in running:
        one.wait()


def measure(names: list[str]) -> tuple[list[Row], list[str]]:
    """Return the rows, and a line for each case that failed."""
    device, gpu = torch.device("cuda"), Gpu()
    rows, failed = [], []
    for case, power in chosen(names):
        for backend in (
            b for b in BACKENDS if not _backend.status()[b] and (b == "triton" or case not in TRITON_ALONE)
        ):
            try:
                with pyflow.backend(backend):
                    work = build(case, power, device)
                    clock = Clock(work.call, gpu)
                    if clock.note:
                        failed.append(f"{case} 2^{power} {backend}: {clock.note}")
                    launch = min(clock.launch(LAUNCHES) for _ in range(2))
                    seconds = statistics.median(gpu.seconds(clock.run, 10))
                    rows.append(Row(case, power, backend, seconds, launch, work.bytes))
            except Exception as why:  # the table stays without this row
                failed.append(f"{case} 2^{power} {backend}: {reason(why)}")
        gpu.free()
    return rows, failed


def copy_bandwidth(n: int = 1 << 26) -> float:
    """Bytes per second that torch's copy of n floats reads and writes."""
    source = torch.ones(n, device="cuda")
    target = torch.empty_like(source)
    gpu = Gpu()
    clock = Clock(lambda: target.copy_(source), gpu)
    return 2 * source.nbytes / statistics.median(gpu.seconds(clock.run, 20))


def table(rows: list[Row], bandwidth: float) -> str:
    """Return a line per case: kernels' share of copy bandwidth at the largest size, then by size launch and kernels."""
    of: dict[tuple[str, int, str], Row] = {(row.case, row.power, row.backend): row for row in rows}
    lines = [
        "| case | of copy, " + ", ".join(BACKENDS) + " | " + " | ".join(f"2^{power}" for power in POWERS) + " |",
        "|---|---:|" + "---:|" * len(POWERS),
    ]
    for case in dict.fromkeys(row.case for row in rows):
        shares = [
            f"{row.bytes / row.seconds / bandwidth:.0%}" if (row := of.get((case, POWERS[-1], b))) else "–"
            for b in BACKENDS
        ]
        cells = [_cell([of.get((case, power, b)) for b in BACKENDS]) for power in POWERS]
        lines.append(f"| {case} | {' / '.join(shares)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: list[Row | None]) -> str:
    launches = " / ".join(report.duration(row.launch) if row else "–" for row in found)
    kernels = " / ".join(report.duration(row.seconds) if row else "–" for row in found)
    return f"{launches} ({kernels})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="parts of names (default: all)")
    parser.add_argument("--out", type=Path, help="folder for backends.json and backends.md")
    parser.add_argument("--compile", type=int, nargs=2, metavar=("SHARE", "SHARES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("backends: no GPU is available")
    if args.compile:
        compile_all(args.cases, *args.compile)
        return
    compile_side_by_side(args.cases, max(1, (os.cpu_count() or 2) - 2))
    bandwidth = copy_bandwidth()
    rows, failed = measure(args.cases)
    facts = {**machine.facts("cuda", torch.get_num_threads(), None), "copy": f"{bandwidth / 1e12:.2f} TB/s"}
    text = table(rows, bandwidth)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        raw = {"header": facts, "rows": [row._asdict() for row in rows], "failed": failed}
        (args.out / "backends.json").write_text(json.dumps(raw, indent=1))
        head = "".join(f"{name}: {value}  \n" for name, value in facts.items())
        (args.out / "backends.md").write_text(f"# Triton and CUDA C++ by size\n\n{head}\n{text}\n")
    print(text, *failed, sep="\n")


if __name__ == "__main__":
    main()
