"""The steps of a sampler as a CUDA graph: the captured step on a CPU, where the graph is the function itself."""

from __future__ import annotations

import pytest
import torch

from pyflow.ops import sample_seeds
from pyflow.sde import VPSDE, Step, _graph, make_step, sample
from pyflow.sde._plan import Plan
from pyflow.testing import assert_same_bits


def score(x, t):
    return -x / (1 + t[:, None])


@pytest.fixture
def captured(monkeypatch):
    """Count captures, whose replay calls the step."""
    steps = []

    def capture(op, step):
        steps.append(step)
        return step

    monkeypatch.setattr(_graph, "capture", capture)
    return steps


OPTIONS = [
    {"method": "euler_maruyama"},
    {"method": "probability_flow"},
    {"method": "pc", "corrector_steps": 2},
    {"method": "pc", "norm": "sample", "snr": 0.01},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("steps", [30, 4, 3, 1])
def test_replayed_steps_are_those_taken_one_by_one(captured, options, steps):
    options = {**options, "steps": steps}
    if options["method"] == "pc":
        options["predictor"] = "euler_maruyama"
    sde = VPSDE(beta_max=0.9)
    plan = make_step(sde, score, **options)._plan
    seed = sample_seeds(5, 6)
    take = Step(plan, score, plan.advance(score))._replay("sample", torch.device("cpu"))
    x = sde.prior_sample((6, 3), seed)
    with torch.no_grad():
        for i in range(steps):
            x = take(x, i, seed)
    assert_same_bits(x, sample(sde, score, (6, 3), seed=5, progress=False, **options))
    assert len(captured) == (steps > _graph.WARM_UP)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "sample: cuda_graph needs a device of type cuda, got cpu"),
        ({"seed": sample_seeds(0, 2)}, "sample: cuda_graph needs a device of type cuda, got cpu"),
        ({"callback": print}, "sample: cuda_graph and callback exclude each other, got both"),
        ({"cuda_graph": "yes"}, "sample: cuda_graph must be true or false, got str"),
    ],
)
def test_bad_input_gets_one_sentence(options, text):
    before = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError)) as error:
        sample(VPSDE(), score, (2, 3), steps=30, **{"cuda_graph": True, **options})
    assert str(error.value) == text
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "options",
    [{"mode": "reduce-overhead"}, {"mode": "max-autotune"}, {"options": {"triton.cudagraphs": True}}],
    ids=str,
)
def test_a_step_that_captures_itself_is_not_captured_again(options):
    step = make_step(VPSDE(), score, steps=30, **options)
    text = "sample: cuda_graph must be False for a step whose compiled code captures graphs, got True"
    with pytest.raises(ValueError, match=f"^{text}$"):
        step.sample((2, 3), cuda_graph=True)


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "max-autotune-no-cudagraphs"}, {"options": {"triton.cudagraphs": False}}, {"options": None}],
)
def test_a_step_that_captures_nothing_can_be_captured(options):
    assert not make_step(VPSDE(), score, steps=30, **options).captures
    with pytest.raises(ValueError, match=r"^sample: cuda_graph needs a device of type cuda, got cpu$"):
        make_step(VPSDE(), score, steps=30, **options).sample((2, 3), cuda_graph=True)


def test_a_run_reads_the_tables_once(captured, monkeypatch):
    built, tables = [], Plan.tables
    monkeypatch.setattr(Plan, "tables", lambda self, device: built.append(device) or tables(self, device))
    plan = make_step(VPSDE(), score, steps=30)._plan
    take = Step(plan, score, plan.advance(score))._replay("sample", torch.device("cpu"))
    x = torch.zeros(2, 3)
    for i in range(30):
        x = take(x, i, sample_seeds(0, 2))
    assert len(built) == len(captured) == 1


def test_a_score_that_cannot_be_captured_is_named(monkeypatch):
    class Graph:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            raise RuntimeError("capture has failed")

        def replay(self):
            raise AssertionError("nothing was captured")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)

    def reads():
        raise ValueError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(RuntimeError, match=r"got: operation not permitted when stream is capturing$"):
        _graph.capture("sample", reads)
