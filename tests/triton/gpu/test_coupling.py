"""On a GPU: the bits of the C++ kernels, of every backend, of every run, batch and graph replay."""

from __future__ import annotations

import itertools

import pytest
import torch

import pyflow
from pyflow import _backend, ops, testing
from pyflow._schemas import FSQ_VARIANTS, PACKINGS, PRIORS, SCALE_MAPS

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(why), reason=f"{name}: {why}"))
    for name, why in _backend.status().items()
    if name in ("triton", "cuda")
]
FORMS = list(itertools.product((False, True), repeat=2))
MAPS = [(name, {}) for name in SCALE_MAPS] + [("sigmoid", {"eps": 1e-3}), ("softplus", {"eps": 1e-2})]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(3, 1), (65, 3), (33, 37), (16, 392), (7, 1000), (5, 2049), (3, 9001), (2, 50001)]


@pytest.fixture(params=BACKENDS)
def gpu(request):
    with pyflow.backend(request.param):
        yield request.param


def draw(*shape, dtype=torch.float32, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def run(backend, function, leaves, device):
    """Outputs and gradients, back on the CPU, with the strides they had."""
    leaves = [v.to(device).requires_grad_() for v in leaves]
    with pyflow.backend(backend):
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [draw(*o.shape, dtype=o.dtype, seed=9).to(device) for o in outputs]
        grads = torch.autograd.grad(outputs, leaves, weights)
    return [v.detach().cpu() for v in (*outputs, *grads)]


def compare(gpu, function, leaves, sums=()):
    """Bits of the C++ kernels; results at `sums`, and all of float64, within rounding."""
    got = run(gpu, function, leaves, "cuda")
    for i, (a, b) in enumerate(zip(got, run("auto", function, leaves, "cpu"))):
        assert a.stride() == b.stride() and a.dtype == b.dtype, f"output {i}"
        if i in sums or leaves[0].dtype == torch.float64:
            error = 2e-12 if leaves[0].dtype == torch.float64 else 2e-5
            size = 1 + b.double().abs()
            testing.assert_within(a, b.double(), (error + testing.UNIT[a.dtype]) * size, f"output {i}")
        elif _backend.cpu_missing is None:
            testing.assert_same_bits(a, b, f"output {i}")
    return got


def affine(**keywords):
    return lambda x, t, s: ops.affine_coupling(x, t, s, **keywords)


@pytest.mark.parametrize("inverse, first", FORMS)
@pytest.mark.parametrize("scale_map, options", MAPS)
def test_maps_and_forms(gpu, scale_map, options, inverse, first):
    leaves = [draw(257, 392), draw(257, 392, seed=1), draw(257, 392, seed=2, spread=3.0)]
    compare(gpu, affine(scale_map=scale_map, inverse=inverse, shift_first=first, **options), leaves, sums=(1,))


@pytest.mark.parametrize("scale_map, options", MAPS)
def test_every_magnitude(gpu, scale_map, options):
    # one float in 4096, so all exponents, both signs, infinities and NaN
    bits = torch.arange(-(2**31), 2**31, 4096, dtype=torch.int64).to(torch.int32)
    scale = bits.view(torch.float32).reshape(-1, 64)
    one = torch.ones_like(scale)
    for inverse in (False, True):
        function = affine(scale_map=scale_map, inverse=inverse, event_dims=0, **options)
        got = run(gpu, function, (one, one, scale), "cuda")
        if _backend.cpu_missing is None:
            for i, (a, b) in enumerate(zip(got, run("auto", function, (one, one, scale), "cpu"))):
                testing.assert_same_bits(a + 0, b + 0, f"{scale_map}, output {i}")


@pytest.mark.parametrize(
    "shape, dtype, param_dtype",
    [(shape, torch.float32, torch.float32) for shape in SHAPES]
    + [((33, 37), *pair) for pair in itertools.product(DTYPES, DTYPES)],
)
def test_dtypes_and_sizes(gpu, shape, dtype, param_dtype):
    leaves = [draw(*shape, dtype=d, seed=i) for i, d in enumerate((dtype, param_dtype, param_dtype))]
    mask = (draw(*shape, seed=3) > 0.3).cuda()
    compare(gpu, affine(scale_map="tanh"), leaves, sums=(1,))
    compare(gpu, lambda x, t, s: affine(inverse=True, mask=mask.to(x.device))(x, t, s), leaves, sums=(1,))
    # the public function leaves the plain case to torch
    compare(gpu, lambda x, t: torch.ops.pyflow.additive_coupling(x, t, None, True), leaves[:2])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("event_dims", [0, 1, 3])
def test_layouts(gpu, layout, event_dims):
    leaves = [draw(6, 5, 7, 12, seed=i) for i in range(3)]
    coupling = affine(scale_map="atan", event_dims=event_dims)
    compare(gpu, lambda *v: coupling(*(testing.laid_out(u, layout) for u in v)), leaves, sums=(1,))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_packings(gpu, packing, dim):
    shape = (4, 6, 5, 8)
    doubled = tuple(n * (1 + (d == dim)) for d, n in enumerate(shape))
    for inverse, first in FORMS:
        options = dict(packing=packing, dim=dim, scale_map="tanh", inverse=inverse, shift_first=first)
        function = lambda x, p: ops.affine_coupling_packed(x, p, **options)  # noqa: B023, E731
        compare(gpu, function, [draw(*shape), draw(*doubled, seed=1)], sums=(1,))


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [True, False])
def test_flow_head(gpu, prior, dtype, scaled):
    shapes = [*SHAPES, (5, 3, 8, 8), (2000, 64), (9,), (0, 4), (4, 0)]
    for shape in shapes if dtype == torch.float32 else [(33, 37), (3, 9001)]:
        leaves = [draw(*shape, dtype=dtype), 0.3 * draw(*shape[1:], dtype=dtype, seed=1)][: 1 + scaled]
        compare(gpu, lambda *v: ops.flow_log_prob(*v, prior=prior), leaves, sums=(0, 2))


QUANTIZERS = [
    ((8, 5, 5, 5), (3001, 4), -1), ((7, 5, 5, 5, 5), (2, 1063, 5), 2), ((8, 8, 8, 5, 5, 5), (3, 6, 37, 41), 1),
    ((5,) * 8, (2, 8, 1024), 1), ((3,), (1, 9007), 0), ((12, 1001), (2, 6000), 0), ((4, 6, 9), (3,), 0),
    ((3,) * 39, (900, 39), 1), ((2**22, 2**22, 2**19), (700, 3), 1), ((5, 3, 4), (0, 3), 1),
]  # fmt: skip


def quantized(gpu, function, z):
    """Outputs and the gradient of the first, bit for bit those of the C++ kernels (float64: within rounding)."""
    results = []
    for backend, device in ((gpu, "cuda"), ("auto", "cpu")):
        leaf = z.to(device).requires_grad_()
        with pyflow.backend(backend):
            outputs = function(leaf)
            gradient = torch.autograd.grad(outputs[0], leaf, draw(*z.shape, dtype=z.dtype, seed=9).to(device))
        results.append([v.detach().cpu() for v in (*outputs, *gradient)])
    for i, (a, b) in enumerate(zip(*results)):
        assert a.dtype == b.dtype and (a.stride() == b.stride() or a.numel() == 0), f"output {i}"
        if not a.is_floating_point():
            # tanh of float64 is the vendor's: a value at a boundary may fall to the other side
            close = (a == b).double().mean() > 0.999 if a.numel() else True
            assert close if z.dtype == torch.float64 else torch.equal(a, b), f"output {i}"
        elif z.dtype == torch.float64 and i < len(results[0]) - 1:
            assert a.numel() == 0 or ((a == b) | a.isnan() & b.isnan()).double().mean() > 0.999, f"output {i}"
        elif z.dtype == torch.float64:
            testing.assert_within(a, b, 1e-12 * (1 + b.abs()), f"output {i}")
        elif _backend.cpu_missing is None:
            testing.assert_same_bits(a, b, f"output {i}")
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
def test_fsq(gpu, variant, dtype):
    for levels, shape, dim in QUANTIZERS:
        z = draw(*shape, dtype=dtype, spread=1.5)
        codes, _, alone, decoded, _ = quantized(gpu, quantize(levels, dim, variant), z)
        testing.assert_same_bits(alone, codes)
        testing.assert_same_bits(decoded, codes)


@pytest.mark.parametrize("variant", FSQ_VARIANTS)
def test_fsq_of_every_magnitude(gpu, variant):
    bits = torch.arange(-(2**31), 2**31, 4096, dtype=torch.int64).to(torch.int32)
    quantized(gpu, quantize((8, 6, 5, 1000), 0, variant), bits.view(torch.float32).reshape(4, -1))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_fsq_layouts(gpu, layout, dim):
    shape = [4, 6, 5, 12]
    shape[dim] = 3
    z = draw(*shape)
    laid_out = lambda function: lambda v: function(testing.laid_out(v, layout))  # noqa: E731
    quantized(gpu, laid_out(quantize((7, 5, 6), dim, "vqp")), z)
    quantized(gpu, laid_out(lambda v: ops.residual_fsq(v, (7, 5, 6), 3, dim=dim)), z)
    part = lambda v: torch.cat((v, v), dim).narrow(dim, 1, 3)  # noqa: E731
    quantized(gpu, lambda v: quantize((7, 5, 6), dim, "symmetric")(part(v)), z)


def test_fsq_of_many_channels(gpu):
    for levels in ((3,) * 40 + (5,) * 39, (6,) * 100):
        for z in (draw(200, len(levels)), draw(len(levels), 200).t()):
            quantized(gpu, lambda v: ops.fsq(v, levels, return_indices=False)[:1], z)  # noqa: B023


@pytest.mark.parametrize("variant", ["symmetric", "symmetric_hard"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_fsq(gpu, variant, dtype):
    for levels, shape, dim in QUANTIZERS:
        z = draw(*shape, dtype=dtype)
        for active in (None, 0, 2, 5):
            count = None if active is None else torch.tensor(active)

            def function(v):
                given = None if count is None else count.to(v.device)  # noqa: B023
                return ops.residual_fsq(v, levels, 3, variant=variant, dim=dim, active=given)  # noqa: B023

            quantized(gpu, function, z)


def test_fsq_decodes_what_is_no_index_to_nan(gpu):
    wild = torch.tensor([-(2**63), -2, -1, 420, 2**31 + 5, 2**63 - 1], device="cuda")
    assert ops.fsq_decode(wild, (3, 4, 5, 7)).isnan().all()
    z = torch.full((5, 4), float("nan"), device="cuda")
    codes, indices = ops.fsq(z, (3, 4, 5, 7))
    assert codes.isnan().all() and indices.eq(-1).all()


def test_fsq_in_a_cuda_graph_follows_active(gpu):
    z = draw(1000, 5).cuda()
    active = torch.tensor(1, device="cuda")

    def step():
        codes, indices = ops.fsq(z, (7, 5, 5, 5, 5))
        out, stages = ops.residual_fsq(codes, (7, 5, 5, 5, 5), 3, active=active)
        return codes, indices, out, stages, ops.fsq_decode(indices, (7, 5, 5, 5, 5))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for count in (1, 3, 0):
        active.fill_(count)
        z.mul_(0.7)
        graph.replay()
        for a, b in zip(captured, step()):
            assert torch.equal(a, b)
        assert (captured[3] >= 0).all(0).tolist() == [stage < count for stage in range(3)]


def test_fsq_compiles_without_a_break(gpu):
    z = draw(300, 5).cuda().requires_grad_()

    def function(z):
        codes, indices = ops.fsq(z, (7, 5, 5, 5, 5))
        out, stages = ops.residual_fsq(z, (7, 5, 5, 5, 5), 2)
        return codes.square().sum() + out.square().sum(), indices, stages

    for a, b in zip(function(z), torch.compile(function, fullgraph=True)(z)):
        torch.testing.assert_close(a, b)
    eager = torch.autograd.grad(function(z)[0], z)
    testing.assert_same_bits(eager[0], torch.autograd.grad(torch.compile(function, fullgraph=True)(z)[0], z)[0])


@pytest.mark.skipif(bool(_backend.status()["cuda"] or _backend.status()["triton"]), reason="needs both backends")
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_and_cuda_agree_even_in_sums(shape):
    leaves = [draw(*shape, seed=i) for i in range(3)]
    strided = [torch.cat((v, v), 1)[:, ::2] if shape[1] > 1 else v for v in leaves]
    functions = [affine(scale_map="tanh"), affine(scale_map="softplus", inverse=True)]
    functions += [lambda h, *_: ops.flow_log_prob(h, prior=prior) for prior in PRIORS]
    for function, inputs in itertools.product(functions, (leaves, strided)):
        with torch.no_grad():
            results = []
            for backend in ("triton", "cuda"):
                with pyflow.backend(backend):
                    out = function(*(v.cuda() for v in inputs))
                    results.append(out if isinstance(out, tuple) else (out,))
        for a, b in zip(*results):
            testing.assert_same_bits(a + 0, b + 0)


def test_same_bits_in_every_run_and_batch(gpu):
    for cols in (3, 37, 392, 3000, 9001):
        x, shift, scale = (draw(300, cols, seed=i).cuda() for i in range(3))
        whole = ops.affine_coupling(x, shift, scale)
        head = ops.flow_log_prob(x)
        for a, b in zip(whole, ops.affine_coupling(x, shift, scale)):
            testing.assert_same_bits(a, b)
        for rows in (slice(0, 1), slice(0, 7), slice(123, 200), slice(1, None)):
            for a, b in zip(whole, ops.affine_coupling(x[rows], shift[rows], scale[rows])):
                testing.assert_same_bits(a[rows], b)
            testing.assert_same_bits(head[rows], ops.flow_log_prob(x[rows]))
        log_scale = draw(cols, seed=4).cuda().requires_grad_()
        grads = [torch.autograd.grad(ops.flow_log_prob(x, log_scale).sum(), log_scale)[0] for _ in range(2)]
        testing.assert_same_bits(*grads)


def test_a_row_has_the_same_sum_in_any_layout(gpu):
    x, shift, scale = (draw(20, 1000, seed=i).cuda() for i in range(3))
    _, logdet = ops.affine_coupling(x, shift, scale, scale_map="tanh")
    wide = torch.zeros(20, 2000, device="cuda")
    wide[:, 1::2] = scale
    testing.assert_same_bits(logdet, ops.affine_coupling(x, shift, wide[:, 1::2], scale_map="tanh")[1])
    shifted = torch.zeros(20 * 1000 + 1, device="cuda")[1:].view(20, 1000).copy_(scale)
    testing.assert_same_bits(logdet, ops.affine_coupling(x, shift, shifted, scale_map="tanh")[1])


def test_works_in_a_cuda_graph_and_never_waits(gpu):
    leaves = [draw(64, 9001, seed=i).cuda() for i in range(3)]
    log_scale = draw(9001, seed=3).cuda()
    params = torch.cat(leaves[1:], 1)

    def step():
        y, logdet = ops.affine_coupling(*leaves, scale_map="tanh")
        z, again = ops.affine_coupling_packed(y, params, scale_map="sigmoid", inverse=True)
        z = torch.ops.pyflow.additive_coupling(z, leaves[1], None, False)
        return z, logdet + again + ops.flow_log_prob(z, log_scale, prior="logistic")

    wanted = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(captured, wanted):
        testing.assert_same_bits(a, b)
    for v in leaves:
        v.mul_(0.5)
    params.mul_(0.5)
    graph.replay()
    for a, b in zip(captured, step()):
        testing.assert_same_bits(a, b)


def test_compiles_without_a_break(gpu):
    leaves = [draw(32, 100, seed=i).cuda().requires_grad_() for i in range(3)]

    def loss(x, shift, scale):
        y, logdet = ops.affine_coupling(x, shift, scale, scale_map="tanh")
        return ops.flow_log_prob(y).sum() + logdet.sum()

    eager = torch.autograd.grad(loss(*leaves), leaves)
    fused = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for a, b in zip(eager, fused):
        testing.assert_same_bits(a, b)


def test_unwritten_memory_is_never_read(gpu):
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        for shape in SHAPES:
            leaves = [draw(*shape, seed=i) for i in range(3)]
            for v in run(gpu, affine(scale_map="tanh"), leaves, "cuda"):
                assert not v.isnan().any(), shape
            for v in run(gpu, lambda h, s: ops.flow_log_prob(h, s[0]), leaves[:2], "cuda"):
                assert not v.isnan().any(), shape
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_runs_on_the_tensors_device(gpu):
    leaves = [draw(9, 100, seed=i) for i in range(3)]
    assert torch.cuda.current_device() == 0
    y, logdet = ops.affine_coupling(*(v.to("cuda:1") for v in leaves))
    assert y.device.index == logdet.device.index == 1 and torch.cuda.current_device() == 0
    testing.assert_same_bits(y, ops.affine_coupling(*(v.to("cuda:0") for v in leaves))[0].to("cuda:1"))


def test_more_elements_than_an_int32_counts(gpu):
    count = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    for shape in [(1, count), (count // 64, 64), (3, count // 2)]:
        x = torch.ones(shape, dtype=torch.bfloat16, device="cuda")
        x[-1, -5:] = 3
        shift = torch.full((1, 1), 0.5, device="cuda").expand(shape)
        scale = torch.full((1, 1), 2.0**-20, device="cuda").expand(shape)
        y, logdet = ops.affine_coupling(x, shift, scale)
        assert y[0, :5].eq(1.5).all() and y[-1, -5:].eq(3.5).all() and y[-1, -6] == 1.5
        torch.testing.assert_close(logdet.double(), torch.full_like(logdet, shape[1] * 2.0**-20).double())
        del y
        y = torch.ops.pyflow.additive_coupling(x, shift, None, False)
        assert y[0, :5].eq(1.5).all() and y[-1, -5:].eq(3.5).all() and y[-1, -6] == 1.5
        del x, y


def test_fsq_of_more_elements_than_an_int32_counts(gpu):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    levels = (5, 5, 5)
    for shape, dim in [((2**31 // 3 + 4097, 3), -1), ((3, 2**31 // 3 + 4096), 0), ((2, 3, 2**30 // 3 + 4096), 1)]:
        z = torch.zeros(shape, dtype=torch.bfloat16, device="cuda").movedim(dim, 0)
        last = (slice(None), *(-1,) * (z.dim() - 1))
        z[last] = torch.tensor([-9.0, 9.0, 9.0])
        codes, indices = ops.fsq(z, levels, dim=0)
        assert indices.flatten()[:5].eq(62).all() and indices.flatten()[-2:].tolist() == [62, 120]
        assert codes[last].tolist() == [-1, 1, 1] and int(codes.count_nonzero()) == 3
        del z
        assert int((ops.fsq_decode(indices, levels, dim=0, dtype=torch.bfloat16) != codes).sum()) == 0
        del codes, indices
