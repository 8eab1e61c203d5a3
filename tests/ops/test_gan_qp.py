"""Losses of GAN-QP: reference, gradients, reproducible bits, transforms, error texts."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch.nn import functional as F

import pyflow
from pyflow import ops, testing
from pyflow._schemas import DISTANCES
from pyflow.reference import gan_qp as ref

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CHOICES = [(distance, latents) for distance in DISTANCES for latents in (False, True)]


def inputs(shape, dtype=torch.float32, t_dtype=None, latents=True, seed=0):
    """Return t_real, t_fake, x_real, x_fake and, with latents, z_real, z_fake."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)
    values = [normal(shape[0]).to(t_dtype or dtype) for _ in range(2)]
    samples = [normal(*shape).to(dtype) for _ in range(2)]
    return values + samples + [normal(shape[0], 37).to(dtype) for _ in range(2 * latents)]


def check(tensors, **options):
    """Compare losses and gradients with the float64 reference on the same rounded inputs."""
    leaves = [t.detach().requires_grad_() for t in tensors[:2]]
    loss = ops.gan_qp_loss(*leaves, *tensors[2:], reduction="none", **options)
    dtype = ref.common_dtype(*tensors)
    assert loss.dtype == dtype and loss.shape == tensors[2].shape[:1]
    weights = torch.linspace(-1, 1, len(loss), dtype=dtype)
    grads = torch.autograd.grad(loss, leaves, weights)
    lam, eps, distance = (options.get(n, v) for n, v in (("lam", 10.0), ("eps", 0.0), ("distance", "l1")))
    exact = [t.detach().double() for t in tensors] + [None] * (6 - len(tensors))
    want, d = ref.gan_qp_loss(*exact, lam=lam, eps=eps, distance=distance)
    want_grads = ref.gan_qp_loss_backward(weights.double(), *exact[:2], d, lam=lam, eps=eps)
    u = testing.UNIT[dtype]
    # the error of a difference is about half an ulp of the larger operand; the mean has the mean of these errors
    size = sum(
        ref.rows((a.abs() + b.abs()).square() if distance == "l2" else a.abs() + b.abs())
        for a, b in zip(exact[2::2], exact[3::2], strict=True) if a is not None
    )  # fmt: skip
    size = size.sqrt() if distance == "l2" else size
    terms = tensors[2][0].numel() if len(loss) else 1
    of_d = 3 * u * size + testing.sum_error(terms, size, dtype) + 3 * u * d
    delta = exact[0] - exact[1]
    q = delta / (2 * lam * (d + eps))
    of_delta = u * (exact[0].abs() + exact[1].abs())
    of_q = q.abs() * (of_d / (d + eps) + 6 * u) + of_delta / (2 * lam * (d + eps))
    testing.assert_within(loss, want, delta.abs() * of_q + of_delta * (q - 1).abs() + 4 * u * delta.abs(), "loss")
    error = weights.double().abs() * (2 * of_q + 4 * u * (1 + q.abs()))
    for name, grad, wanted in zip(("t_real", "t_fake"), grads, want_grads, strict=True):
        assert grad.dtype == tensors[0].dtype
        testing.assert_within(grad, wanted, error, f"gradient of {name}")


@pytest.mark.parametrize("distance, latents", CHOICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(distance, latents, dtype):
    for shape in [(3, 1), (33, 63), (1, 1000), (5, 2, 7, 3), (0, 4), (9,), (65, 513), (2, 20011), (1031, 2)]:
        check(inputs(shape, dtype, latents=latents), distance=distance)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t_dtype", DTYPES)
def test_dtypes_may_differ(distance, dtype, t_dtype):
    tensors = inputs((7, 3, 20), dtype, t_dtype)
    check(tensors, distance=distance, lam=3.5, eps=0.25)
    # generated samples in another dtype than the data
    tensors[3], tensors[5] = tensors[3].float(), tensors[5].bfloat16()
    check(tensors, distance=distance)


def test_matches_the_formula_of_the_paper():
    """The loss equals the formula in float64, and has its minimum -lam d / 2 at Delta = lam d."""
    t_real, t_fake, x_real, x_fake, z_real, z_fake = inputs((6, 3, 8, 8), torch.float64)
    for distance in DISTANCES:
        delta = t_real - t_fake
        if distance == "l1":
            d = (x_real - x_fake).abs().mean((1, 2, 3)) + (z_real - z_fake).abs().mean(1)
        else:
            d = (x_real - x_fake).square().mean((1, 2, 3)).sqrt() + (z_real - z_fake).square().mean(1).sqrt()
        want = -delta + delta**2 / (2 * 7 * (d + 0.5))
        for reduction, expected in (("none", want), ("mean", want.mean()), ("sum", want.sum())):
            got = ops.gan_qp_loss(
                t_real, t_fake, x_real, x_fake, z_real, z_fake, lam=7, distance=distance, eps=0.5, reduction=reduction
            )
            torch.testing.assert_close(got, expected)
        best = (t_fake + 7 * d).requires_grad_()
        loss = ops.gan_qp_loss(best, t_fake, x_real, x_fake, z_real, z_fake, lam=7, distance=distance, reduction="none")
        torch.testing.assert_close(loss, -7 * d / 2)
        assert torch.autograd.grad(loss.sum(), best)[0].abs().max() < 1e-12


def test_generator_loss_matches_its_formula():
    t_real, t_fake, x, x_rec, z, z_rec = inputs((6, 3, 8, 8), torch.float64)
    want = (t_real - t_fake).mean() + 4 * F.mse_loss(z_rec, z) + 6 * F.mse_loss(x_rec, x)
    got = ops.gan_qp_generator_loss(t_real, t_fake, x, x_rec, z, z_rec, (4, 6))
    torch.testing.assert_close(got, want)
    each = ops.gan_qp_generator_loss(t_real, t_fake, x, x_rec, z, z_rec, (4, 6), reduction="none")
    assert each.shape == (6,)
    torch.testing.assert_close(each.mean(), want)
    torch.testing.assert_close(ops.gan_qp_generator_loss(t_real, t_fake), (t_real - t_fake).mean())
    torch.testing.assert_close(
        ops.gan_qp_generator_loss(t_real[:, None], t_fake[:, None], z=z, z_rec=z_rec, reduction="sum"),
        (t_real - t_fake).sum() + 2 * 6 * F.mse_loss(z_rec, z),
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_only_the_documented_inputs_get_gradients(backend):
    leaves = [t.requires_grad_() for t in inputs((4, 3, 5))]
    with pyflow.backend(backend):
        critic = ops.gan_qp_loss(*leaves)
        grads = torch.autograd.grad(critic, leaves, allow_unused=True)
        assert [g is not None for g in grads] == [True, True, False, False, False, False]
        grads = torch.autograd.grad(ops.gan_qp_generator_loss(*leaves), leaves, allow_unused=True)
    assert [g is not None for g in grads] == [True, True, False, True, False, True]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_sample_with_distance_zero_contributes_nothing(backend):
    tensors = inputs((3, 10))
    tensors[3][1], tensors[5][1] = tensors[2][1], tensors[4][1]
    leaves = [t.requires_grad_() for t in tensors[:2]]
    with pyflow.backend(backend):
        loss = ops.gan_qp_loss(*leaves, *tensors[2:], reduction="none")
        grads = torch.autograd.grad(loss.sum(), leaves)
        assert loss[1] == 0 and all(g[1] == 0 for g in grads) and all(g[[0, 2]].ne(0).all() for g in grads)
        # with eps > 0 it contributes
        loss = ops.gan_qp_loss(*leaves, *tensors[2:], eps=0.5, reduction="none")
        delta = (tensors[0] - tensors[1])[1]
        torch.testing.assert_close(loss[1], -delta + delta**2 / 10)
        assert ops.gan_qp_loss(*leaves, tensors[2], tensors[2]).item() == 0


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(distance, layout):
    tensors = inputs((6, 5, 4, 10))
    viewed = [testing.laid_out(t, layout) if t.dim() == 4 else t for t in tensors]
    viewed[4:] = [testing.laid_out(t, "stepped") for t in tensors[4:]]
    viewed[:2] = [torch.stack((t, t), 1)[:, 0] for t in tensors[:2]]
    # x_real alone in the layout, then all samples
    for given in ([*tensors[:2], viewed[2], tensors[3], *tensors[4:]], viewed):
        got = ops.gan_qp_loss(*given, distance=distance, reduction="none")
        torch.testing.assert_close(got, ops.gan_qp_loss(*tensors, distance=distance, reduction="none"))
        check(given, distance=distance)


def test_critic_values_may_be_a_column():
    t_real, t_fake, *samples = inputs((5, 12))
    want = ops.gan_qp_loss(t_real, t_fake, *samples, reduction="none")
    for shape in ((5, 1), (5, 1, 1, 1)):
        got = ops.gan_qp_loss(t_real.reshape(shape), t_fake.reshape(shape), *samples, reduction="none")
        testing.assert_same_bits(got, want)


def digest() -> str:
    """Return one hash over distances and sizes; runs in one process per instruction set."""
    h = hashlib.sha256()
    for distance in DISTANCES:
        for shape in [(33, 70), (2, 9001), (300, 3), (5, 3, 64, 64)]:
            tensors = inputs(shape)
            leaves = [t.requires_grad_() for t in tensors[:2]]
            out = ops.gan_qp_loss(*leaves, *tensors[2:], distance=distance, reduction="none")
            for v in (out, *torch.autograd.grad(out, leaves, torch.ones_like(out))):
                h.update(v.detach().numpy().tobytes())
    return h.hexdigest()


def test_instruction_sets_give_the_same_bits(every_instruction_set):
    assert len(every_instruction_set) == 1


@pytest.mark.parametrize("distance", DISTANCES)
def test_bits_do_not_depend_on_threads_or_batch(distance):
    for shape in [(200, 392), (3, 30000), (2000, 4)]:
        tensors = inputs(shape)
        run = lambda t: ops.gan_qp_loss(*t, distance=distance, reduction="none")
        with testing.threads(1):
            single = run(tensors)
        with testing.threads(4):
            testing.assert_same_bits(run(tensors), single)
        for part in (slice(0, 1), slice(1, None), slice(2, 3)):
            testing.assert_same_bits(run([t[part] for t in tensors]), single[part])


def test_every_output_element_is_written():
    with testing.poisoned():
        for shape in [(5, 70), (2, 9000), (700, 3)]:
            tensors = inputs(shape)
            leaves = [t.requires_grad_() for t in tensors[:2]]
            out = ops.gan_qp_loss(*leaves, *tensors[2:], reduction="none")
            assert not any(v.isnan().any() for v in (out, *torch.autograd.grad(out.sum(), leaves)))


@pytest.mark.parametrize("distance", DISTANCES)
def test_nan_and_infinity_propagate_as_in_the_reference(distance):
    special = torch.tensor([0.0, -0.0, 1.0, 1e30, torch.inf, -torch.inf, torch.nan])
    x_real, x_fake = (v.flatten()[:, None] for v in torch.meshgrid(special, special, indexing="ij"))
    for t_real in special:
        for t_fake in (torch.tensor(0.5), torch.tensor(torch.inf), torch.tensor(torch.nan)):
            leaves = [t.repeat(len(x_real)).requires_grad_() for t in (t_real, t_fake)]

            def run():
                out = ops.gan_qp_loss(*leaves, x_real, x_fake, distance=distance, reduction="none")
                return (out, *torch.autograd.grad(out.sum(), leaves))

            got = run()
            with pyflow.backend("reference"):
                want = run()
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())


@pytest.mark.parametrize("distance, latents", CHOICES)
def test_gradcheck_twice(distance, latents):
    t_real, t_fake, *samples = inputs((3, 2, 2), torch.float64, latents=latents)
    leaves = (t_real.requires_grad_(), t_fake.requires_grad_())
    for reduction in ("none", "mean"):
        f = lambda r, k: ops.gan_qp_loss(r, k, *samples, distance=distance, reduction=reduction)
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


def test_gradcheck_of_the_generator():
    leaves = [t.requires_grad_() for t in inputs((3, 2, 2), torch.float64)]
    t_real, t_fake, x, x_rec, z, z_rec = leaves
    f = lambda r, k, xr, zr: ops.gan_qp_generator_loss(r, k, x.detach(), xr, z.detach(), zr)
    assert torch.autograd.gradcheck(f, (t_real, t_fake, x_rec, z_rec))
    assert torch.autograd.gradgradcheck(f, (t_real, t_fake, x_rec, z_rec))


@pytest.mark.parametrize("layout", testing.gradient_layouts(torch.zeros(2, 3)))
def test_backward_takes_any_gradient_layout(layout):
    tensors = inputs((6, 20))
    leaves = [t.requires_grad_() for t in tensors[:2]]
    out = ops.gan_qp_loss(*leaves, *tensors[2:], reduction="none")
    grad = testing.gradient_layouts(torch.randn(6, 3))[layout][:, 0]
    for a, b in zip(
        torch.autograd.grad(out, leaves, grad, retain_graph=True),
        torch.autograd.grad(out, leaves, grad.contiguous()),
        strict=True,
    ):
        testing.assert_same_bits(a, b)


def test_the_backward_stores_one_value_per_sample():
    tensors = inputs((8, 3, 16, 16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.gan_qp_loss(*(t.requires_grad_() for t in tensors))
    assert kept and all(t.numel() <= 8 for t in kept)


@pytest.mark.slow
def test_more_elements_than_an_int32_counts():
    n = 2**31 + 100
    x = torch.zeros(1, dtype=torch.bfloat16).expand(1, n)
    loss = ops.gan_qp_loss(torch.ones(1), torch.zeros(1), x, torch.ones(1).expand(1, n), lam=1.0)
    assert loss.item() == -0.5


def operator_calls():
    t_real, t_fake, *samples = inputs((3, 4, 5))
    leaves = (t_real.requires_grad_(), t_fake.requires_grad_())
    stepped = [testing.laid_out(t, "stepped") for t in samples]
    grad, d = torch.randn(3, requires_grad=True), torch.rand(3)
    yield "gan_qp_loss", (*leaves, *samples, 10.0, 0.0, 0)
    yield "gan_qp_loss", (*leaves, *stepped[:2], None, None, 2.0, 0.5, 1)
    yield "gan_qp_loss_backward", (grad, *leaves, d, 10.0, 0.0)


@pytest.mark.parametrize("name, args", list(operator_calls()))
def test_opcheck(name, args):
    torch.library.opcheck(getattr(torch.ops.pyflow, name).default, args)


@pytest.mark.parametrize("distance", DISTANCES)
def test_compiles_without_a_graph_break_to_the_same_bits(distance):
    tensors = inputs((6, 40))
    leaves = [t.requires_grad_() for t in tensors[:2]]

    def f(*tensors):
        generator = ops.gan_qp_generator_loss(*tensors)
        return ops.gan_qp_loss(*tensors, distance=distance, reduction="none"), generator

    got, want = torch.compile(f, fullgraph=True)(*tensors), f(*tensors)
    testing.assert_same_bits(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])
    for a, b in zip(torch.autograd.grad(got[0].sum(), leaves), torch.autograd.grad(want[0].sum(), leaves), strict=True):
        testing.assert_same_bits(a, b)


@pytest.mark.parametrize("distance, latents", CHOICES)
def test_function_transforms_agree_with_the_reference(distance, latents):
    tensors = inputs((3, 4), torch.float64, latents=latents)
    loss = lambda *v: ops.gan_qp_loss(*v, distance=distance)
    row = lambda *v: loss(*(t[None] for t in v))
    every, one = tuple(range(len(tensors))), (0, *(None,) * (len(tensors) - 1))
    transforms = {
        "grad": lambda: torch.func.grad(loss, every)(*tensors),
        "jacrev": lambda: torch.func.jacrev(loss, every)(*tensors),
        "jacfwd": lambda: torch.func.jacfwd(loss, every)(*tensors),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(row, (0, 1)))(*tensors),
        "vmap": lambda: (torch.vmap(row)(*tensors),),
        "vmap of one": lambda: (torch.vmap(loss, one)(tensors[0].expand(2, 3), *tensors[1:]),),
        "jvp": lambda: torch.func.jvp(loss, tuple(tensors), tuple(tensors)),
    }  # fmt: skip
    for name, transform in transforms.items():
        got = transform()
        with pyflow.backend("reference"):
            want = transform()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, msg=name)
        if name in ("grad", "jacrev", "jacfwd"):
            assert all(g.count_nonzero() == 0 for g in got[2:]), name
            assert all(g.count_nonzero() == g.numel() for g in got[:2]), name


def test_vmap_has_a_rule_for_both_operators():
    tensors = [t.requires_grad_() for t in inputs((3, 4))]
    batch = [torch.stack((t, 2 * t)).detach() for t in tensors]
    leaves = [t.requires_grad_() for t in batch[:2]]
    out = torch.vmap(lambda *v: ops.gan_qp_loss(*v, reduction="none"))(*leaves, *batch[2:])
    grads = torch.autograd.grad(out.sum(), leaves)
    for i in range(2):
        parts = [t[i].detach().requires_grad_() for t in batch]
        want = ops.gan_qp_loss(*parts, reduction="none")
        testing.assert_same_bits(out[i], want)
        for a, b in zip(grads, torch.autograd.grad(want.sum(), parts[:2]), strict=True):
            testing.assert_same_bits(a[i], b)


def test_autocast_changes_nothing():
    tensors = inputs((4, 40))
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.gan_qp_loss(*tensors), ops.gan_qp_generator_loss(*tensors)
    testing.assert_same_bits(got[0], ops.gan_qp_loss(*tensors))
    testing.assert_same_bits(got[1], ops.gan_qp_generator_loss(*tensors))


T, X, Z = torch.zeros(4), torch.zeros(4, 3, 2), torch.zeros(4, 5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda f: f([1.0], T, X, X), TypeError, "t_real must be a tensor, got list"),
        (
            lambda f: f(T, T.int(), X, X),
            TypeError,
            "t_fake must be float32, float64, bfloat16 or float16, got int32",
        ),
        (lambda f: f(T, T, X.byte(), X), TypeError, "x_real must be float32, float64, bfloat16 or float16, got uint8"),
        (
            lambda f: f(T, T, X, X[:, :2]),
            ValueError,
            r"x_fake must have the shape of x_real, \(4, 3, 2\), got \(4, 2, 2\)",
        ),
        (lambda f: f(T, T, T[0], T[0]), ValueError, "x_real must have at least one dim, the batch, got a scalar"),
        (
            lambda f: f(T, T, X[:, :0], X[:, :0]),
            ValueError,
            r"x_real must have at least one element per sample, got \(4, 0, 2\)",
        ),
        (
            lambda f: f(T[:3], T, X, X),
            ValueError,
            r"t_real must have one value for each sample of x_real, \(4,\) or \(4, 1\), got \(3,\)",
        ),
        (
            lambda f: f(T, Z, X, X),
            ValueError,
            r"t_fake must have one value for each sample of x_real, \(4,\) or \(4, 1\), got \(4, 5\)",
        ),
        (lambda f: f(T, T, X, X, Z), ValueError, "z_real must come with z_fake, got None for z_fake"),
        (lambda f: f(T, T, X, X, None, Z), ValueError, "z_fake must come with z_real, got None for z_real"),
        (lambda f: f(T, T, X, X, Z[:2], Z[:2]), ValueError, r"z_real must have the 4 samples of x_real, got \(2, 5\)"),
        (
            lambda f: f(T, T, X, X, Z, Z[:, 1:]),
            ValueError,
            r"z_fake must have the shape of z_real, \(4, 5\), got \(4, 4\)",
        ),
        (lambda f: f(T.to("meta"), T, X, X), ValueError, "t_real must be on the device of x_real, cpu, got meta"),
        (lambda f: f(T, T, X, X, lam=0), ValueError, "lam must be positive and finite, got 0"),
        (
            lambda f: f(T, T, X, X, lam=1e-46),
            ValueError,
            r"lam must be from 7.89e-31 to 1.27e\+30 in float32, got 1e-46",
        ),
        (lambda f: f(T, T, X, X, lam=-1.5), ValueError, "lam must be positive and finite, got -1.5"),
        (lambda f: f(T, T, X, X, lam="10"), TypeError, "lam must be a number, got str"),
        (lambda f: f(T, T, X, X, eps=-1), ValueError, "eps must be at least 0 and finite, got -1"),
        (lambda f: f(T, T, X, X, distance="l3"), ValueError, "distance must be one of l1, l2, got 'l3'"),
        (
            lambda f: f(T, T, X, X, reduction="max"),
            ValueError,
            "reduction must be one of mean, sum, none, got 'max'",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, error, text, backend):
    with pyflow.backend(backend), pytest.raises(error, match=f"^gan_qp_loss: {text}$"):
        call(ops.gan_qp_loss)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda f: f(T[0], T[0]), ValueError, "t_real must have at least one dim, the batch, got a scalar"),
        (
            lambda f: f(T, T[:2]),
            ValueError,
            r"t_fake must have one value for each sample of t_real, \(4,\) or \(4, 1\), got \(2,\)",
        ),
        (lambda f: f(T, T, X), ValueError, "x must come with x_rec, got None for x_rec"),
        (lambda f: f(T, T, z_rec=Z), ValueError, "z_rec must come with z, got None for z"),
        (lambda f: f(T, T, X, X[:, 1:]), ValueError, r"x_rec must have the shape of x, \(4, 3, 2\), got \(4, 2, 2\)"),
        (lambda f: f(T, T, X[:2], X[:2]), ValueError, r"x must have the 4 samples of t_real, got \(2, 3, 2\)"),
        (
            lambda f: f(T, T, X, X, betas=(1, 1e40)),
            ValueError,
            r"betas\[1\] must be at most 1.27e\+30 in float32, got 1e\+40",
        ),
        (lambda f: f(T, T, X, X, betas=(1, -2)), ValueError, r"betas\[1\] must be at least 0 and finite, got -2"),
        (lambda f: f(T, T, X, X, betas=torch.zeros(2, 3)), ValueError, "betas must be two numbers, got Tensor"),
        (lambda f: f(T, T, X, X, betas=(1,)), ValueError, r"betas must be two numbers, got \(1,\)"),
        (lambda f: f(T, T, X, X, betas=("a", 1)), TypeError, r"betas\[0\] must be a number, got str"),
    ],
)
def test_bad_input_of_the_generator_gets_one_sentence(call, error, text):
    with pytest.raises(error, match=f"^gan_qp_generator_loss: {text}$"):
        call(ops.gan_qp_generator_loss)
