"""Noise on a GPU: the bits of the reference and of C++, in CUDA graphs, without synchronising."""

from __future__ import annotations

import itertools

import pytest
import torch

import pyflow
from pyflow import ops, testing
from pyflow.reference import noise as ref

from .common import DEVICE, DTYPES, INTERPRETED, check_compiled, check_graph, few, moved, needs_memory, sized

SHAPES = [(), (0,), (7,), (65, 3), (33, 37), (16, 392), (5, 3, 7, 4), (3, 9001), (2, 50001), (3000, 2)]
KINDS = ("normal", "uniform")
STEP = 2**40 + 3


def streams(shape):
    """(seed, step) pairs: both numbers, both tensors, and one seed per sample with either kind of step."""
    pairs = [(2**64 - 5, STEP), (torch.tensor(7), torch.tensor(5))]
    own = [torch.arange(n) * 2**33 - 2 for n in shape[:1]]
    return pairs + list(itertools.product(own, (STEP, torch.tensor(5))))


def check(kind, shape, dtype, seed, step):
    options = dict(dtype=dtype, purpose="prior")
    got = getattr(ops, kind)(shape, seed=moved(seed), step=moved(step), device=DEVICE, **options)
    with pyflow.backend("reference"):
        want = getattr(ops, kind)(shape, seed=seed, step=step, **options)
    assert got.is_contiguous() and got.device.type == DEVICE
    testing.assert_same_bits(got.cpu(), want, f"{shape}, {seed}, {step}")


@pytest.mark.parametrize("shape", sized(SHAPES), ids=str)
def test_sizes(gpu, shape):
    for kind in KINDS:
        for seed, step in streams(shape)[:: 1 if kind == "normal" else 3]:
            check(kind, shape, torch.float32, seed, step)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_dtypes(gpu, kind, dtype):
    for shape in ((33, 37), (16, 392)):
        for seed, step in streams(shape)[::2]:
            check(kind, shape, dtype, seed, step)


def test_words_and_seeds(gpu):
    words = torch.randint(2**32, (5, 70, 4)), torch.randint(2**32, (70, 2))
    got = ops.philox(*moved(words)).cpu()
    with pyflow.backend("auto"):
        testing.assert_same_bits(got, ops.philox(*words))
    assert [hex(w) for w in ops.philox(*moved((torch.zeros(4).long(), torch.zeros(2).long())))] == [
        "0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8",
    ]  # fmt: skip
    for start in (0, 2**35):
        got = ops.sample_seeds(torch.tensor(5, device=DEVICE), 100, start=start).cpu()
        with pyflow.backend("auto"):
            testing.assert_same_bits(got, ops.sample_seeds(5, 100, start=start))


def test_a_sample_does_not_depend_on_its_batch(gpu):
    seeds = ops.sample_seeds(torch.tensor(3, device=DEVICE), 40)
    for cols in few((1, 7, 392, 5000), 2):
        whole = ops.normal((40, cols), seed=seeds)
        testing.assert_same_bits(whole, ops.normal((40, cols), seed=seeds))
        for rows in (slice(0, 1), slice(3, 20), slice(1, None)):
            testing.assert_same_bits(whole[rows], ops.normal(whole[rows].shape, seed=seeds[rows]))


def test_no_seed_draws_one_from_torch(gpu):
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(ops.normal((3, 4), seed=None, device=DEVICE))
    testing.assert_same_bits(*draws)
    assert not torch.equal(draws[0], ops.normal((3, 4), seed=None, device=DEVICE))


def test_works_in_a_cuda_graph_and_never_waits(gpu):
    seed, step = torch.arange(64, device=DEVICE), torch.tensor(3, device=DEVICE)

    def draws():
        return (
            ops.normal((64, 90), seed=seed, step=step), ops.uniform((100,), seed=seed[0], step=step),
            ops.normal((9,), seed=11, step=4, device=DEVICE), ops.sample_seeds(step, 9),
        )  # fmt: skip

    check_graph(draws, lambda: step.add_(1), lambda: seed.add_(1000))


def test_compiles_without_graph_breaks(kernels):
    check_compiled(lambda x: x * ops.normal((32, 100), seed=11, step=4, device=DEVICE), [torch.ones(32, 100)])


def test_moments(gpu):
    shape = (1000, 1001) if not INTERPRETED else (100, 101)
    z = ops.normal(shape, seed=3, device=DEVICE).double()
    error = 5 / z.numel() ** 0.5
    assert abs(z.mean()) < error and abs(z.var() - 1) < 2**0.5 * error


def test_errors_name_the_device(gpu):
    if INTERPRETED:
        pytest.skip("the interpreter has one device")
    with pytest.raises(ValueError, match=r"^normal: seed must be on the device of the result, cuda:0, got cpu$"):
        ops.normal((2,), seed=torch.tensor(1), device="cuda")
    with pytest.raises(ValueError, match=r"^normal: step must be on the device of the result, cuda:0, got cpu$"):
        ops.normal((2,), seed=torch.tensor(1, device="cuda"), step=torch.tensor(1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_more_elements_than_an_int32_counts(gpu, kind):
    needs_memory(40)
    count, tail = 2**31 + 4096, 8192
    z = getattr(ops, kind)((count,), seed=7, step=STEP, dtype=torch.bfloat16, device="cuda")
    block = torch.arange((count - tail) // 4, count // 4)
    counter = block & ref.MASK, block >> 32, torch.tensor(STEP & ref.MASK), torch.tensor(STEP >> 32)
    words = torch.stack(torch.broadcast_tensors(*ref.philox(counter, (torch.tensor(7), torch.tensor(0)))), -1)
    testing.assert_same_bits(z[-tail:].cpu(), getattr(ref, kind)(words.flatten()).bfloat16())
    testing.assert_same_bits(z[:tail], getattr(ops, kind)((tail,), seed=7, step=STEP, device="cuda").bfloat16())
    # one sample per row, with rows longer than 2**31
    own = getattr(ops, kind)((1, count), seed=torch.tensor([7], device="cuda"), step=STEP, dtype=torch.bfloat16)
    assert torch.equal(own[0], z)
