"""Wrappers of score functions: protection from writes in place, checks of the result, micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check

Score = Callable[[Tensor, Tensor], Tensor]


class Lent:
    """Wrapper of a function of x that protects x: a function that writes into its argument gets copies of x.

    The first call decides: it gets a copy, whose version counter shows whether the function writes into it.
    """

    def __init__(self, op: str, name: str, function: Callable[..., Any]) -> None:
        self.op, self.name, self.function, self.copies, self.is_new = op, name, function, True, True

    def __call__(self, x: Tensor, *rest: Any) -> Any:
        if torch.compiler.is_compiling():
            # no cost: the compiler removes a copy that is not written to
            return self.function(x.clone(), *rest)
        given = x.clone() if self.copies else x
        version = given._version
        result = self.function(given, *rest)
        wrote = given._version != version
        if wrote and not self.copies:
            raise ValueError(f"{self.op}: {self.name} must change x in place from its first call on or never")
        self.copies, self.is_new = wrote if self.is_new else self.copies, False
        return result


def checked(op: str, score_fn: Score) -> Score:
    """Return the score function with a check that its results have x's shape and device."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        value = score_fn(x, t)
        check.like(op, "the score", value, "x", x.shape, x.device)
        return value

    return score


def in_micro_batches(score_fn: Score, size: int) -> Score:
    """Return the score function, evaluated on `size` samples at a time."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        n, scores = x.shape[0], None
        for start in range(0, n, size):
            part, times = x[start : start + size], t[start : start + size]
            missing = size - part.shape[0]
            if missing:
                # padded with copies of the last sample, a valid input of the network
                part = torch.cat((part, part[-1:].expand(missing, *part.shape[1:])))
                times = torch.cat((times, times[-1:].expand(missing)))
            of_part = score_fn(part, times)[: size - missing]
            if scores is None:
                scores = torch.empty_like(x, dtype=of_part.dtype)
            # copied before the next call, which may return the same memory
            scores[start : start + size] = of_part
        return torch.empty_like(x) if scores is None else scores

    return score
