"""Arrays and tensors as users have them, and a bar over what takes long."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

# a bar appears for what takes longer, in seconds
PATIENCE = 1.0


def samples(op: str, name: str, value: object, kernel: str) -> Tensor:
    """One sample per row, (n, d), from an array, a list or a tensor; (n,) is one column.

    Integers become float64, except for the kernel "delta".
    """
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise TypeError(f"{op}: {name} must hold numbers, got {array.dtype}")
        # torch computes with none of the larger unsigned integers, and reads one byte order
        dtype = np.int64 if array.dtype.kind == "u" else array.dtype.newbyteorder("=")
        value = torch.from_numpy(np.array(array, dtype, order="C"))
    if value.is_complex():
        raise TypeError(f"{op}: {name} must hold real numbers, got {value.dtype}")
    if value.dim() == 1:
        value = value.unsqueeze(1)
    if value.dim() != 2:
        raise ValueError(f"{op}: {name} must be (n,) or (n, d), got shape {tuple(value.shape)}")
    if kernel != "delta" and not value.is_floating_point():
        value = value.double()
    return value.detach()


@contextlib.contextmanager
def bar(total: int, unit: str, progress: bool) -> Iterator[Callable[[int], object]]:
    """A function that is told how many more are done; it shows a bar where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        progress = False
    if not progress:
        yield lambda done: None
        return
    with tqdm(total=total, unit=unit, dynamic_ncols=True, delay=PATIENCE) as shown:
        yield shown.update
