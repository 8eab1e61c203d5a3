"""Cached launches pass to the driver what Triton's own launch passes; on CPU tensors, with a driver that records."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") in ("1", "true"):
    pytest.skip("the interpreter has no launches", allow_module_level=True)

from triton import knobs
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend

from pyflow.triton_kernels import (
    _launch,
    _plans,
    coupling,
    energy,
    flow_head,
    fsq,
    gan_qp,
    hsic,
    noise,
    sde,
    spectral,
    spline,
)

from .fake import fake_driver

F32, F64 = torch.float32, torch.float64


class Checked:
    """Repeats every launch through `JITFunction.run` and compares what the driver was given."""

    def __init__(self, driver, monkeypatch):
        self.driver, self.real, self.launches, self.hits = driver, _plans.launch, 0, 0
        monkeypatch.setattr(_plans, "launch", self)

    def __call__(self, kernel, count, index, num_warps, args, named, constants):
        given, known = self.driver.launches, len(_plans._plans)
        given.clear()
        self.real(kernel, count, index, num_warps, args, named, constants)
        kernel[(count,)](*args, **named, **constants, num_warps=num_warps, enable_fp_fusion=False)
        planned, plain = map(normal, given)
        assert planned == plain
        self.launches += 1
        self.hits += len(_plans._plans) == known


def normal(launch):
    """What decides a launch: the compiled kernel, grid, stream, function, metadata and arguments."""
    source, x, y, z, stream, function, metadata, _, _, _, *args = launch
    return id(source), (x, y, z), stream, function, metadata, *map(pointers, args)


def pointers(value):
    """The value with addresses in place of tensors, and its type."""
    if isinstance(value, tuple):
        return tuple, *map(pointers, value)
    value = value.data_ptr() if isinstance(value, torch.Tensor) else value
    return type(value), value


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(_plans, "_plans", {})
    with fake_driver() as fake:
        yield fake


@pytest.fixture
def checked(driver, monkeypatch):
    return Checked(driver, monkeypatch)


def views(dtype=F32, shape=(64, 32)):
    """Tensors of one shape: contiguous, at an odd offset, strided, transposed, and a parameter."""
    rows, cols = shape
    base = torch.randn(rows * cols * 2 + 8, dtype=dtype)
    yield base[: rows * cols].view(shape)
    yield base[1 : rows * cols + 1].view(shape)
    yield base[: 2 * rows * cols].view(rows, 2 * cols)[:, ::2]
    yield base[: rows * cols].view(cols, rows).t()
    yield torch.nn.Parameter(base[4 : rows * cols + 4].view(shape))


def scalar(value, dtype=F64):
    return torch.tensor(value, dtype=dtype)


def test_coupling(checked):
    for _, (x, s) in itertools.product(range(2), zip(views(F64), views(F32), strict=True)):
        # 0.0 and 1.0 differ in the width of their bits
        for arg in (0.0, 1.0, 2.5):
            coupling.affine_coupling(x, s, s, None, 0, arg, False, False, 1)
        coupling.affine_coupling_backward(s, None, s, s, x, None, 0, 2.0, False, False, 1, F32)
    # views of allocations at other addresses repeat the kinds of arguments
    assert checked.hits > checked.launches / 2


def test_spline(checked):
    # the bound and the scale are numbers that change from call to call
    for x, bound, (bounds, tails) in itertools.product(
        list(views(shape=(8, 4)))[:2], (1.0, 3.0, 1.0), ((None, [0]), (torch.rand(4) + 1, [0, 1] * 2))
    ):
        params = torch.randn(8, 4, 5 + 2 * (len(tails) > 1))
        options = (bounds, None, bound, 2, tails, 0, bound, 1e-3, 1e-3, False, 1)
        y, logdet = spline.rq_spline(x, params, *options)
        spline.rq_spline_backward(y, logdet, x, params, *options)
    assert checked.hits == 2 * checked.launches / 3


def test_shapes_and_presence(checked):
    for shape in [(1, 1), (16, 1), (3, 7), (5, 9001), (64, 32)] * 2:
        x = torch.randn(shape)
        mask = torch.zeros(shape, dtype=torch.bool)
        for with_mask in (None, mask, mask[:1].expand(shape)):
            coupling.affine_coupling(x, x, x, with_mask, 0, 0.0, True, False, 1)
        flow_head.flow_log_prob(x, None, 0)
        flow_head.flow_log_prob(x, x[0].clone(), 1)
        energy.grad_norm_penalty(x)
        t = torch.randn(shape[0])
        gan_qp.gan_qp_loss(t, t, x, x, None, None, 10.0, 0.0, 1)
    assert checked.hits >= checked.launches / 2


def test_seeds_and_steps(checked):
    x = torch.randn(64, 32)
    extremes = [0, 1, 16, 2**31 - 1, 2**31, 2**32, 2**40 + 5, 2**55, -1, -(2**63)]
    for seed, step in itertools.product(extremes, [0, 1, 2**31, 2**55]):
        stream = torch.tensor(seed), torch.tensor(step)
        noise.noise([64, 32], *stream, 1, 0, F32)
        noise.noise([64, 32], *stream, 1, 6, F64)
        for b in (0.0, 0.1, -1e30):
            sde.sde_step(x, x, scalar(0.9), scalar(b), torch.rand(64), *stream, None, 0, False)
    sde.sde_step(x, x, scalar(0.9), scalar(0.5), scalar(0.2), None, None, x, 0, True)
    # one plan for all values
    assert len(_plans._plans) == 4 and checked.hits == checked.launches - 4


def test_constants(checked):
    z = torch.randn(2, 64, 5)
    for levels in [(8, 5, 5, 5, 5), (7, 7, 7, 7, 7)] * 2:
        for front in (z.movedim(2, 0), z.movedim(2, 0).contiguous()):
            for variant in (0, 4):
                codes, _ = fsq.fsq(front, levels, variant, True)
                fsq.fsq_backward(codes, front, levels, variant)
    assert checked.hits >= checked.launches / 2


def test_compiler_options(checked):
    """Products limit registers and stages, which are no arguments of the kernel."""
    for n in (40, 70) * 2:
        z = [torch.randn(1, n, 20), torch.randn(1, n, 30)]
        arguments = (torch.ones(1, 2), [0, 0], [1, 1], [0, 1], False)
        hsic.hsic_sums(z, *arguments, 0, 1)
        grad_rows, grad_cross = torch.zeros(1, 2, n, dtype=F64), torch.zeros(1, 1, dtype=F64)
        hsic.hsic_sums_backward(grad_rows, grad_cross, z, *arguments)
    assert checked.hits >= checked.launches / 2


def test_numbers_above_the_range_of_float32_are_infinite():
    assert _launch.bits(1e39, F32) == _launch.bits(float("inf"), F32) == 0x7F800000
    assert _launch.bits(-1e39, F32) == _launch.bits(-float("inf"), F32)
    assert _launch.bits(1e39, F64) != _launch.bits(float("inf"), F64)


def test_specialised_integers(checked):
    for rows, cols in [(1, 1), (16, 1), (17, 48), (64, 48)] * 2:
        w = torch.randn(rows, cols)
        spectral.spectral_normalize([w, w[0].clone()], [w[:, 0].clone(), w[0, :0]], [w[0].clone(), w[0, :0]], 2)
    assert checked.hits >= checked.launches / 2


def test_addresses_in_a_table_are_filled_in(checked):
    """The table of addresses is written anew in each call, and its launch is planned too."""
    kept = []  # so that each call has tensors at other addresses
    for _ in range(3):
        w, u, v = [torch.randn(17, 48)], [torch.randn(17)], [torch.randn(48)]
        results = spectral.spectral_normalize(w, u, v, 2)
        spectral.spectral_normalize_backward(w, results[-1:], w, u, v, results[-1:])
        kept += [w, u, v, results]
    assert checked.hits >= checked.launches * 2 // 3


@pytest.mark.parametrize("high", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_words_have_one_specialisation(high):
    lows = (0, 1, 15, 16, 2**31 - 1, 2**31, 2**32 - 16, 2**32 - 1)
    kinds = {native_specialize_impl(BaseBackend, _plans.words(high << 32 | low), False, True, True) for low in lows}
    assert kinds == {(("i64", "i64"), ("", ""))}
    assert _plans.words(high << 32 | 7)[1] >> 32 & 0xFFFFFFFF == high


def test_strides_and_presence_of_views_are_part_of_a_plan(checked):
    """Neither the numbers in a tuple nor its form may be mistaken for those of another."""
    x = torch.randn(64, 32)
    for value in (x, x.t().contiguous().t(), torch.randn(64, 33)[:, :32], torch.randn(64, 64)[:, ::2], x.to(F64)):
        for seeds in (torch.tensor(5), torch.arange(64), torch.arange(128)[::2], torch.arange(64)[:1].expand(64)):
            for coefficient in (scalar(0.5), torch.rand(64), torch.rand(65)[1:], torch.rand(1).expand(64)):
                sde.sde_step(value, None, coefficient, None, scalar(0.1), seeds, torch.tensor(3), None, 0, False)
    assert checked.launches == len(_plans._plans) + checked.hits


def test_the_stream_is_read_at_each_launch(driver):
    x = torch.randn(4, 8)
    for driver.stream in (0, 7, 9):
        coupling.additive_coupling(x, x, None, False)
    assert [launch[4] for launch in driver.launches] == [0, 7, 9]


def test_hooks_see_every_launch(driver):
    x, seen = torch.randn(4, 8), []
    coupling.additive_coupling(x, x, None, False)
    hooks = [(knobs.runtime.launch_enter_hook, seen.append), (knobs.runtime.launch_exit_hook, seen.append)]
    for chain, hook in hooks:
        chain.add(hook)
        try:
            coupling.additive_coupling(x, x, None, False)
        finally:
            chain.remove(hook)
        # the driver calls the hooks that it is given
        *_, metadata, enter, leave = driver.launches[-1][:10]
        assert metadata is not None and chain in (enter, leave)
    coupling.additive_coupling(x, x, None, False)
    assert driver.launches[-1][7:10] == (None, None, None)


def test_another_driver_gets_its_own_plans(driver):
    x = torch.randn(4, 8)
    coupling.additive_coupling(x, x, None, False)
    with fake_driver() as other:
        coupling.additive_coupling(x, x, None, False)
    assert len(driver.launches) == len(other.launches) == 1 and len(_plans._plans) == 2


def test_tensors_of_another_device_are_left_to_triton():
    x = torch.randn(4, 8)
    assert _plans._describe((x, 1), [0, 0], x.get_device(), [], [])
    assert not _plans._describe((x, 1), [0, 0], 0, [], [])


def test_plans_are_bounded(driver, monkeypatch):
    monkeypatch.setattr(_plans, "MOST", 5)
    for cols in range(1, 30):
        x = torch.randn(2, cols)
        coupling.additive_coupling(x, x, None, False)
        assert len(_plans._plans) <= 5
    assert len(driver.launches) == 29


def test_a_space_is_one_object_for_equal_strides():
    x = torch.randn(6, 4, 8)
    for tensors in ([x, x], [x.transpose(1, 2), None], [x[::2], x[::2]]):
        once, again = (
            _launch.collapse(2, [t if t is None else t.clone(memory_format=torch.preserve_format) for t in tensors])
            for _ in range(2)
        )
        assert once is again and once.blocks is again.blocks
    assert _launch.collapse(2, [x]) is not _launch.collapse(1, [x])
