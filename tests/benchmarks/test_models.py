"""The table of whole models before and after accelerate, from made-up times."""

from __future__ import annotations

import pytest

from pyflow.benchmarks import models, registry


def test_both_take_turns_and_a_missing_package_is_named(monkeypatch):
    order = []

    def make(fast):
        def measure():
            order.append(fast)
            return {"training": 1.0 if fast else 3.0, "samples": 0.5}

        return measure

    def missing(fast):
        raise registry.Missing("the package x is not installed")

    made = [models.Model("flow", make, {"training": 2.0}), models.Model("other", missing, {})]
    monkeypatch.setattr(models, "MODELS", made)
    assert [*models.lines(2)][2:] == [
        "| flow | training | 3.00 s | 1.00 s | 3.00x (2x) |",
        "| flow | samples | 500 ms | 500 ms | 1.00x |",
        "| other | the package x is not installed | – | – | – |",
    ]
    assert order == [False, True, False, True]


@pytest.mark.parametrize("subject", [models.tokenizer, models.resnet])
def test_parts_of_models_are_measured_alone(subject):
    try:
        own, fast = subject(False)(), subject(True)()
    except registry.Missing as why:
        pytest.skip(str(why))
    assert [*own] == [*fast] and all(seconds > 0 for seconds in (*own.values(), *fast.values()))
