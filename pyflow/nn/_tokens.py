"""Shared by the quantisers: masks of padding, and counts of how often each codebook entry occurs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _checks as check
from ..ops.fsq import CodebookUsage, signed, usage_of
from ._held import HoldsNumbers

MOST_COUNTED = 2**24
# values and dtype
Constant = tuple[float | Sequence, torch.dtype]


def valid_positions(
    op: str, shape: torch.Size, like: Tensor, mask: Tensor | None, lengths: Tensor | None
) -> Tensor | None:
    """Return a bool tensor of this shape, false at padding, from a mask or from lengths (shape (B, n) only).

    None if neither is given.
    """
    if mask is not None and lengths is not None:
        raise ValueError(f"{op}: mask and lengths must not be given together, got both")
    if mask is not None:
        _check_positions(op, "mask", mask, shape, like)
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask must be bool, true at valid positions, got {check.short(mask.dtype)}")
        return mask
    if lengths is None:
        return None
    if len(shape) != 2:
        raise ValueError(f"{op}: lengths must come with sequences, positions of shape (B, n), got {tuple(shape)}")
    _check_positions(op, "lengths", lengths, shape[:1], like)
    check.integer_tensor(op, "lengths", lengths)
    lengths = signed(lengths)
    if lengths.numel() and check.values_are_checked(lengths):
        low, high = (int(v) for v in lengths.aminmax())
        if low < 0 or high > shape[1]:
            raise ValueError(f"{op}: lengths must lie in [0, {shape[1]}], got {low if low < 0 else high}")
    return torch.arange(shape[1], device=like.device) < lengths[:, None]


def _check_positions(op: str, name: str, value: object, shape: tuple[int, ...], like: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{op}: {name} must have the shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on the device of the input, {like.device}, got {value.device}")


class CountsUsage(HoldsNumbers):
    """A module that can count how often its codebook entries occur, separately for every column of its indices."""

    codebook_size: int
    columns = 1
    _place: Tensor
    _counts: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        # an empty buffer follows the module's device and dtype
        self.register_buffer("_place", torch.empty(0), persistent=False)
        self.register_buffer("_counts", None, persistent=False)

    @property
    def _like(self) -> Tensor:
        """A tensor with the module's device and dtype."""
        return next(self.parameters(), self._place)

    def _fix(self, **values: Constant) -> None:
        """Set the constants by name. They are not buffers: casts, averaging and to_empty would change them."""
        self._values = values
        self._fixed = self._tensors(self._place.device)

    @torch.inference_mode(False)
    def _tensors(self, device: torch.device) -> dict[str, Tensor]:
        return {name: torch.tensor(v, dtype=dtype, device=device) for name, (v, dtype) in self._values.items()}

    def _constant(self, name: str, device: torch.device) -> Tensor:
        if self._fixed[name].device == device:
            return self._fixed[name]
        # fully_shard and load_state_dict(assign=True) move parameters without calling _apply
        there = self._tensors(device)
        if not torch.compiler.is_compiling() and type(there[name]) is Tensor:
            self._fixed = there
        return there[name]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CountsUsage:
        counts = self._counts
        super()._apply(fn, recurse)
        if counts is not None and self._counts is not None:
            # to_empty would leave counts of uninitialised memory, which no state_dict restores
            device = self._counts.device
            self._counts = torch.zeros_like(counts, device=device) if counts.is_meta else counts.to(device)
        self._fixed = self._tensors(self._place.device)
        return self

    @torch.inference_mode(False)
    def track_usage(self) -> None:
        """Start counting which codebook entries occur; a second call resets the counts to zero.

        Batches recomputed by activation checkpointing count once. DistributedDataParallel copies buffers from rank 0,
        so the counts are those of rank 0.
        """
        if self.codebook_size > MOST_COUNTED:
            raise ValueError(
                f"{type(self).__name__}: track_usage needs a codebook of at most 2**24 entries, got "
                f"{self.codebook_size}; collect indices and use pyflow.ops.codebook_usage"
            )
        device = self._like.device
        # slot 0 counts index -1: padding, dropped stages and NaN
        self._counts = torch.zeros(self.columns, self.codebook_size + 1, dtype=torch.int64, device=device)

    def _count(self, indices: Tensor) -> None:
        if self._counts is not None and not check.in_backward():
            slots = indices.detach().reshape(-1, self.columns).T.long() + 1
            self._counts.scatter_add_(1, slots, slots.new_ones(()).expand_as(slots))

    def _usages(self) -> tuple[CodebookUsage, ...]:
        if self._counts is None:
            raise RuntimeError(f"{type(self).__name__}: usage needs track_usage() to be called first")
        return tuple(usage_of(row[row > 0], self.codebook_size) for row in self._counts[:, 1:])
