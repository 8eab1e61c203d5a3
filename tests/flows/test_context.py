"""Context of the flows, and sampling: shapes, densities, gradients, seeds, errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from pyflow.flows import IAF, MAF, NICE, NSF, Glow, RealNVP
from pyflow.flows.vectors import VectorFlow

from .peers import programs

MAKERS = {
    "nice": (lambda c=0: NICE(5, hidden=(16,), context_features=c), (5,)),
    "nice_half": (lambda c=0: NICE(4, hidden=(8,), split="half", prior="gaussian", context_features=c), (4,)),
    "realnvp": (lambda c=0: RealNVP(5, couplings=3, hidden=(16,), context_features=c), (5,)),
    "realnvp_images": (lambda c=0: RealNVP((1, 4, 4), hidden=6, prior="logistic", context_features=c), (1, 4, 4)),
    "realnvp_reversible": (lambda c=0: RealNVP((1, 4, 4), hidden=6, reversible=True, context_features=c), (1, 4, 4)),
    "maf": (lambda c=0: MAF(5, layers=3, hidden=(16,), context_features=c), (5,)),
    "maf_reversible": (lambda c=0: MAF(4, layers=2, hidden=(8,), context_features=c, reversible=True), (4,)),
    "iaf": (lambda c=0: IAF(5, layers=2, hidden=(16, 8), context_features=c), (5,)),
    "nsf": (lambda c=0: NSF(5, layers=4, hidden=(16,), bins=4, context_features=c), (5,)),
    "nsf_reversible": (lambda c=0: NSF(4, layers=2, hidden=(8,), bins=3, context_features=c, reversible=True), (4,)),
    "nsf_autoregressive": (lambda c=0: NSF(4, layers=2, hidden=(16,), context_features=c, autoregressive=True), (4,)),
    "nsf_scalar": (lambda c=0: NSF(1, layers=2, hidden=(8,), context_features=c), (1,)),
    "glow": (lambda c=0: Glow((1, 4, 4), steps=2, levels=2, hidden=6, context_features=c), (1, 4, 4)),
}


def started(name, context_features=3, batch=4):
    """(flow in float64 with random weights after its data-dependent initialisation, x, context)"""
    torch.manual_seed(0)
    make, shape = MAKERS[name]
    flow, x = make(context_features).double(), torch.randn(batch, *shape, dtype=torch.float64)
    context = torch.randn(batch, context_features, dtype=torch.float64) if context_features else None
    flow.log_prob(x, context)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow, x, context


@pytest.mark.parametrize("name", MAKERS)
def test_inverse_and_jacobian_given_a_context(name):
    flow, x, context = started(name)
    z, logdet = flow(x, context)
    back, minus = flow.inverse(z, context)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None], context[:1])[0].flatten(), x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian.reshape(x[0].numel(), -1))[1], logdet[0])
    assert not flow(x, context.flip(0))[0].allclose(z)


@pytest.mark.parametrize("name", MAKERS)
def test_density_of_a_sample_does_not_depend_on_other_contexts(name):
    flow, x, context = started(name)
    nats = flow.log_prob(x, context)
    torch.testing.assert_close(torch.stack([flow.log_prob(x[i : i + 1], context[i])[0] for i in range(4)]), nats)
    same = flow.log_prob(x, context[:1])
    torch.testing.assert_close(same, flow.log_prob(x, context[:1].expand(4, 3)))
    torch.testing.assert_close(same, flow.log_prob(x, context[0].float()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_context_gets_a_gradient(name):
    flow, x, context = started(name)
    context.requires_grad_()
    (grad,) = torch.autograd.grad(flow.log_prob(x, context).sum(), context)
    step = 1e-6 * torch.randn_like(context)
    with torch.no_grad():
        change = flow.log_prob(x, context + step).sum() - flow.log_prob(x, context - step).sum()
    torch.testing.assert_close(2 * (grad * step).sum(), change, atol=0, rtol=1e-4)
    (grad,) = torch.autograd.grad(flow.rsample(2, context, seed=0).sum(), context)
    assert grad.isfinite().all() and grad.any()


@pytest.mark.parametrize("context_features", [0, 3])
@pytest.mark.parametrize("name", MAKERS)
def test_samples_and_their_densities(name, context_features):
    flow, x, context = started(name, context_features)
    lead = (6,) if context is None else (6, 4)
    samples = flow.sample(6, context, seed=5)
    assert samples.shape == (*lead, *x.shape[1:]) and not samples.requires_grad
    again, nats = flow.sample_and_log_prob(6, context, seed=5)
    assert again.equal(samples) and nats.shape == lead and not nats.requires_grad
    rows = None if context is None else context.repeat(6, 1)
    torch.testing.assert_close(flow.log_prob(samples.reshape(-1, *x.shape[1:]), rows).view(lead), nats)
    # the first samples of a seed do not depend on how many are drawn, up to the order in which products are summed
    torch.testing.assert_close(flow.sample(2, context, seed=5), samples[:2])
    if context is not None:
        nested = flow.sample(6, context.view(2, 2, 3), seed=5)
        torch.testing.assert_close(nested, samples.unflatten(1, (2, 2)))
        assert flow.sample(6, context[0]).shape == (6, *x.shape[1:])
        assert flow.sample(0, context).shape == (0, 4, *x.shape[1:])
        assert flow.sample(2, context[:0]).shape == (2, 0, *x.shape[1:])
    torch.manual_seed(1)
    free = flow.sample(3, context)
    torch.manual_seed(1)
    assert free.equal(flow.sample(3, context)) and not free.equal(flow.sample(3, context))
    cold = flow.sample(2, context, temperature=0.0)
    assert cold.diff(dim=0).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["nice", "realnvp", "maf", "iaf", "nsf"])
def test_programs_get_every_context_once(name):
    flow, _, context = started(name)
    for own, count in ((context, 4), (context.view(2, 2, 3), 4), (context[0], 1), (context[:1], 1)):
        with programs(1) as seen:
            samples = flow.sample(6, own, seed=3)
        assert seen.rows == [(6 * count, count)]
        z = flow.draw_latent(6 * count, seed=3)
        back = flow.inverse(z, own.expand(6, *own.shape).reshape(-1, 3))[0]
        torch.testing.assert_close(samples.reshape(back.shape), back)
    if not isinstance(flow, VectorFlow):
        return
    wide = context.view(2, 1, 2, 3)  # two dims between which it has one for all
    cases = ((3, 4), context, 4), ((4, 3), context[:, None], 4), ((2, 3, 2), wide, 12), ((), context, 4)
    for lead, own, count in cases:
        given = flow.draw_latent(math.prod(lead)).reshape(*lead, 5)
        whole = torch.broadcast_shapes(lead, own.shape[:-1])
        with programs(1) as seen:
            nats = flow.log_prob(given, own)
        assert nats.shape == whole and seen.rows == [(math.prod(whole), count)]
        rows = [each.expand(*whole, -1).reshape(-1, each.shape[-1]) for each in (given, own)]
        torch.testing.assert_close(nats.flatten(), flow.log_prob(*rows))


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_of_samples(name):
    flow, _, context = started(name)
    x, nats = flow.rsample_and_log_prob(5, context, seed=1)
    assert x.detach().equal(flow.sample(5, context, seed=1)) and x.equal(flow.rsample(5, context, seed=1))
    target = -x.square().flatten(2).sum(2)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    grads = torch.autograd.grad((nats - target).mean(), parameters, allow_unused=True)
    p = max(range(len(parameters)), key=lambda i: 0 if grads[i] is None else grads[i].norm())
    step = 1e-6 * grads[p] / grads[p].norm()

    def loss():
        x, nats = flow.sample_and_log_prob(5, context, seed=1)
        return (nats + x.square().flatten(2).sum(2)).mean()

    with torch.no_grad():
        parameters[p].add_(step)
        above = loss()
        parameters[p].sub_(2 * step)
        below = loss()
    torch.testing.assert_close(above - below, 2 * (grads[p] * step).sum(), atol=1e-12, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("nice", "realnvp", "maf", "nsf") else pytest.param(name, marks=pytest.mark.slow)
        for name in MAKERS
        if "reversible" not in name
    ],
)
def test_compiles_with_a_context(name):
    flow, x, context = started(name)
    torch.compiler.reset()
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, context), flow.log_prob(x, context))


@pytest.mark.parametrize("name", MAKERS)
def test_copies_and_states(name):
    flow, x, context = started(name)
    fresh = MAKERS[name][0](3).double()
    fresh.load_state_dict(flow.state_dict())
    for other in (fresh, copy.deepcopy(flow)):
        assert other.log_prob(x, context).equal(flow.log_prob(x, context))
    single = copy.deepcopy(flow).float()
    torch.testing.assert_close(
        single.log_prob(x.float(), context).double(), flow.log_prob(x, context), atol=1e-3, rtol=1e-4
    )
    assert single.sample(2, context, seed=0).dtype == torch.float32


def test_a_flow_without_context_has_the_states_it_had():
    for make, _ in MAKERS.values():
        assert not any("context" in name for name in make().state_dict())
    assert type(NICE(4, hidden=(8,)).nets[0]) is nn.Sequential


def test_conditional_density_is_learnt():
    torch.manual_seed(0)
    context = torch.rand(512, 1)
    x = torch.cat((context, -context), 1) + 0.1 * torch.randn(512, 2)
    flow = RealNVP(2, couplings=4, hidden=(32,), context_features=1)
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -flow.log_prob(x, context).mean()
        loss.backward()
        optimizer.step()
    # the entropy of the noise is 2 * (0.5 + 0.5 log(2 pi) + log 0.1) = -1.77 nats; without context it is -0.6
    assert loss < -1.5
    means = flow.sample(2000, torch.tensor([[0.2], [0.8]]), seed=0).mean(0)
    torch.testing.assert_close(means, torch.tensor([[0.2, -0.2], [0.8, -0.8]]), atol=0.05, rtol=0)


@pytest.mark.parametrize("name", MAKERS)
def test_wrong_contexts(name):
    flow, x, context = started(name)
    plain, kind = MAKERS[name][0]().double(), type(flow).__name__
    for call in (flow, flow.log_prob, lambda v: flow.inverse(flow(x, context)[0]), lambda v: flow.sample(2)):
        with pytest.raises(ValueError, match=rf"^{kind}: context must be a tensor \(..., 3\), got None$"):
            call(x)
    for call in (flow, flow.log_prob, lambda v, c: flow.sample(2, c), lambda v, c: flow.rsample(2, c)):
        with pytest.raises(ValueError, match=rf"^{kind}: context must have the shape \(..., 3\), got \(4, 2\)$"):
            call(x, context[:, :2])
        with pytest.raises(TypeError, match=rf"^{kind}: context must be a tensor, got float$"):
            call(x, 0.5)
    if isinstance(flow, VectorFlow):
        with pytest.raises(ValueError, match=rf"^{kind}: context must have leading dims that .*, \(4,\), got \(2,\)$"):
            flow(x, context[:2])
        assert flow(x, context[None])[0].shape == (1, *x.shape)
    for wrong in () if isinstance(flow, VectorFlow) else (context[:2], context[None]):
        with pytest.raises(ValueError, match=rf"^{kind}: context must have the shape \(4, 3\) or \(3,\), got "):
            flow(x, wrong)
    for call in (plain, plain.log_prob, lambda v, c: plain.sample(2, c)):
        with pytest.raises(ValueError, match=rf"^{kind}: context must be None with context_features=0, got Tensor$"):
            call(x, context)
    with pytest.raises(ValueError, match=f"{kind}: context_features must be at least 0, got -1"):
        MAKERS[name][0](-1)


def test_logistic_latents_are_finite_and_symmetric():
    flow = NICE(1000, hidden=(1,))
    z = flow.draw_latent(2000, seed=0)
    assert z.isfinite().all() and abs(z.median()) < 5e-3
    assert z.max() > 12 and z.min() < -12
    half = copy.deepcopy(flow).bfloat16().draw_latent(20, seed=0)
    assert half.dtype == torch.bfloat16 and half.equal(z[:20].bfloat16())
