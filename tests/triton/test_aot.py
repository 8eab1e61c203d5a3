"""Compiles every Triton kernel ahead of time and checks instructions, vector width, registers and stack."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") in ("1", "true"):
    pytest.skip("the interpreter and compilation exclude each other", allow_module_level=True)

from pyflow._schemas import DISTANCES, FSQ_VARIANTS, HSIC_KERNELS, PRIORS, SCALE_MAPS
from pyflow.triton_kernels import (
    _random,
    center,
    coupling,
    energy,
    flow_head,
    fsq,
    gan_qp,
    hsic,
    noise,
    sde,
    sector,
    spectral,
)

from . import aot

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPE = (64, 392)
MAPS = [(i, 2.0) for i, name in enumerate(SCALE_MAPS)] + [(SCALE_MAPS.index(n), 0.0) for n in ("sigmoid", "softplus")]
TANH = (SCALE_MAPS.index("tanh"), 2.0)


def affine(x, shift, scale, mask=None, scale_map=TANH, first=False, inverse=False, event_dims=None):
    """Launches of forward and backward, with all gradients."""
    event_dims = x.dim() - 1 if event_dims is None else event_dims
    options = (mask, *scale_map, first, inverse, event_dims)
    grad_logdet = torch.empty(x.shape[: x.dim() - event_dims], dtype=F64 if x.dtype == F64 else F32)
    with aot.recorded() as launches:
        coupling.affine_coupling(x, shift, scale, *options)
        coupling.affine_coupling_backward(torch.empty_like(x), grad_logdet, x, shift, scale, *options, shift.dtype)
        coupling.affine_coupling_backward(None, grad_logdet, x, shift, scale, *options, None)
        coupling.additive_coupling(x, shift, mask, inverse)
    return launches


def packed(x, params, packing, dim):
    options = (None, packing, dim, *TANH, False, False, x.dim() - 1)
    with aot.recorded() as launches:
        coupling.affine_coupling_packed(x, params, *options)
        coupling.affine_coupling_packed_backward(torch.empty_like(x), None, x, params, *options)
    return launches


def head(h, log_scale, prior):
    with aot.recorded() as launches:
        flow_head.flow_log_prob(h, log_scale, prior)
        flow_head.flow_log_prob_backward(torch.empty(h.shape[0]), h, log_scale, prior)
    return launches


def critic(x, z, t, distance=0):
    """Launches of the loss and its backward; x and z serve as real and fake samples and latents, z may be None."""
    d = torch.empty(t.shape, dtype=F64 if F64 in {v.dtype for v in (x, t)} else F32)
    with aot.recorded() as launches:
        gan_qp.gan_qp_loss(t, t, x, x, z, z, 10.0, 0.0, distance)
        gan_qp.gan_qp_loss_backward(torch.empty_like(d), t, t, d, 10.0, 0.0)
    return launches


def normalised(dtype, layers=1):
    """Launches of both operators on matrices and a vector."""
    weights = [torch.empty(64, 392, dtype=dtype)] * layers + [torch.empty(64, dtype=dtype)]
    u, v = ([torch.empty(n, dtype=dtype)] * layers + [torch.empty(0, dtype=dtype)] for n in (64, 392))
    with aot.recorded() as launches:
        sigmas = spectral.spectral_normalize(weights, u, v, 2)[-len(weights) :]
        spectral.spectral_normalize(weights, u, v, 0)
        spectral.spectral_normalize_backward(weights, sigmas, weights, u, v, sigmas)
    return launches


@contextlib.contextmanager
def scalars_on_the_device():
    """Treat 0-d CPU tensors as tensors in GPU memory, not as numbers."""
    real, _random.by_value = _random.by_value, lambda tensor: False
    try:
        yield
    finally:
        _random.by_value = real


def drawn(size, seed, dtype, kind=1):
    with aot.recorded() as launches:
        noise.noise(size, seed, torch.tensor(3), kind, 0, dtype)
        with scalars_on_the_device():
            noise.noise(size, seed, torch.tensor(3), kind, 0, dtype)
    return launches


def stepped(x, score, seed, values, injected=None):
    """Launches of every sde operator, forward and backward."""
    a, b, c = values
    step, grad = torch.tensor(3), torch.empty_like(x)
    f64 = x.dtype == F64
    sums = torch.empty(x.shape[0], dtype=F64 if f64 else F32)
    stream = (None, None, injected) if injected is not None else (seed, step, None)
    dtypes = (x.dtype, score.dtype, None if injected is None else injected.dtype)
    with aot.recorded() as launches:
        sde.sde_step(x, score, a, b, c, *stream, 0, True)
        sde.sde_step(x, None, a, None, c, *stream, 1, False)
        sde.sde_step_backward(grad, grad, x, score, a, b, c, *stream, 0, *dtypes, f64)
        sde.sde_step_backward(grad, None, None, None, a, b, c, None, None, None, 0, *dtypes, f64)
        sde.langevin_squares(score, *stream, 1)
        for std in (c, None):
            sde.denoising_loss(x, std, seed, step)
            sde.denoising_loss_backward(sums, x, std, seed, step)
    return launches


def chained(shape, dtype, seed, alpha, energies=F32):
    """Launches of the accept step and of the gradient penalty."""
    z, z_new, grad, grad_new = dense(dtype, 4, shape)
    u, u_new = dense(energies, 2, shape[:1])
    with aot.recorded() as launches:
        energy.mala_accept(z, z_new, u, u_new, grad, grad_new, alpha, seed, torch.tensor(3))
        energy.grad_norm_penalty(grad)
    return launches


def random_words():
    with aot.recorded() as launches:
        noise.philox(torch.zeros(100, 4, dtype=torch.int64), torch.zeros(100, 2, dtype=torch.int64))
    return launches


def sector_counts():
    with aot.recorded() as launches:
        arguments = torch.zeros(3, dtype=F64), 33, 10**6, torch.tensor(1), torch.tensor(3), 6
        sector.sector_counts(*arguments)
        with scalars_on_the_device():
            sector.sector_counts(*arguments)
    return launches


def quantizer(z, levels, variant, stages=2):
    """Launches of every FSQ operator; the channels of z are its first dim."""
    levels, active = list(levels), torch.empty((), dtype=torch.int64)
    variant, grad = FSQ_VARIANTS.index(variant), torch.empty_like(z)
    with aot.recorded() as launches:
        _, indices = fsq.fsq(z, levels, variant, True)
        fsq.fsq(z, levels, variant, False)
        fsq.fsq_backward(grad, z, levels, variant)
        at = z.dim() - 1 if z.stride(0) == 1 else min(1, z.dim() - 1)
        fsq.fsq_decode(indices, levels, variant, at, z.dtype)
        fsq.fsq_decode(indices.long(), levels, variant, at, z.dtype)
        if variant in (FSQ_VARIANTS.index("symmetric"), FSQ_VARIANTS.index("symmetric_hard")):
            fsq.residual_fsq(z, levels, variant, stages, None)
            fsq.residual_fsq(z, levels, variant, stages, active)
            fsq.residual_fsq_backward(grad, z, levels, variant, stages, active)
    return launches


@contextlib.contextmanager
def launched_for(target):
    """Make the launchers choose tiles and precisions for the target."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hsic, "_hopper", lambda device: target in ("sm_90", "sm_100"))
        patch.setattr(torch.version, "hip", "6" if target.startswith("gfx") else None)
        yield


def grams(target, dtype, kernels, dims, degree=1, n=200):
    """Launches of the sums over two Gram matrices and over one with itself, forward and backward."""
    numbers = [HSIC_KERNELS.index(kernel) for kernel in kernels]
    dims = [n if kernel == "precomputed" else dim for kernel, dim in zip(kernels, dims, strict=True)]
    z, scale = [torch.zeros(2, n, dim, dtype=dtype) for dim in dims], torch.ones(2, len(dims), dtype=dtype)
    arguments = (scale, numbers, [degree] * len(dims), [0, 1, 0, 0], False)
    sums = torch.empty(2, len(dims), n, dtype=F64), torch.empty(2, 2, dtype=F64)
    with launched_for(target), aot.recorded() as launches:
        hsic.hsic_sums(z, *arguments, 0, 1)
        hsic.hsic_sums_backward(*sums, z, *arguments)
    return launches


def matrices(dtype, shape=(2, 200, 200)):
    with aot.recorded() as launches:
        center.center_gram(torch.empty(shape, dtype=dtype))
        if dtype in (F32, F64):
            gram = torch.empty(shape[1:], dtype=dtype)
            hsic.hsic_permuted(gram, gram, torch.zeros(3, shape[1], dtype=torch.int32))
    return launches


def positions(dtype, *shape, dim=-1):
    """A tensor of this shape with the channels moved to the first dim."""
    return torch.empty(shape, dtype=dtype).movedim(dim, 0)


def dense(dtype, count, shape=SHAPE):
    return [torch.empty(shape, dtype=dtype) for _ in range(count)]


def cases():
    """name -> launches; the name starts with the target."""
    table = {}
    for number, (scale_map, arg) in enumerate(MAPS):
        inverse, first = bool(number % 2), bool(number // 2 % 2)
        for target, dtypes in (("sm_90", (F32, F64, BF16, F16)), (("sm_80", "sm_100", "gfx942")[number % 3], (F32,))):
            for dtype in dtypes:
                name = f"{target}-{str(dtype)[6:]}-map{scale_map}{'eps' * (arg > 0)}"
                table[name] = affine(*dense(dtype, 3), scale_map=(scale_map, arg), inverse=inverse, first=first)
    mask = torch.empty(SHAPE, dtype=torch.bool)
    wide = lambda dtype=F32: torch.empty(64, 784, dtype=dtype)
    image = lambda c: torch.empty(8, c, 16, 16)
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        table[f"{target}-bfloat16-tanh"] = affine(*dense(BF16, 3))
        table[f"{target}-float64-tanh"] = affine(*dense(F64, 3))
        table[f"{target}-mixed-float32-bfloat16"] = affine(*dense(F32, 1), *dense(BF16, 2), first=True)
        table[f"{target}-mixed-bfloat16-float32"] = affine(*dense(BF16, 1), *dense(F32, 2), inverse=True)
        for dtype in (F32, F64):
            table[f"{target}-{str(dtype)[6:]}-long"] = affine(*dense(dtype, 3, (4, 20000)))
        for prior in range(len(PRIORS)):
            for dtype in (F32, F64, BF16, F16)[: 4 if target == "sm_90" else 2]:
                name = f"{target}-{str(dtype)[6:]}-head{prior}"
                table[name] = head(*dense(dtype, 1), torch.empty(392, dtype=dtype), prior)
        seeds = torch.zeros(64, dtype=torch.int64)
        for dtype in (F32, F64, BF16, F16)[: 4 if target == "sm_90" else 1]:
            table[f"{target}-noise-{str(dtype)[6:]}"] = drawn(SHAPE, seeds[0], dtype) + drawn(SHAPE, seeds, dtype, 0)
        table[f"{target}-philox"] = random_words()
        table[f"{target}-float64-sector"] = sector_counts()
        numbers, own = [torch.tensor(0.5, dtype=F64)] * 3, [torch.empty(64)] * 3
        for dtype in (F32, F64, BF16, F16)[: 4 if target == "sm_90" else 2]:
            name = f"{target}-sde-{str(dtype)[6:]}"
            table[name] = stepped(*dense(dtype, 2), seeds[0], numbers)
            table[f"{name}-per-sample"] = stepped(*dense(dtype, 2), seeds, own)
        for number, distance in enumerate(DISTANCES):
            for dtype in (F32, F64, BF16, F16)[: 4 if target == "sm_90" else 2]:
                x, t = torch.empty(64, 3, 32, 32, dtype=dtype), torch.empty(64, dtype=dtype)
                name = f"{target}-gan_qp-{distance}-{str(dtype)[6:]}"
                table[name] = critic(x, torch.empty(64, 128, dtype=dtype), t, number)
        for dtype in (F32, F64, BF16, F16)[: 4 if target == "sm_90" else 2]:
            name = f"{target}-energy-{str(dtype)[6:]}"
            energies = F64 if dtype == F64 else F32
            table[name] = chained(SHAPE, dtype, seeds[0], numbers[0], energies)
            table[f"{name}-long"] = chained((64, 20000), dtype, seeds, own[0], energies)
    table["sm_90-gan_qp-long"] = critic(torch.empty(64, 3, 128, 128), None, torch.empty(64))
    table["sm_90-gan_qp-mixed"] = critic(torch.empty(64, 3, 32, 32, dtype=BF16), torch.empty(64, 128), torch.empty(64))
    table["sm_90-gan_qp-odd"] = critic(torch.empty(5, 37), torch.empty(5, 10)[:, ::2], torch.empty(5, 2)[:, 0])
    with scalars_on_the_device():
        table["sm_90-energy-device-scalars"] = chained((5, 37), F32, seeds[0], torch.tensor(0.5), BF16)
    table["sm_90-noise-odd"] = drawn((5, 2), seeds[:5], F32)
    table["sm_90-sde-odd"] = stepped(*dense(F32, 2, (5, 37)), seeds[0], numbers)
    table["sm_90-sde-injected"] = stepped(*dense(F32, 2), seeds[0], numbers, torch.empty(SHAPE))
    table["sm_90-sde-long"] = stepped(*dense(F32, 2, (64, 20000)), seeds, own)
    table["sm_90-sde-mixed"] = stepped(*dense(F32, 1), *dense(BF16, 1), seeds, [torch.empty(64, dtype=F16)] * 3)
    with scalars_on_the_device():
        table["sm_90-sde-device-scalars"] = stepped(*dense(F32, 2), seeds[0], [torch.tensor(0.5)] * 3)
    for inverse in (False, True):
        for first in (False, True):
            options = dict(inverse=inverse, first=first)
            table[f"sm_90-float32-mask-{inverse}-{first}"] = affine(*dense(F32, 3), mask.expand(SHAPE), **options)
    table["sm_90-float32-halves"] = affine(wide()[:, 392:], wide()[:, :392], wide()[:, 392:])
    table["sm_90-float32-stepped"] = affine(wide()[:, ::2], wide()[:, ::2], wide()[:, 1::2])
    table["sm_90-float32-channels"] = affine(image(6), image(12)[:, ::2], image(12)[:, 1::2])
    corners = image(6)[..., ::2, 1::2], image(6)[..., ::2, ::2], image(6)[..., 1::2, ::2]
    table["sm_90-float32-checkerboard"] = affine(*corners)
    table["sm_90-float32-elements"] = affine(*dense(F32, 3), event_dims=0)
    table["sm_90-float32-odd"] = affine(*dense(F32, 3, (5, 37)))
    table["sm_90-float32-no-log-scale"] = head(*dense(F32, 1), None, 0)
    table["sm_90-mixed-head"] = head(*dense(F32, 1), torch.empty(392, dtype=BF16), 1)
    for number, variant in enumerate(FSQ_VARIANTS):
        for target, dtypes in (("sm_90", (F32, F64, BF16, F16)), (("sm_80", "sm_100", "gfx942")[number % 3], (F32,))):
            for dtype in dtypes:
                name = f"{target}-{str(dtype)[6:]}-fsq-{variant}"
                table[name] = quantizer(positions(dtype, 40, 102, 5), (7, 5, 5, 5, 5), variant)
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for name, z, levels in [
            ("first", positions(F32, 8, 4, 32, 32, dim=1), (8, 5, 5, 5)),
            ("first-bfloat16", positions(BF16, 8, 6, 32, 32, dim=1), (8, 8, 8, 5, 5, 5)),
            ("wide", positions(F32, 500, 21), (8,) * 21),
            ("wide-float64", positions(F64, 500, 39), (3,) * 39),
            ("most", positions(F32, 500, 63), (2,) * 63),
        ]:
            table[f"{target}-fsq-{name}"] = quantizer(z, levels, "symmetric")
    table["sm_90-float32-fsq-odd"] = quantizer(positions(F32, 333, 5), (7, 5, 5, 5, 5), "vqp")
    table["sm_90-float32-fsq-halves"] = quantizer(positions(F32, 100, 10)[:5], (7, 5, 5, 5, 5), "symmetric_hard")
    table["sm_90-float32-fsq-large"] = quantizer(torch.empty(1, 1).expand(4, 2**21), (8, 5, 5, 5), "paper")
    table["sm_90-float32-fsq-stages"] = quantizer(positions(F32, 500, 4), (8, 5, 5, 5), "symmetric", stages=8)
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for dtype in (F32, F64):
            name = f"{target}-{str(dtype)[6:]}-hsic"
            table[f"{name}-rbf"] = grams(target, dtype, ("rbf", "rbf"), (64, 3))
            table[f"{name}-rbf-wide"] = grams(target, dtype, ("rbf", "rbf"), (64, 100))
        for dtype in (F32, F64, BF16, F16)[: 4 if target == "sm_90" else 2]:
            table[f"{target}-{str(dtype)[6:]}-center"] = matrices(dtype)
    for dtype in (F32, F64):
        name = f"sm_90-{str(dtype)[6:]}-hsic"
        table[f"{name}-laplacian"] = grams("sm_90", dtype, ("laplacian", "polynomial"), (10, 20), degree=3)
        table[f"{name}-linear"] = grams("sm_90", dtype, ("polynomial", "delta"), (64, 1))
        table[f"{name}-precomputed"] = grams("sm_90", dtype, ("precomputed", "rbf"), (0, 64))
    for target, dtypes in (("sm_80", (F32,)), ("sm_90", (F32, F64, BF16, F16)), ("sm_100", (F32,)), ("gfx942", (F32,))):
        for dtype in dtypes:
            table[f"{target}-{str(dtype)[6:]}-spectral"] = normalised(dtype)
        table[f"{target}-float32-spectral-many"] = normalised(F32, 70)
    for packing in range(3):
        table[f"sm_90-float32-packed{packing}"] = packed(dense(F32, 1)[0], wide(), packing, 1)
        table[f"sm_90-bfloat16-packed{packing}"] = packed(dense(BF16, 1)[0], wide(BF16), packing, 1)
    return table


CASES = cases()
GRAM_KERNELS = ("sums_kernel", "backward_kernel", "matrix_kernel", "permuted_kernel", "accumulate_kernel")
PRODUCTS = ("hsic.sums_kernel", "hsic.backward_kernel")
# bytes of stack: with Triton 3.6 ptxas puts a constant of the 39 float64 channels on the stack
STACK = {("sm_80-fsq-wide-float64", "fsq.residual_kernel"): 8} if triton.__version__.startswith("3.6.") else {}


def dtypes(launch):
    """Dtypes of tensors, and those behind addresses in a table, which are constants."""
    constants = {str(value) for value in launch.constants.values()}
    behind = {dtype for dtype, element in spectral.ELEMENT.items() if str(element) in constants}
    return {a.dtype for a in launch.args if isinstance(a, torch.Tensor)} | behind


def test_every_kernel_has_a_case():
    launches = [launch for case in CASES.values() for launch in case]
    assert {launch.name for launch in launches} == aot.launched_kernels()
    for name in aot.launched_kernels():
        compiled = set().union(*(dtypes(launch) for launch in launches if launch.name == name))
        # sums over partial results read float32 or float64 for every input dtype
        due = {"_tiles.sum_segments": {F32, F64}, "noise.philox_kernel": {torch.int64}}
        # matrices have the compute dtype
        due |= {f"hsic.{kernel}": {F32, F64} for kernel in GRAM_KERNELS}
        due |= {"_gram.prepare_kernel": {F32}, "_gram.wide_kernel": {F64}}
        due["center.means_kernel"] = {F64}
        due["sector.counts_kernel"] = {F64, torch.int64}
        due |= {"spectral.reduce_kernel": {F32, F64}, "_table.fill_kernel": {torch.int64}}
        assert compiled >= due.get(name, {F32, F64, BF16, F16}), name


@pytest.mark.parametrize("layers, tables", [(1, 1), (54, 1), (57, 2)])
@pytest.mark.parametrize("n_iter", [0, 1, 3])
def test_all_layers_share_the_launches(n_iter, layers, tables):
    weights = [torch.empty(8 + i, 4, 3, 3) for i in range(layers)]
    u, v = [torch.empty(len(w)) for w in weights], [torch.empty(36)] * layers
    with aot.recorded() as launches:
        sigmas = spectral.spectral_normalize(weights, u, v, n_iter)[-layers:]
    names = Counter(launch.name.partition(".")[2] for launch in launches)
    rounds = max(n_iter, 1)
    want = {"fill_kernel": tables, "product_kernel": rounds, "scale_kernel": rounds, "reduce_kernel": n_iter}
    assert names == Counter(want)
    with aot.recorded() as launches:
        spectral.spectral_normalize_backward(weights, sigmas, weights, u, v, sigmas)
    assert len(launches) == 2 + tables


def test_arguments_of_a_table_fit_the_limit_of_a_launch():
    for launch in normalised(F32, 56):
        tuples = [a for a in launch.args if isinstance(a, tuple)]
        # addresses of 8 bytes, numbers of 4; table, pitch, first and Triton's two scratch pointers
        assert sum(len(a) * size for a, size in zip(tuples, (8, 4), strict=False)) + 32 <= 4096


def test_layers_of_other_shapes_need_no_compilation():
    def keys(weights):
        u, v = [torch.empty(len(w)) for w in weights], [torch.empty(w[0].numel()) for w in weights]
        with aot.recorded() as launches:
            sigmas = spectral.spectral_normalize(weights, u, v, 2)[-len(weights) :]
            spectral.spectral_normalize_backward(weights, sigmas, weights, u, v, sigmas)
        # the source's hash holds signature, constants and alignment
        return {aot.specialised(launch, "sm_90")[0].hash() for launch in launches}

    shapes = [(1, 1), (16, 16), (64, 3, 7, 7), (1000, 48)]
    assert keys([torch.empty(shape) for shape in shapes]) == keys([torch.empty(33, 5)] * 2)


@pytest.mark.parametrize("case", CASES)
def test_compiles_to_the_expected_instructions_and_resources(case):
    target = case.partition("-")[0]
    for launch in CASES[case]:
        kernel = aot.compiled(launch, target)
        where = f"{case}: {launch.name}"
        # neither reassociated nor contracted: only an explicit fma fuses a * b + c
        relaxed = re.search(r"= f(mul|add|sub|div) (fast|reassoc|contract|arcp|afn|nnan|ninf|nsz)", kernel.asm["llir"])
        assert not relaxed, f"{where}: {relaxed[0]}"
        if target.startswith("sm_"):
            check_ptx(kernel.asm["ptx"], launch, where)
            used = aot.resources(kernel)
            if launch.name in PRODUCTS:
                # two tiles of products fill the registers; a few loop constants may be on the stack
                assert used.stack <= 128 and used.local == 0, f"{where}: {used}"
                continue
            assert used.stack <= STACK.get((case, launch.name), 0) and used.local == 0, f"{where}: {used}"
            assert used.registers <= 168, f"{where}: {used}"  # three blocks of 128 threads per multiprocessor


def check_ptx(ptx, launch, where):
    if F64 in dtypes(launch):
        return  # exp and log are libdevice's and use instructions excluded below
    assert ".f64" not in ptx, where
    # the fma of sqrt_normal and div_normal make these two results IEEE
    roots, quotients = (len(re.findall(rf"\b{name}\.approx\.ftz\.f32", ptx)) for name in ("rsqrt", "rcp"))
    if launch.name.startswith(("fsq.", "noise.")):
        # a packed instruction of sm_100 computes one or two
        least = len(re.findall(r"\bfma\.", ptx))
        most = least + len(re.findall(r"\bfma\.\S*f32x2", ptx))
        assert least <= 2 * roots + 4 * quotients <= most, where
    ptx = re.sub(r"\b(?:rsqrt|rcp)\.approx\.ftz\.f32", "", ptx)
    loose = re.findall(r"\b(?:mul|add|sub|fma|div)\.f32\b|\S*\.(?:ftz|approx|full)\b\S*", ptx)
    assert not loose, f"{where}: {loose}"


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_unit_stride_data_moves_in_128_bit_vectors(dtype, target):
    launches = affine(*dense(dtype, 3)) + head(*dense(dtype, 1), torch.empty(392, dtype=dtype), 1)
    launches += critic(torch.empty(64, 3, 32, 32, dtype=dtype), None, torch.empty(64, dtype=dtype))[:1]
    launches += quantizer(positions(dtype, 1000, 5), (7, 5, 5, 5, 5), "symmetric")
    launches += quantizer(positions(dtype, 4, 5, 1000, dim=1), (7, 5, 5, 5, 5), "symmetric")
    launches += packed(*dense(dtype, 1), torch.empty(64, 784, dtype=dtype), 2, 1) if dtype != F64 else []
    for launch in launches:
        ptx = aot.compiled(launch, target).asm["ptx"]
        widths = Counter(re.findall(r"\b((?:ld|st)\.global)\S*?((?:\.v\d)?\.b\d+)", ptx))
        full = {".v4.b32", ".v2.b64"}
        loads = sum(n for (op, width), n in widths.items() if op == "ld.global" and width in full)
        stores = sum(n for (op, width), n in widths.items() if op == "st.global" and width in full)
        size = 16 // torch.empty((), dtype=dtype).element_size()
        # decode loads an index once per channel, not in vectors
        assert loads or launch.name == "fsq.decode_kernel", f"{launch.name}: {widths}"
        # narrow accesses are allowed only for one value per row: logdet, its gradient, sums, indices
        narrow = {k: n for k, n in widths.items() if k[1] not in full}
        # channel first, a thread has 16 elements of several positions, each with its indices
        most = 16 if launch.name.startswith("fsq.") else 8
        assert sum(narrow.values()) <= most, f"{launch.name}, {size} a vector: {narrow}"
        sums = ("flow_head.forward_kernel", "flow_head.sum_blocks", "gan_qp.sums_kernel")
        assert stores or launch.name in sums, f"{launch.name}: {widths}"
