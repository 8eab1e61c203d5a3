"""The compiled step: one graph for all times, and with an analytic score the bits of the eager step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from pyflow.ops import sample_seeds
from pyflow.sde import VESDE, VPSDE, SubVPSDE, make_step, sample
from pyflow.testing import assert_same_bits


def score(x, t):
    return -x * (1 + t[:, None])


CASES = [
    (VPSDE(), "euler_maruyama"),
    (VPSDE(), "ancestral"),
    (SubVPSDE(), "pc"),
    (VESDE(), "pc"),
    (VESDE(), "probability_flow"),
]


@pytest.mark.parametrize(("sde", "method"), CASES, ids=lambda value: value if isinstance(value, str) else repr(value))
def test_one_graph_serves_every_time(sde, method):
    torch._dynamo.reset()
    counter = CompileCounter()
    step = make_step(sde, score, method, steps=30, snr=0.05, backend=counter)
    x = step.sample((4, 3), seed=0, progress=False)
    assert counter.frame_count == 1
    assert_same_bits(x, sample(sde, score, (4, 3), method=method, steps=30, snr=0.05, seed=0, progress=False))


def test_inductor_compiles_once():
    torch._dynamo.reset()
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4))

    def network(x, t):
        return net(x) - x * t[:, None]

    step = make_step(VPSDE(), network, "pc", steps=30, snr=0.05, corrector_steps=2, micro_batch=2)
    x = step.sample((3, 4), seed=0, progress=False)
    with torch.compiler.set_stance("fail_on_recompile"):
        again = step.sample((3, 4), seed=0, progress=False)
        other = step.sample((3, 4), seed=1, progress=False)
    assert_same_bits(x, again)
    assert not torch.equal(x, other)
    eager = sample(
        VPSDE(), network, (3, 4), method="pc", steps=30, snr=0.05, corrector_steps=2, micro_batch=2, seed=0,
        progress=False,
    )  # fmt: skip
    torch.testing.assert_close(x, eager, rtol=1e-3, atol=1e-3)


def test_single_steps_match_the_loop():
    sde = VESDE()
    step = make_step(sde, score, "reverse_diffusion", steps=6, backend="eager")
    seeds = sample_seeds(3, 2)
    x = sde.prior_sample((2, 3), seeds)
    assert step.times == pytest.approx(torch.linspace(1, 1e-3, 6).tolist())
    for i in range(len(step.times)):
        x = step(x, i, seeds)
    assert_same_bits(x, step.sample((2, 3), seed=3, progress=False))


class Made(TorchDispatchMode):
    """Records the tensors that operators return in newly allocated memory."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        taken = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for value in out if isinstance(out, tuple) else (out,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in taken:
                self.tensors.append((str(function), tuple(value.shape)))
        return out


@pytest.mark.parametrize(
    ("method", "norm", "calls", "rest"),
    [("euler_maruyama", "marginal", 1, 4), ("pc", "marginal", 2, 4), ("pc", "sample", 2, 2 * 4)],
)
def test_a_step_allocates_only_the_score_and_the_new_state(method, norm, calls, rest):
    made, after = Made(), []

    def keep(i, t, x):
        after.append(len(made.tensors))

    arguments = {"steps": 30, "method": method, "norm": norm, "seed": 0, "progress": False}
    with made:
        sample(VPSDE(), lambda x, t: x.neg(), (4, 32), callback=keep, **arguments)
    assert len({b - a for a, b in itertools.pairwise(after)}) == 1
    # the other tensors are small: times, and per-sample values of the corrector's norms
    sizes = [math.prod(shape) for _, shape in made.tensors[after[0] : after[1]]]
    assert sorted(sizes)[-2 * calls :] == [4 * 32] * 2 * calls
    assert max(sorted(sizes)[: -2 * calls], default=0) <= rest, made.tensors[after[0] : after[1]]


def test_a_score_that_changes_its_arguments_in_place_compiles_to_the_same_step():
    def rude(x, t):
        x.mul_(-2 - t[:, None])
        t.mul_(1000)
        return x

    for method in ("euler_maruyama", "pc"):
        torch._dynamo.reset()
        step = make_step(VPSDE(), rude, method, steps=30, backend="aot_eager")
        pure = lambda x, t: x * (-2 - t[:, None])
        wanted = sample(VPSDE(), pure, (4, 3), method=method, steps=30, seed=0, progress=False)
        assert_same_bits(step.sample((4, 3), seed=0, progress=False), wanted)
