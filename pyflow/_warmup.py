"""Compile the kernels before their first use."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch

from . import _checks as check
from . import ops as ops  # registers the operators
from ._operators import OPERATORS
from ._schemas import SCALE_MAPS


def warmup(
    device: torch.device | str = "cuda",
    *,
    dtypes: Iterable[torch.dtype] = (torch.float32,),
    scale_maps: Iterable[str] = SCALE_MAPS,
    levels: Iterable[tuple[int, ...]] = ((8, 5, 5, 5),),
) -> None:
    """Run every operation once, forward and backward, on small tensors of these dtypes.

    Triton compiles a kernel at its first call for a dtype and scale map; `warmup` compiles it in advance. On a CPU
    nothing is compiled at run time.

    Args:
        device: device that the kernels will run on.
        dtypes: dtypes of the inputs.
        scale_maps: scale maps of the coupling layers.
        levels: FSQ levels.

    Raises:
        TypeError, ValueError: no such device here.

    Example:
        >>> warmup("cpu", scale_maps=["tanh"])
    """
    device = check.device("warmup", device)
    options: dict[str, Any] = {"scale_maps": tuple(scale_maps), "levels": tuple(levels)}
    for dtype in dtypes:
        x = torch.zeros(2, 64, dtype=dtype, device=device, requires_grad=True)
        outputs: list[Any] = []
        for family in sorted({operator.family for operator in OPERATORS.values()}):
            # a function of the family's name may hide its module in pyflow.ops
            outputs += importlib.import_module(f".ops.{family}", __package__).warmup(x, **options)
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
