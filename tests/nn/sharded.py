"""Run by test_reversible: one gloo process shards a reversible stack in several ways and compares gradients.

python sharded.py FOLDER
"""

from __future__ import annotations

import os
import sys

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pyflow.nn import AffineCoupling, ReversibleSequential


class Root(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (AffineCoupling(nn.Linear(3, 6), scale_map="tanh", swap=i % 2 == 1) for i in range(3))
        self.stack = ReversibleSequential(*layers, recompute=recompute)
        self.double()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.stack(x)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    x = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6)
    for _ in range(2):
        model.zero_grad()
        y, logdet = model(x)
        (y.square().sum() + logdet.sum()).backward()
    return [p.grad for p in model.parameters()]


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    expected = gradients(Root(False))
    for how in ("layers", "stack", "root", "all"):
        model = Root(True)
        for layer in model.stack.layers if how in ("layers", "all") else ():
            fully_shard(layer, mesh=mesh)
        if how in ("stack", "all"):
            fully_shard(model.stack, mesh=mesh, reshard_after_forward=True)
        if how in ("root", "all"):
            fully_shard(model, mesh=mesh)
        for got, wanted in zip(gradients(model), expected, strict=True):
            torch.testing.assert_close(got.full_tensor(), wanted, msg=lambda text, how=how: f"{how}: {text}")
    # as in replicated.py
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
