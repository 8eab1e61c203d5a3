"""torch's spectral norm, both of its forms, accelerated: weights, vectors, gradients and state are torch's."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hooked
from torch.utils.checkpoint import checkpoint

import pyflow
from pyflow.integrations import _spectral
from pyflow.testing import UNIT

FORMS = [parametrizations.spectral_norm, hooked]


@pytest.fixture(autouse=True)
def _weights_of_all_sizes(monkeypatch):
    monkeypatch.setattr(_spectral, "FEWEST", dict.fromkeys(_spectral.FEWEST, 0))


def network(form, rounds=1):
    torch.manual_seed(0)
    wide = lambda layer, **options: form(layer, n_power_iterations=rounds, **options)
    return nn.Sequential(
        wide(nn.Conv2d(3, 8, 3)), nn.Tanh(), wide(nn.ConvTranspose2d(8, 5, 3, stride=2)), nn.Tanh(),
        wide(nn.Conv2d(5, 4, 1), dim=1), nn.Flatten(), wide(nn.Linear(4 * 13 * 13, 3)),
    )  # fmt: skip


def twins(form, rounds=1):
    own = network(form, rounds)
    accelerated = copy.deepcopy(own)
    return own, accelerated, pyflow.accelerate(accelerated)


def assert_near(got, want):
    # a sum of n products is off by up to n roundings; the longest has 676
    unit = UNIT[want.dtype]
    torch.testing.assert_close(got, want, rtol=700 * unit, atol=700 * unit * max(1.0, want.abs().max().item()))


def assert_same(accelerated, own):
    for (name, got), (other, want) in zip(accelerated.named_buffers(), own.named_buffers(), strict=True):
        assert name == other
        assert_near(got, want)
    for got, want in zip(accelerated.parameters(), own.parameters(), strict=True):
        assert_near(got.grad, want.grad)


def images(seed=1):
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_that_of_torch(form, rounds):
    own, accelerated, report = twins(form, rounds)
    assert len(report.replaced) == 4 and not report.left
    for training in (True, True, False, True):
        results = []
        for model in (own.train(training), accelerated.train(training)):
            # as a discriminator, which sees real and fake images before a backward
            real, fake = model(images(1)), model(images(2))
            (real.square().sum() - fake.mean()).backward()
            results.append(torch.stack((real, fake)))
        assert_near(results[1], results[0])
        assert_same(accelerated, own)
    assert all(of.fast == 8 and not of.fallback for of in report.calls())


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_changes_nothing_and_gradients_of_gradients_are_torchs(form):
    own, accelerated, _ = twins(form)
    before = [each.clone() for each in accelerated.eval().buffers()]
    penalties = []
    for model in (own.eval(), accelerated):
        x = images().requires_grad_()
        slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
        penalties.append(slope.square().sum())
        penalties[-1].backward()
    assert all(torch.equal(a, b) for a, b in zip(before, accelerated.buffers(), strict=True))
    assert_near(*penalties)
    for a, b in zip(own.parameters(), accelerated.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert_near(b.grad, a.grad)


@pytest.mark.parametrize("form", FORMS)
def test_losses_of_parts_have_graphs_of_their_own(form):
    own, accelerated, _ = twins(form)
    for model in (own, accelerated):
        first = model[:2](images())
        second = model[2:](first.detach())
        first.sum().backward()
        second.sum().backward()
    assert_same(accelerated, own)


@pytest.mark.parametrize("form", FORMS)
def test_function_transforms_move_u_and_v_as_in_torch(form):
    own, accelerated, _ = twins(form)
    results = []
    for model in (own, accelerated):
        parts = torch.func.jvp(model, (images(1),), (images(2),))
        slopes = torch.func.grad(lambda x, model=model: model(x).square().sum())(images(3))
        results.append([*parts, slopes])
    for got, want in zip(results[1], results[0], strict=True):
        assert_near(got, want)
    for got, want in zip(accelerated.buffers(), own.buffers(), strict=True):
        assert_near(got, want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_iterates_again_as_in_torch(reentrant):
    own, accelerated, _ = twins(parametrizations.spectral_norm)
    for model in (own, accelerated):
        x = images().requires_grad_()
        model[3:](checkpoint(model[:3], x, use_reentrant=reentrant)).sum().backward()
    assert_same(accelerated, own)


def test_cached_weights_iterate_once():
    own, accelerated, _ = twins(parametrizations.spectral_norm)
    for model in (own, accelerated):
        with parametrize.cached():
            (model(images(1)) + model(images(2))).sum().backward()
    assert_same(accelerated, own)


@pytest.mark.parametrize("form", FORMS)
def test_state_copies_and_removal(form):
    own, accelerated, report = twins(form)
    with torch.no_grad():
        # the hook's weight is no leaf, which torch does not copy
        accelerated(images())
    own.load_state_dict(accelerated.state_dict())
    accelerated.load_state_dict(own.state_dict())
    copied = copy.deepcopy(accelerated)
    for model in (own, accelerated, copied):
        model(images()).sum().backward()
    for other in (accelerated, copied):
        for got, want in zip(other.state_dict().values(), own.state_dict().values(), strict=True):
            assert_near(got, want)
    want = own.eval()(images())
    accelerated.eval()
    if form is hooked:
        # torch pickles modules with hooks, and none with parametrizations
        saved = io.BytesIO()
        torch.save(accelerated, saved)
        loaded = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
        assert_near(loaded(images()), want)
        kinds = {type(hook) for layer in loaded for hook in layer._forward_pre_hooks.values()}
        assert kinds == {torch.nn.utils.spectral_norm.__globals__["SpectralNorm"]}
        nn.utils.remove_spectral_norm(accelerated[0])
    else:
        parametrize.remove_parametrizations(accelerated[0], "weight")
    assert isinstance(accelerated[0].weight, nn.Parameter)
    assert_near(accelerated(images()), want)
    report.restore()
    assert_near(accelerated(images()), want)


def test_what_kernels_do_not_take_runs_as_in_torch():
    for layer, options, reason in [
        (nn.Linear(4, 3), {"eps": 1e-3}, "its eps is larger than that of a kernel"),
        (nn.LayerNorm(4), {}, "a vector has no power iteration"),
        (nn.Linear(4, 3, dtype=torch.complex64), {}, "its dtype, layout or class is not that of a kernel"),
    ]:
        own = parametrizations.spectral_norm(layer, **options)
        accelerated = copy.deepcopy(own)
        report = pyflow.accelerate(accelerated)
        assert torch.equal(own.weight, accelerated.weight)
        assert report.calls()[0].reasons == {reason: 1}


@pytest.mark.parametrize("name", ["_power_method", "_reshape_weight_to_matrix"])
def test_methods_of_a_parametrization_run(name):
    own, accelerated, report = twins(parametrizations.spectral_norm)
    seen = []
    for each in (own, accelerated):
        norm = each[0].parametrizations.weight[0]
        method = getattr(norm, name)
        setattr(norm, name, lambda *args, method=method: seen.append(name) or method(*args))
    assert_near(accelerated(images()), own(images()))
    assert seen == [name] * len(seen) and len(seen) == 2
    assert report.calls()[0].reasons == {"it has methods of its own": 1}


def test_methods_of_a_hook_run():
    own, accelerated, report = twins(hooked)
    for each in (own, accelerated):
        norm = next(iter(each[0]._forward_pre_hooks.values()))
        norm.reshape_weight_to_matrix = lambda weight: weight.reshape(len(weight), -1).abs()
    assert_near(accelerated(images()), own(images()))
    assert report.calls()[0].reasons == {"it has methods of its own": 1}


def test_small_weights_are_left_to_torch_on_a_cpu(monkeypatch):
    monkeypatch.setattr(_spectral, "FEWEST", {"parametrization": 13, "hook": 16})
    for form in FORMS:
        for size, fast in ((3, 0), (4, 1)):
            layer = form(nn.Linear(4, size))
            report = pyflow.accelerate(layer)
            layer(torch.ones(1, 4))
            assert report.calls()[0].fast == fast
            assert report.calls()[0].reasons == ({} if fast else {"its weight is small": 1})


def test_half_precision_is_that_of_torch_within_its_rounding():
    own, accelerated, _ = twins(parametrizations.spectral_norm)
    for dtype in (torch.float64, torch.bfloat16):
        for model in (own.to(dtype), accelerated.to(dtype)):
            assert model(images().to(dtype)).dtype == dtype
        unit = UNIT[dtype]
        for got, want in zip(accelerated.buffers(), own.buffers(), strict=True):
            # torch rounds Wv and its norm before it divides
            torch.testing.assert_close(got, want, rtol=8 * unit, atol=8 * unit)


@pytest.mark.slow
def test_compiles_without_a_break():
    own, accelerated, _ = twins(parametrizations.spectral_norm)
    compiled = torch.compile(accelerated, fullgraph=True)
    for model in (own, compiled):
        model(images()).sum().backward()
    assert_same(accelerated, own)
