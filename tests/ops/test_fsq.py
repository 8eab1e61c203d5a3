"""Finite scalar quantisation against its reference: every token, bit by bit, and under every transform."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyflow
from pyflow import ops, testing
from pyflow._schemas import FSQ_VARIANTS
from pyflow.reference import fsq as ref

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
RESIDUAL = ["symmetric", "symmetric_hard"]
SMOOTH = ["vqp", "paper", "symmetric", "sigmoid"]


def values(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def undecided(z, levels, variant, dim):
    """Where the exact bound lies within 4 ulp (at the size of the bound) of a rounding boundary."""
    z = z.detach().to(testing.compute_dtype(z.dtype)).movedim(dim, 0)
    b = ref.bound(z.double(), levels, variant)
    top = torch.tensor(levels, dtype=torch.float64).reshape(-1, *(1,) * (z.dim() - 1)) - 1
    distance = ((b - b.floor()) - 0.5).abs()
    return (distance <= 8 * testing.UNIT[z.dtype] * top).movedim(0, dim)


def check(z, levels, variant, dim=-1):
    """Codes and indices are the reference's, but where rounding is undecided; the gradient is that of the bound."""
    z = z.detach().requires_grad_()
    codes, indices = ops.fsq(z, levels, variant=variant, dim=dim)
    assert codes.dtype == z.dtype and codes.shape == z.shape and indices.dtype == ref.index_dtype(levels)
    with pyflow.backend("reference"):
        want_codes, want_indices = ops.fsq(z, levels, variant=variant, dim=dim)
    open_ = undecided(z, levels, variant, dim)
    assert torch.equal(codes[~open_], want_codes[~open_])
    assert torch.equal(indices[~open_.any(dim)], want_indices[~open_.any(dim)])
    assert open_.double().mean() < 0.05 or z.numel() < 1000
    testing.assert_same_bits(ops.fsq_decode(indices, levels, variant=variant, dim=dim, dtype=z.dtype), codes.detach())
    grad = values(z.shape, z.dtype, seed=1)
    got = torch.autograd.grad(codes, z, grad)[0]
    if variant in SMOOTH:
        wide = z.detach().double().movedim(dim, 0)
        slope = ref.slope(wide, levels, variant).movedim(0, dim)
        # an argument off by one rounding moves the logarithm of the slope by twice that; exp and four operations.
        # 1 - tanh^2 of the reference is off by its own roundings
        u = testing.UNIT[testing.compute_dtype(z.dtype)]
        size = grad.double().abs() * slope
        error = (14 + 4 * z.detach().double().abs()) * u * size + 8 * testing.UNIT[torch.float64] * grad.double().abs()
        testing.assert_within(got, grad.double() * slope, error)
    else:
        want = torch.autograd.grad(want_codes, z, grad)[0]
        testing.assert_within(
            got, want.double(), 4 * testing.UNIT[testing.compute_dtype(z.dtype)] * want.double().abs()
        )


@pytest.mark.parametrize("variant", FSQ_VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(variant, dtype):
    for levels, shape, dim in [
        ((8, 5, 5, 5), (1000, 4), -1),
        ((7, 5, 5, 5, 5), (2, 63, 5), 2),
        ((8, 8, 8, 5, 5, 5), (3, 6, 7, 11), 1),
        ((3,), (1, 997), 0),
        ((4, 6, 9), (3,), 0),
        ((12, 1001), (2, 257), 0),
        ((5, 3, 4), (0, 3), 1),
        ((3,) * 39, (9, 39), 1),
    ]:
        check(values(shape, dtype), levels, variant, dim)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_layouts(layout, dim):
    shape = [4, 6, 5, 10]
    shape[dim] = 4
    z = values(shape)
    viewed = testing.laid_out(z, layout)
    for variant in ("vqp", "symmetric"):
        got, want = (ops.fsq(t, (8, 5, 4, 3), variant=variant, dim=dim) for t in (viewed, z))
        testing.assert_same_bits(got[0], want[0])
        assert torch.equal(got[1], want[1]) and got[1].is_contiguous()
        assert got[0].stride() == torch.empty_like(viewed).stride()
        check(viewed, (8, 5, 4, 3), variant, dim)


# runs of several tiles that end inside one; the last is written past the caches
@pytest.mark.parametrize("shape", [(3, 4, 37, 29), (2, 4, 512), (1, 4, 1, 513), (2, 4, 750, 751)])
def test_channels_in_front_have_the_bits_of_channels_behind(shape):
    levels, results = (8, 5, 4, 3), []
    z, grad = values(shape), values(shape, seed=1)
    for dim in (1, -1):
        moved = z.movedim(1, dim).contiguous().requires_grad_()
        codes, indices = ops.fsq(moved, levels, dim=dim)
        gz = torch.autograd.grad(codes, moved, grad.movedim(1, dim).contiguous())[0]
        decoded = ops.fsq_decode(indices, levels, dim=dim)
        results.append((indices, *(t.movedim(dim, 1) for t in (codes.detach(), gz, decoded))))
    for got, want in zip(*results, strict=True):
        testing.assert_same_bits(got, want)


def test_a_codebook_beyond_float_and_int32_is_numbered_exactly():
    for levels in [(2**22, 2**22, 2**19), (8,) * 21, (5, 1000, 1000, 999, 1001, 17), (3,) * 39, (4, 2**20, 3, 7)]:
        z = 4 * values((500, len(levels)))
        codes, indices = ops.fsq(z, levels, variant="symmetric")
        tops = torch.tensor(levels, dtype=torch.float64) - 1
        digits = ((codes.double() + 1) * tops / 2).round().long().tolist()
        want = [sum(digit * math.prod(levels[:i]) for i, digit in enumerate(row)) for row in digits]
        assert indices.tolist() == want and max(want) > 2**24
        assert indices.dtype == (torch.int64 if math.prod(levels) > 2**31 else torch.int32)
        testing.assert_same_bits(ops.fsq_decode(indices, levels, variant="symmetric"), codes)


def test_digits_stay_in_range_where_the_margin_would_push_them_out():
    z = torch.tensor([[50.0], [-50.0]])
    for n in (1001, 1002, 4096, 2**22):
        codes, indices = ops.fsq(z, (n,))
        assert indices.tolist() == [n - 1, 0] and codes.abs().max() <= 1


@pytest.mark.parametrize("variant", FSQ_VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_index_decodes_to_the_code_that_encodes_to_it(variant, dtype):
    levels = (3, 4, 5, 7)
    indices = torch.arange(math.prod(levels))
    for kind in (torch.int64, torch.int32, torch.int16, torch.uint16):
        codes = ops.fsq_decode(indices.to(kind), levels, variant=variant, dtype=dtype)
        assert codes.shape == (420, 4) and codes.dtype == dtype and codes.is_contiguous()
        with pyflow.backend("reference"):
            testing.assert_same_bits(codes, ops.fsq_decode(indices, levels, variant=variant, dtype=dtype))
    assert len(codes.unique(dim=0)) == 420
    spread = ops.fsq_decode(indices.reshape(2, 210).t(), levels, variant=variant, dim=1, dtype=dtype)
    testing.assert_same_bits(spread, codes.reshape(2, 210, 4).permute(1, 2, 0).contiguous())
    assert spread.is_contiguous()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(3, 40), min_size=1, max_size=7),
    st.sampled_from(FSQ_VARIANTS),
    st.integers(0, 50),
    st.integers(0, 10_000),
)
def test_laws(levels, variant, rows, seed):
    z = 3 * values((rows, len(levels)), seed=seed)
    codes, indices = ops.fsq(z, levels, variant=variant)
    assert ((indices >= 0) & (indices < math.prod(levels))).all()
    testing.assert_same_bits(ops.fsq_decode(indices, levels, variant=variant), codes)
    assert codes.abs().le(1).all() and not torch.signbit(codes[codes == 0]).any()
    order = z.sort(0).values
    assert (ops.fsq(order, levels, variant=variant)[0].diff(dim=0) >= 0).all()
    none = ops.fsq(z, levels, variant=variant, return_indices=False)
    testing.assert_same_bits(none[0], codes)
    assert none[1] is None


def residual_inputs(shape, dtype=torch.float32):
    return values(shape, torch.float64, seed=2).tanh().to(dtype)


@pytest.mark.parametrize("variant", RESIDUAL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("active", [None, 0, 2])
def test_residual_matches_the_reference(variant, dtype, active):
    active = active if active is None else torch.tensor(active)
    for levels, shape, dim in [((8, 5, 5, 3), (70, 4), -1), ((5, 5, 5), (2, 3, 9, 7), 1), ((2, 3), (0, 2), 1)]:
        x = residual_inputs(shape, dtype).requires_grad_()
        out, indices = ops.residual_fsq(x, levels, 4, variant=variant, dim=dim, active=active)
        with pyflow.backend("reference"):
            want, want_indices = ops.residual_fsq(x, levels, 4, variant=variant, dim=dim, active=active)
        # a token of the first stage that rounds the other way changes all stages after it
        same = (indices == want_indices).all(-1)
        assert same.double().mean() > 0.97 if same.numel() else same.shape == want_indices.shape[:-1]
        assert indices.dtype == want_indices.dtype == (torch.int32 if active is None else torch.int64)
        assert torch.equal(out.movedim(dim, -1)[same], want.movedim(dim, -1)[same])
        grad = values(x.shape, dtype, seed=3)
        got, expected = (torch.autograd.grad(o, x, grad)[0].movedim(dim, -1)[same].double() for o in (out, want))
        u = testing.UNIT[testing.compute_dtype(dtype)]
        # 1 - tanh^2 of the reference loses digits where it is small
        bound = 4 * 24 * u * grad.movedim(dim, -1)[same].double().abs() + 2 * testing.UNIT[dtype] * expected.abs()
        assert ((got - expected).abs() <= bound).all()


def test_residual_stages_add_up_and_get_finer():
    levels = (5, 5, 5)
    x = residual_inputs((200, 3))
    errors = []
    for stages in range(1, 5):
        out, indices = ops.residual_fsq(x, levels, stages)
        parts = ops.fsq_decode(indices, levels, variant="symmetric_hard")
        scale = torch.tensor(ref.scales(levels, stages))
        torch.testing.assert_close((parts * scale).sum(-2), out)
        errors.append((x - out).abs().max().item())
    assert all(later < earlier / 2 for earlier, later in itertools.pairwise(errors))


def digest() -> str:
    """One hash over variants, layouts and operators; run in a process per instruction set."""
    h = hashlib.sha256()
    for variant in FSQ_VARIANTS:
        for levels, shape, dim in [
            ((8, 5, 5, 5), (531, 4), -1),
            ((7, 5, 3), (2, 3, 21, 33), 1),
            ((8,) * 21, (40, 21), 1),
        ]:
            z = values(shape).requires_grad_()
            codes, indices = ops.fsq(z, levels, variant=variant, dim=dim)
            outputs = [codes, indices, torch.autograd.grad(codes.sum(), z)[0]]
            if variant in RESIDUAL:
                out, indices = ops.residual_fsq(z, levels, 3, variant=variant, dim=dim)
                outputs += [out, indices, torch.autograd.grad(out.sum(), z)[0]]
            for v in outputs:
                h.update(v.detach().contiguous().numpy().tobytes())
    return h.hexdigest()


def test_instruction_sets_give_the_same_bits(every_instruction_set):
    assert len(every_instruction_set) == 1


@pytest.mark.parametrize("shape, dim", [((40_000, 4), -1), ((5, 4, 90, 77), 1)])
def test_bits_do_not_depend_on_threads_or_batch(shape, dim):
    z = values(shape).requires_grad_()

    def run():
        codes, indices = ops.fsq(z, (8, 5, 5, 5), dim=dim)
        out, stages = ops.residual_fsq(z, (8, 5, 5, 5), 2, dim=dim)
        return codes, indices.float(), out, stages.float(), *torch.autograd.grad((codes + out).sum(), z)

    with testing.threads(1):
        single = run()
    with testing.threads(4):
        several = run()
    for a, b in zip(single, several, strict=True):
        testing.assert_same_bits(a, b)
    codes, indices = ops.fsq(z[:1], (8, 5, 5, 5), dim=dim)
    testing.assert_same_bits(codes, single[0][:1])
    assert torch.equal(indices.float(), single[1][:1])


def test_every_output_element_is_written():
    with testing.poisoned():
        for shape, dim in [((531, 4), -1), ((3, 4, 21, 33), 1), ((4,), 0)]:
            z = values(shape).requires_grad_()
            codes, indices = ops.fsq(z, (8, 5, 5, 5), dim=dim)
            out, stages = ops.residual_fsq(z, (8, 5, 5, 5), 3, dim=dim)
            grads = torch.autograd.grad((codes + out).sum(), z)
            decoded = ops.fsq_decode(indices, (8, 5, 5, 5), dim=dim)
            assert not any(v.isnan().any() for v in (codes, out, decoded, *grads))
            assert indices.max() < 1000 and stages.max() < 1000


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("variant", FSQ_VARIANTS)
def test_nan_and_infinity(variant, backend):
    special = torch.tensor([[0.3, 0.0], [torch.nan, 0.0], [torch.inf, -torch.inf], [1e38, -1e38], [0.0, torch.nan]])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for layout in ("contiguous", "transposed"):
            z = testing.laid_out(special.to(dtype), layout).requires_grad_()
            with pyflow.backend(backend):
                codes, indices = ops.fsq(z, (5, 4), variant=variant)
                decoded = ops.fsq_decode(indices, (5, 4), variant=variant, dtype=dtype)
            assert torch.equal(codes.isnan(), z.isnan())
            assert (indices == -1).tolist() == [False, True, False, False, True]
            assert indices[2] == indices[3] == 4
            assert decoded[[1, 4]].isnan().all()
            testing.assert_same_bits(decoded[[0, 2, 3]], codes[[0, 2, 3]].detach())
            if variant in RESIDUAL:
                with pyflow.backend(backend):
                    out, stages = ops.residual_fsq(z, (5, 4), 2, variant=variant)
                assert torch.equal(out.isnan(), z.isnan()) and (stages[[1, 4]] == -1).all()


@pytest.mark.parametrize("variant", ["hard", "symmetric_hard", "bounded"])
def test_a_clamped_value_passes_no_gradient_by_selection(variant):
    z = torch.tensor([[3.0, 0.1], [-3.0, 1.0]], requires_grad=True)
    for backend in ("auto", "reference"):
        with pyflow.backend(backend):
            codes, _ = ops.fsq(z, (5, 5), variant=variant)
            grad = torch.autograd.grad(codes, z, torch.full_like(codes, torch.inf))[0]
        assert (grad[:, 0] == 0).all() and (grad[:, 1] == torch.inf).all()


@pytest.mark.parametrize("variant", SMOOTH)
def test_gradcheck_twice(variant):
    z = values((3, 7), torch.float64).requires_grad_()
    grad = values((3, 7), torch.float64, seed=1).requires_grad_()
    backward = lambda g, z: torch.ops.pyflow.fsq_backward(g, z, [8, 5, 4], FSQ_VARIANTS.index(variant))
    assert torch.autograd.gradcheck(backward, (grad, z))
    assert torch.autograd.gradgradcheck(backward, (grad, z))
    codes, _ = ops.fsq(z, (8, 5, 4), variant=variant, dim=0)
    (first,) = torch.autograd.grad(codes, z, grad, create_graph=True)
    second = torch.autograd.grad(first.sum(), z)[0]
    slope = ref.slope(z, (8, 5, 4), variant)
    torch.testing.assert_close(second, torch.autograd.grad((grad * slope).sum(), z)[0])


def test_residual_double_backward():
    # between the steps of the first stages the gradient is smooth
    x = residual_inputs((3, 6), torch.float64).requires_grad_()
    grad = values((3, 6), torch.float64, seed=1).requires_grad_()
    backward = lambda g, x: torch.ops.pyflow.residual_fsq_backward(g, x, [5, 5, 4], 2, 2, None)
    assert torch.autograd.gradcheck(backward, (grad, x))
    assert torch.autograd.gradgradcheck(backward, (grad, x))


@pytest.mark.parametrize("layout", testing.gradient_layouts(torch.zeros(2, 3)))
def test_backward_takes_any_gradient_layout(layout):
    grad = testing.gradient_layouts(values((60, 4), seed=1))[layout]
    z = values((60, 4)).requires_grad_()
    for output in (ops.fsq(z, (8, 5, 5, 5))[0], ops.residual_fsq(z, (8, 5, 5, 5), 2)[0]):
        a = torch.autograd.grad(output, z, grad, retain_graph=True)[0]
        testing.assert_same_bits(a, torch.autograd.grad(output, z, grad.contiguous())[0])


def operator_calls():
    z = values((4, 3, 5)).requires_grad_()
    last = values((6, 4)).t().requires_grad_()
    stepped = testing.laid_out(z.detach(), "stepped").requires_grad_()
    levels = [8, 5, 5, 3]
    yield "fsq", (z, levels, 0, True)
    yield "fsq", (last, levels, 2, False)
    yield "fsq", (stepped, levels, 3, True)
    yield "fsq_backward", (values((4, 3, 5), seed=1).requires_grad_(), z, levels, 1)
    yield "fsq_backward", (values((6, 4), seed=1).t(), last, levels, 2)
    yield "fsq_decode", (torch.arange(12).reshape(3, 4), levels, 0, 1, torch.float32)
    yield "fsq_decode", (torch.arange(12, dtype=torch.int32), levels, 5, 1, torch.bfloat16)
    yield "residual_fsq", (z, levels, 5, 3, None)
    yield "residual_fsq", (last, levels, 2, 3, torch.tensor(2))
    yield "residual_fsq_backward", (values((4, 3, 5), seed=1).requires_grad_(), z, levels, 2, 2, torch.tensor(1))


@pytest.mark.parametrize("name, args", list(operator_calls()))
def test_opcheck(name, args):
    torch.library.opcheck(getattr(torch.ops.pyflow, name).default, args)


def test_backward_keeps_nothing_but_the_input():
    z = values((8, 4)).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.fsq(z, (8, 5, 5, 5))
    assert len(saved) == 1 and saved[0].data_ptr() == z.data_ptr()


@pytest.mark.parametrize("variant", ["vqp", "symmetric_hard"])
def test_compiles_without_a_graph_break_to_the_same_bits(variant):
    z = values((6, 40, 4)).requires_grad_()

    def f(z):
        codes, indices = ops.fsq(z, (8, 5, 5, 5), variant=variant)
        decoded = ops.fsq_decode(indices, (8, 5, 5, 5), variant=variant)
        out, _ = ops.residual_fsq(codes, (8, 5, 5, 5), 2, active=torch.ones((), dtype=torch.int64))
        return codes + decoded, out, indices

    got, want = torch.compile(f, fullgraph=True)(z), f(z)
    for a, b in zip(got, want, strict=True):
        testing.assert_same_bits(a.float(), b.float())
    sums = [torch.autograd.grad((a + b).sum(), z)[0] for a, b, _ in (got, want)]
    testing.assert_same_bits(*sums)


@pytest.mark.parametrize("variant", ["vqp", "sigmoid", "symmetric_hard"])
def test_function_transforms_agree_with_the_reference(variant):
    z = values((5, 3, 4), torch.float64)
    one = lambda z: ops.fsq(z, (8, 5, 4), variant=variant, dim=0)
    loss = lambda z: (one(z)[0] ** 2).sum()
    stages = lambda z, n: ops.residual_fsq(z, (8, 5, 4), 3, dim=0, active=n)
    counts = torch.arange(5)
    indices = torch.arange(20).reshape(5, 4)
    transforms = {
        "grad": lambda: torch.func.grad(loss)(z[0]),
        "jacrev": lambda: torch.func.jacrev(loss)(z[0]),
        "jacfwd": lambda: torch.func.jacfwd(loss)(z[0]),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(loss))(z),
        "vmap": lambda: torch.vmap(one)(z),
        "vmap, batch last": lambda: torch.vmap(one, in_dims=2)(z.movedim(0, 2)),
        "vmap of decode": lambda: torch.vmap(lambda i: ops.fsq_decode(i, (8, 5, 4), variant=variant))(indices),
        "vmap of stages": lambda: torch.vmap(stages)(z, counts),
        "vmap of stages, one count": lambda: torch.vmap(stages, (0, None))(z, counts[2]),
        "jvp": lambda: torch.func.jvp(loss, (z[0],), (z[0],)),
    }
    for name, transform in transforms.items():
        got = transform()
        with pyflow.backend("reference"):
            want = transform()
        for a, b in zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]:
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_vmap_of_the_backward_operators():
    z, grad = values((5, 3, 4)), values((5, 3, 4), seed=1)
    levels, n = [8, 5, 4], torch.arange(5)
    for op, extra, batched in (
        (torch.ops.pyflow.fsq_backward, (levels, 0), ()),
        (torch.ops.pyflow.residual_fsq_backward, (levels, 5, 3), (n,)),
    ):
        got = torch.vmap(lambda g, z, *a: op(g, z, *extra, *a))(grad, z, *batched)
        want = torch.stack([op(g, z_, *extra, *a) for g, z_, *a in zip(grad, z, *batched, strict=True)])
        testing.assert_same_bits(got, want)
    got = torch.vmap(lambda g, z: torch.ops.pyflow.residual_fsq_backward(g, z, levels, 5, 3, None))(grad, z)
    testing.assert_same_bits(got[2], torch.ops.pyflow.residual_fsq_backward(grad[2], z[2], levels, 5, 3, None))


def test_autocast_changes_nothing():
    z = values((30, 4))
    with torch.autocast("cpu", torch.bfloat16):
        codes, indices = ops.fsq(z, (8, 5, 5, 5))
    want = ops.fsq(z, (8, 5, 5, 5))
    testing.assert_same_bits(codes, want[0])
    assert torch.equal(indices, want[1])


def test_usage_needs_values():
    with pytest.raises(ValueError, match=r"^codebook_usage: indices must have values, got a meta tensor$"):
        ops.codebook_usage(torch.zeros(3, dtype=torch.int64, device="meta"), 4)


def test_codebook_usage():
    usage = ops.codebook_usage(torch.tensor([[0, 0], [5, -1]]), 6)
    assert usage.counts.tolist() == [2, 1] and usage.fraction.item() == pytest.approx(2 / 6)
    assert usage.perplexity.item() == pytest.approx(math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))))
    everything = ops.codebook_usage(torch.arange(1000), 1000)
    assert everything.fraction == 1 and everything.perplexity.item() == pytest.approx(1000)
    huge = ops.codebook_usage(torch.tensor([0, 2**62]), 2**63)
    assert huge.perplexity.item() == pytest.approx(2)
    nothing = ops.codebook_usage(torch.tensor([-1]), 4)
    assert nothing.fraction == 0 and nothing.perplexity == 0


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    n = 2**31 + 9
    z = torch.zeros(n, dtype=torch.bfloat16)
    z[-5:] = torch.tensor([9, -9, 0, 9, -9])
    codes, indices = ops.fsq(z[:, None], (5,))
    assert codes[-5:, 0].tolist() == [1, -1, 0, 1, -1] and indices[-5:].tolist() == [4, 0, 2, 4, 0]


Z = torch.zeros(2, 4)
I = torch.zeros(3, dtype=torch.int64)  # noqa: E741
FOUR = (5, 5, 5, 5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: ops.fsq([1.0], FOUR), TypeError, "fsq: z must be a tensor, got list"),
        (lambda: ops.fsq(Z.long(), FOUR), TypeError, "fsq: z must be float32, float64, bfloat16 or float16, got int64"),
        (lambda: ops.fsq(Z, (8, 1)), ValueError, r"fsq: levels must be integers >= 2, got \(8, 1\)"),
        (lambda: ops.fsq(Z, (8.0, 5)), ValueError, r"fsq: levels must be integers >= 2, got \(8.0, 5\)"),
        (lambda: ops.fsq(Z, ()), ValueError, r"fsq: levels must be integers >= 2, got \(\)"),
        (lambda: ops.fsq(Z, 8), TypeError, "fsq: levels must be a list of integers, got int"),
        (
            lambda: ops.fsq(Z, (2, 5, 5, 5)),
            ValueError,
            r"fsq: levels must be at least 3 for variant vqp, got \(2, 5, 5, 5\)",
        ),
        (
            lambda: ops.fsq(Z, (2, 5, 5, 5), variant="hard"),
            ValueError,
            r"fsq: levels must be at least 3 for variant hard, got \(2, 5, 5, 5\)",
        ),
        (
            lambda: ops.fsq(Z, (2**23, 5, 5, 5)),
            ValueError,
            r"fsq: levels must be at most 2\*\*22, which float32 can tell apart, got \(8388608, 5, 5, 5\)",
        ),
        (
            lambda: ops.fsq(Z, (2**22,) * 3 + (3,)),
            ValueError,
            r"fsq: levels must have a product of at most 2\*\*63 to be numbered, got \(4194304, 4194304, 4194304, 3\)",
        ),
        (
            lambda: ops.fsq(Z, (5, 5)),
            ValueError,
            "fsq: z must have 2 channels in dim -1, one for each level, got 4",
        ),
        (lambda: ops.fsq(Z, FOUR, dim=2), ValueError, r"fsq: dim must be in \[-2, 1\], got 2"),
        (lambda: ops.fsq(Z, FOUR, dim=1.0), TypeError, "fsq: dim must be an integer, got float"),
        (
            lambda: ops.fsq(torch.zeros(()), (5,)),
            ValueError,
            "fsq: z must have at least one dim, the channels, got a scalar",
        ),
        (
            lambda: ops.fsq(Z, FOUR, variant="round"),
            ValueError,
            "fsq: variant must be one of vqp, paper, symmetric, sigmoid, hard, symmetric_hard, bounded, got 'round'",
        ),
        (lambda: ops.fsq_decode([0], FOUR), TypeError, "fsq_decode: indices must be a tensor, got list"),
        (lambda: ops.fsq_decode(I.float(), FOUR), TypeError, "fsq_decode: indices must be integers, got float32"),
        (lambda: ops.fsq_decode(I == 0, FOUR), TypeError, "fsq_decode: indices must be integers, got bool"),
        (
            lambda: ops.fsq_decode(I, FOUR, dtype=torch.int32),
            TypeError,
            "fsq_decode: dtype must be float32, float64, bfloat16 or float16, got int32",
        ),
        (lambda: ops.fsq_decode(I + 625, FOUR), ValueError, r"fsq_decode: indices must lie in \[-1, 625\), got 625"),
        (lambda: ops.fsq_decode(I - 2, FOUR), ValueError, r"fsq_decode: indices must lie in \[-1, 625\), got -2"),
        (
            lambda: ops.residual_fsq(Z, FOUR, 2, variant="vqp"),
            ValueError,
            "residual_fsq: variant must be one of symmetric, symmetric_hard, got 'vqp'",
        ),
        (lambda: ops.residual_fsq(Z, FOUR, 0), ValueError, "residual_fsq: num_quantizers must be at least 1, got 0"),
        (
            lambda: ops.residual_fsq(Z, FOUR, 1.5),
            TypeError,
            "residual_fsq: num_quantizers must be an integer, got float",
        ),
        (lambda: ops.residual_fsq(Z, FOUR, 2, active=1), TypeError, "residual_fsq: active must be a tensor, got int"),
        (
            lambda: ops.residual_fsq(Z, FOUR, 2, active=torch.tensor(1.0)),
            TypeError,
            "residual_fsq: active must be int64, got float32",
        ),
        (
            lambda: ops.residual_fsq(Z, FOUR, 2, active=torch.tensor(-1)),
            ValueError,
            "residual_fsq: active must be at least 0, got -1",
        ),
        (lambda: ops.residual_fsq(Z, FOUR, 2, active=I), ValueError, r"residual_fsq: active must be 0-d, got \(3,\)"),
        (lambda: ops.codebook_usage([0], 4), TypeError, "codebook_usage: indices must be a tensor, got list"),
        (lambda: ops.codebook_usage(Z, 4), TypeError, "codebook_usage: indices must be integers, got float32"),
        (lambda: ops.codebook_usage(I, 0), ValueError, "codebook_usage: size must be at least 1, got 0"),
        (
            lambda: ops.codebook_usage(I + 9, 9),
            ValueError,
            "codebook_usage: indices must lie below the codebook's size, 9, got 9",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, error, text, backend):
    with pyflow.backend(backend), pytest.raises(error, match=f"^{text}$"):
        call()
