"""What a sampler puts around a score function: copies where it writes, checks of its results, micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check

Score = Callable[[Tensor, Tensor], Tensor]


class Lent:
    """A function of x that is lent x: one that writes into it gets copies, one that does not gets x itself."""

    def __init__(self, op: str, name: str, function: Callable[..., Any]) -> None:
        # what it does is seen at the first call
        self.op, self.name, self.function, self.copies, self.is_new = op, name, function, True, True

    def __call__(self, x: Tensor, *rest: Any) -> Any:
        if torch.compiler.is_compiling():
            # costs nothing: the compiler drops a copy that nobody writes into
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
    """The score function, whose results must have x's shape and device."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        value = score_fn(x, t)
        check.like(op, "the score", value, "x", x.shape, x.device)
        return value

    return score


def in_micro_batches(score_fn: Score, size: int) -> Score:
    """The score function, called with `size` samples at a time."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        n, scores = x.shape[0], None
        for start in range(0, n, size):
            part, times = x[start : start + size], t[start : start + size]
            missing = size - part.shape[0]
            if missing:
                # copies of a sample, for which the network is sure to be defined
                part = torch.cat((part, part[-1:].expand(missing, *part.shape[1:])))
                times = torch.cat((times, times[-1:].expand(missing)))
            of_part = score_fn(part, times)[: size - missing]
            if scores is None:
                scores = torch.empty_like(x, dtype=of_part.dtype)
            # copied at once: a network may return the same memory every time
            scores[start : start + size] = of_part
        return torch.empty_like(x) if scores is None else scores

    return score
