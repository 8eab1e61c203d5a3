"""Spectral normalisation: reference, SVD, gradients, reproducible bits, transforms, error texts."""

from __future__ import annotations

import hashlib

import pytest
import torch

import pyflow
from pyflow import ops, testing
from pyflow.reference import spectral as ref

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (33, 70), (64, 3, 7, 7), (17,), (1, 1000), (1000, 1), (127, 513), (1,), (260, 1030)]


def unit(n, seed, dtype):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x / x.norm()).to(dtype)


def inputs(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    u = [None if w.dim() == 1 else unit(w.shape[0], 1, dtype) for w in weights]
    v = [None if w.dim() == 1 else unit(w[0].numel(), 2, dtype) for w in weights]
    return weights, u, v


def flat(lists):
    return [x for values in lists for x in values if x is not None]


def forward_backward(weights, u, v, **options):
    leaves = [w.detach().requires_grad_() for w in weights]
    out = ops.spectral_normalize(leaves, u, v, **options)
    ends = [*out[0], *out[3]]
    cotangents = [torch.linspace(-1, 1, max(1, o.numel())).reshape(o.shape).to(o.dtype) for o in ends]
    return [*flat(out), *torch.autograd.grad(ends, leaves, cotangents)]


@pytest.mark.parametrize("n_iter", [0, 1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(dtype, n_iter):
    weights, u, v = inputs(dtype=dtype)
    got = forward_backward(weights, u, v, n_iter=n_iter)
    with pyflow.backend("reference"):
        wide = [[None if x is None else x.double() for x in values] for values in (weights, u, v)]
        want = forward_backward(*wide, n_iter=n_iter)
    # u and v are rounded to dtype and enter the gradients; with arbitrary u and v (n_iter = 0) sigma may cancel
    unit_error = (400 if n_iter == 0 else 40) * testing.UNIT[dtype]
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        testing.assert_within(a, b, unit_error * (1 + b.abs().max()), f"output {i}")


def test_sigma_is_the_largest_singular_value():
    weights, u, v = inputs()
    scaled, _, _, sigmas = ops.spectral_normalize(weights, u, v, n_iter=3000)
    for w, s, sigma in zip(weights, scaled, sigmas, strict=True):
        exact = torch.linalg.svdvals(w.double().reshape(1, -1) if w.dim() == 1 else w.double().flatten(1))[0]
        assert abs(sigma.item() / exact.item() - 1) < 1e-5
        torch.testing.assert_close(s, (w.double() / exact).float(), rtol=2e-5, atol=1e-9)


def test_a_start_orthogonal_to_the_singular_vector_stalls():
    w = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])) * 5 + torch.outer(
        torch.tensor([2.0, -1.0]), torch.ones(2)
    )
    exact = torch.linalg.svdvals(w)
    stalled = ops.spectral_normalize([w], [torch.ones(2)], [torch.ones(2)], n_iter=5)[3][0]
    found = ops.spectral_normalize([w], [torch.ones(2)], [unit(2, 0, torch.float32)], n_iter=50)[3][0]
    torch.testing.assert_close(torch.stack((found, stalled)), exact)


# u and v that are no unit vectors: |W v| vanishes, |W'u| vanishes, and both after a layer that moves
@pytest.mark.parametrize("n_iter", [1, 3])
@pytest.mark.parametrize(("value", "left", "right"), [(-3e-7, 0.6, 5e-7), (-3e-14, 1e9, 5e3), (1e-13, 50.0, 0.5)])
def test_a_stalled_round_leaves_u_and_v_and_divides_by_their_product(value, left, right, n_iter):
    weights = [torch.full((17, 1), value), torch.ones(2, 2)]
    u, v = [torch.full((17,), left), torch.ones(2)], [torch.full((1,), right), torch.ones(2)]
    got = ops.spectral_normalize(weights, u, v, n_iter=n_iter)
    with pyflow.backend("reference"):
        want = ops.spectral_normalize(*[[x.double() for x in given] for given in (weights, u, v)], n_iter=n_iter)
    assert torch.equal(got[1][0], u[0]) and torch.equal(got[2][0], v[0])
    assert float(want[3][0]) == pytest.approx(17 * value * left * right)
    for a, b in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_zero_weights_stay_zero_and_nan_propagates(backend):
    weights = [torch.zeros(4, 3), torch.zeros(5), torch.full((4, 3), torch.nan), torch.zeros(0)]
    u, v = [torch.ones(4), None] * 2, [torch.ones(3), None] * 2
    with pyflow.backend(backend):
        for n_iter in (0, 1):
            leaves = [w.clone().requires_grad_() for w in weights]
            scaled, new_u, new_v, sigmas = ops.spectral_normalize(leaves, u, v, n_iter=n_iter)
            assert torch.equal(scaled[0], weights[0]) and torch.equal(scaled[1], weights[1])
            assert torch.equal(new_u[0], u[0]) and torch.equal(new_v[0], v[0]) and new_u[1] is None
            assert sigmas[0].item() == sigmas[1].item() == pytest.approx(1e-12)
            assert scaled[2].isnan().all() and sigmas[2].isnan() and scaled[3].shape == (0,)
            grads = torch.autograd.grad(sum(s.sum() for s in scaled[:2]), leaves[:2])
            assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("scale", [1e-8, 1e8, 1e15])
def test_small_and_large_magnitudes(scale):
    weights, u, v = inputs([(40, 50), (30,)])
    for a, b in zip(
        ops.spectral_normalize([scale * w for w in weights], u, v)[0],
        ops.spectral_normalize(weights, u, v)[0],
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout):
    base = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    weight = testing.laid_out(base, layout)
    u, v = [unit(6, 0, torch.float32)], [unit(40, 1, torch.float32)[::2]]
    got, want = forward_backward([weight], u, v), forward_backward([base], u, [v[0].contiguous()])
    assert got[0].stride() == torch.empty_like(weight).stride()
    for a, b in zip(got, want, strict=True):
        testing.assert_same_bits(a, b)


def digest() -> str:
    """Return one hash over dtypes and rounds; runs in one process per instruction set."""
    h = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16):
        for n_iter in (0, 1, 2):
            for x in forward_backward(*inputs(dtype=dtype), n_iter=n_iter):
                h.update(x.detach().float().numpy().tobytes())
    return h.hexdigest()


def test_instruction_sets_give_the_same_bits(every_instruction_set):
    assert len(every_instruction_set) == 1


def test_bits_do_not_depend_on_threads_or_other_weights():
    weights, u, v = inputs([*SHAPES, (600, 1200)])
    with testing.threads(1):
        single = forward_backward(weights, u, v)
    with testing.threads(4):
        several = forward_backward(weights, u, v)
    for a, b in zip(single, several, strict=True):
        testing.assert_same_bits(a, b)
    alone = ops.spectral_normalize(weights[-1:], u[-1:], v[-1:])
    testing.assert_same_bits(alone[0][0], single[len(weights) - 1])


def test_nothing_is_changed_in_place_and_everything_is_written():
    weights, u, v = inputs()
    before = [x.clone() for x in flat((weights, u, v))]
    with testing.poisoned():
        assert not any(x.isnan().any() for x in forward_backward(weights, u, v, n_iter=2))
    for a, b in zip(before, flat((weights, u, v)), strict=True):
        testing.assert_same_bits(a, b)


@pytest.mark.parametrize("through_iteration", [False, True])
def test_gradcheck_twice(through_iteration):
    weights, u, v = inputs([(4, 3), (5,), (2, 2, 3)], torch.float64)
    # at the singular vectors, the backward with constant u and v is the exact derivative
    _, u, v, _ = ops.spectral_normalize(weights, u, v, n_iter=400)

    def f(*leaves):
        n_iter = 2 if through_iteration else 0
        scaled, _, _, sigmas = ops.spectral_normalize(leaves, u, v, n_iter=n_iter, through_iteration=through_iteration)
        return (*scaled, *sigmas)

    leaves = [w.requires_grad_() for w in weights]
    assert torch.autograd.gradcheck(f, leaves) and torch.autograd.gradgradcheck(f, leaves)


def test_through_iteration_differentiates_the_rounds():
    weights, u, v = inputs([(6, 4)], torch.float64)
    leaf, start = weights[0].requires_grad_(), v[0].requires_grad_()
    f = lambda w, s: ops.spectral_normalize([w], u, [s], n_iter=2, through_iteration=True)[3][0]
    assert torch.autograd.gradcheck(f, (leaf, start))
    assert torch.autograd.grad(f(leaf, start), start)[0].abs().max() > 1e-4


@pytest.mark.parametrize("layout", testing.gradient_layouts(torch.zeros(2, 3)))
def test_backward_takes_any_gradient_layout(layout):
    weights, u, v = inputs([(12, 20)])
    leaf = weights[0].requires_grad_()
    out = ops.spectral_normalize([leaf], u, v)[0][0]
    grad = testing.gradient_layouts(torch.randn(12, 20))[layout]
    a, b = (torch.autograd.grad(out, leaf, g, retain_graph=True)[0] for g in (grad, grad.contiguous()))
    testing.assert_same_bits(a, b)


def operator_calls():
    weights, u, v = inputs([(4, 6), (3,), (5, 2, 3)])
    leaves = [w.requires_grad_() for w in weights]
    u, v = ([torch.empty(0) if x is None else x for x in xs] for xs in (u, v))
    grads = [torch.randn_like(w).requires_grad_() for w in weights]
    scalars = [torch.tensor(float(i + 1), requires_grad=True) for i in range(3)]
    yield "spectral_normalize", (leaves, u, v, 2)
    yield "spectral_normalize", (leaves, u, v, 0)
    yield "spectral_normalize_backward", (grads, scalars, leaves, u, v, [s.detach() for s in scalars])


@pytest.mark.parametrize("name, args", list(operator_calls()))
def test_opcheck(name, args):
    torch.library.opcheck(getattr(torch.ops.pyflow, name).default, args)


def test_compiles_without_a_graph_break_to_the_same_bits():
    weights, u, v = inputs([(9, 20), (7,)])
    f = lambda w, n: flat(ops.spectral_normalize(w, u, v, n_iter=n))
    leaves = [w.requires_grad_() for w in weights]
    got, want = torch.compile(f, fullgraph=True)(leaves, 1), f(leaves, 1)
    for a, b in zip(got, want, strict=True):
        testing.assert_same_bits(a, b)
    for a, b in zip(*(torch.autograd.grad(x[0].square().sum(), leaves[0]) for x in (got, want)), strict=True):
        testing.assert_same_bits(a, b)


def test_function_transforms_agree_with_the_reference():
    weights, u, v = inputs([(4, 6)], torch.float64)
    f = lambda w: ops.spectral_normalize([w], u, v)[0][0]
    loss = lambda w: f(w).square().sum()
    batch = torch.stack([weights[0], 2 * weights[0] + 1])
    transforms = {
        "grad": lambda: torch.func.grad(loss)(weights[0]),
        "jacrev": lambda: torch.func.jacrev(f)(weights[0]),
        "jacfwd": lambda: torch.func.jacfwd(f)(weights[0]),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(loss))(batch),
        "vmap": lambda: torch.vmap(f)(batch),
        "jvp": lambda: torch.func.jvp(f, (weights[0],), (weights[0].cos(),))[1],
    }
    for name, transform in transforms.items():
        got = transform()
        with pyflow.backend("reference"):
            torch.testing.assert_close(got, transform(), msg=name)


@pytest.mark.parametrize("index", [0, 3])
def test_batched_gradients_equal_a_loop(index):
    weights, u, v = inputs([(4, 6), (5,)], torch.float64)
    leaves = [w.requires_grad_() for w in weights]
    out = ops.spectral_normalize(leaves, u, v)[index]
    grads = [torch.randn(3, *o.shape, dtype=o.dtype) for o in out]
    got = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        want = torch.autograd.grad(out, leaves, [g[i] for g in grads], retain_graph=True)
        torch.testing.assert_close([g[i] for g in got], [*want])


@pytest.mark.parametrize("through_iteration", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_changes_nothing(backend, through_iteration):
    weights, u, v = inputs([(9, 20), (7,)])
    leaves = [w.requires_grad_() for w in weights]

    def run():
        out = flat(ops.spectral_normalize(leaves, u, v, n_iter=2, through_iteration=through_iteration))
        kept = [o for o in out if o.requires_grad]
        return [*out, *torch.autograd.grad(kept, leaves, [torch.ones_like(o) for o in kept])]

    with pyflow.backend(backend):
        want = run()
        with torch.autocast("cpu", torch.bfloat16):
            got = run()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_reference_backward_is_the_derivative():
    weights, u, v = inputs([(4, 6)], torch.float64)
    leaf = weights[0].requires_grad_()
    scaled, new_u, new_v, sigmas = ref.spectral_normalize([leaf], u, v, n_iter=1)
    g, gs = torch.randn_like(leaf), torch.tensor(0.7, dtype=torch.float64)
    want = torch.autograd.grad([scaled[0], sigmas[0]], leaf, [g, gs])[0]
    got = ref.spectral_normalize_backward([g], [gs], [leaf], new_u, new_v, sigmas)[0]
    torch.testing.assert_close(got, want)


W, U, V = torch.zeros(4, 3), torch.zeros(4), torch.zeros(3)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "args, options, error, text",
    [
        ((W, [U], [V]), {}, TypeError, "weights must be a list, got Tensor"),
        (([], [], []), {}, ValueError, "weights must hold at least one tensor, got an empty list"),
        (([W], [U, U], [V]), {}, ValueError, "u must be as many as weights, 1, got 2"),
        (([W.long()], [U], [V]), {}, TypeError, r"weights\[0\] must be float32, .* got int64"),
        (([W[0, 0]], [U], [V]), {}, ValueError, r"weights\[0\] must have at least one dim, got a scalar"),
        (([W[:0]], [U[:0]], [V]), {}, ValueError, r"weights\[0\] must not be empty, got shape \(0, 3\)"),
        (([W], [V], [V]), {}, ValueError, r"u\[0\] must have shape \(4,\), got \(3,\)"),
        (([W], [U], [U]), {}, ValueError, r"v\[0\] must have shape \(3,\), got \(4,\)"),
        (([W], [None], [V]), {}, TypeError, r"u\[0\] must be a tensor, got NoneType"),
        (([U], [U], [V]), {}, ValueError, r"u\[0\] must be None, weights\[0\] is a vector"),
        (([W, W.to("meta")], [U, U], [V, V]), {}, ValueError, "weights must be on one device, cpu, got meta"),
        (([W], [U], [V]), {"n_iter": -1}, ValueError, "n_iter must be at least 0, got -1"),
        (([W], [U], [V]), {"n_iter": 1.0}, TypeError, "n_iter must be an integer, got float"),
    ],
)
def test_bad_input_gets_one_sentence(args, options, error, text, backend):
    with pyflow.backend(backend), pytest.raises(error, match=f"^spectral_normalize: {text}$"):
        ops.spectral_normalize(*args, **options)
