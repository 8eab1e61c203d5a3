"""Schedules against their formulas in float64, and the scalars of each method."""

from __future__ import annotations

import math

import pytest
import torch

from pyflow.sde import SDE, VESDE, VPSDE, SubVPSDE, from_marginals, sample
from pyflow.sde.equations import Grid

SDES = (VPSDE(), SubVPSDE(), VESDE())
TIMES = torch.tensor([1e-5, 1e-3, 0.1, 0.5, 0.9, 1.0])


def named(sde):
    return type(sde).__name__


@pytest.mark.parametrize("sde", SDES, ids=named)
def test_marginal_keeps_its_relative_accuracy_near_0_in_float32(sde):
    exact, single = sde.marginal(TIMES.double()), sde.marginal(TIMES)
    for ours, wanted in zip(single, exact, strict=True):
        assert ours.dtype == torch.float32
        assert bool(((ours - wanted).abs() <= 1e-5 * wanted).all())


def test_marginals_are_the_published_formulas():
    t = TIMES.double()
    log_alpha = -0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1
    for sde, alpha, variance in (
        (VPSDE(), log_alpha.exp(), 1 - (2 * log_alpha).exp()),
        (SubVPSDE(), log_alpha.exp(), (1 - (2 * log_alpha).exp()) ** 2),
        (VESDE(), torch.ones_like(t), (0.01 * 5000**t) ** 2),
    ):
        ours = sde.marginal(t)
        torch.testing.assert_close(ours[0], alpha)
        torch.testing.assert_close(ours[1] ** 2, variance, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sde", SDES, ids=named)
def test_rates_match_the_derivatives_of_the_marginals(sde):
    twin = from_marginals(lambda t: sde.marginal(t)[0], lambda t: sde.marginal(t)[1])
    t = TIMES.double()
    for ours, derived in zip(sde.rates(t), twin.rates(t), strict=True):
        torch.testing.assert_close(ours, derived, rtol=1e-8, atol=1e-12)
    assert twin.prior_std == pytest.approx(sde.marginal(1.0)[1].item())
    torch.testing.assert_close(twin.diffusion(t), sde.diffusion(t), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("sde", SDES, ids=named)
def test_drift_takes_one_time_per_sample(sde):
    x = torch.randn(2, 3, 4)
    drift = sde.drift(x, torch.tensor([0.2, 0.7]))
    f = sde.rates(torch.tensor([0.2, 0.7]))[0]
    torch.testing.assert_close(drift, torch.stack((f[0] * x[0], f[1] * x[1])))
    assert sde.drift(x.bfloat16(), 0.5).dtype == torch.bfloat16
    assert sde.marginal(torch.tensor(0.5, dtype=torch.bfloat16))[1].dtype == torch.float32


def test_a_constant_alpha_has_no_drift():
    f, g2 = from_marginals(lambda t: 1.0, lambda t: 2 * t).rates(torch.tensor([0.25, 0.5]))
    assert f.tolist() == [0, 0]
    torch.testing.assert_close(g2, torch.tensor([2.0, 4.0]))


class Table:
    """Values of a schedule without derivatives."""

    def __init__(self, values, learned=False):
        self.values = values.double().requires_grad_(learned)

    def __call__(self, t):
        return self.values[(t * (len(self.values) - 1)).round().long()]


TABLE = torch.linspace(0, 1, 1001)


@pytest.mark.parametrize(
    "std",
    [
        Table(TABLE),
        Table(TABLE, learned=True),
        torch.no_grad()(lambda t: 1 * t),
        torch.inference_mode()(lambda t: t.clone()),
        lambda t: torch.tensor(t.detach().numpy() ** 2),
        lambda t: t.detach() + 0 * t,
        lambda t: torch.floor(100 * t) / 100,
        lambda t: t * t.detach(),
    ],
    ids=["table", "learned table", "no_grad", "inference mode", "numpy", "detach", "floor", "half detached"],
)
def test_missing_derivatives_are_an_error(std):
    sde = from_marginals(lambda t: 1.0, std)
    assert sde.marginal(0.5)[1].item() == pytest.approx(0.5, abs=0.26)
    text = r"^from_marginals: std\(t\) must be differentiable in t by torch, got a derivative whose integral is "
    for use in (sde.rates, sde.diffusion, lambda t: sde.drift(torch.ones(2), t)):
        with pytest.raises(ValueError, match=text):
            use(0.5)


def test_a_table_that_reaches_alpha_0_needs_no_derivatives():
    sde, smooth = from_marginals(Table(1 - TABLE), Table(TABLE)), from_marginals(lambda t: 1 - t, lambda t: t)
    # the times of the grid are entries of the table
    rows = [each.reverse_diffusion(each.grid(1000, 1e-3)) for each in (sde, smooth)]
    for ours, wanted in zip(*rows, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_a_constant_tensor_has_derivative_0():
    f, g2 = from_marginals(lambda t: torch.ones(t.shape), lambda t: 2 * t).rates(torch.tensor([0.25, 0.5]))
    assert f.tolist() == [0, 0] and g2.tolist() == [2, 4]


def test_rates_under_no_grad_and_in_inference_mode():
    def cosine():
        return from_marginals(lambda t: torch.cos(1.5 * t), lambda t: torch.sin(1.5 * t))

    wanted = cosine().rates(torch.tensor([0.3, 0.6]))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for ours, want in zip(cosine().rates(torch.tensor([0.3, 0.6])), wanted, strict=True):
                assert torch.equal(ours, want) and not ours.requires_grad


def test_a_schedule_may_change_its_argument_in_place():
    sde = from_marginals(lambda t: t.mul_(-1.0).exp_(), lambda t: t.mul_(2.0))
    twin = from_marginals(lambda t: torch.exp(-t), lambda t: 2 * t)
    for t in (torch.tensor(0.5), torch.tensor([0.2, 0.4], dtype=torch.float64)):
        for ours, want in zip((*sde.rates(t), *sde.marginal(t)), (*twin.rates(t), *twin.marginal(t)), strict=True):
            torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("sde", SDES, ids=named)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_python_times_are_float32_for_every_default_dtype(sde, default):
    functions = (lambda: sde.marginal(0.301)[1], lambda: sde.diffusion(0.301), lambda: sde.drift(torch.ones(2), 0.301))
    wanted = [function() for function in functions]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = [function() for function in functions[:2]]
    finally:
        torch.set_default_dtype(before)
    for ours, want in zip(got, wanted, strict=False):
        assert ours.dtype == torch.float32 and torch.equal(ours, want)
    torch.set_default_device("meta")
    try:
        # drift is on x's device
        x = torch.ones(2, device="cpu")
        assert torch.equal(sde.drift(x, 0.301), wanted[2])
        grid = Grid.of(20, 1e-3)
        assert grid.times.is_cpu and grid.index.is_cpu and grid.spread().is_cpu
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("shape", "error", "got"),
    [(5, TypeError, "int"), ((), ValueError, "()"), ((2.0,), ValueError, "(2.0,)"), ((-1, 2), ValueError, "(-1, 2)")],
)
def test_prior_sample_refuses_wrong_shapes_and_dtypes(shape, error, got):
    with pytest.raises(error) as caught:
        VPSDE().prior_sample(shape, 0)
    assert str(caught.value) == f"prior_sample: shape must be (B, ...) of integers that are not negative, got {got}"
    with pytest.raises(TypeError, match=r"^prior_sample: dtype must be float32, .*, got int64$"):
        VPSDE().prior_sample((2, 3), 0, dtype=torch.int64)


def test_a_learned_schedule_has_gradients():
    power = torch.tensor(1.5, requires_grad=True)
    sde = from_marginals(lambda t: torch.cos(t), lambda t: torch.sin(t) ** power)
    assert sde.rates(torch.tensor([0.3]))[1].requires_grad
    with torch.no_grad():
        assert not sde.rates(torch.tensor([0.3]))[1].requires_grad


def test_prior_sample_is_a_function_of_each_samples_seed():
    from pyflow.ops import sample_seeds

    for sde, std in ((VPSDE(), 1.0), (SubVPSDE(), 1.0), (VESDE(), 50.0)):
        x = sde.prior_sample((6, 5000), 3)
        assert torch.equal(x[4:5], sde.prior_sample((1, 5000), sample_seeds(3, 1, start=4)))
        assert abs(x.std().item() / std - 1) < 3 / math.sqrt(2 * x.numel())
        assert torch.equal(sde.prior_sample((6, 5000), 3, dtype=torch.bfloat16), x.bfloat16())


def test_grid_index_matches_its_times():
    for steps, eps in ((1, 0.5), (2, 1e-3), (1000, 1e-3), (1000, 1e-5), (1001, 1e-3), (2000, 1e-3), (37, 0.3)):
        grid = Grid.of(steps, eps)
        assert grid.times[0] == 1 and (steps == 1 or grid.times[-1] == pytest.approx(eps))
        # 1e-9 guards times at which t (N - 1) is an integer and rounds down
        wanted = (grid.times * (steps - 1) + 1e-9).floor().long()
        assert torch.equal(grid.index, wanted)


def test_step_scalars_match_the_published_formulas():
    n = 100
    grid = Grid.of(n, 1e-3)
    t, i = grid.times, grid.index.double()
    vp, sub, ve = SDES
    beta_t = (0.1 + t * 19.9) / n
    beta = torch.linspace(0.1 / n, 20 / n, n, dtype=torch.float64)[grid.index]
    alpha_bar = vp.marginal(t)[0]
    g2 = (0.1 + t * 19.9) * (1 - alpha_bar**4)
    sigma_t = 0.01 * 5000**t
    sigma = 0.01 * 5000 ** (i / (n - 1))
    below = torch.where(i > 0, 0.01 * 5000 ** ((i - 1) / (n - 1)), 0)
    gap = sigma**2 - below**2
    growth = 2 * math.log(5000)
    one = torch.ones_like(t)
    rows = {
        vp.euler_maruyama: (1 + beta_t / 2, beta_t, beta_t.sqrt()),
        vp.reverse_diffusion: (2 - (1 - beta).sqrt(), beta, beta.sqrt()),
        vp.ancestral: (1 / (1 - beta).sqrt(), beta / (1 - beta).sqrt(), beta.sqrt()),
        sub.euler_maruyama: (1 + beta_t / 2, g2 / n, (g2 / n).sqrt()),
        sub.reverse_diffusion: (1 + beta_t / 2, g2 / n, (g2 / n).sqrt()),
        ve.euler_maruyama: (one, sigma_t**2 * growth / n, sigma_t * math.sqrt(growth / n)),
        ve.reverse_diffusion: (one, gap, gap.sqrt()),
        ve.ancestral: (one, gap, (below**2 * gap / sigma**2).sqrt()),
    }
    for method, wanted in rows.items():
        for ours, value in zip(method(grid), wanted, strict=True):
            torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(vp.corrector_alpha(grid), 1 - beta)
    torch.testing.assert_close(sub.corrector_alpha(grid), 1 - beta)
    torch.testing.assert_close(ve.corrector_alpha(grid), one)
    assert repr(vp) == "VPSDE(beta_min=0.1, beta_max=20)" and repr(ve) == "VESDE(sigma_min=0.01, sigma_max=50)"


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: VPSDE(0.0), ValueError, "VPSDE: beta_min must be positive and finite, got 0.0"),
        (lambda: SubVPSDE(2, 1), ValueError, "SubVPSDE: beta_max must be finite and at least beta_min, 2, got 1"),
        (lambda: VESDE(sigma_min=-1), ValueError, "VESDE: sigma_min must be positive and finite, got -1"),
        (lambda: VESDE(1.0, 1.0), ValueError, "VESDE: sigma_max must be finite and above sigma_min, 1.0, got 1.0"),
        (lambda: from_marginals("1", 2), TypeError, "from_marginals: alpha must be callable or a number, got str"),
        (
            lambda: from_marginals(lambda t: 1.0, lambda t: t[None]),
            ValueError,
            "from_marginals: std(t) must have the shape of t, got (1,)",
        ),
        (
            lambda: from_marginals(lambda t: 1.0, lambda t: 2 - t).rates(0.5),
            ValueError,
            "from_marginals: std / alpha must not fall as t grows",
        ),
    ],
)
def test_wrong_arguments(make, error, text):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == text


def test_a_constant_marginal_may_be_a_number():
    number, function = (from_marginals(one, lambda t: 0.1 + t) for one in (1, lambda t: torch.ones_like(t)))
    for t in (0.3, torch.tensor([0.1, 0.9])):
        for got, wanted in zip(
            (*number.rates(t), *number.marginal(t)), (*function.rates(t), *function.marginal(t)), strict=True
        ):
            assert torch.equal(got, wanted)
    assert from_marginals(0.5, 2.0).prior_std == 2


def test_rates_have_a_graph_only_to_tensors_that_require_grad():
    speed = torch.tensor(1.5)
    sde = from_marginals(lambda t: torch.cos(speed * t), lambda t: torch.sin(speed * t))
    for value in (*sde.rates(0.5), sde.diffusion(0.5), sde.drift(torch.ones(1, 2), 0.5)):
        assert not value.requires_grad
    t = torch.tensor(0.5, requires_grad=True)
    torch.testing.assert_close(
        torch.autograd.grad(sde.rates(t)[0], t)[0], -(1.5**2) / torch.cos(0.75 * torch.ones(())) ** 2
    )
    speed.requires_grad_()
    slope = -torch.tan(speed / 2) * speed
    torch.testing.assert_close(*(torch.autograd.grad(f, speed)[0] for f in (sde.rates(0.5)[0], slope)))


class Slow(SDE):
    """VPSDE at half the speed: the same process in twice the time."""

    T = 2.0
    inner = VPSDE()

    def marginal(self, t):
        return self.inner.marginal(torch.as_tensor(t) / 2)

    def rates(self, t):
        return tuple(rate / 2 for rate in self.inner.rates(torch.as_tensor(t) / 2))


class Fast(SDE):
    """VPSDE without discrete tables."""

    def marginal(self, t):
        return Slow.inner.marginal(t)

    def rates(self, t):
        return Slow.inner.rates(t)


@pytest.mark.parametrize("method", ["euler_maruyama", "pc", "probability_flow"])
def test_a_subclass_may_end_at_another_time(method):
    times = []

    def score(x, t):
        times.append(float(t[0]))
        return (1 - x) / (1 + t[:, None])

    options = {"steps": 50, "method": method, "seed": 0, "progress": False}
    if method == "pc":
        options["predictor"] = "euler_maruyama"
    slow = sample(Slow(), lambda x, t: score(x, t / 2), (4, 3), eps=2e-3, **options)
    assert times[0] == 1 and times[-1] == pytest.approx(1e-3)
    other = Fast() if method == "pc" else VPSDE()
    torch.testing.assert_close(slow, sample(other, score, (4, 3), eps=1e-3, **options), rtol=1e-4, atol=1e-5)
