"""Run by test_spectral: two gloo processes train a normalised model under DDP, each saves its state.

python replicated.py FOLDER
"""

from __future__ import annotations

import os
import sys

import torch
import torch.multiprocessing as mp
from torch import nn

from pyflow.nn import apply_spectral_norm


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = nn.parallel.DistributedDataParallel(apply_spectral_norm(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        # two forwards before the backward
        (model(torch.randn(4, 6)).square().sum() - model(torch.randn(4, 6)).sum()).backward()
        optimizer.step()
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    # no destroy_process_group: it holds the GIL while it waits for gloo's threads, which may wait for the GIL
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
