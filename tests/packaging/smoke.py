"""Holds an operation of every family to its reference, and the command line to its word: python smoke.py [version of torch]

Needs torch and an installed pyflow alone; run in a folder without a checkout.
"""

import subprocess
import sys
from pathlib import Path

import torch

import pyflow
from pyflow import _backend, _operators, ops, stats
from pyflow.program import Affine, Dense, Net, Program

torch.manual_seed(0)
x, y, z = torch.randn(3, 33, 20).unbind()
net = Net((0,), False, (Dense(0, -1, 2),))
program = Program(2, 0, (0, 1), (net, Affine((1,), 0, 0, 0.0)))
gram = x @ x.T
rows = torch.randn(33), torch.randn(33)
CALLS = {
    "center": lambda: ops.center_gram(gram),
    "coupling": lambda: ops.affine_coupling(x, y, z, scale_map="tanh"),
    "energy": lambda: ops.mala_accept(x, y, *rows, y, z, 0.1, seed=0),
    "flow_head": lambda: ops.flow_log_prob(x, y[0]),
    "flow_program": lambda: ops.flow_program(x[:, :2].contiguous(), program, [y[:2, :1].contiguous()]),
    "fsq": lambda: ops.fsq(x[:, :4], (8, 5, 5, 5)),
    "gan_qp": lambda: ops.gan_qp_loss(*rows, x, y),
    "hsic": lambda: ops.hsic(x, y, bandwidth=3.0),
    "noise": lambda: ops.normal((33, 20), seed=1),
    "sde": lambda: ops.sde_step(x, y, 0.9, 0.1, 0.3, seed=2),
    "sector": lambda: ops.sector_counts(torch.tensor([0.4, 0.5], dtype=torch.float64), 4, 1000, seed=3),
    "spectral": lambda: ops.spectral_normalize([x], [y[:, 0]], [z[0]])[0],
    "spline": lambda: ops.rq_spline(x, torch.randn(33, 20, 23, generator=torch.Generator().manual_seed(4)), bins=8),
}


def main(version=""):
    assert torch.__version__.startswith(version), f"torch must be {version}, got {torch.__version__}"
    assert not Path("pyflow").exists() and pyflow.__file__.startswith(sys.prefix), pyflow.__file__
    assert _backend.cpu_missing is None, _backend.cpu_missing
    assert set(CALLS) == {operator.family for operator in _operators.OPERATORS.values()}
    for family, call in CALLS.items():
        got = call()
        with pyflow.backend("reference"):
            want = call()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=lambda text, family=family: f"{family}: {text}")
    assert round(stats.sector_probability(4, torch.pi), 12) == 0.5
    weight = x.clone().requires_grad_()
    ops.affine_coupling(weight, y, z)[0].sum().backward()
    assert weight.grad is not None
    info = subprocess.run(
        [sys.executable, "-m", "pyflow", "info"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "cpu backend:        on" in info, info
    assert "pyflow._host:       left out, as in every wheel: only the tests of a checkout need it" in info, info
    maps = Path("/proc/self/maps").read_text()
    threads = {line.split()[-1] for line in maps.splitlines() if "gomp" in line or "iomp" in line}
    assert len(threads) <= 1, f"two OpenMP runtimes: {threads}"
    print(
        f"pyflow {pyflow.__version__} with torch {torch.__version__}, Python {sys.version.split()[0]}: {len(CALLS)} families"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
