"""Short runs of the sector demo, and its numerical parts."""

from __future__ import annotations

import argparse
import json
import math

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from pyflow.recipes import sector
from pyflow.stats import sector_probability


def run(*argv):
    parser = argparse.ArgumentParser()
    sector.add_arguments(parser)
    return sector.run(parser.parse_args([*map(str, argv)]))


def test_a_seed_repeats_the_run(tmp_path, capsys):
    figures = []
    for name in ("a.png", "b.png"):
        out = tmp_path / "pictures" / name
        assert run("--quick", "--trials", 20_000, "--points", 1, 3, 8, "--seed", 3, "--out", out) == 0
        figures.append(json.loads(out.with_suffix(".json").read_text()))
    from matplotlib.image import imread

    picture = imread(out)
    assert picture.shape[0] > 700 and picture.shape[1] > 1000 and picture.std() > 0.1
    printed = capsys.readouterr()
    for text in ("four ducks, half a pond: 1/2", "of 48 points", "in NumPy", "10^-3006", str(out)):
        assert text in printed.out
    assert "n = 8" in printed.err
    got = figures[0]
    assert got["four_ducks"]["formula"] == pytest.approx(0.5, abs=1e-15)
    assert abs(got["four_ducks"]["estimate"] - 0.5) < 4 * got["four_ducks"]["standard_error"]
    assert got["worst_deviation"] < 4 and got["trials"] == 20_000
    assert [curve["n"] for curve in got["curves"]] == [1, 3, 8]
    for each in figures:
        assert each.pop("seconds_per_trial") > 0 and each.pop("numpy_seconds_per_trial") > 0
    assert figures[0] == figures[1]


def test_angles_invert_the_probability():
    p = np.linspace(0.01, 0.99, 9)
    for n in (2, 5, 300):
        np.testing.assert_allclose(sector_probability(n, sector.angles(n, p)), p, rtol=1e-9)


def test_the_plain_sum_matches_the_formula_for_few_points():
    for n, theta in ((1, 1.0), (4, math.pi), (6, 5.0)):
        assert sector.plain_sum(n, theta) == pytest.approx(sector_probability(n, theta), rel=1e-12)


def test_wrong_arguments_give_one_sentence(tmp_path, capsys):
    assert run("--backend", "vulkan", "--out", tmp_path / "x.png") == 1
    assert capsys.readouterr().err.startswith("demo sector: backend: name must be one of")
    with pytest.raises(SystemExit):
        run("--trials", 0)
    assert "must be at least 1, got 0" in capsys.readouterr().err
