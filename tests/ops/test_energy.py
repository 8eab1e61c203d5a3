"""MALA steps, gradient penalty and energy losses: distribution, reference, transforms, error texts."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import pyflow
from pyflow import ops, testing
from pyflow.reference import energy as ref

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(9,), (0, 4), (4, 0), (3, 1), (33, 63), (5, 2, 7, 3), (700, 3), (2, 20011), (65, 513)]
SEED, STEP = 11, 2**33 + 7


def draw(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chain(shape, dtype=torch.float32):
    """Return arguments of mala_accept for which about half the rows accept."""
    z, grad = draw(shape, dtype), draw(shape, dtype, 1)
    u = draw(shape[:1], seed=4)
    u_new = u + draw(shape[:1], seed=5) + 0.5
    return z, z + 0.1 * draw(shape, dtype, 2), u, u_new, grad, grad + 0.05 * draw(shape, dtype, 3)


def seeds(shape):
    return SEED, ops.sample_seeds(SEED, shape[0])


def normal_energy(z):
    return z.square().flatten(1).sum(1) / 2


# distribution of the chains


ALPHA = 0.5


def log_q(to, start, drift=ALPHA):
    """Return the log density of the proposal on N(0, 1), up to a constant; the gradient of the energy is z."""
    return -(to - start + drift * start).square() / (4 * ALPHA)


def unsquared(to, start):
    return -(to - start + ALPHA * start).abs() / (4 * ALPHA)


def energies(z, new):
    return (z.square() - new.square()) / 2


# name -> (variance on N(0, 1), log-ratio): the correct rule, and three wrong rules that published samplers use
RULES = {
    "right": (1.0, lambda z, new: energies(z, new) + log_q(z, new) - log_q(new, z)),
    "energies alone": (4 / 7, energies),
    "norms not squared": (0.736, lambda z, new: energies(z, new) + unsquared(z, new) - unsquared(new, z)),
    # the ratio is always 1: every proposal is accepted, and the variance is 1 / (1 - alpha / 2)
    "drift of the density doubled": (
        4 / 3, lambda z, new: energies(z, new) + log_q(z, new, 2 * ALPHA) - log_q(new, z, 2 * ALPHA)
    ),
}  # fmt: skip


def variance(advance, chains=20000, burn=40, steps=60):
    """Return the mean of z^2 over chains and steps, and its standard error; the chains are independent."""
    total = torch.zeros(chains, dtype=torch.float64)
    for step in range(burn + steps):
        z = advance(step)
        if step >= burn:
            total += z.flatten().double().square() / steps
    return total.mean().item(), total.std().item() / math.sqrt(chains)


@pytest.mark.parametrize("rule", RULES)
def test_each_acceptance_rule_has_its_known_variance(rule):
    want, log_ratio = RULES[rule]
    z = draw((20000, 1), torch.float64, 8)

    def advance(step):
        nonlocal z
        new = ops.mala_propose(z, z, ALPHA, seed=SEED, step=step)
        uniforms = ops.uniform((len(z),), seed=SEED, step=step, purpose="accept")[:, None]
        z = torch.where(uniforms.log() < log_ratio(z, new), new, z)
        return z

    got, error = variance(advance)
    # 0.736 is rounded to three digits
    assert error < 0.005 and abs(got - want) < 5 * error + 5e-4 * (want == 0.736)


def test_mala_samples_have_the_variance_of_the_normal():
    z = draw((20000, 1), seed=8)
    u, grad = ops.energy_and_grad(normal_energy, z)

    def advance(step):
        nonlocal z, u, grad
        z, u, grad, _ = ops.mala_step(z, u, grad, normal_energy, ALPHA, seed=SEED, step=step)
        return z

    got, error = variance(advance)
    assert error < 0.005 and abs(got - 1) < 5 * error


def test_log_ratio_matches_the_densities():
    z, new, _, _, grad, grad_new = chain((50, 7), torch.float64)
    alpha = torch.linspace(0.01, 2, 50, dtype=torch.float64)
    there = -(new - z + alpha[:, None] * grad).square().sum(1) / (4 * alpha)
    back = -(z - new + alpha[:, None] * grad_new).square().sum(1) / (4 * alpha)
    torch.testing.assert_close(ref.log_ratio(z, new, grad, grad_new, alpha), back - there)


def test_a_step_evaluates_the_energy_once():
    calls = []

    def energy(z):
        calls.append(len(z))
        return normal_energy(z)

    z = draw((64, 5))
    u, grad = ops.energy_and_grad(energy, z)
    for step in range(5):
        z, u, grad, accepted = ops.mala_step(z, u, grad, energy, 0.3, seed=1, step=step)
        testing.assert_same_bits(u, normal_energy(z))
        testing.assert_same_bits(grad, z)
        assert not (z.requires_grad or u.requires_grad or grad.requires_grad) and accepted.dtype == torch.bool
    assert calls == [64] * 6
    given = ops.mala_step(z, u, grad, lambda z: (normal_energy(z), z), 0.3, seed=1, step=5)
    for a, b in zip(given, ops.mala_step(z, u, grad, energy, 0.3, seed=1, step=5), strict=True):
        assert torch.equal(a, b)


# against the reference


@pytest.mark.parametrize("dtype", DTYPES)
def test_mala_accept_matches_the_reference_bit_for_bit(dtype):
    for shape in SHAPES:
        args = chain(shape, dtype)
        for alpha in (0.01, torch.tensor(0.01), torch.full(shape[:1], 0.02)):
            for seed in seeds(shape):
                got = ops.mala_accept(*args, alpha, seed=seed, step=STEP)
                with pyflow.backend("reference"):
                    want = ops.mala_accept(*args, alpha, seed=seed, step=STEP)
                for name, a, b in zip(("z", "u", "grad"), got, want, strict=False):
                    testing.assert_same_bits(a, b, f"{name}, {shape}")
                assert torch.equal(got[3], want[3]), shape
        if len(got[3]) > 30:
            assert 0.2 < got[3].float().mean() < 0.8


def test_a_selected_value_keeps_its_bits_in_any_mix_of_dtypes():
    z, new, u, u_new, grad, grad_new = chain((40, 5), torch.bfloat16)
    u, u_new, grad, grad_new = u.double() / 3, u_new.double() / 3, grad.float() / 3, grad_new.float() / 3
    z_out, u_out, grad_out, accepted = ops.mala_accept(z, new, u, u_new, grad, grad_new, 0.01, seed=1)
    testing.assert_same_bits(z_out, torch.where(accepted[:, None], new, z))
    testing.assert_same_bits(u_out, torch.where(accepted, u_new, u))
    testing.assert_same_bits(grad_out, torch.where(accepted[:, None], grad_new, grad))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["u_new", "z_new", "grad_new"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_non_finite_proposals_are_rejected(bad, where, backend):
    for cols in (3, 700, 9000):
        args = dict(zip(("z", "z_new", "u", "u_new", "grad", "grad_new"), chain((64, cols)), strict=True))
        args["u"] = args["u"] + 1e6  # finite proposals are accepted
        args[where][::2] = bad
        with pyflow.backend(backend):
            z, u, grad, accepted = ops.mala_accept(**args, alpha=0.01, seed=2)
        assert accepted.tolist() == [False, True] * 32
        testing.assert_same_bits(z[::2], args["z"][::2])
        testing.assert_same_bits(u[::2], args["u"][::2])
        testing.assert_same_bits(grad[::2], args["grad"][::2])
        assert z.isfinite().all() and u.isfinite().all() and grad.isfinite().all()


def test_a_chain_can_leave_a_state_of_infinite_energy():
    z, new, u, u_new, grad, grad_new = chain((8, 3))
    u[:] = torch.inf
    assert ops.mala_accept(z, new, u, u_new, grad, grad_new, 0.1, seed=1)[3].all()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout):
    z, new, u, u_new, grad, grad_new = chain((6, 5, 4, 10))
    want = ops.mala_accept(z, new, u, u_new, grad, grad_new, 0.01, seed=3)
    views = [testing.laid_out(v, layout) for v in (z, new, grad, grad_new)]
    strided = torch.stack((u, u_new), 1)
    got = ops.mala_accept(views[0], views[1], strided[:, 0], strided[:, 1], *views[2:], 0.01, seed=3)
    for a, b in zip(got[:3], want[:3], strict=True):
        testing.assert_same_bits(a, b)
    assert got[0].stride() == torch.empty_like(views[0]).stride()
    torch.testing.assert_close(ops.grad_norm_penalty(views[2]), ops.grad_norm_penalty(grad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty_is_the_squared_norm(dtype):
    for shape in SHAPES:
        grad = draw(shape, dtype).requires_grad_()
        got = ops.grad_norm_penalty(grad)
        exact = grad.detach().double().reshape(shape[0], math.prod(shape[1:])).square().sum(1)
        compute = testing.compute_dtype(dtype)
        terms = math.prod(shape[1:])
        testing.assert_within(got, exact, testing.sum_error(terms, exact, compute) + 2 * testing.UNIT[compute] * exact)
        assert got.dtype == compute
        weights = draw(shape[:1], compute, 3)
        (of_grad,) = torch.autograd.grad(got, grad, weights)
        want = 2 * weights.double().reshape(-1, *(1,) * (len(shape) - 1)) * grad.detach().double()
        testing.assert_within(of_grad, want, 2 * testing.UNIT[compute] * want.abs())


def digest() -> str:
    """Return one hash over sizes and seeds; runs in one process per instruction set."""
    h = hashlib.sha256()
    for shape in [(33, 70), (3, 9001), (300, 3)]:
        for seed in seeds(shape):
            for v in ops.mala_accept(*chain(shape), 0.01, seed=seed, step=STEP):
                h.update(v.numpy().tobytes())
        h.update(ops.grad_norm_penalty(draw(shape)).numpy().tobytes())
    return h.hexdigest()


def test_instruction_sets_give_the_same_bits(every_instruction_set):
    assert len(every_instruction_set) == 1


def test_bits_do_not_depend_on_threads_or_batch():
    for shape in [(200, 392), (3, 30000), (900, 3)]:
        args, seed = chain(shape), ops.sample_seeds(1, shape[0])
        results = []
        for count in (1, 4):
            with testing.threads(count):
                results.append((*ops.mala_accept(*args, 0.01, seed=seed), ops.grad_norm_penalty(args[0])))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        first = ops.mala_accept(*(v[1:2] for v in args), 0.01, seed=seed[1:2])
        for a, b in zip((*first, ops.grad_norm_penalty(args[0][1:2])), results[0], strict=True):
            assert torch.equal(a, b[1:2])


def test_every_output_element_is_written():
    with testing.poisoned():
        for shape in [(5, 70), (2, 9000), (40, 3), (4, 0)]:
            z, u, grad, _ = ops.mala_accept(*chain(shape), 0.01, seed=1)
            penalty = ops.grad_norm_penalty(z)
            assert not any(v.isnan().any() for v in (z, u, grad, penalty))


# registration with torch


def operator_calls():
    z, new, u, u_new, grad, grad_new = chain((3, 4, 5))
    number, seed, step = torch.tensor(0.5, dtype=torch.float64), torch.tensor(3), torch.tensor(4)
    yield "mala_accept", (z, new, u, u_new, grad, grad_new, number, seed, step)
    stepped = testing.laid_out(z, "stepped")
    yield "mala_accept", (stepped, new, u, u_new, grad, grad_new, torch.ones(3), torch.arange(3), step)
    yield "grad_norm_penalty", (grad.clone().requires_grad_(),)
    yield "grad_norm_penalty", (stepped.clone().requires_grad_(),)


@pytest.mark.parametrize("name, args", list(operator_calls()))
def test_opcheck(name, args):
    torch.library.opcheck(getattr(torch.ops.pyflow, name).default, args)


def test_gradcheck_twice():
    grad = draw((3, 2, 2), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ops.grad_norm_penalty, grad)
    assert torch.autograd.gradgradcheck(ops.grad_norm_penalty, grad)
    z, slope = draw((3, 4), torch.float64).requires_grad_(), draw((3, 4), torch.float64, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, g: ops.mala_propose(z, g, 0.1, seed=1), (z, slope))
    for kind in ("linear", "hinge", "ebgan"):
        energies = [draw((n,), torch.float64, n).requires_grad_() for n in (5, 7)]
        assert torch.autograd.gradcheck(lambda r, f: ops.energy_loss(r, f, kind), energies)


def test_the_penalty_trains_an_energy():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    x = draw((5, 6), torch.float64)

    def penalty(backend):
        with pyflow.backend(backend):
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(net(leaf).sum(), leaf, create_graph=True)
            return torch.autograd.grad(ops.grad_norm_penalty(grad).mean(), net[0].weight)[0]

    torch.testing.assert_close(penalty("auto"), penalty("reference"))


@pytest.mark.parametrize("layout", testing.gradient_layouts(torch.zeros(2, 3)))
def test_backward_takes_any_gradient_layout(layout):
    grad = draw((6, 20)).requires_grad_()
    out = ops.grad_norm_penalty(grad)
    weights = testing.gradient_layouts(draw((6, 3), seed=1))[layout][:, 0]
    a = torch.autograd.grad(out, grad, weights, retain_graph=True)[0]
    testing.assert_same_bits(a, torch.autograd.grad(out, grad, weights.contiguous())[0])


def test_compiles_once_for_every_step_size_and_step():
    args = chain((6, 40))
    counter = CompileCounter()

    def accept(alpha, step):
        return ops.mala_accept(*args, alpha, seed=5, step=step)

    compiled = torch.compile(accept, fullgraph=True, backend=counter)
    for i in range(4):
        alpha, step = torch.tensor(0.01 * (i + 1)), torch.tensor(i)
        for a, b in zip(compiled(alpha, step), accept(alpha, step), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1
    full = torch.compile(lambda z, g: ops.mala_propose(z, g, 0.3, seed=1), fullgraph=True)
    testing.assert_same_bits(full(args[0], args[4]), ops.mala_propose(args[0], args[4], 0.3, seed=1))
    penalty = torch.compile(ops.grad_norm_penalty, fullgraph=True)
    testing.assert_same_bits(penalty(args[4]), ops.grad_norm_penalty(args[4]))


def test_function_transforms_agree_with_the_reference():
    grad = draw((3, 4), torch.float64)
    loss = lambda g: ops.grad_norm_penalty(g).sum()
    row = lambda g: ops.grad_norm_penalty(g[None])[0]
    transforms = {
        "grad": lambda: torch.func.grad(loss)(grad),
        "jacrev": lambda: torch.func.jacrev(loss)(grad),
        "jacfwd": lambda: torch.func.jacfwd(loss)(grad),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(row))(grad),
        "vmap": lambda: torch.vmap(row)(grad),
        "jvp": lambda: torch.func.jvp(loss, (grad,), (grad,))[1],
    }
    for name, transform in transforms.items():
        got = transform()
        with pyflow.backend("reference"):
            torch.testing.assert_close(got, transform(), msg=name)
    args = [torch.stack((v, v + 0.01)) for v in chain((6, 4))]
    accept = lambda *v: ops.mala_accept(*v, 0.1, seed=3)
    for i, want in enumerate(zip(accept(*(v[0] for v in args)), accept(*(v[1] for v in args)), strict=True)):
        assert torch.equal(torch.vmap(accept)(*args)[i], torch.stack(want))


def test_autocast_changes_nothing():
    args = chain((4, 40))
    with torch.autocast("cpu", torch.bfloat16):
        got = (*ops.mala_accept(*args, 0.1, seed=1), ops.grad_norm_penalty(args[0]))
    for a, b in zip(got, (*ops.mala_accept(*args, 0.1, seed=1), ops.grad_norm_penalty(args[0])), strict=True):
        assert torch.equal(a, b)


# losses and error texts


def test_losses():
    real, fake = torch.tensor([-2.0, 0.0, 0.5]), torch.tensor([0.5, 3.0])
    assert ops.energy_loss(real, fake).item() == pytest.approx(-0.5 - 1.75)
    assert ops.energy_loss(real, fake, "hinge").item() == pytest.approx(2.5 / 3 + 0.25)
    assert ops.energy_loss(real, fake, "ebgan", 2.0).item() == pytest.approx(-0.5 + 0.75)
    half = ops.energy_loss(real.bfloat16(), fake.bfloat16(), "hinge")
    assert half.dtype == torch.float32 and ops.energy_loss(real.double(), fake).dtype == torch.float64


def test_seed_none_uses_the_generator_of_torch():
    z = draw((8, 3))
    torch.manual_seed(0)
    first = ops.mala_step(z, normal_energy(z), z, normal_energy, 0.5, seed=None)[0]
    assert not torch.equal(first, ops.mala_step(z, normal_energy(z), z, normal_energy, 0.5, seed=None)[0])
    torch.manual_seed(0)
    testing.assert_same_bits(ops.mala_step(z, normal_energy(z), z, normal_energy, 0.5, seed=None)[0], first)


Z, U = torch.zeros(2, 4), torch.zeros(2)
BAD = [
    ("mala_propose", lambda f: f(Z, Z, 0, seed=1), ValueError, "alpha must be positive, got 0.0"),
    ("mala_propose", lambda f: f(Z, Z, float("nan"), seed=1), ValueError, "alpha must be positive, got nan"),
    ("mala_propose", lambda f: f(Z, Z, "a", seed=1), TypeError, "alpha must be a number or a tensor, got str"),
    ("mala_propose", lambda f: f(Z, U, 1, seed=1), ValueError, r"grad must have the shape of z, \(2, 4\), got \(2,\)"),
    ("mala_propose", lambda f: f(Z[0, 0], Z, 1, seed=1), ValueError,
     "z must have at least one dim, the batch, got a scalar"),
    ("mala_propose", lambda f: f(Z, Z, 1e-46, seed=1), ValueError, "alpha must be a normal number of float32, got 1e-46"),
    ("mala_propose", lambda f: f(Z, Z, 1e40, seed=1), ValueError, r"alpha must be a normal number of float32, got 1e\+40"),
    ("mala_propose", lambda f: f(Z.to_sparse(), Z, 1, seed=1), TypeError, "z must be a dense tensor, got sparse_coo"),
    ("mala_accept", lambda f: f(Z.half(), Z, U, U, Z, Z, torch.tensor([1, 1e-46], dtype=torch.float64), seed=1), ValueError,
     "alpha must be a normal number of float32, got 1e-46"),
    ("mala_step", lambda f: f(None, U, Z, normal_energy, 1, seed=1), TypeError, "z must be a tensor, got NoneType"),
    ("mala_step", lambda f: f(Z, U, U, normal_energy, 1, seed=1), ValueError,
     r"grad must have the shape of z, \(2, 4\), got \(2,\)"),
    ("mala_step", lambda f: f(Z, Z, Z, normal_energy, 1, seed=1), ValueError,
     r"u must have the shape \(2,\), a value per sample, got \(2, 4\)"),
    ("mala_step", lambda f: f(Z, U, Z, 3, 1, seed=1), TypeError, "energy_fn must be callable, got int"),
    ("mala_step", lambda f: f(Z, U, Z, lambda z: z, 1, seed=1), ValueError,
     r"the energy must have the shape \(2,\), a value per sample, got \(2, 4\)"),
    ("mala_step", lambda f: f(Z, U, Z, normal_energy, -1, seed=1), ValueError, "alpha must be positive, got -1.0"),
    ("mala_step", lambda f: f(Z, U, Z, normal_energy, 1, seed=1, step=-1), ValueError,
     r"step must be in \[0, 2\*\*56\), got -1"),
    ("mala_accept", lambda f: f(Z, Z, U, U, Z, Z, torch.tensor([1.0, -1.0]), seed=1), ValueError,
     "alpha must be positive, got -1.0"),
    ("mala_accept", lambda f: f(Z, Z[:1], U, U, Z, Z, 1, seed=1), ValueError,
     r"z_new must have the shape of z, \(2, 4\), got \(1, 4\)"),
    ("mala_accept", lambda f: f(Z, Z, Z, U, Z, Z, 1, seed=1), ValueError,
     r"u must have the shape \(2,\), a value per sample, got \(2, 4\)"),
    ("mala_accept", lambda f: f(Z, Z, U, U[:1], Z, Z, 1, seed=1), ValueError,
     r"u_new must have the shape \(2,\), a value per sample, got \(1,\)"),
    ("mala_accept", lambda f: f(Z, Z, U, U, Z.long(), Z, 1, seed=1), TypeError,
     "grad must be float32, float64, bfloat16 or float16, got int64"),
    ("mala_accept", lambda f: f(Z, Z, U, U, Z, Z, 1, seed=1.5), TypeError,
     "seed must be an integer or an int64 tensor, got float"),
    ("energy_and_grad", lambda f: f(torch.no_grad()(lambda z: z.sum(1)), Z), ValueError,
     "energy_fn must keep the graph from z to the energy, or return a gradient too"),
    ("energy_and_grad", lambda f: f(lambda z: torch.ones(len(z), requires_grad=True) + z.detach().sum(1), Z), ValueError,
     "energy_fn must keep the graph from z to the energy, or return a gradient too"),
    ("energy_and_grad", lambda f: f(lambda z: (z.data.sum(1), z.detach().add_(1)), Z.clone()), ValueError,
     "energy_fn must not change z in place"),
    ("energy_and_grad", lambda f: f(None, Z), TypeError, "energy_fn must be callable, got NoneType"),
    ("energy_and_grad", lambda f: f(lambda z: z, Z), ValueError,
     r"the energy must have the shape \(2,\), a value per sample, got \(2, 4\)"),
    ("grad_norm_penalty", lambda f: f([1.0]), TypeError, "grad must be a tensor, got list"),
    ("grad_norm_penalty", lambda f: f(torch.zeros(())), ValueError,
     "grad must have at least one dim, the batch, got a scalar"),
    ("energy_loss", lambda f: f(U, U, "wgan"), ValueError, "kind must be one of linear, hinge, ebgan, got 'wgan'"),
    ("energy_loss", lambda f: f(U, U, "hinge", 0.0), ValueError, "margin must be positive and finite, got 0.0"),
    ("energy_loss", lambda f: f(U, U, margin="a"), TypeError, "margin must be a number, got str"),
    ("energy_loss", lambda f: f(U, 1.0), TypeError, "u_fake must be a tensor, got float"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name, call, error, text", BAD)
def test_bad_input_gets_one_sentence(name, call, error, text, backend):
    with pyflow.backend(backend), pytest.raises(error, match=f"^{name}: {text}$"):
        call(getattr(ops, name))


def test_a_call_that_raises_draws_no_seed():
    before = torch.get_rng_state()
    for call in (
        lambda: ops.mala_step(Z, U, Z, normal_energy, -1, seed=None),
        lambda: ops.mala_step(Z, U, Z, normal_energy, 1, seed=None, step=-1),
        lambda: ops.mala_propose(Z, Z, 1, seed=None, step=-1),
        lambda: ops.mala_accept(Z, Z, U, U, Z, Z, 0, seed=None),
        lambda: ops.mala_accept(Z, Z, U, U, Z, Z, 1, seed=None, step=-1),
    ):
        with pytest.raises(ValueError, match=r"^mala_"):
            call()
    assert torch.equal(torch.get_rng_state(), before)


def test_float64_takes_steps_that_float32_cannot():
    z = draw((2000, 2)).double() * 1e-23
    energy = lambda z: (z / 1e-23).square().sum(1) / 2
    u, grad = ops.energy_and_grad(energy, z)
    for step in range(10):
        z, u, grad, accepted = ops.mala_step(z, u, grad, energy, 5e-47, seed=0, step=step)
    assert 0.8 < accepted.double().mean() < 0.95 and 0.9 < (z / 1e-23).var() < 1.1


def test_an_energy_is_differentiated_in_inference_mode():
    z = torch.tensor([[3.0, 4.0]])
    with torch.inference_mode():
        inner = z.clone()
        results = [ops.energy_and_grad(normal_energy, each) for each in (z, inner)]
        moved = ops.mala_step(inner, *results[0], normal_energy, 0.1, seed=0)
    results.append(ops.energy_and_grad(normal_energy, inner))
    want = ops.energy_and_grad(normal_energy, z)
    for got in results:
        for a, b in zip(got, want, strict=True):
            testing.assert_same_bits(a, b)
    for a, b in zip(moved, ops.mala_step(z, *want, normal_energy, 0.1, seed=0), strict=True):
        testing.assert_same_bits(a, b)


def test_an_energy_may_reuse_its_output_buffer():
    u, grad = torch.empty(50), torch.empty(50, 3)

    def reused(z):
        return u.copy_(z.square().sum(1) / 2), grad.copy_(z)

    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    for energy in (reused, normal_energy):
        state = z, *ops.energy_and_grad(energy, z)
        for step in range(5):
            *state, _accepted = ops.mala_step(*state, energy, 0.5, seed=0, step=step)
        if energy is reused:
            got = state
    for a, b in zip(got, state, strict=True):
        testing.assert_within(a, b.double(), 1e-5 * (1 + b.abs().double()), "state")


def test_an_energy_and_its_gradient_compile_to_one_graph():
    config = torch._dynamo.config
    if not hasattr(config, "trace_autograd_ops") or torch.__version__ < (2, 13):
        pytest.skip("this torch breaks the graph at autograd.grad or requires_grad_")
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with config.patch(trace_autograd_ops=True):
        compiled = torch.compile(lambda z: ops.energy_and_grad(normal_energy, z), backend="eager", fullgraph=True)
        for got, want in zip(compiled(z), ops.energy_and_grad(normal_energy, z), strict=True):
            testing.assert_same_bits(got, want)
    torch._dynamo.reset()


@pytest.mark.skipif(torch.__version__.startswith("2.11"), reason="its dynamo does not trace requires_grad_")
def test_a_step_with_an_energy_that_returns_gradients_compiles_to_one_graph():
    both = lambda z: (quadratic(z), 2 * z)
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    step = lambda z: ops.mala_step(z, *ops.energy_and_grad(both, z), both, 0.1, seed=0)[0]
    testing.assert_same_bits(torch.compile(step, backend="eager", fullgraph=True)(z), step(z))
    torch._dynamo.reset()


def test_energies_are_not_differentiated_under_transforms():
    z, u, grad = torch.ones(3, 4, 2), torch.ones(3, 4), torch.ones(3, 4, 2)
    for op, run in (
        ("energy_and_grad", lambda z, u, g: ops.energy_and_grad(quadratic, z)),
        ("mala_step", lambda z, u, g: ops.mala_step(z, u, g, quadratic, 0.1, seed=0)[0]),
    ):
        with pytest.raises(RuntimeError, match=rf"^{op}: the energy is not differentiated under vmap"):
            torch.vmap(run)(z, u, grad)


def quadratic(z):
    return z.square().sum(1) / 2
