"""Every operation in plain torch: the specification in code."""

from __future__ import annotations

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operation computes, and returns sums, for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
