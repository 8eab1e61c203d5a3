"""Counts of the largest gap: definition, reference, distribution, reproducibility, error texts."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from scipy import stats
from torch._dynamo.testing import CompileCounter

import pyflow
from pyflow import ops, testing
from pyflow._schemas import PURPOSES
from pyflow.reference import sector as ref

X = torch.linspace(0, 1, 40, dtype=torch.float64) ** 2
POINTS = [1, 2, 3, 4, 5, 8, 33, 100]
TRIALS = [1, 127, 128, 129, 5000]
SEED, STEP = 0x9ABCDEF012345678, 2**40 + 5


def by_hand(x, points, trials, seed, step):
    """Return the largest gap of every trial, computed from the stream in float64."""
    blocks = -(-points // 4)
    words = pyflow.reference.noise.words(torch.tensor(seed), torch.tensor(step), PURPOSES.index("monte_carlo"),
                                         4 * blocks * trials)  # fmt: skip
    u = (words.reshape(trials, 4 * blocks)[:, :points].double() + 1) / 2**32
    gaps = -u.log()
    return gaps.amax(1) / gaps.sum(1)


@pytest.mark.parametrize("points", POINTS)
def test_counts_match_the_reference(points):
    for trials in TRIALS:
        for seed, step in ((SEED - 2**64, STEP), (torch.tensor(3), torch.tensor(2)), (-1, 0)):
            got = ops.sector_counts(X, points, trials, seed=seed, step=step)
            with pyflow.backend("reference"):
                assert torch.equal(got, ops.sector_counts(X, points, trials, seed=seed, step=step)), (trials, seed)
            assert got.dtype == torch.int64 and got[0] == trials and (got.diff() <= 0).all()


@pytest.mark.parametrize("points", POINTS)
def test_counts_match_the_definition(points):
    trials = 3000
    largest = by_hand(X, points, trials, 11, 4)
    got = ops.sector_counts(X, points, trials, seed=11, step=4)
    # float32 logarithms change a gap by a relative error of 1e-6
    low, high = ((largest >= X[:, None] * (1 + move)).sum(1) for move in (1e-5, -1e-5))
    assert ((low <= got) & (got <= high)).all()


def test_distribution_of_the_largest_gap():
    """The gaps have the distribution of the largest gaps between sorted random points."""
    n, trials = 7, 200_000
    angles = torch.rand(trials, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(1).values
    gaps = torch.cat((angles.diff(dim=1), angles[:, :1] + 1 - angles[:, -1:]), 1).amax(1)
    ours = by_hand(X, n, trials, 5, 0)
    assert stats.ks_2samp(gaps.numpy(), ours.numpy()).pvalue > 1e-3


def test_trials_use_separate_blocks_of_the_stream():
    # trial 2 with three points uses block 2 of the stream: its counts are those of three trials minus those of two
    three, two = (ops.sector_counts(X, 3, trials, seed=9) for trials in (3, 2))
    assert torch.equal(three - two, (by_hand(X, 3, 3, 9, 0)[2] >= X).long())
    # every trial reaches the threshold 0
    assert ref.sector_counts(X, 1, 5, torch.tensor(0), torch.tensor(0), purpose=6)[0] == 5


@pytest.mark.parametrize("points", [3, 8])
def test_extreme_words(points, monkeypatch):
    """Random words that are all zeros or all ones give finite gaps."""
    for word in (0, ref.MASK):
        monkeypatch.setattr(ref, "philox", lambda counter, key, word=word: [torch.full_like(counter[0], word)] * 4)
        with pyflow.backend("reference"):
            got = ops.sector_counts(torch.tensor([0.0, 0.2, 1.1], dtype=torch.float64), points, 2, seed=0)
        assert got.tolist()[0] == 2


def test_thresholds_of_any_shape():
    x = X.reshape(5, 8)
    want = ops.sector_counts(X, 5, 999, seed=1)
    assert torch.equal(ops.sector_counts(x, 5, 999, seed=1).flatten(), want)
    assert torch.equal(ops.sector_counts(x.mT, 5, 999, seed=1).mT.flatten(), want)
    assert torch.equal(ops.sector_counts(X[::3], 5, 999, seed=1), want[::3])
    assert torch.equal(ops.sector_counts(X[:1].expand(7), 5, 999, seed=1), want[:1].expand(7))
    assert ops.sector_counts(X[7], 5, 999, seed=1) == want[7]
    assert ops.sector_counts(X[:0], 5, 999, seed=1).shape == (0,)
    many = torch.linspace(0, 1, 1000, dtype=torch.float64)
    assert ops.sector_counts(many, 5, 999, seed=1)[0] == 999
    odd = torch.tensor([math.nan, math.inf, -math.inf, -1.0], dtype=torch.float64)
    assert ops.sector_counts(odd, 5, 99, seed=1).tolist() == [0, 0, 99, 99]


def test_seeds_and_steps():
    args = X, 9, 4000
    want = ops.sector_counts(*args, seed=11, step=12)
    assert torch.equal(ops.sector_counts(*args, seed=torch.tensor(11), step=torch.tensor(12)), want)
    assert torch.equal(ops.sector_counts(*args, seed=2**64 - 1), ops.sector_counts(*args, seed=-1))
    for seed, step in ((10, 12), (11, 13)):
        assert not torch.equal(ops.sector_counts(*args, seed=seed, step=step), want)
    torch.manual_seed(0)
    first, second = ops.sector_counts(*args, seed=None), ops.sector_counts(*args, seed=None)
    torch.manual_seed(0)
    assert torch.equal(ops.sector_counts(*args, seed=None), first) and not torch.equal(first, second)


def digest() -> str:
    """Return one hash over the counts; runs in one process per instruction set."""
    h = hashlib.sha256()
    for points in POINTS:
        for trials in TRIALS:
            h.update(ops.sector_counts(X, points, trials, seed=SEED, step=STEP).numpy().tobytes())
    return h.hexdigest()


def test_instruction_sets_give_the_same_counts(every_instruction_set):
    assert len(every_instruction_set) == 1


def test_counts_do_not_depend_on_threads():
    with testing.threads(1):
        single = ops.sector_counts(X, 5, 300_007, seed=1)
    with testing.threads(4):
        several = ops.sector_counts(X, 5, 300_007, seed=1)
    assert torch.equal(single, several)


def test_every_count_is_written():
    with testing.poisoned():
        assert ops.sector_counts(X, 5, 1, seed=0).sum() <= len(X)


def test_memory_depends_on_neither_points_nor_trials():
    def most(points, trials):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False) as profile:
            ops.sector_counts(X, points, trials, seed=0)
        sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        return max(sizes)

    if pyflow._backend.cpu_missing:
        pytest.skip(pyflow._backend.cpu_missing)
    assert most(4, 1) == most(4, 200_000) == most(1000, 500) == 8 * len(X)


# registration with torch


def test_opcheck():
    for x in (X, X[:0], X.reshape(5, 8).mT, X[3]):
        args = x, 5, 100, torch.tensor(3), torch.tensor(2), 6
        torch.library.opcheck(torch.ops.pyflow.sector_counts, args)


def test_compiles_once_for_all_numbers():
    counter = CompileCounter()
    f = torch.compile(lambda x, n, t, s: ops.sector_counts(x, n, t, seed=s), fullgraph=True, backend=counter,
                      dynamic=True)  # fmt: skip
    for points, trials, seed in ((5, 100, 3), (6, 200, 4), (9, 333, 2**62)):
        assert torch.equal(f(X, points, trials, seed), ops.sector_counts(X, points, trials, seed=seed))
    assert counter.frame_count == 1


def test_vmap():
    seeds = torch.arange(3)
    got = torch.vmap(lambda s: ops.sector_counts(X, 5, 100, seed=s))(seeds)
    assert torch.equal(got, torch.stack([ops.sector_counts(X, 5, 100, seed=s) for s in seeds]))
    got = torch.vmap(lambda x: ops.sector_counts(x, 5, 100, seed=2), in_dims=1)(X.reshape(5, 8))
    assert torch.equal(got, ops.sector_counts(X.reshape(5, 8), 5, 100, seed=2).mT)


def test_under_transforms_and_grad():
    x = X.clone().requires_grad_()
    got = ops.sector_counts(x, 5, 100, seed=2)
    assert torch.equal(got, ops.sector_counts(X, 5, 100, seed=2)) and not got.requires_grad
    gradient = torch.func.grad(lambda x: (x * ops.sector_counts(x.detach(), 5, 100, seed=2)).sum())(X)
    assert torch.equal(gradient, got.double())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("change, error, text", [
    ({"thresholds": 0.5}, TypeError, "thresholds must be a tensor, got float"),
    ({"thresholds": X.float()}, TypeError, "thresholds must be float64, got float32"),
    ({"thresholds": X.long()}, TypeError, "thresholds must be float32, float64, bfloat16 or float16, got int64"),
    ({"points": 0}, ValueError, "points must be at least 1, got 0"),
    ({"points": 2.0}, TypeError, "points must be an integer, got float"),
    ({"trials": 0}, ValueError, "trials must be at least 1, got 0"),
    ({"trials": True}, TypeError, "trials must be an integer, got bool"),
    ({"trials": 2**60}, ValueError, f"trials must be below 2**60, got {2**60}"),
    ({"seed": 1.5}, TypeError, "seed must be an integer or an int64 tensor, got float"),
    ({"seed": 2**64}, ValueError, f"seed must fit 64 bits, got {2**64}"),
    ({"seed": torch.arange(3)}, ValueError, "seed must have the shape (), got (3,)"),
    ({"seed": torch.tensor(1, dtype=torch.int32)}, TypeError, "seed must be int64, got int32"),
    ({"step": -1}, ValueError, "step must be in [0, 2**56), got -1"),
    ({"step": -1, "seed": None}, ValueError, "step must be in [0, 2**56), got -1"),
    ({"thresholds": X.to_sparse()}, TypeError, "thresholds must be a dense tensor, got sparse_coo"),
])  # fmt: skip
def test_wrong_arguments(backend, change, error, text):
    options = {"thresholds": X, "points": 4, "trials": 10, "seed": 0} | change
    before = torch.get_rng_state()
    with pyflow.backend(backend), pytest.raises(error) as raised:
        ops.sector_counts(options.pop("thresholds"), options.pop("points"), options.pop("trials"), **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert str(raised.value) == f"sector_counts: {text}"
