"""The elementary functions against float64: largest error in ulp, special values, every instruction set."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pyflow import _native, testing

host = pytest.importorskip("pyflow._host", reason="built in a checkout alone")

# name -> (float64 function, domain, largest error in ulp as the header states it)
FUNCTIONS = {
    "exp": (torch.exp, (-103.9720, 88.7228), 1.1),
    "exp_unfused": (torch.exp, (-103.9720, 88.7228), 1.1),
    "tanh": (torch.tanh, (-torch.inf, torch.inf), 1.5),
    "tanh_unfused": (torch.tanh, (-torch.inf, torch.inf), 2.6),
    "log": (torch.log, (1.4e-45, torch.inf), 0.9),
    "log1p01": (torch.log1p, (0.0, 1.0), 1.5),
    "softplus": (lambda x: torch.logaddexp(x, torch.zeros_like(x)), (-103.0, torch.inf), 1.7),
    "sigmoid": (torch.sigmoid, (-103.0, torch.inf), 2.4),
    "atan": (torch.atan, (-torch.inf, torch.inf), 1.6),
    "erf": (torch.erf, (-torch.inf, torch.inf), 1.5),
    "sin": (torch.sin, (-1e5, 1e5), 1.6),
    "cos": (torch.cos, (-1e5, 1e5), 1.6),
    "log_plain": (torch.log, (1.1754944e-38, 3.4028235e38), 0.9),
}


def evaluate(name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(host.evaluate(name, x.numpy()))


def worst_error(name: str, bits: np.ndarray) -> float:
    function, (low, high), _ = FUNCTIONS[name]
    x = torch.from_numpy(bits.astype(np.uint32).view(np.float32))
    x = x[x.isfinite() & (x >= low) & (x <= high)]
    if not len(x):
        return 0.0
    exact = function(x.double())
    kept = exact.abs() <= torch.finfo(torch.float32).max
    return testing.ulp_error(evaluate(name, x[kept]), exact[kept]).max().item() if kept.any() else 0.0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_on_a_sample(name):
    bits = np.arange(0, 2**32, 1009, dtype=np.uint64)
    assert worst_error(name, bits) <= FUNCTIONS[name][2]


def test_the_page_states_these_errors():
    page = Path(__file__).parents[2] / "docs" / "numerics.md"
    if not page.exists():
        pytest.skip("this folder holds the tests alone")
    stated = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", page.read_text(), re.MULTILINE))
    assert stated == {name: str(bound) for name, (_, _, bound) in FUNCTIONS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_over_all_floats(name):
    block = 2**24
    worst = max(worst_error(name, np.arange(i * block, (i + 1) * block, dtype=np.uint64)) for i in range(256))
    print(f"{name}: {worst:.3f} ulp")
    assert worst <= FUNCTIONS[name][2]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(name):
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-40, 200.0, -200.0])
    if name == "log_plain":
        x = torch.tensor([1.0, 0.5, 2.0**-126, 2.0**-32])
    if name == "log1p01":
        x = torch.tensor([0.0, 1.0, torch.nan, 1e-40])
    got, want = evaluate(name, x), FUNCTIONS[name][0](x.double()).float()
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, equal_nan=True)
    if name in ("tanh", "tanh_unfused", "atan", "erf"):
        assert torch.equal(torch.signbit(got[:2]), torch.tensor([False, True]))


# functions of a random word, passed as the bits of a float: name -> (float64 function, largest error in ulp)
WORD_FUNCTIONS = {
    "radius": (lambda w: torch.sqrt(-2 * torch.log(((w.float() + 1) * 2.0**-32).double())), 1.0),
    "sin_turns": (lambda w: torch.sin(2 * torch.pi * (w >> 8).double() / 2**24), 1.6),
    "cos_turns": (lambda w: torch.cos(2 * torch.pi * (w >> 8).double() / 2**24), 1.6),
}


@pytest.mark.parametrize("name", WORD_FUNCTIONS)
def test_error_over_random_words(name):
    function, bound = WORD_FUNCTIONS[name]
    # covers all 2^24 angles
    words = torch.arange(0, 2**32, 256) if name != "radius" else torch.arange(0, 2**32, 509)
    got = evaluate(name, words.to(torch.int32).view(torch.float32))
    exact = function(words)
    # 2 pi is rounded in float64, so the reference's sin(pi) is not exactly 0
    kept = exact.abs() > 1e-12
    assert testing.ulp_error(got[kept], exact[kept]).max() <= bound
    assert (got[~kept] == 0).all()


def digest() -> str:
    h = hashlib.sha256()
    bits = np.arange(0, 2**32, 65521, dtype=np.uint64).astype(np.uint32)
    for name in (*FUNCTIONS, *WORD_FUNCTIONS):
        y = host.evaluate(name, bits.view(np.float32))
        h.update(np.where(np.isnan(y), np.float32(0), y).tobytes())
    return h.hexdigest()


def test_instruction_sets_give_the_same_bits(every_instruction_set):
    assert len(every_instruction_set) == 1


def test_unknown_function():
    with pytest.raises(ValueError, match="unknown function sinh"):
        host.evaluate("sinh", np.zeros(1, np.float32))


def test_multiply_adds_are_counted():
    assert _native.multiply_adds(3) == 3 * _native.multiply_adds(1) > 0
