"""Run by test_sharding: samples of one seed from 1, 2 and 4 gloo processes, saved by rank 0.

python sharded.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pyflow.ops import sample_seeds
from pyflow.sde import VESDE, VPSDE, sample

SAMPLES = 8


def analytic(x, t):
    return -x * (1 + t[:, None, None, None])


def network():
    torch.manual_seed(0)
    first, last = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 1, 3, padding=1)

    def score(x, t):
        return last(torch.nn.functional.silu(first(x) + t[:, None, None, None])) - x

    return score


def draw(rank, world):
    torch.set_num_threads(1)
    part = SAMPLES // world
    seeds = sample_seeds(7, part, start=rank * part)
    runs = [
        (VPSDE(), analytic, "ancestral", None),
        (VESDE(), analytic, "pc", None),
        (VPSDE(), network(), "pc", 2),
    ]
    return torch.stack([
        sample(
            sde, score, (part, 1, 8, 8), steps=25, method=method, micro_batch=micro_batch, seed=seeds, progress=False
        )
        for sde, score, method, micro_batch in runs
    ])  # fmt: skip


def rank_main(rank, world, folder):
    store = dist.FileStore(str(Path(folder) / f"store{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    mine = draw(rank, world)
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine)
    if rank == 0:
        torch.save(torch.cat(parts, 1), Path(folder) / f"{world}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    for world in (1, 2, 4):
        mp.spawn(rank_main, (world, sys.argv[1]), nprocs=world)
