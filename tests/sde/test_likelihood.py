"""The probability-flow ODE on a Gaussian, whose density is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from pyflow.ops import sample_seeds
from pyflow.sde import VESDE, VPSDE, SubVPSDE, bits_per_dim, log_likelihood

pytest.importorskip("torchdiffeq")

# the prior leaves out alpha(1) times the mean, hence a small one
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
    """The density the ODE gives from this prior: every covariance has the data's eigenvectors, so the map is linear."""
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
    # the prior is not quite the data at t = 1: single densities are off by more than their mean
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


def test_seeds_belong_to_the_samples():
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
    # a score that does not depend on x has no divergence
    assert log_likelihood(sde, lambda x, t: torch.zeros_like(x), x).isfinite().all()
    assert net.weight.grad is None


def test_bits_per_dim_of_grey_levels():
    assert bits_per_dim(torch.zeros(1), 784, 256).item() == 8.0
