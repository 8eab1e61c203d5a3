"""Likelihood by the probability-flow ODE of a Gaussian, for which the density has a closed form."""

from __future__ import annotations

import math

import pytest
import torch

from pyflow.ops import sample_seeds
from pyflow.sde import VESDE, VPSDE, SubVPSDE, bits_per_dim, from_marginals, log_likelihood

pytest.importorskip("torchdiffeq")

# small, because the prior neglects alpha(1) times the mean
MEAN = torch.tensor([0.05, -0.1, 0.02], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.6, 0.0], [0.6, 0.8, -0.3], [0.0, -0.3, 0.5]], dtype=torch.float64)
SDES = {"vp": VPSDE(), "sub_vp": SubVPSDE(), "ve": VESDE()}


def moments(sde, t):
    alpha, std = sde.marginal(t)
    return alpha * MEAN, alpha**2 * COVARIANCE + std**2 * torch.eye(3, dtype=torch.float64)


def gaussian_score(sde):
    def score(x, t):
        mean, covariance = moments(sde, t[0].double())
        return -(x - mean.to(x)) @ torch.linalg.inv(covariance).to(x)

    return score


def data(sde, n=16, dtype=torch.float32):
    mean, covariance = moments(sde, torch.tensor(1e-5, dtype=torch.float64))
    torch.manual_seed(0)
    exact = torch.distributions.MultivariateNormal(mean, covariance)
    x = exact.sample((n,)).to(dtype)
    return x, exact.log_prob(x.double())


def model_log_prob(sde, x):
    """Return the log-density under the ODE: all covariances share the data's eigenvectors, so its map is linear."""
    times = torch.tensor([1e-5, 1.0], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(COVARIANCE)
    alpha, std = (part[:, None] for part in sde.marginal(times))
    start, end = (alpha**2 * values + std**2).sqrt()
    z = ((x - alpha[0] * MEAN) @ vectors) * (end / start) + alpha[1] * MEAN @ vectors
    prior = torch.distributions.Normal(0.0, sde.prior_std)
    return prior.log_prob(z).sum(1) + (end / start).log().sum()


@pytest.mark.parametrize("name", SDES)
def test_exact_divergence_gives_the_closed_form(name):
    sde = SDES[name]
    x, density = data(sde)
    nats = log_likelihood(sde, gaussian_score(sde), x, divergence="exact")
    assert nats.dtype == torch.float32 and not nats.requires_grad
    bits = bits_per_dim(nats.double(), 3)
    assert (bits - bits_per_dim(model_log_prob(sde, x.double()), 3)).abs().max().item() <= 1e-4
    # the prior differs slightly from the data at t = 1: single densities are off by more than their mean
    assert (bits - bits_per_dim(density, 3)).mean().abs().item() <= 1e-3


def test_hutchinson_is_unbiased_and_exact_for_independent_elements():
    sde = VPSDE()

    def diagonal(x, t):
        alpha, std = sde.marginal(t[:, None])
        return -x / (alpha**2 * 0.25 + std**2)

    x = 0.5 * torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    exact = log_likelihood(sde, diagonal, x, divergence="exact")
    torch.testing.assert_close(log_likelihood(sde, diagonal, x, seed=0), exact, rtol=1e-4, atol=1e-4)
    x, wanted = data(sde, 1)
    repeated = x.expand(400, 3)
    estimates = log_likelihood(sde, gaussian_score(sde), repeated, seed=0).double()
    error = estimates.std() / math.sqrt(400)
    assert error > 0 and (estimates.mean() - wanted[0]).abs() <= 3 * error
    averaged = log_likelihood(sde, gaussian_score(sde), repeated, seed=0, probes=4).double()
    assert averaged.std() < 0.7 * estimates.std()


def test_an_ode_that_would_end_before_it_starts_is_refused():
    line = from_marginals(lambda t: 1 - t, lambda t: t)
    with pytest.raises(
        ValueError, match=r"^log_likelihood: eps must be below the time at which the ODE ends, 0.4, got 0.6$"
    ):
        log_likelihood(line, lambda x, t: -x, torch.zeros(1, 1), eps=0.6)


def test_a_sample_keeps_its_seed_in_any_batch():
    sde = VPSDE()
    x, _ = data(sde, 6)
    whole = log_likelihood(sde, gaussian_score(sde), x, seed=3)
    alone = log_likelihood(sde, gaussian_score(sde), x[4:5], seed=sample_seeds(3, 1, start=4))
    torch.testing.assert_close(whole[4:5], alone, rtol=1e-3, atol=1e-3)
    assert not torch.equal(whole, log_likelihood(sde, gaussian_score(sde), x, seed=4))


def test_dtypes_shapes_and_modules():
    sde, net = VPSDE(), torch.nn.Linear(4, 4)

    def score(x, t):
        return net(x.flatten(1)).view_as(x) - x

    x = torch.randn(3, 1, 2, 2)
    assert log_likelihood(sde, score, x, seed=0).dtype == torch.float32
    assert log_likelihood(sde, lambda x, t: -x, x.double(), seed=0).dtype == torch.float64
    assert log_likelihood(sde, lambda x, t: -x, x.bfloat16(), seed=0).dtype == torch.float32
    assert log_likelihood(sde, score, x[:0]).shape == (0,)
    flat, column = (log_likelihood(sde, lambda x, t: -x, v, seed=0) for v in (x.flatten(), x.reshape(-1, 1)))
    assert torch.equal(flat, column)
    # a score that does not depend on x has divergence 0
    assert log_likelihood(sde, lambda x, t: torch.zeros_like(x), x).isfinite().all()
    assert net.weight.grad is None


@pytest.mark.parametrize("solver", ["dopri5", "dopri8", "bosh3", "adaptive_heun", "rk4", "heun3"])
@pytest.mark.parametrize("name", SDES)
def test_every_solver_stays_in_the_time_range_and_agrees(name, solver):
    sde, seen = SDES[name], []
    exact = gaussian_score(sde)
    rates = sde.rates

    def score(x, t):
        seen.extend((t.min().item(), t.max().item()))
        return exact(x, t)

    def watched(t):
        seen.append(float(t))
        return rates(t)

    x, _ = data(sde, 4, torch.float64)
    wanted = model_log_prob(sde, x)
    sde.rates = watched
    try:
        nats = log_likelihood(sde, score, x, divergence="exact", solver=solver, rtol=1e-4, atol=1e-4)
    finally:
        del sde.rates
    # 1e-5 rounded to float32
    assert min(seen) >= 1e-5 * (1 - 1e-6) and max(seen) <= 1
    # one step of rk4 over the whole range would be off by 1 to 3
    torch.testing.assert_close(nats, wanted, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("alpha", "std"),
    [
        (lambda t: torch.cos(1.5 * t), lambda t: torch.sin(1.5 * t)),
        (lambda t: torch.cos(math.pi / 2 * t), lambda t: torch.sin(math.pi / 2 * t)),
        (lambda t: 1 - t, lambda t: t),
    ],
    ids=["cosine that ends early", "cosine", "line"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_schedules_from_marginals_including_alpha_0(alpha, std, dtype):
    sde, spread = from_marginals(alpha, std), 0.5

    def score(x, t):
        a, s = (v.to(x)[:, None] for v in sde.marginal(t.double()))
        return -x / (spread**2 * a**2 + s**2)

    x = torch.tensor([[0.3, -0.2], [1.0, 0.1]], dtype=dtype)
    # the prior has the std of the noise alone, but x still contains data if the ODE ends early
    a, s = (v.item() for v in sde.marginal(torch.tensor(min(sde.last_time(1e-5), 1.0), dtype=torch.float64)))
    ratio = math.sqrt(spread**2 * a**2 + s**2) / spread
    wanted = torch.distributions.Normal(0.0, s).log_prob(x.double() * ratio).sum(1) + 2 * math.log(ratio)
    nats = log_likelihood(sde, score, x, divergence="exact")
    assert nats.dtype == dtype
    torch.testing.assert_close(nats.double(), wanted, rtol=0, atol=1e-3)


def test_inference_mode_and_inference_tensors():
    sde = VPSDE()
    x, _ = data(sde, 4)
    wanted = log_likelihood(sde, gaussian_score(sde), x, seed=0)
    with torch.inference_mode():
        inner = x.clone()
        assert torch.equal(log_likelihood(sde, gaussian_score(sde), inner, seed=0), wanted)
    assert torch.equal(log_likelihood(sde, gaussian_score(sde), inner, seed=0), wanted)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("name", ["no_grad", "inference mode", "detach", "detached network"])
def test_a_score_without_a_graph_is_an_error(name, divergence):
    net = torch.nn.Linear(3, 3)
    score = {
        "no_grad": torch.no_grad()(lambda x, t: -x),
        "inference mode": torch.inference_mode()(lambda x, t: -x),
        "detach": lambda x, t: -x.detach(),
        "detached network": lambda x, t: net(x.detach()),
    }[name]
    with pytest.raises(ValueError, match=r"^log_likelihood: score_fn must keep the graph from x to the score, got "):
        log_likelihood(VPSDE(), score, torch.zeros(2, 3), divergence=divergence)


def test_a_score_may_change_and_keep_its_arguments():
    sde, kept = VPSDE(), []
    x, _ = data(sde, 4)
    exact = gaussian_score(sde)

    def rude(x, t):
        score = exact(x.clone(), t.clone())
        x.mul_(0)
        t.mul_(1000)
        kept.append((t, t.clone()))
        return score + x

    before = x.clone()
    assert torch.equal(log_likelihood(sde, rude, x, seed=0), log_likelihood(sde, exact, x, seed=0))
    assert torch.equal(x, before)
    assert all(torch.equal(t, then) for t, then in kept)


def test_a_score_that_is_not_finite_raises():
    with pytest.raises(FloatingPointError, match=r"^log_likelihood: dopri5 found no step; the score must be finite"):
        log_likelihood(VPSDE(), lambda x, t: x / 0, torch.ones(2, 3), seed=0)


def test_bits_per_dim_of_grey_levels():
    assert bits_per_dim(torch.zeros(1), 784, 256).item() == 8.0
