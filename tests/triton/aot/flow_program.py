"""Launches of programs of flows: the same kernels for any program, with splines or without."""

from __future__ import annotations

import torch

from pyflow.program import ACTIVATIONS, Additive, Dense, Net, Prior, Program, Spline
from pyflow.triton_kernels import flow_program

from . import F32, F64, recorded

BOUNDED = {"flow_program.machine_kernel": "places of a tile, and weights, of which there are at most 2**31"}
DTYPES = {"flow_program.machine_kernel": {F32, F64}}
FORWARD, BACKWARD = range(2)
# two blocks per multiprocessor, of twice the threads one
REGISTERS = {
    (f"{target}-{dtype}-program{splines}-{way}", "flow_program.machine_kernel"): 255
    for target in ("sm_80", "sm_90", "sm_100")
    for splines in ("", "-splines")
    for dtype, way in (("float32", 1), ("float64", 0), ("float64", 1))
}

# of libdevice's sine
STACK = {case: 48 for case in REGISTERS if "float64" in case[0]}


def flow(dtype, splines, way):
    """Launches of forward or backward."""
    rows, width = 64, 8
    net = Net(tuple(range(width)), False, (Dense(0, -1, width, ACTIVATIONS.index("tanh")),))
    spline = (Spline(tuple(range(width)), 4, 3, (0,), 0, (3.0,), params=1),) if splines else ()
    columns = tuple(range(width))
    code = Program(width, 0, columns, (*spline, net, Additive(columns), Prior(columns))).encode()
    x, weights = torch.empty(rows, width, dtype=dtype), [torch.empty(width, width, dtype=dtype)]
    weights += [torch.empty(width, 11, dtype=dtype)] * splines
    with recorded() as launches:
        if way == FORWARD:
            flow_program.flow_program(x, None, 1, weights, code, 0)
        else:
            flow_program.flow_program_backward(None, x[:, 0], x, None, 1, weights, code, None, True, False, True)
    return launches


def cases():
    table = {}
    for target in ("sm_90", "sm_80", "sm_100"):
        for dtype in (F32, F64):
            for splines in (False, True):
                for way in (FORWARD, BACKWARD):
                    name = f"{target}-{str(dtype)[6:]}-program{'-splines' * splines}-{way}"
                    table[name] = flow(dtype, splines, way)
    return table


# half a minute each; the one that is left has the code of all others
SLOW = cases().keys() - {"sm_90-float32-program-splines-1"}
