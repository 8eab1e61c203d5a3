"""One pytest-benchmark entry per case and contender; `run` starts this file with its plugin."""

from __future__ import annotations

import pytest


class Replay:
    """pytest-benchmark's clock: it runs through times that were taken in turn, which it cannot do itself."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


clock = Replay()


@pytest.mark.benchmark(timer=clock)
def test_contender(benchmark, session, case, contender):
    times = session.times(case, contender)
    benchmark.group = case.name
    benchmark.extra_info.update(session.extra(case, contender))

    def call() -> None:
        clock.now += next(remaining)

    remaining = iter(times)
    benchmark.pedantic(call, rounds=len(times))
