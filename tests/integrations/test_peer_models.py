"""Models as their packages make them compute the same after `accelerate`, and train to the same place."""

import contextlib
import re
import subprocess
import sys
import tempfile

import pytest
import torch

import pyflow

nflows = pytest.importorskip("nflows")
normflows = pytest.importorskip("normflows")
zuko = pytest.importorskip("zuko")

from nflows import distributions, flows, transforms
from nflows.nn.nets import ResidualNet

D, C = 4, 3


def normflows_realnvp():
    layers = []
    for _ in range(4):
        layers.append(normflows.flows.AffineCouplingBlock(normflows.nets.MLP([2, 16, 16, 4], init_zeros=True)))
        layers.append(normflows.flows.Permute(D, mode="swap"))
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(D), layers)


def normflows_nsf():
    layers = []
    for _ in range(3):
        layers += [normflows.flows.AutoregressiveRationalQuadraticSpline(D, 1, 16), normflows.flows.LULinearPermute(D)]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(D, trainable=False), layers)


def nflows_realnvp():
    return flows.SimpleRealNVP(D, 16, 4, 2)


def nflows_nsf():
    def net(inputs, outputs):
        return ResidualNet(inputs, outputs, 16, context_features=C, num_blocks=1)

    layers = []
    for i in range(3):
        layers += [
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                (torch.arange(D) + i) % 2, net, num_bins=5, tails="linear", tail_bound=3.0
            ),
            transforms.LULinear(D, identity_init=False),
        ]
    return flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([D]))


def nflows_maf():
    return flows.MaskedAutoregressiveFlow(D, 16, 3, 2)


def zuko_flow(kind, **more):
    return lambda: getattr(zuko.flows, kind)(D, C, transforms=3, hidden_features=(16, 16), **more)


# what makes a model, and whether it takes a context
MODELS = {
    "normflows_realnvp": (normflows_realnvp, False),
    "normflows_nsf": (normflows_nsf, False),
    "nflows_realnvp": (nflows_realnvp, False),
    "nflows_nsf": (nflows_nsf, True),
    "nflows_maf": (nflows_maf, False),
    "zuko_nice": (zuko_flow("NICE"), True),
    "zuko_nsf": (zuko_flow("NSF"), True),
    "zuko_ncsf": (zuko_flow("NCSF"), True),
    "zuko_maf": (zuko_flow("MAF"), True),
}


def made(name):
    torch.manual_seed(0)
    model = MODELS[name][0]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def data(name, rows):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, D, dtype=torch.float64, generator=generator)
    context = torch.randn(rows, C, dtype=torch.float64, generator=generator) if MODELS[name][1] else None
    return x.mul(0.5).add(torch.randn(rows, 1, dtype=torch.float64, generator=generator) * 0.3), context


def log_prob(model, x, context):
    if isinstance(model, zuko.lazy.Flow):
        return model(context).log_prob(x)
    return model.log_prob(x) if context is None else model.log_prob(x, context)


def sample(model, context):
    torch.manual_seed(2)
    if isinstance(model, zuko.lazy.Flow):
        return model(context[:2]).sample((3,))
    if isinstance(model, normflows.NormalizingFlow):
        x, nats = model.sample(5)
        return torch.cat([x, nats[:, None]], 1)
    return model.sample(5) if context is None else model.sample(3, context[:2])


def trained(model, x, context, steps=50):
    """Return the losses on the way."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -log_prob(model, x, context).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@contextlib.contextmanager
def default_float64():
    # normflows draws in the default dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_and_trains_as_before(name):
    with default_float64():
        own, fast = made(name), made(name)
        x, context = data(name, 32)
        report = pyflow.accelerate(fast, verify=(x,) if context is None else (x, context))
        assert report.replaced[0].path == "" and not report.left
        # the base distribution neither
        assert "left, " not in str(report)
        torch.testing.assert_close(sample(fast.eval(), context), sample(own.eval(), context), rtol=1e-7, atol=1e-8)
        losses = trained(own.train(), x, context)
        torch.testing.assert_close(trained(fast.train(), x, context), losses, rtol=1e-6, atol=1e-8)
        assert losses[-1] < losses[0] - 0.1
    calls = report.calls()[0]
    assert calls.fast > 50 and not calls.fallback
    # the same weights in a model that was never accelerated
    other = made(name)
    other.load_state_dict(fast.state_dict())
    torch.testing.assert_close(log_prob(other, x, context), log_prob(fast, x, context), rtol=1e-8, atol=1e-9)


def test_normflows_realnvp_reverse_kld_trains_as_before():
    with default_float64():
        results = []
        for fast in (False, True):
            model = made("normflows_realnvp")
            model.p = normflows.distributions.TwoModes(2.0, 0.1) if D == 2 else normflows.distributions.DiagGaussian(D)
            if fast:
                pyflow.accelerate(model)
            torch.manual_seed(3)
            loss = model.reverse_kld(16)
            loss.backward()
            results.append([loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["nsf", "maf"])
def test_the_posterior_of_sbi_trains_and_samples_as_before(kind, monkeypatch, tmp_path):
    # sbi writes logs where it runs
    monkeypatch.chdir(tmp_path)
    inference = pytest.importorskip("sbi.inference")
    from sbi.utils import BoxUniform

    def posterior():
        torch.manual_seed(0)
        prior = BoxUniform(-torch.ones(2), torch.ones(2))
        theta = prior.sample((300,))
        x = theta @ torch.tensor([[1.0, 0.5], [0.0, 1.0]]) + 0.1 * torch.randn(300, 2)
        trainer = inference.NPE(prior, density_estimator=kind, show_progress_bars=False)
        trainer.append_simulations(theta, x).train(max_num_epochs=3, training_batch_size=50)
        found = trainer.build_posterior()
        seen = torch.tensor([[0.3, 0.2]])
        samples = found.sample((500,), x=seen, show_progress_bars=False)
        return samples, found.log_prob(samples[:20], x=seen), trainer.summary["validation_loss"][-1]

    own = posterior()
    with pyflow.patch("nflows"):
        fast = posterior()
    # float32, 15 steps of training apart
    assert abs(own[2] - fast[2]) < 1e-3
    torch.testing.assert_close(fast[0], own[0], rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(fast[1], own[1], rtol=1e-2, atol=1e-2)


def test_the_tests_that_normflows_ships_pass_when_it_is_patched():
    names = ("core_test", "flows.affine.coupling_test", "flows.neural_spline.wrapper_test")
    words = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "python_files=*_test.py",
        "--pyargs",
        *[f"normflows.{n}" for n in names],
    ]
    command = [sys.executable, "-m", "pyflow", "run", "-m", "pytest", "--patch", "normflows", "-v", "--", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir())
    assert done.returncode == 0, done.stdout
    assert re.search(r"[1-9]\d* passed", done.stdout)
    assert re.search(r"normflows.core.NormalizingFlow: [1-9]\d* fast", done.stderr), done.stderr
