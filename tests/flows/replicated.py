"""Run by test_fuse: one gloo process trains a flow under DDP, and compares the gradients with those of the layers.

python replicated.py FOLDER
"""

from __future__ import annotations

import os
import sys

import torch
from torch import nn

import pyflow
from pyflow.flows import RealNVP


def main(folder: str) -> None:
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    flow, x = RealNVP(4, couplings=2, hidden=(8,)).double(), torch.randn(16, 4, dtype=torch.float64)
    flow.log_prob(x)
    parallel = nn.parallel.DistributedDataParallel(flow)
    found = []
    for name in ("auto", "reference"):
        parallel.zero_grad()
        with pyflow.backend(name):
            sum(each.sum() for each in parallel(x)).backward()
        found.append([p.grad.clone() for p in flow.parameters()])
    torch.testing.assert_close(*found)
    print("the same gradients", flush=True)
    # no destroy_process_group: it holds the GIL while it waits for gloo's threads, which may wait for the GIL
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
