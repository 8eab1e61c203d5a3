"""Error texts for wrong arguments of the samplers and of the likelihood."""

from __future__ import annotations

import sys
from fractions import Fraction

import pytest
import torch

from pyflow.sde import VESDE, VPSDE, SubVPSDE, log_likelihood, make_step, sample


def score(x, t):
    return -x


def draw(sde=None, score_fn=score, shape=(2, 3), **arguments):
    return sample(sde or VPSDE(), score_fn, shape, **{"steps": 30, "progress": False, **arguments})


def one_step(x, i, score_fn=score):
    return make_step(VPSDE(), score_fn, steps=5, backend="eager")(x, i, torch.zeros(2, dtype=torch.int64))


WRONG = [
    (lambda: draw(steps=0), ValueError, "sample: steps must be at least 1, got 0"),
    (lambda: draw(steps=2.0), TypeError, "sample: steps must be an integer, got float"),
    (lambda: draw(eps=0), ValueError, "sample: eps must be in (0, 1), got 0"),
    (lambda: draw(eps=1.0), ValueError, "sample: eps must be in (0, 1), got 1.0"),
    (lambda: draw(denoise="no"), TypeError, "sample: denoise must be true or false, got str"),
    (lambda: draw(check_finite="no"), TypeError, "sample: check_finite must be true or false, got str"),
    (lambda: draw(seed=torch.zeros(())), TypeError, "sample: seed must be int64, got float32"),
    (
        lambda: make_step(VPSDE(), score, backend="eager")(torch.zeros(2, 3), 0, torch.zeros(3, dtype=torch.int64)),
        ValueError,
        "step: seed must have the shape () or (2,), got (3,)",
    ),
    (lambda: make_step(VPSDE(), score, fullgraph=False), TypeError, "make_step: fullgraph is always on"),
    (
        lambda: log_likelihood(VPSDE(), score, torch.zeros(2, 3, device="meta")),
        ValueError,
        "log_likelihood: x must have values, on which the solver chooses its steps, got a meta tensor",
    ),
    (lambda: VPSDE().marginal(torch.tensor(1j)), TypeError, "sde: t must be real, got complex64"),
    (lambda: VESDE().rates(torch.tensor(True)), TypeError, "sde: t must be real, got bool"),
    (lambda: VESDE().rates(torch.zeros(2).to_sparse()), TypeError, "sde: t must be a dense tensor, got sparse_coo"),
    (
        lambda: draw(method="heun"),
        ValueError,
        "sample: method must be one of euler_maruyama, reverse_diffusion, ancestral, pc, probability_flow, got 'heun'",
    ),
    (
        lambda: draw(method="pc", predictor="pc"),
        ValueError,
        "sample: predictor must be one of euler_maruyama, reverse_diffusion, ancestral, probability_flow, got 'pc'",
    ),
    (lambda: draw(corrector="ald"), ValueError, "sample: corrector must be one of langevin, none, got 'ald'"),
    (lambda: draw(norm="l2"), ValueError, "sample: norm must be one of marginal, sample, batch, got 'l2'"),
    (
        lambda: draw(predictor="ancestral"),
        ValueError,
        "sample: predictor goes with pc and probability_flow, got method 'euler_maruyama'",
    ),
    (
        lambda: draw(method="probability_flow", predictor="ancestral"),
        ValueError,
        "sample: predictor of probability_flow must be euler_maruyama or reverse_diffusion, got 'ancestral'",
    ),
    *(
        (
            lambda method=method: draw(method=method, steps=20),
            ValueError,
            "VPSDE: steps must be more than beta_max, 20, for a discrete table with every beta_i below 1, got 20",
        )
        for method in ("reverse_diffusion", "ancestral", "pc")
    ),
    (
        lambda: draw(SubVPSDE(), method="pc", steps=20),
        ValueError,
        "SubVPSDE: steps must be more than beta_max, 20, for a discrete table with every beta_i below 1, got 20",
    ),
    (
        lambda: draw(SubVPSDE(), method="ancestral"),
        ValueError,
        "SubVPSDE: ancestral sampling is defined for VPSDE and VESDE only",
    ),
    (lambda: draw(snr=0), ValueError, "sample: snr must be positive and finite, got 0"),
    (lambda: draw(step_size=-1.0), ValueError, "sample: step_size must be positive and finite, got -1.0"),
    (lambda: draw(corrector_steps=0), ValueError, "sample: corrector_steps must be at least 1, got 0"),
    (lambda: draw(micro_batch=0), ValueError, "sample: micro_batch must be at least 1, got 0"),
    (lambda: draw(VPSDE), TypeError, "sample: sde must be a pyflow.sde.SDE, got type"),
    (lambda: draw(score_fn=None), TypeError, "sample: score_fn must be callable, got NoneType"),
    (
        lambda: draw(shape=()),
        ValueError,
        "sample: shape must be (B, ...) of integers that are not negative, got ()",
    ),
    (lambda: draw(seed=[1, 2]), TypeError, "sample: seed must be an integer or an int64 tensor, got list"),
    (lambda: draw(seed=2**64), ValueError, "sample: seed must fit 64 bits, got 18446744073709551616"),
    (lambda: draw(device="disc"), ValueError, "sample: device must be a torch.device or its name, got 'disc'"),
    (lambda: draw(device=1.5), TypeError, "sample: device must be a torch.device or its name, got 1.5"),
    (lambda: one_step(torch.ones(2, 3), 5), ValueError, "step: i must be below the number of steps, 5, got 5"),
    (lambda: one_step(torch.ones(2, 3), -1), ValueError, "step: i must be at least 0, got -1"),
    (lambda: one_step([1.0], 0), TypeError, "step: x must be a tensor, got list"),
    (lambda: one_step(torch.ones(()), 0), ValueError, "step: x must have at least one dim, the batch, got a scalar"),
    (lambda: VPSDE().marginal("now"), TypeError, "sde: t must be a number or a tensor, got str"),
    (lambda: VPSDE().rates(None), TypeError, "sde: t must be a number or a tensor, got NoneType"),
    (lambda: VPSDE().drift([1.0], 0.5), TypeError, "drift: x must be a tensor, got list"),
    (
        lambda: VPSDE().drift(torch.ones(2, 3), torch.ones(3)),
        ValueError,
        "drift: t must have the shape () or (2,), got (3,)",
    ),
    (lambda: draw(shape=5), TypeError, "sample: shape must be (B, ...) of integers that are not negative, got int"),
    (
        lambda: draw(shape=(2.0,)),
        ValueError,
        "sample: shape must be (B, ...) of integers that are not negative, got (2.0,)",
    ),
    (
        lambda: draw(score_fn=lambda x, t: x[:1]),
        ValueError,
        "sample: the score must have the shape of x, (2, 3), got (1, 3)",
    ),
    (
        lambda: draw(score_fn=lambda x, t: x[:, :1], micro_batch=1),
        ValueError,
        "sample: the score must have the shape of x, (1, 3), got (1, 1)",
    ),
    (lambda: draw(score_fn=lambda x, t: None), TypeError, "sample: the score must be a tensor, got NoneType"),
    (
        lambda: log_likelihood(VPSDE(), score, torch.zeros(2, 3), solver="rk5"),
        ValueError,
        "log_likelihood: solver must be one of dopri8, dopri5, bosh3, fehlberg2, adaptive_heun, euler, midpoint, "
        "heun2, heun3, rk4, explicit_adams, implicit_adams, got 'rk5'",
    ),
    (
        lambda: log_likelihood(VPSDE(), score, torch.zeros(2, 3), solver="rk4", steps=0),
        ValueError,
        "log_likelihood: steps must be at least 1, got 0",
    ),
    (
        lambda: log_likelihood(VPSDE(), score, torch.full((2, 3), torch.nan)),
        ValueError,
        "log_likelihood: x must be finite, got other values",
    ),
    (
        lambda: draw(shape=(2, -1)),
        ValueError,
        "sample: shape must be (B, ...) of integers that are not negative, got (2, -1)",
    ),
    (
        lambda: draw(dtype=torch.int32),
        TypeError,
        "sample: dtype must be float32, float64, bfloat16 or float16, got int32",
    ),
    (
        lambda: draw(seed=torch.zeros(3, dtype=torch.int64)),
        ValueError,
        "sample: seed must have one entry per sample, (2,), got (3,)",
    ),
    (lambda: draw(seed=torch.zeros(2)), TypeError, "sample: seed must be int64, got float32"),
    (lambda: make_step(VPSDE(), score, steps=0), ValueError, "make_step: steps must be at least 1, got 0"),
    (
        lambda: one_step(torch.zeros(2, 3), 0, lambda x, t: x[:, :2]),
        ValueError,
        "make_step: the score must have the shape of x, (2, 3), got (2, 2)",
    ),
    (
        lambda: one_step(torch.zeros(2, 3), 0, lambda x, t: 1.0),
        TypeError,
        "make_step: the score must be a tensor, got float",
    ),
    (
        lambda: log_likelihood(VPSDE(), score, torch.zeros(2, 3), divergence="hutch"),
        ValueError,
        "log_likelihood: divergence must be one of hutchinson, exact, got 'hutch'",
    ),
    (
        lambda: log_likelihood(VPSDE(), score, torch.zeros(2, 3), eps=2),
        ValueError,
        "log_likelihood: eps must be in (0, 1), got 2",
    ),
    (
        lambda: log_likelihood(VPSDE(), score, torch.zeros(2, 3), probes=0),
        ValueError,
        "log_likelihood: probes must be at least 1, got 0",
    ),
    (
        lambda: log_likelihood(VPSDE(), lambda x, t: x[:, :2], torch.zeros(2, 3)),
        ValueError,
        "log_likelihood: score_fn must return the shape of x, (2, 3), got (2, 2)",
    ),
    (
        lambda: log_likelihood(VPSDE(), score, torch.zeros(2, 3).long()),
        TypeError,
        "log_likelihood: x must be float32, float64, bfloat16 or float16, got int64",
    ),
    (
        lambda: log_likelihood(VPSDE(), score, torch.tensor(0.0)),
        ValueError,
        "log_likelihood: x must have at least one dim, the batch, got a scalar",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), WRONG, ids=[text for _, _, text in WRONG])
def test_wrong_arguments(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text


def test_numbers_of_any_type():
    wanted = draw(eps=0.25, seed=0)
    assert torch.equal(draw(eps=Fraction(1, 4), seed=0), wanted)
    nats = [log_likelihood(VPSDE(), score, torch.zeros(1, 2), eps=eps, seed=0) for eps in (0.25, Fraction(1, 4))]
    assert torch.equal(*nats)


def test_beta_max_limits_only_methods_with_discrete_tables():
    for method in ("euler_maruyama", "probability_flow"):
        assert draw(method=method, steps=5).isfinite().all()
    assert draw(VESDE(), method="ancestral", steps=2).isfinite().all()
    assert draw(VESDE(), method="reverse_diffusion", steps=1).isfinite().all()


def test_check_finite_stops_at_the_step():
    def breaks(x, t):
        return torch.where((t < 0.5)[:, None], torch.nan, -x)

    with pytest.raises(FloatingPointError) as caught:
        draw(VESDE(), breaks, steps=11, eps=1e-3, check_finite=True)
    assert str(caught.value) == "sample: x is not finite after step 6 of 11, t = 0.4006"
    # without the option NaN propagates
    assert draw(VESDE(), breaks, steps=11).isnan().all()
    assert draw(check_finite=True).isfinite().all()


def test_a_missing_solver_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError) as caught:
        log_likelihood(VPSDE(), score, torch.zeros(2, 3))
    assert str(caught.value) == "log_likelihood: needs the package torchdiffeq (pip install torchdiffeq)"
