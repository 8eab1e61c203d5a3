"""The kernels in Triton's interpreter, on CPU tensors; run by test_interpreter.py in a process of its own.

The interpreter's fma rounds twice and its bfloat16 truncates. Here both are replaced by exact ones, so that every
elementwise result can be held to the bits of the C++ kernels, which are those of the same kernel on a GPU.
"""

from __future__ import annotations

import math

import numpy as np
import pyflow
import pytest
import torch
import triton.language as tl
from pyflow import _backend, ops, testing
from pyflow._schemas import FSQ_VARIANTS, PACKINGS, PRIORS, SCALE_MAPS
from pyflow.triton_kernels import fsq
from pyflow.triton_kernels import _random
from triton.runtime import interpreter

FORMS = [(inverse, first) for inverse in (False, True) for first in (False, True)]
MAPS = [(name, {}) for name in SCALE_MAPS] + [("sigmoid", {"eps": 1e-3}), ("softplus", {"eps": 1e-2})]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MIXED = [
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, torch.float16),
    (torch.float16, torch.float64),
]  # fmt: skip


def exact_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 fma: the product is exact in float64, and rounding that sum to odd keeps the second rounding right."""
    if a.dtype != np.float32:
        return a * b + c
    with np.errstate(all="ignore"):
        p, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
        s = p + c
        rest = s - p
        error = (p - (s - rest)) + (c - rest)
        i = s.view(np.int64)
        step = np.where((error > 0) == (s > 0), 1, -1)
        odd = np.isfinite(s) & (error != 0) & (i & 1 == 0)
        return np.where(odd, i + step, i).view(np.float64).astype(np.float32)


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest bfloat16, ties to even."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).view(torch.uint16).numpy()


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    assert _backend.interpreting()
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def fma(self, x, y, z):
        return handle(exact_fma(*np.broadcast_arrays(x.data, y.data, z.data)), z.dtype.scalar)

    def cast(self, src, dst_type, plain=builder.cast_impl):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return handle(round_to_bfloat16(src.data), dst_type.scalar)
        return plain(self, src, dst_type)

    monkeypatch.setattr(builder, "create_fma", fma)
    monkeypatch.setattr(builder, "cast_impl", cast)
    with pyflow.backend("triton"):
        yield


def draw(shape, dtype=torch.float32, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def additive(x, shift, mask=None, inverse=False):
    """The operator; the public function leaves the plain case to torch."""
    return torch.ops.pyflow.additive_coupling(x, shift, mask, inverse)


def run(backend, function, leaves, weights=None):
    """Outputs, then gradients for `weights`, through the public function."""
    leaves = [v.detach().requires_grad_() for v in leaves]
    with pyflow.backend(backend):
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if weights is None:
            weights = [draw(o.shape, o.dtype, seed=9) for o in outputs]
        grads = torch.autograd.grad(outputs, leaves, weights)
    return [v.detach() for v in (*outputs, *grads)]


def compare(function, leaves, *, sums=(), error=2e-5):
    """Bits of the C++ kernels (those at `sums` within rounding), and the reference in float64."""
    got = run("triton", function, leaves)
    dtype = testing.compute_dtype(leaves[0].dtype)
    exact = run("reference", function, [v.double() for v in leaves],
                [draw(o.shape, o.dtype, seed=9).double() for o in got[: len(got) - len(leaves)]])  # fmt: skip
    scale = 1e-6 if dtype == torch.float64 else error
    for i, (a, b) in enumerate(zip(got, exact)):
        testing.assert_within(a, b, scale * (1 + b.abs()), f"output {i} against the reference")
    if _backend.cpu_missing is not None or dtype == torch.float64:
        return got
    for i, (a, b) in enumerate(zip(got, run("cpu", function, leaves))):
        assert a.dtype == b.dtype and a.stride() == b.stride(), f"output {i}"
        if i in sums:
            size = 1 + b.double().abs()
            testing.assert_within(a, b.double(), (1e-5 + testing.UNIT[a.dtype]) * size, f"output {i} against C++")
        else:
            testing.assert_same_bits(a, b, f"output {i} against C++")
    return got


@pytest.mark.parametrize("inverse, first", FORMS)
@pytest.mark.parametrize("scale_map, options", MAPS)
def test_affine_maps_and_forms(scale_map, options, inverse, first):
    def function(x, shift, scale):
        return ops.affine_coupling(
            x, shift, scale, scale_map=scale_map, inverse=inverse, shift_first=first, **options
        )  # fmt: skip

    compare(function, [draw((5, 37)), draw((5, 37), seed=1), draw((5, 37), seed=2, spread=1.5)], sums=(1,))


@pytest.mark.parametrize("scale_map, options", MAPS)
def test_extreme_values(scale_map, options):
    values = [0.0, -0.0, 1e-40, -1e-30, 0.5499999, 0.55, 1.0, -15.0, -15.000001, 20.0, 88.0, -88.0, 103.9, -120.0, 3e38]
    scale = torch.tensor([values + [math.inf, -math.inf, math.nan]])
    x, shift = torch.ones_like(scale), -torch.ones_like(scale)
    for inverse, first in FORMS:
        keywords = dict(scale_map=scale_map, inverse=inverse, shift_first=first, event_dims=0, **options)
        function = lambda x, t, s: ops.affine_coupling(x, t, s, **keywords)  # noqa: B023, E731
        got = run("triton", function, (x, shift, scale))
        if _backend.cpu_missing is None:
            for a, b in zip(got, run("cpu", function, (x, shift, scale))):
                testing.assert_same_bits(a + 0, b + 0)  # the sign of a log-determinant's zero is free


@pytest.mark.parametrize("x_dtype, dtype", [(d, d) for d in DTYPES] + MIXED)
@pytest.mark.parametrize("inverse, first", FORMS)
def test_dtypes(x_dtype, dtype, inverse, first):
    leaves = [draw((3, 45), x_dtype), draw((3, 45), dtype, 1), draw((3, 45), dtype, 2)]
    mask = draw((3, 45), seed=3) > 0.5
    for keywords in ({}, {"mask": mask}):
        for scale_map in SCALE_MAPS:
            keywords |= dict(scale_map=scale_map, inverse=inverse, shift_first=first)
            compare(lambda x, t, s: ops.affine_coupling(x, t, s, **keywords), leaves, sums=(1,))  # noqa: B023
        compare(lambda x, t: additive(x, t, keywords.get("mask"), inverse), leaves[:2])  # noqa: B023


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("inverse, first", FORMS)
def test_packings(packing, dim, inverse, first):
    shape = (2, 3, 4, 6)
    packed = tuple(n * (1 + (d == dim)) for d, n in enumerate(shape))
    keywords = dict(packing=packing, dim=dim, scale_map="tanh", inverse=inverse, shift_first=first)
    function = lambda x, p: ops.affine_coupling_packed(x, p, **keywords)  # noqa: E731
    compare(function, [draw(shape), draw(packed, seed=1)], sums=(1,))
    mask = draw(shape[1:], seed=2) > 0
    compare(lambda x, p: function_with(mask, x, p, keywords), [draw(shape), draw(packed, seed=1)], sums=(1,))


def function_with(mask, x, params, keywords):
    return ops.affine_coupling_packed(x, params, mask=mask, **keywords)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (3, 2, 4, 8)])
@pytest.mark.parametrize("event_dims", [0, 1, 3, 4])
def test_layouts(layout, shape, event_dims):
    x, shift, scale = draw(shape), draw(shape, seed=1), draw(shape, seed=2)
    function = lambda x, t, s: ops.affine_coupling(x, t, s, scale_map="tanh", event_dims=event_dims)  # noqa: E731
    plain = run("triton", function, (x, shift, scale))
    viewed = compare(function, [testing.laid_out(x, layout), shift, testing.laid_out(scale, layout)], sums=(1,))
    for a, b in zip(plain, viewed):
        # event dims are summed in memory order, anything else is the same to the bit
        if layout in ("transposed", "channels_last") and a.dim() != len(shape):
            torch.testing.assert_close(a, b)
        else:
            testing.assert_same_bits(a, b)
    checkerboard = torch.zeros(2 * shape[0], *shape[1:-1], 2 * shape[-1])[::2, ..., 1::2]
    compare(function, [checkerboard.copy_(x), shift, scale], sums=(1,))


def test_masks_broadcast():
    x, shift, scale = draw((4, 3, 8)), draw((4, 3, 8), seed=1), draw((4, 3, 8), seed=2)
    for shape in [(8,), (3, 1), (4, 1, 1), (4, 3, 8), ()]:
        mask = draw(shape, seed=3) > -0.2
        mask[(0,) * len(shape)] = True
        function = lambda x, t, s: ops.affine_coupling(x, t, s, mask=mask)  # noqa: B023, E731
        clean = compare(function, [x, shift, scale], sums=(1,))
        hidden = torch.where(mask, math.nan, 0)
        for a, b in zip(run("triton", function, (x, shift + hidden, scale + hidden)), clean):
            testing.assert_same_bits(a, b)


@pytest.mark.parametrize(
    "shape", [(0, 4), (4, 0), (1, 1), (9,), (2, 1), (65, 3), (1, 513), (3, 1000), (2, 9001), (1, 20011)]
)
def test_sizes(shape):
    leaves = [draw(shape, seed=i) for i in range(3)]
    compare(lambda x, t, s: ops.affine_coupling(x, t, s, scale_map="atan"), leaves, sums=(1,), error=2e-4)
    compare(lambda x, t: additive(x, t), leaves[:2])


def test_gradients_that_are_absent_or_expanded():
    leaves = [draw((3, 10), seed=i).requires_grad_() for i in range(3)]
    for pick in (lambda y, g: y.sum(), lambda y, g: g.sum(), lambda y, g: y.t()[::2].sum() + g[0]):
        results = []
        for backend in ("triton", "reference"):
            with pyflow.backend(backend):
                grads = torch.autograd.grad(pick(*ops.affine_coupling(*leaves)), leaves, allow_unused=True)
                results.append([torch.zeros_like(v) if g is None else g for g, v in zip(grads, leaves)])
        torch.testing.assert_close(*results)


def test_rows_do_not_depend_on_the_batch():
    for cols in (3, 37, 392, 3000, 9001):
        x, shift, scale = (draw((7, cols), seed=i) for i in range(3))
        whole = ops.affine_coupling(x, shift, scale)
        for rows in (slice(0, 1), slice(2, 5)):
            for a, b in zip(whole, ops.affine_coupling(x[rows], shift[rows], scale[rows])):
                testing.assert_same_bits(a[rows], b)
        head = ops.flow_log_prob(x)
        testing.assert_same_bits(head[2:5], ops.flow_log_prob(x[2:5]))


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [True, False])
def test_flow_head(prior, dtype, scaled):
    shapes = [(3, 1), (5, 2, 3, 7), (0, 4), (4, 0), (9,), (2, 600)]
    for shape in shapes + [(33, 63), (35, 513), (2, 9001)] * (dtype == torch.float32 and scaled):
        leaves = [draw(shape, dtype), 0.3 * draw(shape[1:], dtype, 1)][: 1 + scaled]
        function = lambda *v: ops.flow_log_prob(*v, prior=prior)  # noqa: E731
        got = compare(function, leaves, sums=(0, 2), error=2e-4)
        assert got[0].dtype == testing.compute_dtype(dtype)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_flow_head_layouts(layout):
    h, log_scale = draw((6, 5, 4, 10)), 0.3 * draw((5, 4, 10), seed=1)
    scale = log_scale.transpose(0, 2).contiguous().transpose(0, 2)
    compare(lambda h, s: ops.flow_log_prob(h, s), [testing.laid_out(h, layout), scale], sums=(0, 2))


def test_flow_head_many_rows():
    compare(lambda h, s: ops.flow_log_prob(h, s), [draw((1100, 20)), draw((20,), seed=1)], sums=(0, 2), error=2e-4)


def test_float64_is_accurate():
    s = torch.cat((torch.linspace(-40, 40, 2001), 10.0 ** torch.linspace(-30, -1, 400)), 0).double()
    zero = torch.zeros_like(s)
    softplus = lambda v: torch.clamp(v, min=0) + torch.log1p(torch.exp(-v.abs()))  # noqa: E731
    expected = {
        "exp": s, "sigmoid": -softplus(-(s + 2)), "sigmoid_inv": softplus(-(s + 2)), "tanh": 2 * torch.tanh(s / 2),
        "atan": 2 * 0.636 * torch.atan(s), "softsign": s / (1 + s.abs() / -math.log(1e-3)),
        "softplus": torch.where(s < -15, s - 0.5 * torch.exp(s), torch.log(softplus(s))),
    }  # fmt: skip
    for scale_map, g in expected.items():
        _, got = ops.affine_coupling(zero, zero, s, scale_map=scale_map, event_dims=0)
        torch.testing.assert_close(got, g, rtol=4e-15, atol=4e-16 if scale_map == "softplus" else 0, msg=scale_map)
    densities = {"gaussian": -0.5 * s * s - 0.5 * math.log(2 * math.pi), "logistic": -softplus(s) - softplus(-s)}
    for prior, density in densities.items():
        torch.testing.assert_close(ops.flow_log_prob(s[:, None], prior=prior), density, rtol=4e-15, atol=4e-15)


QUANTIZERS = [
    ((8, 5, 5, 5), (300, 4), -1), ((7, 5, 5, 5, 5), (2, 63, 5), 2), ((8, 8, 8, 5, 5, 5), (3, 6, 7, 11), 1),
    ((3,), (1, 97), 0), ((12, 1001), (2, 130), 0), ((4, 6, 9), (3,), 0), ((5,) * 8, (2, 8, 40), 1),
    ((3,) * 39, (9, 39), 1), ((5, 3, 4), (0, 3), 1),
]  # fmt: skip


def with_nan(z):
    """NaN and infinities strewn in."""
    z = z.clone(memory_format=torch.contiguous_format)
    for i, value in enumerate((math.nan, math.inf, -math.inf, -0.0)):
        z.view(-1)[i * 5 :: 31] = value
    return z


def equal(got, want, name):
    """Bits and strides; gradients of float64, of which libm has the exponential, within rounding."""
    assert got.dtype == want.dtype and (got.stride() == want.stride() or got.numel() == 0), name
    if not got.is_floating_point():
        assert torch.equal(got, want), name
    elif "gradient" in name and got.dtype == torch.float64:
        testing.assert_within(got, want, 1e-14 * (1 + want.abs()), name)
    else:
        testing.assert_same_bits(got, want, name)


def both_backends(function, z):
    """The outputs, and the gradient of the first, on Triton; they are those of C++."""
    if _backend.cpu_missing is not None:
        pytest.skip(_backend.cpu_missing)
    results = []
    for backend in ("triton", "cpu"):
        leaf = z.detach().requires_grad_()
        with pyflow.backend(backend):
            outputs = function(leaf)
            gradient = torch.autograd.grad(outputs[0], leaf, draw(z.shape, z.dtype, seed=9))
        results.append({f"output {i}": v.detach() for i, v in enumerate(outputs)} | {"gradient": gradient[0]})
    for name, got in results[0].items():
        equal(got, results[1][name], name)
    return results[0]


def quantize(levels, dim, variant):
    def function(z):
        codes, indices = ops.fsq(z, levels, variant=variant, dim=dim)
        alone, _ = ops.fsq(z, levels, variant=variant, dim=dim, return_indices=False)
        decoded = ops.fsq_decode(indices, levels, variant=variant, dim=dim, dtype=z.dtype)
        return codes, indices, alone, decoded

    return function


@pytest.mark.parametrize("variant", FSQ_VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fsq(variant, dtype):
    for levels, shape, dim in QUANTIZERS:
        for z in (draw(shape, dtype, spread=1.5), with_nan(draw(shape, dtype, seed=1))):
            got = both_backends(quantize(levels, dim, variant), z)
            testing.assert_same_bits(got["output 2"], got["output 0"])
            unknown = z.isnan().any(dim, keepdim=True)
            testing.assert_same_bits(got["output 3"], torch.where(unknown, math.nan, got["output 0"]))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("levels", [(8, 5, 4, 3), (7, 5, 6)])
def test_fsq_layouts(layout, dim, levels):
    shape = [4, 6, 5, 8]
    shape[dim] = len(levels)
    z = testing.laid_out(draw(shape), layout)
    both_backends(quantize(levels, dim, "vqp"), z)
    residual = lambda v: ops.residual_fsq(v, levels, 2, dim=dim)  # noqa: E731
    both_backends(residual, z.clamp(-1, 1) if layout == "contiguous" else z)
    wide = torch.cat((z, z), dim).narrow(dim, 1, len(levels))
    both_backends(quantize(levels, dim, "symmetric"), wide)


@pytest.mark.parametrize("variant", FSQ_VARIANTS)
def test_fsq_extreme_values(variant):
    bits = torch.arange(-(2**31), 2**31, 2**21 + 1, dtype=torch.int64).to(torch.int32)
    both_backends(quantize((8, 6, 5, 1000), 0, variant), bits.view(torch.float32)[: bits.numel() // 4 * 4].view(4, -1))


def test_fsq_numbers_beyond_int32():
    for levels in [(2**22, 2**22, 2**19), (8,) * 21, (5, 1000, 1000, 999, 1001, 17), (4, 2**20, 3, 7), (2,) * 31]:
        z = draw((70, len(levels)), spread=4)
        got = both_backends(quantize(levels, -1, "symmetric"), z)
        assert got["output 1"].dtype == (torch.int64 if math.prod(levels) > 2**31 else torch.int32)
        top = torch.full((3, len(levels)), 50.0)
        assert ops.fsq(top, levels, variant="symmetric")[1].tolist() == [math.prod(levels) - 1] * 3


def test_fsq_many_channels_and_many_tiles(monkeypatch):
    for levels in ((3,) * 40 + (5,) * 39, (6,) * 100):
        for z in (draw((20, len(levels))), draw((len(levels), 20)).t()):
            function = lambda v: ops.fsq(v, levels, return_indices=False)[:1]  # noqa: B023, E731
            both_backends(function, z)
    monkeypatch.setattr(fsq, "MANY_TILES", 3)
    tile = fsq._tile
    for wide in (False, True):
        # 64-bit numbers, as from 2**31 elements on
        monkeypatch.setattr(fsq, "_tile", lambda *args: tile(*args)._replace(wide=wide))  # noqa: B023
        for shape, dim in (((1701, 5), -1), ((3, 5, 1000), 1)):
            both_backends(quantize((7, 5, 5, 5, 5), dim, "vqp"), draw(shape))
            both_backends(lambda z: ops.residual_fsq(z, (7, 5, 5, 5, 5), 2, dim=dim), draw(shape))  # noqa: B023


def test_fsq_gradients_that_are_expanded():
    z = draw((3, 10, 4)).requires_grad_()
    for pick in (lambda c: c.sum(), lambda c: c.transpose(0, 1)[::2].sum(), lambda c: (c * c[:1].detach()).sum()):
        results = []
        for backend in ("triton", "cpu" if _backend.cpu_missing is None else "reference"):
            with pyflow.backend(backend):
                results.append(torch.autograd.grad(pick(ops.fsq(z, (8, 5, 5, 5))[0]), z)[0])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("variant", FSQ_VARIANTS)
def test_fsq_decode(variant):
    levels = (3, 4, 5, 7)
    indices = torch.arange(-1, 420)
    for dtype in DTYPES:
        for kind, dim in ((torch.int64, 0), (torch.int32, 1), (torch.int64, -1)):
            for given in (indices.to(kind), indices.to(kind)[:420].view(20, 21).t(), indices.to(kind)[5]):
                if -given.dim() - 1 <= dim <= given.dim():
                    call = lambda: ops.fsq_decode(given, levels, variant=variant, dim=dim, dtype=dtype)  # noqa: B023, E731
                    with pyflow.backend("reference"):
                        want = call()
                    equal(call(), want.contiguous(), f"{dtype} {kind} {dim}")
    # a GPU does not look at the indices: what is no index is NaN
    number = FSQ_VARIANTS.index(variant)
    for wild in (torch.tensor([-(2**63), -2, 420, 2**31 + 5, 2**63 - 1]), torch.tensor([420, -7]).int()):
        assert fsq.fsq_decode(wild, levels, number, 1, torch.float32).isnan().all()


@pytest.mark.parametrize("variant", ["symmetric", "symmetric_hard"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fsq_residual(variant, dtype):
    for levels, shape, dim in QUANTIZERS:
        z = draw(shape, dtype)
        for active in (None, 0, 2, 5):
            given = None if active is None else torch.tensor(active)
            function = lambda v: ops.residual_fsq(v, levels, 3, variant=variant, dim=dim, active=given)  # noqa: B023, E731
            got = both_backends(function, with_nan(z) if active == 2 else z)
            if active is not None:
                assert (got["output 1"][..., active:] == -1).all()
    # the scale of the later stages is denormal, then 0
    z = draw((17, 2), dtype)
    both_backends(lambda v: ops.residual_fsq(v, (1000, 4096), 16, variant=variant), z)


@pytest.fixture(params=["numbers", "on the device"])
def scalars(request, monkeypatch):
    """0-d tensors on the CPU are the caller's numbers; on a GPU they lie in its memory."""
    if request.param == "on the device":
        monkeypatch.setattr(_random, "by_value", lambda tensor: False)


def same_on_every_backend(function):
    """Bits of the reference, which are those of C++."""
    got = function()
    for backend in ("reference",) + ("cpu",) * (_backend.cpu_missing is None):
        with pyflow.backend(backend):
            want = function()
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert a.stride() == b.stride()
            testing.assert_same_bits(a, b, f"output {i} against {backend}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise(dtype, scalars):
    for shape in [(), (0,), (7,), (10, 33), (5, 3, 7), (300, 2), (3, 1027), (4, 4, 4)]:
        for seed in (3, 2**64 - 5, *(torch.arange(n) * 2**33 - 2 for n in shape[:1])):
            for draw in (ops.normal, ops.uniform):
                options = dict(seed=seed, step=2**40 + 3, dtype=dtype, purpose="prior")
                same_on_every_backend(lambda: (draw(shape, **options),))  # noqa: B023


def test_noise_words():
    counter, key = torch.randint(2**32, (3, 50, 4)), torch.randint(2**32, (50, 2))
    same_on_every_backend(lambda: (ops.philox(counter, key), ops.philox(counter[:0], key), ops.sample_seeds(5, 9)))


def sde_leaves(shape, dtype, kind):
    rows = shape[:1] if kind == "per sample" else ()
    x, score = draw(shape, dtype), draw(shape, torch.float32, 1)
    return [x, score, draw(rows, seed=2), draw(rows, seed=3), draw(rows, seed=4).abs()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["0-d", "per sample"])
def test_sde_step(dtype, kind, scalars):
    long = [(33, 63), (300, 3)] * (dtype == torch.float32)
    for shape in [(), (9,), (0, 4), (4, 0), (3, 1), (5, 2, 7, 3), *long]:
        if kind == "per sample" and not shape:
            continue
        leaves = sde_leaves(shape, dtype, kind)
        for seed in (3, *(ops.sample_seeds(3, n) for n in shape[:1])):
            step = lambda *v: ops.sde_step(*v, seed=seed, step=2**33, return_mean=True)  # noqa: B023, E731
            compare(step, leaves, sums=(4, 5, 6), error=3e-4)
            compare(lambda x, a, c: ops.perturb(x, a, c, seed=seed), [leaves[0], *leaves[2::2]], sums=(2, 3), error=3e-4)  # noqa: B023
        injected = lambda *v: ops.sde_step(*v[:5], noise=v[5], return_mean=True)  # noqa: E731
        compare(injected, [*leaves, draw(shape, dtype, 6)], sums=(4, 5, 6), error=3e-4)
        numbers = lambda x, s: ops.sde_step(x, s, 1.1, 0.3, 0.7, seed=3)  # noqa: E731
        compare(numbers, leaves[:2])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_sde_layouts(layout):
    x, score, noise = (draw((6, 5, 4, 10), seed=i) for i in range(3))
    viewed = [testing.laid_out(v, layout) for v in (x, score, noise)]
    for seed in (3, ops.sample_seeds(3, 6)):
        compare(lambda x, s: ops.sde_step(x, s, 1.1, 0.3, 0.7, seed=seed), viewed[:2])  # noqa: B023
        compare(lambda x, s: ops.sde_step(x, s, 1.1, 0.3, 0.7, seed=seed), [viewed[0], score])  # noqa: B023
        loss = lambda p, c: ops.denoising_loss(p, c, seed=seed)  # noqa: B023, E731
        compare(loss, [viewed[0], draw((6,), seed=4).abs()], sums=(0, 2), error=3e-4)
    compare(lambda x, s, z: ops.sde_step(x, s, 1.1, 0.3, 0.7, noise=z), viewed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sde_loss_and_norms(dtype, scalars):
    for shape in [(9,), (0, 4), (4, 0), (5, 2, 7, 3), *[(33, 63), (2, 9001)] * (dtype == torch.float32)]:
        pred, score, _, _, std = sde_leaves(shape, dtype, "per sample")
        for seed in (3, ops.sample_seeds(3, shape[0])):
            loss = lambda p, c: ops.denoising_loss(p, c, seed=seed)  # noqa: B023, E731
            compare(loss, [pred, std], sums=(0, 2), error=3e-4)
            epsilon = lambda p: ops.denoising_loss(p, seed=seed, parameterization="epsilon")  # noqa: B023, E731
            compare(epsilon, [pred], sums=(0,), error=3e-4)
            for norm in ("sample", "batch"):
                options = dict(snr=0.2, norm=norm, seed=seed)
                corrector = lambda x, s: ops.langevin_step(x, s, **options)  # noqa: B023, E731
                compare(corrector, [pred, score], sums=(0, 2), error=3e-4)
