"""Samplers on a GPU: the noise equals the CPU's, so the same score gives the same samples, in any batch."""

from __future__ import annotations

import pytest
import torch

import pyflow
from pyflow import energy, ops, testing
from pyflow.sde import VESDE, VPSDE, SubVPSDE, from_marginals, log_likelihood, make_step, sample

from .common import DEVICE, assert_near, needs_cuda

SDES = {
    "vp": VPSDE(),
    "sub_vp": SubVPSDE(),
    "ve": VESDE(),
    "marginals": from_marginals(lambda t: torch.cos(1.5 * t), lambda t: torch.sin(1.5 * t)),
}
METHODS = ("euler_maruyama", "reverse_diffusion", "ancestral", "pc", "probability_flow")
CASES = [(s, m) for s in SDES for m in METHODS if m != "ancestral" or s in ("vp", "ve")]
MEAN, VARIANCE = torch.tensor([0.5, -1.0, 0.2]), torch.tensor([1.0, 0.8, 0.5])

pytestmark = pytest.mark.usefixtures("kernels")


def gaussian(sde):
    """Return the score of normal data with independent columns."""

    def score(x, t):
        assert t.device == x.device and t.dtype == torch.float32
        alpha, std = (v[:, None] for v in sde.marginal(t))
        return -(x - alpha * MEAN.to(x.device)) / (alpha**2 * VARIANCE.to(x.device) + std**2)

    return score


def on_both(sde, score, shape, **options):
    """Return samples drawn on the device and on the CPU."""
    got = sample(sde, score, shape, device=DEVICE, progress=False, **options)
    assert got.device.type == DEVICE and not got.requires_grad
    with pyflow.backend("auto"):
        return got, sample(sde, score, shape, progress=False, **options)


@pytest.mark.parametrize("name, method", CASES)
def test_samples_match_the_cpu(name, method):
    sde = SDES[name]
    got, want = on_both(sde, gaussian(sde), (50, 3), steps=40, method=method, snr=0.05, seed=3)
    assert_near(got, want, 1e-3)


@pytest.mark.parametrize("name, method", CASES)
def test_an_exact_score_gives_the_same_bits(name, method):
    # negation is exact, and a fixed step size needs no norms
    got, want = on_both(SDES[name], lambda x, t: -x, (50, 3), steps=30, method=method, step_size=0.002, seed=3)
    testing.assert_same_bits(got.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    got, want = on_both(VPSDE(), lambda x, t: -x, (20, 5), steps=30, method="ancestral", dtype=dtype, seed=3)
    assert got.dtype == dtype
    assert_near(got, want, 4 * testing.UNIT[dtype] * 30)


@pytest.mark.parametrize("name, method", [("vp", "pc"), ("ve", "ancestral"), ("sub_vp", "euler_maruyama")])
def test_a_sample_does_not_depend_on_its_batch(name, method):
    sde = SDES[name]
    options = {"steps": 25, "method": method, "progress": False, "device": DEVICE}
    together = sample(sde, gaussian(sde), (9, 3), seed=2, **options)
    testing.assert_same_bits(together, sample(sde, gaussian(sde), (9, 3), seed=2, **options))
    assert not torch.equal(together, sample(sde, gaussian(sde), (9, 3), seed=3, **options))
    alone = sample(sde, gaussian(sde), (1, 3), seed=ops.sample_seeds(2, 1, start=5), **options)
    testing.assert_same_bits(together[5:6], alone)
    own = ops.sample_seeds(torch.tensor(2, device=DEVICE), 9)
    options.pop("device")
    testing.assert_same_bits(together, sample(sde, gaussian(sde), (9, 3), seed=own, **options))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 1, 3, padding=1)
        self.time = torch.nn.Linear(1, 8)

    def forward(self, x, t):
        h = torch.nn.functional.silu(self.first(x) + self.time(t[:, None])[:, :, None, None])
        return self.last(h) - x


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_a_network(micro_batch):
    options = {"steps": 25, "method": "pc", "snr": 0.05, "seed": 2, "progress": False, "micro_batch": micro_batch}
    net = Net()
    with pyflow.backend("auto"):
        want = sample(VPSDE(), net, (10, 1, 8, 8), **options)
    # the default device is that of the parameters
    net = net.to(DEVICE)
    got = sample(VPSDE(), net, (10, 1, 8, 8), **options)
    assert got.device.type == DEVICE
    assert_near(got, want, 1e-3)
    if micro_batch:
        part = sample(VPSDE(), net, (4, 1, 8, 8), **{**options, "seed": ops.sample_seeds(2, 4, start=4).to(DEVICE)})
        testing.assert_same_bits(got[4:8], part)


@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_norms_of_the_corrector(norm):
    sde = VPSDE()
    options = {"steps": 30, "method": "pc", "snr": 0.05, "norm": norm, "corrector_steps": 2, "seed": 5}
    got, want = on_both(sde, gaussian(sde), (7, 3), **options)
    assert_near(got, want, 1e-3)


@pytest.mark.parametrize("method", ["ancestral", "pc"])
def test_one_compiled_step_for_all_times(method):
    sde = VPSDE()
    options = {"steps": 30, "step_size": 0.002}
    step = make_step(sde, lambda x, t: -x, method, **options)
    got = step.sample((6, 5), seed=3, device=DEVICE, progress=False)
    want = sample(sde, lambda x, t: -x, (6, 5), method=method, seed=3, device=DEVICE, progress=False, **options)
    if method == "pc":
        # Inductor computes the square root of the step size
        assert_near(got, want, 1e-5)
    else:
        testing.assert_same_bits(got, want)


@needs_cuda
@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_waits(method):
    step = make_step(VPSDE(), lambda x, t: -x, method, steps=30, backend="eager")
    x, seeds = torch.zeros(4, 3, device=DEVICE), torch.arange(4, device=DEVICE)
    x = step(x, 0, seeds)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in (1, 29):
            x = step(x, i, seeds)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_seed_comes_from_torch_when_none_is_given():
    draws = []
    for _ in range(2):
        torch.manual_seed(11)
        draws.append(sample(VPSDE(), lambda x, t: -x, (2, 3), steps=5, device=DEVICE, progress=False))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], sample(VPSDE(), lambda x, t: -x, (2, 3), steps=5, device=DEVICE, progress=False))


def test_callback_and_check():
    seen = []
    x = sample(
        VESDE(), lambda x, t: -x, (2, 3), steps=5, device=DEVICE, progress=False, check_finite=True, seed=0,
        callback=lambda i, t, x: seen.append((i, t, x)),
    )  # fmt: skip
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4] and seen[-1][2] is x
    options = {"steps": 5, "device": DEVICE, "progress": False, "check_finite": True}
    with pytest.raises(FloatingPointError, match=r"^sample: x is not finite after step 0 of 5"):
        sample(VPSDE(), lambda x, t: x * torch.nan, (2, 3), **options)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_likelihood(divergence):
    pytest.importorskip("torchdiffeq")
    sde, x = VPSDE(), MEAN * 0.1 + torch.arange(12.0).view(4, 3) / 10
    options = {"divergence": divergence, "seed": 3}
    got = log_likelihood(sde, gaussian(sde), x.to(DEVICE), **options)
    with pyflow.backend("auto"):
        assert_near(got, log_likelihood(sde, gaussian(sde), x, **options), 1e-3)


def analytic(z):
    """Return energies and gradients of a normal density; with one column every device rounds alike."""
    return z.square().sum(1) / 2, z


def chains(device, columns, **options):
    z = torch.linspace(-1, 1, 40 * columns).view(40, columns).to(device)
    return energy.sample(analytic, z, 0.3, steps=15, seed=1, progress=False, **options)


def fields(chain):
    return [v.cpu() for v in (chain.z, chain.u, chain.grad, chain.acceptance)]


@pytest.mark.parametrize("metropolis, columns", [(True, 1), (False, 1), (False, 6)])
def test_chains_match_the_cpu(metropolis, columns):
    got = chains(DEVICE, columns, metropolis=metropolis)
    with pyflow.backend("auto"):
        want = chains("cpu", columns, metropolis=metropolis)
    assert got.z.device.type == DEVICE
    testing.assert_same_bits(got.z.cpu(), want.z)
    for a, b in zip(fields(got), fields(want), strict=True):
        assert_near(a, b, 1e-6)


def test_chains_of_many_columns_and_their_batch():
    got, again = chains(DEVICE, 6), chains(DEVICE, 6)
    with pyflow.backend("auto"):
        want = chains("cpu", 6)
    # sums rounded differently may change the decision on a borderline proposal
    assert ((got.z.cpu() - want.z).abs() < 1e-5).double().mean() > 0.9
    for a, b in zip(fields(got), fields(again), strict=True):
        testing.assert_same_bits(a, b)
    assert not torch.equal(got.z, energy.sample(analytic, got.z, 0.3, steps=15, seed=2, progress=False).z)


def test_chains_with_autograd_and_their_own_seeds():
    own = ops.sample_seeds(torch.tensor(1, device=DEVICE), 40)
    z = torch.zeros(40, 1, device=DEVICE)
    whole = energy.sample(lambda z: z.square().sum(1) / 2, z, 0.3, steps=10, seed=own, progress=False)
    half = energy.sample(lambda z: z.square().sum(1) / 2, z, 0.3, steps=5, seed=own, progress=False)
    rest = energy.sample(analytic, half.z, 0.3, steps=5, seed=own, start=5, progress=False)
    testing.assert_same_bits(rest.z, whole.z)
    alone = energy.sample(analytic, z[7:8], 0.3, steps=10, seed=own[7:8], progress=False)
    testing.assert_same_bits(alone.z, whole.z[7:8])


@needs_cuda
@pytest.mark.parametrize("method", ["euler_maruyama", "pc", "probability_flow"])
def test_a_captured_step_gives_the_same_bits(method):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 3)).to(DEVICE)
    calls = []

    def score(x, t):
        calls.append(len(calls))
        return net(x) - x / (1 + t[:, None])

    options = {"steps": 40, "method": method, "snr": 0.05, "seed": 3, "device": DEVICE, "progress": False}
    want = sample(VPSDE(), score, (50, 3), **options)
    calls.clear()
    got = sample(VPSDE(), score, (50, 3), cuda_graph=True, check_finite=True, **options)
    # two calls a step with a corrector; three steps before the capture
    assert len(calls) == 4 * (1 + (method == "pc"))
    testing.assert_same_bits(got, want)
    assert torch.equal(got, sample(VPSDE(), score, (50, 3), cuda_graph=True, **options))


@needs_cuda
def test_a_score_that_waits_for_the_gpu_is_refused_and_named():
    def score(x, t):
        return -x * float(x.abs().max() > 0)

    options = {"steps": 40, "seed": 3, "device": DEVICE, "progress": False}
    with pytest.raises(RuntimeError, match="sample: score_fn must run as a CUDA graph"):
        sample(VPSDE(), score, (50, 3), cuda_graph=True, **options)
    assert sample(VPSDE(), score, (50, 3), **options).isfinite().all()
