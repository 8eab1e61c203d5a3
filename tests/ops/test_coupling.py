"""The coupling family against its reference, bit by bit and under every transform."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyflow
from pyflow import ops, testing
from pyflow._schemas import PACKINGS, SCALE_MAPS
from pyflow.reference import coupling as ref

FORMS = [(inverse, first) for inverse in (False, True) for first in (False, True)]
MAP_OPTIONS = [(name, {}) for name in SCALE_MAPS] + [("sigmoid", {"eps": 1e-3}), ("softplus", {"eps": 1e-2})]
MAP_IDS = [name + "_eps" * bool(options) for name, options in MAP_OPTIONS]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def inputs(shape, dtype=torch.float32, param_dtype=None, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda d: (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(d)
    return draw(dtype), draw(param_dtype or dtype), draw(param_dtype or dtype)


def map_arg(scale_map, clamp=2.0, eps=0.0, slope=1e-3):
    return {"tanh": clamp, "atan": clamp, "sigmoid": eps, "softplus": eps, "softsign": -math.log(slope)}.get(
        scale_map, 0.0
    )


def expected(x, shift, scale, scale_map, inverse, first, mask=None, event_dims=None, grads=None, **options):
    """fp64 values, and bounds on the error of computing them in x's compute dtype."""
    u = testing.UNIT[testing.compute_dtype(x.dtype)]
    arg = map_arg(scale_map, **options)
    event_dims = x.dim() - 1 if event_dims is None else event_dims
    leaves = [v.detach().double().requires_grad_() for v in (x, shift, scale)]
    keywords = dict(
        scale_map=scale_map, map_arg=arg, shift_first=first, inverse=inverse, mask=mask, event_dims=event_dims
    )
    y, logdet = ref.affine_coupling(*leaves, **keywords)
    xd, td, sd = (v.detach() for v in leaves)
    g, slope = ref.log_scale(sd, scale_map, arg), ref.log_scale_slope(sd, scale_map, arg)
    e = torch.exp(-g if inverse else g)
    # g: 4 ulp of its own or of the function inside its logarithm; e: that and its own ulp, and the product
    g_error = u * (8 + 4 * g.abs())
    e_error = e * (g_error + 4 * u)
    size = xd.abs() + td.abs()
    errors = [size * e_error + 4 * u * (size * e + td.abs())]
    dims = tuple(range(x.dim() - event_dims, x.dim()))
    reduce = (lambda v: v.sum(dims)) if dims else (lambda v: v)
    terms = math.prod(x.shape[d] for d in dims)
    errors.append(reduce(g_error) + testing.sum_error(terms, reduce(g.abs()), testing.compute_dtype(x.dtype)))
    values = [y, logdet]
    if grads is not None:
        gy, gl = (v.double() for v in grads)
        values += torch.autograd.grad((y, logdet), leaves, (gy, gl))
        gl = gl.reshape(gl.shape + (1,) * event_dims)
        pull = gy.abs() * size * e + gl.abs()
        pull_error = gy.abs() * size * (e_error + 4 * u * e)
        # the slope of tanh is 1 - t^2, absolutely accurate only
        errors += [gy.abs() * e_error] * 2 + [pull_error * slope.abs() + pull * u * (8 + 8 * slope.abs())]
    return [v.detach() for v in values], errors


def check(x, shift, scale, scale_map, inverse, first, **options):
    leaves = [v.detach().requires_grad_() for v in (x, shift, scale)]
    y, logdet = ops.affine_coupling(
        *leaves, scale_map=scale_map, inverse=inverse, shift_first=first, **options
    )  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    gy = torch.randn(y.shape, generator=generator).to(y.dtype)
    gl = torch.randn(logdet.shape, generator=generator).to(logdet.dtype)
    grads = torch.autograd.grad((y, logdet), leaves, (gy, gl))
    assert logdet.dtype == testing.compute_dtype(x.dtype)
    values, errors = expected(x, shift, scale, scale_map, inverse, first, grads=(gy, gl), **options)
    for name, a, e, error in zip(
        ("y", "logdet", "grad x", "grad shift", "grad scale"), (y, logdet, *grads), values, errors, strict=True
    ):
        testing.assert_within(a, e, error, name)


@pytest.mark.parametrize("inverse, first", FORMS)
@pytest.mark.parametrize("scale_map, options", MAP_OPTIONS, ids=MAP_IDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(scale_map, options, inverse, first, dtype):
    for shape in [(3, 1), (2, 63), (1, 1000), (5, 2, 7, 3)]:
        check(*inputs(shape, dtype), scale_map, inverse, first, **options)


@pytest.mark.parametrize(
    "shape", [(0, 5), (4, 0), (0, 0), (1,), (17,), (7, 1), (1, 8193), (2, 20011), (700, 3), (65, 513), (4, 257)]
)
@pytest.mark.parametrize("inverse", [False, True])
def test_sizes(shape, inverse):
    check(*inputs(shape), "tanh", inverse, False)


@pytest.mark.parametrize(
    "x_dtype, param_dtype",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
)
def test_mixed_dtypes(x_dtype, param_dtype):
    for inverse, first in FORMS:
        check(*inputs((5, 70), x_dtype, param_dtype), "tanh", inverse, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_give_the_same_bits(layout, dtype):
    x, shift, scale = inputs((6, 5, 4, 10), dtype)
    plain = ops.affine_coupling(x, shift, scale, scale_map="tanh")
    viewed = ops.affine_coupling(*(testing.laid_out(v, layout) for v in (x, shift, scale)), scale_map="tanh")
    testing.assert_same_bits(viewed[0], plain[0], layout)
    assert viewed[0].stride() == torch.empty_like(testing.laid_out(x, layout)).stride()
    torch.testing.assert_close(viewed[1], plain[1])


def test_mixed_layouts_and_expanded_inputs():
    x, shift, scale = inputs((6, 5, 4, 10))
    mixed = testing.laid_out(x, "channels_last"), testing.laid_out(shift, "stepped"), scale[:1].expand(6, 5, 4, 10)
    y, _ = ops.affine_coupling(*mixed)
    testing.assert_same_bits(y, ops.affine_coupling(x, shift, scale[:1].repeat(6, 1, 1, 1))[0])


@pytest.mark.parametrize("event_dims", [0, 1, 2, 3])
@pytest.mark.parametrize("inverse", [False, True])
def test_event_dims(event_dims, inverse):
    check(*inputs((3, 4, 5)), "softsign", inverse, False, event_dims=event_dims)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shape, dim", [((4, 6), 1), ((4, 6), -1), ((3, 4, 5, 2), 1), ((3, 4, 5), 2), ((2, 700), 1)])
@pytest.mark.parametrize("inverse, first", FORMS)
def test_packed_is_the_unpacked_op(packing, shape, dim, inverse, first):
    x, shift, scale = inputs(shape)
    options = dict(scale_map="tanh", inverse=inverse, shift_first=first)
    params = ref.pack(shift, scale, packing, dim).requires_grad_()
    x.requires_grad_()
    y, logdet = ops.affine_coupling_packed(x, params, packing=packing, dim=dim, **options)
    plain = ops.affine_coupling(x, *ref.unpack(params, packing, dim), **options)
    testing.assert_same_bits(y, plain[0])
    testing.assert_same_bits(logdet, plain[1])
    grads = torch.autograd.grad((y, logdet), (x, params), (y.detach(), logdet.detach()))
    plain_grads = torch.autograd.grad(plain, (x, params), (y.detach(), logdet.detach()))
    for a, b in zip(grads, plain_grads, strict=True):
        testing.assert_same_bits(a, b)


@pytest.mark.parametrize("inverse, first", FORMS)
def test_mask_passes_through_by_selection(inverse, first):
    x, shift, scale = (v.requires_grad_() for v in inputs((4, 6, 5)))
    lengths = torch.tensor([6, 1, 0, 3])
    mask = (torch.arange(6) >= lengths[:, None])[..., None]  # (4, 6, 1), true: padding
    poison = torch.where(mask, torch.nan, 0.0)
    y, logdet = ops.affine_coupling(
        x, shift + poison, scale + poison, mask=mask, scale_map="tanh", inverse=inverse, shift_first=first
    )
    full = mask.expand(x.shape)
    testing.assert_same_bits(y[full], x[full])
    assert logdet[2] == 0 and not logdet.isnan().any()
    grads = torch.autograd.grad((y, logdet), (x, shift, scale), (torch.ones_like(y), torch.ones_like(logdet)))
    assert not any(g.isnan().any() for g in grads)
    assert (grads[0][full] == 1).all() and (grads[1][full] == 0).all() and (grads[2][full] == 0).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("inverse, first", FORMS)
@pytest.mark.parametrize("x_there, scale_there", [(0.0, 200.0), (math.nan, 0.0), (math.inf, -math.inf)])
def test_nothing_under_the_mask_reaches_a_gradient_of_any_order(x_there, scale_there, inverse, first, backend):
    mask = torch.tensor([[False, True]])
    x, shift, scale = torch.tensor([[[1.0, x_there]], [[2.0, x_there]], [[0.5, scale_there]]])
    seen = [v.clone().requires_grad_() for v in (x, shift, scale)]
    plain = [v[:, :1].clone().requires_grad_() for v in (x, shift, scale)]

    def loss(x, shift, scale):
        y, logdet = ops.affine_coupling(
            x, shift, scale, shift_first=first, inverse=inverse, mask=mask if x.shape[1] == 2 else None
        )
        return y[:, 0].sin().sum() + logdet.exp().sum()

    def both_orders(leaves):
        found = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g[:, 0].sin().sum() for g in found), leaves)
        return [*found, *second]

    with pyflow.backend(backend):
        got, want = both_orders(seen), both_orders(plain)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, torch.cat((b, torch.zeros_like(b)), 1))
        for i, jacobian in enumerate(torch.func.jacrev(loss, (0, 1, 2))(x, shift, scale)):
            torch.testing.assert_close(jacobian, got[i])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("inverse, first", FORMS)
def test_a_log_determinant_alone_is_differentiated_where_y_overflows(inverse, first, backend):
    sign = -1.0 if inverse else 1.0
    leaves = [torch.full((1, 3), v, requires_grad=True) for v in (math.inf, 1.0, sign * 100)]
    with pyflow.backend(backend):
        _, logdet = ops.affine_coupling(*leaves, shift_first=first, inverse=inverse)
        grads = torch.autograd.grad(logdet.sum(), leaves, allow_unused=True)
    assert torch.equal(grads[2], torch.full((1, 3), sign))
    assert not any(grad is not None and grad.any() for grad in grads[:2])


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int64])
def test_masks_of_any_dtype_and_broadcast(kind):
    x, shift, scale = inputs((4, 6))
    mask = torch.tensor([1, 0, 0, 1, 0, 1]).to(kind)
    y, logdet = ops.affine_coupling(x, shift, scale, mask=mask)
    r, sums = ref.affine_coupling(
        x, shift, scale, scale_map="exp", map_arg=0.0, shift_first=False, inverse=False, mask=mask.bool(), event_dims=1
    )
    torch.testing.assert_close(y, r)
    torch.testing.assert_close(logdet, sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_additive(dtype, inverse):
    for shape in [(3, 1), (2, 63), (0, 4), (5, 2, 7, 3), (), (9,)]:
        x, shift, _ = inputs(shape, dtype)
        y = ops.additive_coupling(x, shift, inverse=inverse)
        testing.assert_same_bits(y, (x - shift) if inverse else (x + shift))
    for layout in testing.LAYOUTS:
        x, shift, _ = inputs((6, 5, 4, 10), dtype)
        y = ops.additive_coupling(testing.laid_out(x, layout), shift)
        assert y.stride() == torch.empty_like(testing.laid_out(x, layout)).stride(), layout
    x, shift, _ = inputs((6, 10), dtype, torch.float32)
    mask = torch.arange(10) % 3 == 0
    y = ops.additive_coupling(x.requires_grad_(), shift.requires_grad_(), inverse=inverse, mask=mask)
    gx, gs = torch.autograd.grad(y, (x, shift), torch.ones_like(y))
    assert (gx == 1).all() and gs.dtype == shift.dtype
    testing.assert_same_bits(gs, torch.where(mask, 0.0, -1.0 if inverse else 1.0).expand(6, 10))


# bits


@pytest.mark.parametrize("shape", [(64, 392), (3, 30000), (1000, 7)])
def test_bits_do_not_depend_on_threads_or_batch(shape):
    x, shift, scale = (v.requires_grad_() for v in inputs(shape))

    def run(rows=None):
        part = [v[:rows] for v in (x, shift, scale)]
        out = ops.affine_coupling(*part, scale_map="tanh")
        return (*out, *torch.autograd.grad(out, part, (out[0].detach(), out[1].detach())))

    with testing.threads(1):
        single = run()
    with testing.threads(4):
        several, again = run(), run()
    for a, b, c in zip(single, several, again, strict=True):
        testing.assert_same_bits(a, b)
        testing.assert_same_bits(b, c)
    for a, b in zip(run(1), single, strict=True):
        testing.assert_same_bits(a, b[:1])


def digest() -> str:
    """One hash over every map, form and kind of layout; run in a process per instruction set."""
    h = hashlib.sha256()
    for scale_map, options in MAP_OPTIONS:
        for inverse, first in FORMS:
            for shape in [(33, 70), (2, 9001), (300, 3)]:
                x, shift, scale = (v.requires_grad_() for v in inputs(shape, spread=3.0))
                out = ops.affine_coupling(
                    x, shift, scale, scale_map=scale_map, inverse=inverse, shift_first=first, **options
                )
                grads = torch.autograd.grad(out, (x, shift, scale), (x.detach(), torch.ones_like(out[1])))
                for v in (*out, *grads):
                    h.update(torch.nan_to_num(v.detach()).numpy().tobytes())
    return h.hexdigest()


def test_instruction_sets_give_the_same_bits(every_instruction_set):
    assert len(every_instruction_set) == 1


def test_every_output_element_is_written():
    with testing.poisoned():
        assert torch.empty(3).isnan().all()
        for shape in [(5, 70), (2, 9000), (40, 3)]:
            x, shift, scale = (testing.laid_out(v, "stepped").requires_grad_() for v in inputs(shape))
            out = ops.affine_coupling(x, shift, scale, mask=torch.arange(shape[1]) % 5 == 0, inverse=True)
            grads = torch.autograd.grad(out, (x, shift, scale), (torch.ones(shape), torch.ones(shape[0])))
            assert not any(v.isnan().any() for v in (*out, *grads))


@pytest.mark.parametrize("scale_map, options", MAP_OPTIONS, ids=MAP_IDS)
@pytest.mark.parametrize("inverse, first", FORMS)
def test_nan_and_infinity_travel_as_in_the_reference(scale_map, options, inverse, first):
    special = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, 30.0, -30.0, 95.0, -95.0, 200.0, -200.0, torch.inf, -torch.inf, torch.nan]
    )
    grid = torch.cartesian_prod(special, torch.tensor([0.0, 1.0, torch.inf, torch.nan]), special)
    x, shift, scale = grid.unbind(1)
    keywords = dict(scale_map=scale_map, inverse=inverse, shift_first=first)
    y, logdet = ops.affine_coupling(x, shift, scale, **keywords, **options)
    with pyflow.backend("reference"):
        r, sums = ops.affine_coupling(x, shift, scale, **keywords, **options)
    for a, b, name in ((y, r, "y"), (logdet, sums, "logdet")):
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.equal(a.isposinf(), b.isposinf()) and torch.equal(a.isneginf(), b.isneginf()), name


# laws


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from(SCALE_MAPS), st.booleans(), st.floats(0.1, 30.0),
    st.sampled_from([(7, 33), (2, 600), (3, 4, 5)]),
)  # fmt: skip
def test_inverse_undoes_forward(seed, scale_map, first, spread, shape):
    x, shift, scale = inputs(shape, seed=seed, spread=spread)
    g = ref.log_scale(scale.double(), scale_map, map_arg(scale_map))
    scale = torch.where(g.abs() <= 5, scale, torch.full_like(scale, 0.25))
    g = ref.log_scale(scale.double(), scale_map, map_arg(scale_map))
    y, logdet = ops.affine_coupling(x, shift, scale, scale_map=scale_map, shift_first=first)
    back, inverse_logdet = ops.affine_coupling(y, shift, scale, scale_map=scale_map, shift_first=first, inverse=True)
    # shift_first: what is scaled is x + shift, so the shift counts as it stands
    bound = 4 * 2.0**-23 * (x.double().abs() + shift.double().abs() * (1 if first else torch.exp(-g)))
    assert ((back.double() - x.double()).abs() <= bound).all()
    testing.assert_same_bits(inverse_logdet, -logdet)


# gradients and transforms


@pytest.mark.parametrize("layout", testing.gradient_layouts(torch.zeros(2, 3, 4)))
@pytest.mark.parametrize("inverse, first", FORMS)
def test_backward_takes_any_gradient_layout(layout, inverse, first):
    x, shift, scale = (v.requires_grad_() for v in inputs((5, 4, 12)))
    y, logdet = ops.affine_coupling(x, shift, scale, scale_map="tanh", inverse=inverse, shift_first=first)
    gy = testing.gradient_layouts(torch.randn(y.shape))[layout]
    gl = torch.ones(()).expand(5) if layout == "expanded" else torch.randn(10)[::2]
    got = torch.autograd.grad((y, logdet), (x, shift, scale), (gy, gl), retain_graph=True)
    plain = torch.autograd.grad((y, logdet), (x, shift, scale), (gy.contiguous(), gl.contiguous()))
    for a, b in zip(got, plain, strict=True):
        testing.assert_same_bits(a, b)


@pytest.mark.parametrize("which", ["y", "logdet"])
def test_backward_through_one_output(which):
    x, shift, scale = (v.requires_grad_() for v in inputs((5, 40)))
    out = ops.affine_coupling(x, shift, scale, scale_map="softsign")
    grads = torch.autograd.grad(out[which == "logdet"].sum(), (x, shift, scale), allow_unused=True)
    with pyflow.backend("reference"):
        out = ops.affine_coupling(x, shift, scale, scale_map="softsign")
        want = torch.autograd.grad(out[which == "logdet"].sum(), (x, shift, scale), allow_unused=True)
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(torch.zeros(5, 40) if a is None else a, torch.zeros(5, 40) if b is None else b)


@pytest.mark.parametrize("inverse, first", FORMS)
@pytest.mark.parametrize("scale_map, options", MAP_OPTIONS, ids=MAP_IDS)
def test_gradcheck_twice(scale_map, options, inverse, first):
    leaves = [v.requires_grad_() for v in inputs((2, 3), torch.float64)]
    f = lambda *v: ops.affine_coupling(*v, scale_map=scale_map, inverse=inverse, shift_first=first, **options)
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("packing", PACKINGS)
def test_gradcheck_twice_packed_additive_and_masked(packing):
    x, shift, scale = inputs((2, 4), torch.float64)
    mask = torch.tensor([True, False, False, True])
    leaves = [x.requires_grad_(), torch.cat((shift, scale), 1).requires_grad_()]
    f = lambda x, p: ops.affine_coupling_packed(x, p, packing=packing, mask=mask, scale_map="tanh")
    g = lambda x, p: ops.additive_coupling(x, p[:, ::2], mask=mask, inverse=True)
    for function in (f, g):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


def operator_calls():
    x, shift, scale = (v.requires_grad_() for v in inputs((3, 4, 5)))
    stepped = testing.laid_out(x.detach(), "stepped").requires_grad_()
    params = torch.cat((shift, scale), 1).detach().requires_grad_()
    mask = (torch.arange(5) < 2).expand(3, 4, 5)
    gy, gl = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, requires_grad=True)
    tail = (4, 2.0, False, False, 2)
    swapped = (1, 1e-3, True, True, 2)
    yield "additive_coupling", (x, shift, mask, True)
    yield "additive_coupling", (stepped, shift, None, False)
    yield "affine_coupling", (x, shift, scale, None, *tail)
    yield "affine_coupling", (stepped, shift, scale, mask, *swapped)
    yield "affine_coupling_backward", (gy, gl, x, None, scale, None, *tail, None)
    yield "affine_coupling_backward", (gy, None, x, shift, scale, mask, 4, 2.0, False, True, 2, torch.float32)
    yield "affine_coupling_packed", (x, params, None, 0, 1, *tail)
    yield "affine_coupling_packed", (stepped, params, mask, 2, 1, *swapped)
    yield "affine_coupling_packed_backward", (gy, gl, x, params, None, 2, 1, *tail)
    yield "affine_coupling_packed_backward", (None, gl, x, params, mask, 1, 1, *swapped)


@pytest.mark.parametrize("name, args", list(operator_calls()))
def test_opcheck(name, args):
    torch.library.opcheck(getattr(torch.ops.pyflow, name).default, args)


@pytest.mark.parametrize("inverse, first", FORMS)
def test_compiles_without_a_graph_break_to_the_same_bits(inverse, first):
    x, shift, scale = (v.requires_grad_() for v in inputs((6, 40)))

    def f(x, shift, scale):
        y, a = ops.affine_coupling(x, shift * 1, scale, scale_map="tanh", inverse=inverse, shift_first=first)
        y, b = ops.affine_coupling_packed(y, torch.cat((scale, shift), 1), packing="scale_shift")
        return ops.additive_coupling(y, shift), a + b

    def run(f):
        out = f(x, shift, scale)
        return (*out, *torch.autograd.grad(out, (x, shift, scale), (torch.ones(6, 40), torch.ones(6))))

    compiled = run(torch.compile(f, fullgraph=True))
    for a, b in zip(compiled[:2], run(f)[:2], strict=True):
        testing.assert_same_bits(a, b)
    for a, b in zip(compiled[2:], run(f)[2:], strict=True):
        torch.testing.assert_close(a, b)  # sums of gradients are Inductor's


@pytest.mark.parametrize("inverse, first", FORMS)
def test_function_transforms_agree_with_the_reference(inverse, first):
    x, shift, scale = inputs((3, 4), torch.float64)

    def loss(x, shift, scale):
        y, logdet = ops.affine_coupling(x, shift, scale, scale_map="tanh", inverse=inverse, shift_first=first)
        return (y**2).sum() + logdet.sum()

    transforms = {
        "grad": lambda f: torch.func.grad(f, (0, 1, 2))(x, shift, scale),
        "jacrev": lambda f: torch.func.jacrev(f, (0, 1, 2))(x, shift, scale),
        "jacfwd": lambda f: torch.func.jacfwd(f, (0, 1, 2))(x, shift, scale),
        "vmap of grad": lambda f: torch.vmap(torch.func.grad(f, (0, 1, 2)))(*(v[:, None] for v in (x, shift, scale))),
        "jvp": lambda f: torch.func.jvp(f, (x, shift, scale), (shift, scale, x)),
    }
    for name, transform in transforms.items():
        got = transform(loss)
        with pyflow.backend("reference"):
            want = transform(loss)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, msg=name)


def test_dual_tensors_carry_their_tangents():
    x, shift, scale = inputs((3, 4), torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(scale, torch.ones_like(scale))
        y, logdet = ops.affine_coupling(x, shift, dual)
        tangents = [torch.autograd.forward_ad.unpack_dual(v).tangent for v in (y, logdet)]
    torch.testing.assert_close(tangents[0], x * scale.exp())
    torch.testing.assert_close(tangents[1], torch.full((3,), 4.0, dtype=torch.float64))


def test_vmap_runs_the_kernel_and_records_gradients():
    x, shift, scale = inputs((5, 3, 4))
    x.requires_grad_()
    y, logdet = torch.vmap(ops.affine_coupling)(x, shift, scale)
    plain, plain_logdet = ops.affine_coupling(x, shift, scale, event_dims=1)
    testing.assert_same_bits(y, plain)
    testing.assert_same_bits(logdet, plain_logdet)
    assert y.requires_grad and torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    y, _ = torch.vmap(lambda x, p: ops.affine_coupling_packed(x, p), in_dims=(0, None))(
        x, torch.cat((shift, scale), 2)[0]
    )
    assert y.shape == x.shape
    y = torch.vmap(ops.additive_coupling, in_dims=(1, 0), out_dims=1)(x, shift.movedim(1, 0))
    testing.assert_same_bits(y, x + shift)


def test_autocast_changes_nothing():
    x, shift, scale = inputs((4, 40))
    with torch.autocast("cpu", torch.bfloat16):
        y, logdet = ops.affine_coupling(x, shift, scale)
    testing.assert_same_bits(y, ops.affine_coupling(x, shift, scale)[0])
    assert logdet.dtype == torch.float32


def test_offsets_beyond_two_to_the_31():
    # a view into more elements than an int32 counts; only what it touches is ever paged in
    storage = torch.empty(2**31 + 2**20, dtype=torch.bfloat16)
    x = storage[:: 2**20][:2049].view(1, -1)
    values = torch.randn(1, 2049).bfloat16()
    x.copy_(values)
    y, _ = ops.affine_coupling(x, values, values)
    testing.assert_same_bits(y, ops.affine_coupling(values, values, values)[0])


@pytest.mark.slow
def test_more_elements_than_an_int32_counts():
    n = 2**31 + 100
    one = torch.tensor(1.5, dtype=torch.bfloat16).expand(1, n)
    y, logdet = ops.affine_coupling(one, one, torch.zeros((), dtype=torch.bfloat16).expand(1, n))
    assert y[0, -1] == 3 and y[0, 0] == 3 and logdet == 0


# bad input


X = torch.zeros(2, 4)
BAD = [
    (lambda f: f("x", X, X), TypeError, "x must be a tensor, got str"),
    (lambda f: f(X.int(), X, X), TypeError, "x must be float32, float64, bfloat16 or float16, got int32"),
    (lambda f: f(X, None, X), TypeError, "shift must be a tensor, got NoneType"),
    (lambda f: f(X, X, X.bool()), TypeError, "scale must be float32, float64, bfloat16 or float16, got bool"),
    (lambda f: f(X, X[:, :3], X), ValueError, r"shift must have the shape of x, \(2, 4\), got \(2, 3\)"),
    (lambda f: f(X, X, X.to("meta")), ValueError, "scale must be on the device of x, cpu, got meta"),
    (lambda f: f(X, X, X, scale_map="relu"), ValueError, "scale_map must be one of exp, sigmoid, .*, got 'relu'"),
    (lambda f: f(X, X, X, clamp=0.0), ValueError, "clamp must be positive and finite, got 0.0"),
    (lambda f: f(X, X, X, clamp=True), TypeError, "clamp must be a number, got bool"),
    (lambda f: f(X, X, X, clamp=float("nan")), ValueError, "clamp must be positive and finite, got nan"),
    (lambda f: f(X, X, X, scale_map="tanh", clamp=1e40), ValueError, r"clamp must be from 7.89e-31 to 1.27e\+30 in float32, got 1e\+40"),
    (lambda f: f(X, X, X, scale_map="atan", clamp=1e-46), ValueError, r"clamp must be from 7.89e-31 to 1.27e\+30 in float32, got 1e-46"),
    (lambda f: f(X, X, X, scale_map="softplus", eps=1e40), ValueError, r"eps must be at most 1.27e\+30 in float32, got 1e\+40"),
    (lambda f: f(X, X, X, eps=-1), ValueError, "eps must be at least 0 and finite, got -1"),
    (lambda f: f(X, X, X, slope=1.0), ValueError, r"slope must be in \(0, 1\), got 1.0"),
    (lambda f: f(X, X, X, mask=[1]), TypeError, "mask must be a tensor, got list"),
    (lambda f: f(X, X, X, mask=torch.zeros(3, dtype=torch.bool)), ValueError, r"mask must broadcast to the shape of x, \(2, 4\), got \(3,\)"),
    (lambda f: f(X, X, X, mask=X + 0.5), ValueError, "mask must be bool or hold only 0 and 1, got other values"),
    (lambda f: f(X, X, X, event_dims=3), ValueError, r"event_dims must be in \[0, 2\], got 3"),
    (lambda f: f(X, X, X, event_dims=1.0), TypeError, "event_dims must be an integer, got float"),
    (lambda f: f(*[torch.zeros(())] * 3), ValueError, "x must have at least one dim, the batch, got a scalar"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("call, error, text", BAD)
def test_bad_input_gets_one_sentence(call, error, text, backend):
    with pyflow.backend(backend), pytest.raises(error, match=f"^affine_coupling: {text}$"):
        call(ops.affine_coupling)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda f: f(X, X), ValueError, r"params must have the shape of x doubled along dim, \(2, 8\), got \(2, 4\)"),
        (lambda f: f(X, X, dim=2), ValueError, r"dim must be in \[-2, 1\], got 2"),
        (lambda f: f(X, X, dim=None), TypeError, "dim must be an integer, got NoneType"),
        (lambda f: f(X, torch.zeros(2, 8), packing="pairs"), ValueError, "packing must be one of .*, got 'pairs'"),
    ],
)
def test_bad_packing_gets_one_sentence(call, error, text):
    with pytest.raises(error, match=f"^affine_coupling_packed: {text}$"):
        call(ops.affine_coupling_packed)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_largest_and_least_clamps(backend):
    s = torch.tensor([[0.0, 0.5, -3.0]])
    zero = torch.zeros_like(s)
    with pyflow.backend(backend):
        for clamp in (1e30, 1e-30):
            _, logdet = ops.affine_coupling(zero, zero, s, scale_map="tanh", clamp=clamp, event_dims=0)
            want = s if clamp > 1 else clamp * s.sign()
            torch.testing.assert_close(logdet, want, rtol=1e-6, atol=0)
        wide = [t.double() for t in (zero, zero, s)]
        _, logdet = ops.affine_coupling(*wide, scale_map="tanh", clamp=1e40)
        assert logdet.item() == pytest.approx(-2.5)


def test_additive_bad_input():
    with pytest.raises(
        ValueError, match=r"^additive_coupling: shift must have the shape of x, \(2, 4\), got \(4, 2\)$"
    ):
        ops.additive_coupling(X, X.T)
    with pytest.raises(TypeError, match=r"^additive_coupling: inverse must be true or false, got str$"):
        ops.additive_coupling(X, X, inverse="no")
