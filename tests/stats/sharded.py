"""Run by test_hsic: HSIC of one data set from 2 and 4 gloo processes, saved by every one of them.

python sharded.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pyflow.stats import hsic

OPTIONS = ({}, {"estimator": "unbiased"}, {"normalize": True, "kernel_y": "laplacian"}, {"kernel": "linear"})


def rows(n=301):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator)
    return x, x[:, :2] ** 2 + torch.randn(n, 2, generator=generator)


def rank_main(rank, world, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / f"store{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    x, y = rows()
    # parts of different lengths, one of them empty
    ends = [0, *(r * 90 for r in range(1, world - 1)), 301, 301]
    mine = slice(ends[rank], ends[rank + 1])
    values = [hsic(x[mine], y[mine], group=dist.group.WORLD, progress=False, **options).value for options in OPTIONS]
    # an error of one process must be everybody's, or the others wait for ever
    try:
        hsic(x[mine, : 1 + (rank == 0)], y[mine], group=dist.group.WORLD, progress=False)
        error = None
    except ValueError as raised:
        error = str(raised)
    torch.save((values, error), Path(folder) / f"{world}_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    for world in (2, 4):
        mp.spawn(rank_main, (world, sys.argv[1]), nprocs=world)
