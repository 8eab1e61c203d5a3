"""The flow head against its reference, bit by bit and under every transform."""

from __future__ import annotations

import hashlib

import pytest
import torch
from scipy import stats

import pyflow
from pyflow import ops, testing
from pyflow._schemas import PRIORS
from pyflow.reference import flow_head as ref

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def inputs(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(shape, generator=generator, dtype=torch.float64)
    log_scale = 0.3 * torch.randn(shape[1:], generator=generator, dtype=torch.float64)
    return h.to(dtype), log_scale.to(dtype)


def check(h, log_scale, prior):
    leaves = [v.detach().requires_grad_() for v in (h, log_scale) if v is not None]
    out = ops.flow_log_prob(*leaves, prior=prior)
    weights = torch.linspace(-1, 1, h.shape[0]).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, weights)
    exact = [v.detach().double().requires_grad_() for v in leaves]
    want = ref.flow_log_prob(*exact, prior=prior)
    want_grads = torch.autograd.grad(want, exact, weights.double())
    u = testing.UNIT[testing.compute_dtype(h.dtype)]
    hd = exact[0].detach()
    sd = exact[1].detach() if len(exact) > 1 else torch.zeros(h.shape[1:], dtype=torch.float64)
    z = hd * sd.exp()
    # z: exp 1.1 ulp and the product; the density: squared, or softplus; then the sum
    size = (z * z + 2 * z.abs() + 2 + sd.abs()).flatten(1).sum(1) if h.dim() > 1 else z * z + 2 * z.abs() + 2
    terms = max(1, h[0].numel()) if len(h) else 1
    testing.assert_within(
        out, want, 12 * u * size + testing.sum_error(terms, size, testing.compute_dtype(h.dtype)), "log_prob"
    )
    column = weights.double().abs().reshape(-1, *(1,) * (h.dim() - 1))
    testing.assert_within(grads[0], want_grads[0], 16 * u * column * sd.exp() * (z.abs() + 1), "grad h")
    if log_scale is not None:
        # at most 32 additions in float32 before the sum goes on in float64
        testing.assert_within(
            grads[1], want_grads[1], 48 * u * (column * (z * z + z.abs() + 1)).sum(0), "grad log_scale"
        )


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [True, False])
def test_matches_the_reference(prior, dtype, scaled):
    for shape in [
        (3, 1), (33, 63), (1, 1000), (5, 2, 7, 3), (0, 4), (4, 0), (2, 3, 0), (9,), (65, 513), (2, 20011), (70, 2),
        (3, 2051),
    ]:  # fmt: skip
        h, log_scale = inputs(shape, dtype)
        check(h, log_scale if scaled else None, prior)


@pytest.mark.parametrize("prior, density", [("gaussian", stats.norm), ("logistic", stats.logistic)])
def test_is_the_log_density(prior, density):
    h, _ = inputs((4, 50), torch.float64)
    want = density.logpdf(3 * h.numpy()).sum(1) + 50 * torch.log(torch.tensor(3.0)).item()
    got = ops.flow_log_prob(h, torch.full((50,), 3.0, dtype=torch.float64).log(), prior=prior)
    torch.testing.assert_close(got, torch.from_numpy(want))


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(prior, layout):
    h, log_scale = inputs((6, 5, 4, 10))
    viewed = testing.laid_out(h, layout).requires_grad_()
    scale = log_scale.transpose(0, 2).contiguous().transpose(0, 2)
    got = ops.flow_log_prob(viewed, scale, prior=prior)
    torch.testing.assert_close(got, ops.flow_log_prob(h, log_scale, prior=prior))
    check(viewed, scale, prior)


def digest() -> str:
    """One hash over priors and sizes; run in a process per instruction set."""
    h = hashlib.sha256()
    for prior in PRIORS:
        for shape in [(33, 70), (2, 9001), (300, 3)]:
            leaves = [v.requires_grad_() for v in inputs(shape)]
            out = ops.flow_log_prob(*leaves, prior=prior)
            for v in (out, *torch.autograd.grad(out, leaves, torch.ones_like(out))):
                h.update(v.detach().numpy().tobytes())
    return h.hexdigest()


def test_instruction_sets_give_the_same_bits(every_instruction_set):
    assert len(every_instruction_set) == 1


@pytest.mark.parametrize("prior", PRIORS)
def test_bits_do_not_depend_on_threads_or_batch(prior):
    for shape in [(200, 392), (3, 30000)]:
        leaves = [v.requires_grad_() for v in inputs(shape)]

        def run(leaves=leaves):
            out = ops.flow_log_prob(*leaves, prior=prior)
            return (out, *torch.autograd.grad(out, leaves, torch.ones_like(out)))

        with testing.threads(1):
            single = run()
        with testing.threads(4):
            several = run()
        for a, b in zip(single, several, strict=True):
            testing.assert_same_bits(a, b)
        testing.assert_same_bits(ops.flow_log_prob(leaves[0][:1], leaves[1], prior=prior), single[0][:1])


def test_every_output_element_is_written():
    with testing.poisoned():
        for shape in [(5, 70), (2, 9000), (40, 3)]:
            leaves = [v.requires_grad_() for v in inputs(shape)]
            out = ops.flow_log_prob(*leaves)
            assert not any(v.isnan().any() for v in (out, *torch.autograd.grad(out.sum(), leaves)))


@pytest.mark.parametrize("prior", PRIORS)
def test_nan_and_infinity_travel_as_in_the_reference(prior):
    special = torch.tensor([0.0, -0.0, 1.0, 30.0, -200.0, 1e30, torch.inf, -torch.inf, torch.nan])[:, None]
    for scale in (None, torch.zeros(1), torch.tensor([95.0]), torch.tensor([-torch.inf])):
        got = ops.flow_log_prob(special, scale, prior=prior)
        want = ref.flow_log_prob(special, scale, prior=prior)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


@pytest.mark.parametrize("prior", PRIORS)
def test_gradcheck_twice(prior):
    h, log_scale = (v.requires_grad_() for v in inputs((3, 2, 2), torch.float64))
    for f, leaves in (
        (lambda h, s: ops.flow_log_prob(h, s, prior=prior), (h, log_scale)),
        (lambda h: ops.flow_log_prob(h, prior=prior), (h,)),
    ):
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("layout", testing.gradient_layouts(torch.zeros(2, 3)))
def test_backward_takes_any_gradient_layout(layout):
    leaves = [v.requires_grad_() for v in inputs((6, 20))]
    out = ops.flow_log_prob(*leaves)
    grad = testing.gradient_layouts(torch.randn(6, 3))[layout][:, 0]
    for a, b in zip(
        torch.autograd.grad(out, leaves, grad, retain_graph=True),
        torch.autograd.grad(out, leaves, grad.contiguous()),
        strict=True,
    ):
        testing.assert_same_bits(a, b)


def operator_calls():
    h, log_scale = (v.requires_grad_() for v in inputs((3, 4, 5)))
    stepped = testing.laid_out(h.detach(), "stepped").requires_grad_()
    grad = torch.randn(3, requires_grad=True)
    yield "flow_log_prob", (h, log_scale, 0)
    yield "flow_log_prob", (stepped, None, 1)
    yield "flow_log_prob_backward", (grad, h, log_scale, 1)
    yield "flow_log_prob_backward", (grad, stepped, None, 0)


@pytest.mark.parametrize("name, args", list(operator_calls()))
def test_opcheck(name, args):
    torch.library.opcheck(getattr(torch.ops.pyflow, name).default, args)


@pytest.mark.parametrize("prior", PRIORS)
def test_compiles_without_a_graph_break_to_the_same_bits(prior):
    leaves = [v.requires_grad_() for v in inputs((6, 40))]
    f = lambda h, s: ops.flow_log_prob(h, s, prior=prior)
    compiled = torch.compile(f, fullgraph=True)(*leaves)
    testing.assert_same_bits(compiled, f(*leaves))
    for a, b in zip(
        torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(f(*leaves).sum(), leaves), strict=True
    ):
        testing.assert_same_bits(a, b)


@pytest.mark.parametrize("prior", PRIORS)
def test_function_transforms_agree_with_the_reference(prior):
    h, log_scale = inputs((3, 4), torch.float64)
    loss = lambda h, s: ops.flow_log_prob(h, s, prior=prior).sum()
    rows = lambda h, s: ops.flow_log_prob(h[None], s, prior=prior)[0]
    transforms = {
        "grad": lambda: torch.func.grad(loss, (0, 1))(h, log_scale),
        "jacrev": lambda: torch.func.jacrev(loss, (0, 1))(h, log_scale),
        "jacfwd": lambda: torch.func.jacfwd(loss, (0, 1))(h, log_scale),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(rows, (0, 1)), (0, None))(h, log_scale),
        "vmap": lambda: (torch.vmap(rows, (0, None))(h, log_scale),),
        "jvp": lambda: torch.func.jvp(loss, (h, log_scale), (h, log_scale)),
    }
    for name, transform in transforms.items():
        got = transform()
        with pyflow.backend("reference"):
            want = transform()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, msg=name)


def test_autocast_changes_nothing():
    h, log_scale = inputs((4, 40))
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.flow_log_prob(h, log_scale)
    testing.assert_same_bits(got, ops.flow_log_prob(h, log_scale))


H = torch.zeros(2, 4)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda f: f([1.0]), TypeError, "h must be a tensor, got list"),
        (lambda f: f(H.long()), TypeError, "h must be float32, float64, bfloat16 or float16, got int64"),
        (lambda f: f(torch.zeros(())), ValueError, "h must have at least one dim, the batch, got a scalar"),
        (
            lambda f: f(H, H),
            ValueError,
            r"log_scale must have the shape of h without its batch dim, \(4,\), got \(2, 4\)",
        ),
        (lambda f: f(H, prior="cauchy"), ValueError, "prior must be one of gaussian, logistic, got 'cauchy'"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, text, backend):
    with pyflow.backend(backend), pytest.raises(error, match=f"^flow_log_prob: {text}$"):
        call(ops.flow_log_prob)
