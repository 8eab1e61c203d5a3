"""Split the input of a coupling layer into the elements that stay and feed the net, and the elements that change."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check

SPLITS = ("half", "interleave", "checkerboard", "channel")

_RANKS = {"half": (2, "(B, D, ...)"), "interleave": (2, "(B, D, ...)"), "channel": (3, "(B, C, ...)")}


def divide(op: str, x: Tensor, split: str, swap: bool, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (kept, changed, mask of changed) as views of x.

    On a checkerboard kept is x with zeros in the changed pixels, and changed is x itself with kept pixels masked.
    """
    _check(op, x, split)
    if mask is not None:
        mask = check.mask_for(op, mask, x)
    if split == "checkerboard":
        board = checkerboard(x, swap)
        return torch.where(board, x, 0), x, board if mask is None else board | mask
    kept, changed = _halves(x, split)[:: -1 if swap else 1]
    if mask is not None:
        mask = _halves(mask, split)[not swap]
    return kept, changed, mask


def join(kept: Tensor, changed: Tensor, split: str, swap: bool) -> Tensor:
    """Join the parts that `divide` returned."""
    if split == "checkerboard":
        return changed
    first, second = (changed, kept) if swap else (kept, changed)
    if split != "interleave":
        return torch.cat((first, second), 1)
    pairs = second.shape[1]
    y = torch.stack((first[:, :pairs], second), 2).flatten(1, 2)
    return y if first.shape[1] == pairs else torch.cat((y, first[:, pairs:]), 1)


def checkerboard(x: Tensor, swap: bool) -> Tensor:
    """Bool (H, W): true where row + column is even (odd with `swap`)."""
    row, column = (torch.arange(n, device=x.device) for n in x.shape[-2:])
    return (row[:, None] + column) % 2 == int(swap)


def _halves(x: Tensor, split: str) -> tuple[Tensor, ...]:
    """Return (first, second); for an odd length the first is longer by one."""
    if split != "interleave":
        return x.chunk(2, 1)
    if x.shape[1] % 2 == 0:
        # the backward of unbind is one stack; the backward of each slice would fill a whole tensor with zeros
        return x.unflatten(1, (-1, 2)).unbind(2)
    return x[:, 0::2], x[:, 1::2]


def _check(op: str, x: Tensor, split: str) -> None:
    check.float_tensor(op, "x", x)
    if split == "checkerboard":
        if x.dim() != 4:
            raise ValueError(f"{op}: split checkerboard needs images (B, C, H, W), got shape {tuple(x.shape)}")
        return
    rank, shape = _RANKS[split]
    if x.dim() < rank or x.shape[1] < 2:
        raise ValueError(
            f"{op}: split {split} needs a shape {shape} with at least 2 elements along dim 1, got {tuple(x.shape)}"
        )
