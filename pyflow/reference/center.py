"""Centred Gram matrices."""

from __future__ import annotations

from torch import Tensor


def center_gram(gram: Tensor) -> Tensor:
    """H K H of (..., n, n)."""
    rows, columns = gram.mean(-1, keepdim=True), gram.mean(-2, keepdim=True)
    return gram - rows - columns + rows.mean(-2, keepdim=True)
