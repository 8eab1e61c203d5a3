"""Steps of a sampler as a CUDA graph: the first ones run as usual, one is captured, and all others replay it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# steps before the capture, in which kernels are compiled and libraries allocate their workspaces
WARM_UP = 3


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Run a block on a stream of its own, because the default stream cannot be captured."""
    before, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)


def given_back(x: Tensor) -> Tensor:
    """Return a result of that stream for use on the current one."""
    x.record_stream(torch.cuda.current_stream(x.device))
    return x


def capture(op: str, step: Callable[[], None]) -> Callable[[], None]:
    """Return a function that replays the kernels of a step, which does not run now."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            step()
    except Exception as error:
        # the exception says that the capture failed, its context says why
        why = str(error.__context__ or error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(f"{op}: score_fn must run as a CUDA graph when cuda_graph is set, got: {why[0]}") from error
    return graph.replay


class Replay:
    """Takes the steps of one run, in order. From the captured step on, the result is always the same tensor.

    Args:
        op: name of the function that errors come from.
        advance: (x, seed, *row) -> x'.
        scalars, counters: the numbers of all steps, with a first dim of the steps.
        row_of: makes of one entry of both the row, 0-d tensors.
    """

    def __init__(
        self,
        op: str,
        advance: Callable[..., Tensor],
        scalars: Tensor,
        counters: Tensor,
        row_of: Callable[[Tensor, Tensor], tuple],
    ) -> None:
        self.op, self.advance, self.row_of = op, advance, row_of
        self.scalars, self.counters = scalars, counters
        self.replay: Callable[[], None] | None = None

    def __call__(self, x: Tensor, i: int, seed: Tensor) -> Tensor:
        if i < WARM_UP:
            return self.advance(x, seed, *self.row_of(self.scalars[i], self.counters[i]))
        if self.replay is None:
            self.x, self.seed = x, seed
            self.index = torch.full((1,), i, dtype=torch.int64, device=x.device)
            self.replay = capture(self.op, self._step)
        self.replay()
        return self.x

    def _step(self) -> None:
        """The step that is captured: it reads which step it is from the device, and counts on."""
        row = self.row_of(self.scalars.index_select(0, self.index)[0], self.counters.index_select(0, self.index)[0])
        self.x.copy_(self.advance(self.x, self.seed, *row))
        self.index += 1
