"""Samplers on a Gaussian, for which the discretised chain is linear in x and its moments are known exactly."""

from __future__ import annotations

import contextlib
import io
import math
import sys

import pytest
import torch

import pyflow
from pyflow.ops import normal, sample_seeds
from pyflow.sde import VESDE, VPSDE, SubVPSDE, from_marginals, make_step, sample
from pyflow.sde.equations import Grid
from pyflow.testing import assert_same_bits, threads

MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.6, 0.0], [0.6, 0.8, -0.3], [0.0, -0.3, 0.5]], dtype=torch.float64)
SDES = {
    "vp": VPSDE(),
    "sub_vp": SubVPSDE(),
    "ve": VESDE(),
    "marginals": from_marginals(lambda t: torch.cos(1.5 * t), lambda t: torch.sin(1.5 * t)),
}
METHODS = ("euler_maruyama", "reverse_diffusion", "ancestral", "pc", "probability_flow")
CASES = [(s, m) for s in SDES for m in METHODS if m != "ancestral" or s in ("vp", "ve")]
STEPS, LANGEVIN = 60, 0.002


def linear_score(sde, t):
    """(A, mean of x_t) with score = A (x - mean)."""
    alpha, std = sde.marginal(t)
    return -torch.linalg.inv(alpha**2 * COVARIANCE + std**2 * torch.eye(3, dtype=torch.float64)), alpha * MEAN


def gaussian_score(sde):
    def score(x, t):
        matrix, mean = linear_score(sde, t[0].double())
        # not a GEMM, whose bits depend on the batch size
        residual = x - mean.to(x)
        return sum(residual[:, j : j + 1] * matrix[:, j].to(x) for j in range(3))

    return score


def scalars(sde, method, steps, eps=1e-3):
    """(t, a, b, c) of every predictor step."""
    grid = Grid.of(steps, eps)
    rows = {"pc": sde.reverse_diffusion, "probability_flow": sde.euler_maruyama}
    a, b, c = (rows.get(method) or getattr(sde, method))(grid)
    if method == "probability_flow":
        b, c = b / 2, 0 * c
    c[-1] = 0
    return zip(grid.times, a, b, c, strict=True)


def chain_moments(sde, method, steps):
    """Return mean and covariance after the last step of the chain, in float64."""
    one = torch.eye(3, dtype=torch.float64)
    mean, covariance = torch.zeros(3, dtype=torch.float64), sde.prior_std**2 * one

    def move(a, b, c, t):
        matrix, centre = linear_score(sde, t)
        factor = a * one + b * matrix
        return factor @ mean - b * matrix @ centre, factor @ covariance @ factor.T + c**2 * one

    for t, a, b, c in scalars(sde, method, steps):
        if method == "pc":
            mean, covariance = move(1.0, LANGEVIN, (2 * LANGEVIN) ** 0.5, t)
        mean, covariance = move(a, b, c, t)
    return mean, covariance


@pytest.mark.parametrize(("name", "method"), CASES)
def test_moments_match_the_discretised_chain(name, method):
    sde, n = SDES[name], 20_000
    x = sample(
        sde, gaussian_score(sde), (n, 3), steps=STEPS, method=method, step_size=LANGEVIN, seed=1, progress=False
    ).double()
    mean, covariance = chain_moments(sde, method, STEPS)
    variances = covariance.diagonal()
    mean_error = (variances / n).sqrt()
    covariance_error = ((variances[:, None] * variances + covariance**2) / n).sqrt()
    assert bool(((x.mean(0) - mean).abs() <= 3 * mean_error).all())
    assert bool(((x.T.cov() - covariance).abs() <= 3 * covariance_error).all())


@pytest.mark.parametrize("norm", ["marginal", "sample", "batch"])
@pytest.mark.parametrize("name", SDES)
def test_snr_rule_matches_an_eager_loop_on_the_same_noise(name, norm):
    sde, shape, steps, snr = SDES[name], (7, 3), 30, 0.05
    score, seeds = gaussian_score(sde), sample_seeds(5, 7)
    alphas = sde.corrector_alpha(Grid.of(steps, 1e-3))
    x = sde.prior_std * normal(shape, seed=seeds, purpose="prior")
    for i, (t, a, b, c) in enumerate(scalars(sde, "pc", steps)):
        times = t.float().expand(7)
        z, grad = normal(shape, seed=seeds, step=i, purpose="corrector"), score(x, times)
        z_norm, grad_norm = z.norm(dim=1, keepdim=True), grad.norm(dim=1, keepdim=True)
        if norm == "batch":
            z_norm, grad_norm = z_norm.mean(), grad_norm.mean()
        if norm == "marginal":
            z_norm, grad_norm = sde.marginal(t)[1].float(), 1
        step_size = 2 * alphas[i].float() * (snr * z_norm / grad_norm) ** 2
        x = x + step_size * grad + (2 * step_size).sqrt() * z
        x = a.float() * x + b.float() * score(x, times) + c.float() * normal(shape, seed=seeds, step=i)
    ours = sample(sde, score, shape, steps=steps, method="pc", snr=snr, norm=norm, seed=5, progress=False)
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_sample_does_not_depend_on_its_batch(name, method):
    sde = SDES[name]
    arguments = {"steps": 25, "method": method, "progress": False}
    together = sample(sde, gaussian_score(sde), (9, 3), seed=2, **arguments)
    alone = sample(sde, gaussian_score(sde), (1, 3), seed=sample_seeds(2, 1, start=5), **arguments)
    assert_same_bits(together[5:6], alone)
    assert_same_bits(together, sample(sde, gaussian_score(sde), (9, 3), seed=2, **arguments))
    assert not torch.equal(together, sample(sde, gaussian_score(sde), (9, 3), seed=3, **arguments))


@pytest.mark.parametrize("method", ["euler_maruyama", "ancestral", "probability_flow"])
def test_every_backend_and_thread_count_gives_the_same_sample(method):
    def draw():
        return sample(VPSDE(), gaussian_score(VPSDE()), (500, 3), steps=25, method=method, seed=6, progress=False)

    wanted = draw()
    with threads(1):
        assert_same_bits(draw(), wanted)
    with pyflow.backend("reference"):
        assert_same_bits(draw(), wanted)


class Net(torch.nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Conv2d(1, channels, 3, padding=1), torch.nn.Conv2d(channels, 1, 3, padding=1)
        self.time, self.mix = torch.nn.Linear(1, channels), torch.nn.Linear(64, 64)
        self.batches = []

    def forward(self, x, t):
        self.batches.append(len(x))
        h = torch.nn.functional.silu(self.first(x) + self.time(t[:, None].to(x.dtype))[:, :, None, None])
        return self.mix(self.last(h).flatten(1)).view_as(x) - x


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_network_in_micro_batches_gives_the_same_sample_in_any_batch(micro_batch):
    net = Net()
    arguments = {"steps": 25, "method": "pc", "micro_batch": micro_batch, "progress": False}
    together = sample(VPSDE(), net, (10, 1, 8, 8), seed=2, **arguments)
    assert set(net.batches) == {micro_batch}
    for k in (0, 3, 9):
        alone = sample(VPSDE(), net, (1, 1, 8, 8), seed=sample_seeds(2, 1, start=k), **arguments)
        assert_same_bits(together[k : k + 1], alone)
    plain = sample(VPSDE(), net, (10, 1, 8, 8), seed=2, steps=25, method="pc", progress=False)
    torch.testing.assert_close(together, plain, rtol=1e-3, atol=1e-3)


def test_samples_are_equal_at_the_same_row_of_a_micro_batch():
    torch.manual_seed(0)
    # with these widths a scalar loop computes the last activations, so rows of one micro-batch differ in bits
    net = torch.nn.Sequential(torch.nn.Linear(5, 13), torch.nn.Softplus(), torch.nn.Linear(13, 5))
    arguments = {"score_fn": lambda x, t: net(x) - x, "steps": 50, "progress": False}
    for micro_batch, starts in ((1, range(10)), (4, (0, 4, 8))):
        together = sample(VPSDE(), shape=(10, 5), seed=2, micro_batch=micro_batch, **arguments)
        for start in starts:
            n = min(micro_batch, 10 - start)
            seeds = sample_seeds(2, n, start=start)
            part = sample(VPSDE(), shape=(n, 5), seed=seeds, micro_batch=micro_batch, **arguments)
            assert_same_bits(together[start : start + n], part)


def test_an_empty_batch_gives_an_empty_result():
    x = sample(VPSDE(), Net(), (0, 1, 8, 8), steps=3, micro_batch=4, progress=False)
    assert x.shape == (0, 1, 8, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_times_and_scalars_stay_float32(dtype):
    seen = []

    def score(x, t):
        seen.append((x.dtype, t.dtype, t.shape))
        return -x

    x = sample(VPSDE(), score, (4, 2), steps=40, method="ancestral", dtype=dtype, seed=0, progress=False)
    assert x.dtype == dtype and set(seen) == {(dtype, torch.float32, (4,))}
    wide = sample(VPSDE(), lambda x, t: -x, (4, 2), steps=40, method="ancestral", seed=0, progress=False)
    # the state is rounded forty times
    limit = 40 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(x.float(), wide, rtol=limit, atol=limit)


def test_denoise_leaves_out_the_noise_of_the_last_step_only():
    sde, last = VPSDE(), []

    def keep(i, t, x):
        last.append(x)

    arguments = {"steps": 30, "method": "pc", "snr": 0.05, "seed": 4, "progress": False}
    mean = sample(sde, gaussian_score(sde), (3, 3), callback=keep, **arguments)
    states, last = last, []
    noisy = sample(sde, gaussian_score(sde), (3, 3), denoise=False, callback=keep, **arguments)
    for ours, other in zip(states[:-1], last[:-1], strict=True):
        assert_same_bits(ours, other)
    c = sde.reverse_diffusion(Grid.of(30, 1e-3))[2][-1].item()
    z = normal((3, 3), seed=sample_seeds(4, 3), step=29)
    torch.testing.assert_close(noisy - mean, c * z, rtol=1e-4, atol=1e-6)


def test_callback_and_progress(monkeypatch):
    pytest.importorskip("tqdm")
    seen = []
    bar = io.StringIO()
    with contextlib.redirect_stderr(bar):
        x = sample(VESDE(), lambda x, t: -x, (2, 3), steps=5, callback=lambda *args: seen.append(args), seed=0)
    assert "5/5" in bar.getvalue()
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4]
    assert [t for _, t, _ in seen] == pytest.approx(torch.linspace(1, 1e-3, 5).tolist())
    assert seen[-1][2] is x and not torch.equal(seen[0][2], x)
    for hidden, progress in (({}, False), ({"tqdm": None}, True)):
        for name, module in hidden.items():
            monkeypatch.setitem(sys.modules, name, module)
        with contextlib.redirect_stderr(io.StringIO()) as silent:
            sample(VESDE(), lambda x, t: -x, (2, 3), steps=5, progress=progress)
        assert not silent.getvalue()


def test_a_callback_may_be_an_object_that_is_false():
    class Frames(list):
        def __call__(self, i, t, x):
            self.append(x.clone())

    frames = Frames()
    x = sample(VESDE(), lambda x, t: -x, (2, 3), steps=5, seed=0, callback=frames, progress=False)
    assert len(frames) == 5 and torch.equal(frames[-1], x)


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("method", ["euler_maruyama", "pc"])
def test_writes_of_a_score_into_its_arguments_do_not_change_samples(method, micro_batch):
    kept, buffer = [], torch.empty(2, 3)

    def pure(x, t):
        return -x * (1 + t[:, None])

    def rude(x, t):
        kept.append((x, x.clone(), t, t.clone()))
        score = pure(x, t)
        x.zero_()
        kept[-1][1].zero_()
        t.mul_(1000)
        kept[-1][3].mul_(1000)
        # returns the same memory in every call
        return buffer[: len(x)].copy_(score) if micro_batch else score

    arguments = {"shape": (5, 3), "steps": 30, "method": method, "seed": 3, "progress": False}
    wanted = sample(VPSDE(), pure, **arguments)
    assert_same_bits(sample(VPSDE(), rude, micro_batch=micro_batch, **arguments), wanted)
    for x, then, t, t_then in kept:
        assert_same_bits(x, then)
        assert_same_bits(t, t_then)


def test_a_score_that_keeps_its_arguments_sees_no_change():
    kept = []

    def score(x, t):
        kept.append((x, x.clone(), t, t.clone()))
        return -x

    sample(VPSDE(), score, (2, 3), steps=30, method="pc", seed=3, progress=False)
    assert len({t[0].item() for _, _, t, _ in kept}) == 30
    for x, then, t, t_then in kept:
        assert_same_bits(x, then)
        assert_same_bits(t, t_then)


def test_callback_writes_do_not_reach_the_state_and_late_writes_raise():
    arguments = {"shape": (2, 3), "steps": 10, "seed": 3, "progress": False}
    wanted = sample(VPSDE(), lambda x, t: -x, **arguments)
    assert_same_bits(sample(VPSDE(), lambda x, t: -x, callback=lambda i, t, x: x.zero_(), **arguments), wanted)
    late = [
        ("score_fn", {"score_fn": lambda x, t: x.neg_() if t[0] < 0.5 else -x}),
        ("callback", {"score_fn": lambda x, t: -x, "callback": lambda i, t, x: x.zero_() if i == 5 else None}),
    ]
    for name, functions in late:
        text = f"^sample: {name} must change x in place from its first call on or never$"
        with pytest.raises(ValueError, match=text):
            sample(VPSDE(), **functions, **arguments)
    with pytest.raises(TypeError, match=r"^sample: callback must be callable, got int$"):
        sample(VPSDE(), lambda x, t: -x, callback=3, **arguments)


def test_inference_mode_changes_nothing_and_a_score_may_use_autograd():
    def score(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(-x.square().sum() / 2, x)[0]

    arguments = {"shape": (2, 3), "steps": 30, "method": "pc", "seed": 3, "progress": False}
    wanted = sample(VPSDE(), score, **arguments)
    with torch.inference_mode():
        assert_same_bits(sample(VPSDE(), score, **arguments), wanted)
        step = make_step(VPSDE(), lambda x, t: -x, steps=5, backend="eager")
        assert step(torch.zeros(2, 3), 0, torch.zeros(2, dtype=torch.int64)).shape == (2, 3)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["euler_maruyama", "pc"])
def test_the_default_dtype_and_device_change_nothing(default, method):
    seen = []

    def score(x, t):
        seen.append((t.dtype, t[0].item()))
        return -x

    cosine = from_marginals(lambda t: torch.cos(1.5 * t), lambda t: torch.sin(1.5 * t))
    for sde in (VPSDE(), VESDE(), cosine):
        arguments = {"shape": (4, 3), "steps": 30, "method": method, "seed": 3, "progress": False, "device": "cpu"}
        wanted, times = sample(sde, score, **arguments), seen.copy()
        seen.clear()
        before = torch.get_default_dtype(), torch.get_default_device()
        torch.set_default_dtype(default)
        # stands for an accelerator
        torch.set_default_device("meta")
        try:
            got = sample(sde, score, **arguments)
        finally:
            torch.set_default_dtype(before[0])
            torch.set_default_device(None)
        assert_same_bits(got, wanted)
        assert seen == times and seen[0][0] == torch.float32
        seen.clear()


@pytest.mark.parametrize("name", [name for name in SDES if name != "marginals"])
@pytest.mark.parametrize("dims", [1, 2, 8])
def test_the_default_corrector_gives_the_right_moments_in_few_dimensions(name, dims):
    sde, n = SDES[name], 4000

    def score(x, t):
        alpha, std = (v[:, None] for v in sde.marginal(t))
        return -(x - 1.5 * alpha) / (0.09 * alpha**2 + std**2)

    x = sample(sde, score, (n, dims), steps=300, method="pc", seed=0, progress=False).double()
    # three standard errors, plus the bias of the discretisation
    assert abs(x.std().item() / 0.3 - 1) < 0.03 + 3 / math.sqrt(2 * n * dims)
    assert abs(x.mean().item() - 1.5) < 0.03 * 0.3 + 3 * 0.3 / math.sqrt(n * dims)
    assert (x - 1.5).abs().max().item() < 6 * 0.3


REACHING_ZERO = {
    "cosine": from_marginals(lambda t: torch.cos(math.pi / 2 * t), lambda t: torch.sin(math.pi / 2 * t)),
    "line": from_marginals(lambda t: 1 - t, lambda t: t),
    "flat at the end": from_marginals(lambda t: (1 - 1.25 * t).clamp(min=0), lambda t: t),
}


@pytest.mark.parametrize("method", ["euler_maruyama", "reverse_diffusion", "pc", "probability_flow"])
@pytest.mark.parametrize("name", REACHING_ZERO)
def test_schedules_that_reach_alpha_0_give_the_right_moments(name, method):
    sde, n, seen = REACHING_ZERO[name], 20_000, []

    def score(x, t):
        seen.append(t[0].item())
        alpha, std = (v[:, None] for v in sde.marginal(t))
        return -(x - 1.5 * alpha) / (0.09 * alpha**2 + std**2)

    x = sample(sde, score, (n, 1), steps=400, method=method, step_size=1e-6, seed=0, progress=False).double()
    assert 0.79 < max(seen) < 1 and sde.marginal(max(seen))[0] > 0
    assert abs(x.std().item() / 0.3 - 1) < 0.03 and abs(x.mean().item() - 1.5) < 0.02


@pytest.mark.parametrize("name", REACHING_ZERO)
def test_exact_steps_keep_the_moments_of_a_single_datum(name):
    """With one datum m the score is -(x - alpha m) / std^2, and each step keeps mean and std of x_t exactly."""
    sde, m = REACHING_ZERO[name], 0.7
    grid = sde.grid(50, 1e-3)
    alpha, std = sde.marginal(torch.cat((grid.times, grid.times.new_zeros(1))))
    assert bool((alpha > 0).all()) and len(grid.times) < 50
    for row in (sde.euler_maruyama(grid), sde.reverse_diffusion(grid), sde.probability_flow(grid)):
        for i, (a, b, c) in enumerate(zip(*row, strict=True)):
            gain = a - b / std[i] ** 2
            mean = gain * alpha[i] * m + b * alpha[i] * m / std[i] ** 2
            variance = (gain * std[i]) ** 2 + c**2
            torch.testing.assert_close(mean, alpha[i + 1] * m, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(variance, std[i + 1] ** 2, rtol=1e-9, atol=1e-9)
    assert bool((sde.probability_flow(grid)[2] == 0).all())


def test_schedules_without_valid_steps_are_refused():
    late = from_marginals(lambda t: 1 - t, lambda t: t)
    with pytest.raises(
        ValueError, match=r"^from_marginals: steps must be large enough that alpha is above 0 .*, got 1$"
    ):
        sample(late, lambda x, t: -x, (2, 3), steps=1, progress=False)
    wave = from_marginals(lambda t: torch.cos(5 * t), lambda t: t)
    with pytest.raises(ValueError, match=r"^from_marginals: alpha\(t\) must be positive for t below 1$"):
        sample(wave, lambda x, t: -x, (2, 3), steps=30, progress=False)
    rough = from_marginals(lambda t: 1.0, lambda t: t * torch.where(t > 0.5, 1.0, torch.nan))
    with pytest.raises(ValueError, match=r"^sample: the steps of sde must be finite, got "):
        sample(rough, lambda x, t: -x, (2, 3), steps=30, progress=False)


def test_the_seed_comes_from_torch_when_none_is_given():
    draws = []
    for _ in range(2):
        torch.manual_seed(11)
        draws.append(sample(VPSDE(), lambda x, t: -x, (2, 3), steps=5, progress=False))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], sample(VPSDE(), lambda x, t: -x, (2, 3), steps=5, progress=False))


def test_predictor_and_corrector_choices():
    sde, score = VPSDE(), gaussian_score(VPSDE())
    arguments = {"steps": 30, "seed": 4, "progress": False}
    plain = sample(sde, score, (3, 3), method="ancestral", **arguments)
    bare = sample(sde, score, (3, 3), method="pc", predictor="ancestral", corrector="none", **arguments)
    assert_same_bits(plain, bare)
    corrected = [
        sample(sde, score, (3, 3), method="pc", corrector_steps=k, step_size=LANGEVIN, **arguments) for k in (1, 2)
    ]
    assert not torch.equal(*corrected)
    flows = [
        sample(sde, score, (3, 3), method="probability_flow", predictor=p, **arguments)
        for p in ("euler_maruyama", "reverse_diffusion")
    ]
    assert not torch.equal(*flows)
    torch.testing.assert_close(*flows, rtol=0.5, atol=0.5)
