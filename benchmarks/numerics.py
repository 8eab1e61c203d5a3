"""Measure the errors of operations in float32 for docs/numerics.md: python -m pyflow.benchmarks.numerics

Cases, inputs and the float64 truth are those of the benchmark. An error is the largest of |result - truth| / (|truth| +
its root mean square), as the benchmark judges it.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch

from .machine import facts
from .measure import Judge
from .registry import all_cases

PAGE = Path(__file__).resolve().parent.parent / "docs" / "numerics.md"
CASES = (
    "coupling/additive forward", "coupling/forward", "coupling/inverse", "coupling/forward+backward",
    "coupling/inverse+backward", "coupling/forward, exp", "coupling/forward, sigmoid", "coupling/bf16 forward",
    "coupling/packed interleaved forward+backward", "spline/forward", "spline/inverse", "spline/forward+backward",
    "spline/zuko forward", "spline/zuko inverse", "flow_head/gaussian forward", "flow_head/gaussian forward+backward",
    "flow_head/logistic forward", "flow_head/logistic forward+backward", "flow_program/log_prob, 32-128-8, batch 512",
    "flow_program/sample, 32-128-8, batch 512", "flow_program/log_prob+backward, 32-128-8, batch 512",
    "fsq/8-5-5-5 forward", "fsq/8-5-5-5 forward+backward", "fsq/residual, 8 stages, forward", "hsic/4096 forward",
    "hsic/4096 forward+backward", "hsic/center_gram", "sde/step, given noise", "sde/step, given noise forward+backward",
    "sde/denoising loss", "sde/denoising loss forward+backward", "gan_qp/l1 forward", "gan_qp/l1 forward+backward",
    "gan_qp/l2 forward+backward", "energy/gradient penalty",
    "energy/gradient penalty forward+backward", "spectral/ResNet-50 forward", "spectral/ResNet-50 forward+backward",
)  # fmt: skip
HEAD = "| case | pyflow | plain torch |\n|---|---:|---:|\n"
TABLE = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- end -->)", re.DOTALL)


def errors(name: str) -> dict[str, float]:
    """Return the largest errors of a case by contender."""
    case = all_cases()[name]
    # errors are fractions of the tolerance
    problem = dataclasses.replace(case.build(case.shape, torch.device("cpu")), tolerance=1.0)
    judge = Judge(problem)
    return {each: judge.error(each, problem.calls[each]()) for each in ("pyflow", "eager") if each in problem.calls}


def main() -> None:
    about = facts("cpu", torch.get_num_threads(), None)
    rows = []
    for name in CASES:
        found = [f"{error:.1e}" for error in errors(name).values()]
        rows.append(f"| {name} | {' | '.join([*found, '–'][:2])} |\n")
        print(rows[-1], end="", flush=True)
    where = f"{about['CPU']}, {about['instruction set']}, torch {about['torch']}, {about['date']}, {about['commit']}"
    text = f"{HEAD}{''.join(rows)}\nMeasured on: {where}.\n"
    PAGE.write_text(TABLE.sub(lambda _: text, PAGE.read_text()))


if __name__ == "__main__":
    main()
