"""The command line: demos by either spelling, and what each must understand for `demo all`."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import types

import pytest
import torch

from pyflow import cli


@pytest.fixture
def two_words(monkeypatch):
    """A demo whose module has an underscore; returns what it was asked."""
    asked = []
    module = types.ModuleType("pyflow.recipes.two_words", "A demo.")
    module.add_arguments = lambda parser: parser.add_argument("--quick", action="store_true")
    module.run = lambda args: asked.append(args) or 7
    monkeypatch.setitem(sys.modules, "pyflow.recipes.two_words", module)
    monkeypatch.setattr(cli, "demos", lambda: ["one", "two-words"])
    return asked


@pytest.mark.parametrize("name", ["two-words", "two_words"])
def test_both_spellings(two_words, name):
    assert cli.main(["demo", name, "--quick"]) == 7
    assert two_words[0].quick is True


def test_names_are_shown_with_hyphens(two_words, capsys):
    for argv in (["demo"], ["demo", "--help"]):
        assert cli.main(argv) == 0
        assert "demos: one, two-words, all" in capsys.readouterr().out
    assert cli.main(["demo", "--quick"]) == 2
    assert "demos: one, two-words, all" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["demo", "three"])
    assert "invalid choice: 'three'" in capsys.readouterr().err


def test_demos_are_the_recipes():
    assert {"fsq", "nice", "sde", "sector"} <= set(cli.demos())
    assert not [name for name in cli.demos() if "_" in name]


def test_without_tqdm_every_demo_says_how_to_get_it():
    # a process of its own: packages that fail on the way are half imported
    code = "import sys; sys.modules['tqdm'] = None; from pyflow import cli; print([cli.main(['demo', n, '--quick']) for n in cli.demos()])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    names = cli.demos()
    assert done.stdout == f"{[1] * len(names)}\n", done.stderr
    for name, line in zip(names, done.stderr.splitlines(), strict=True):
        # or another package of the extra, imported before
        assert re.fullmatch(rf"pyflow demo {name}: [\w.]+ is not installed: pip install 'pyflow-kernels\[demo\]'", line)


@pytest.mark.parametrize("name", cli.demos())
def test_every_demo_can_be_one_of_all(name):
    try:
        recipe = importlib.import_module(f"pyflow.recipes.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    parser = argparse.ArgumentParser()
    recipe.add_arguments(parser)
    args = parser.parse_args(["--quick", "--out", "a.png", "--seed", "3", "--device", "cpu", "--backend", "cpu"])
    assert args.quick and args.seed == 3 and args.out.name == "a.png"


def pyflow(*words, reader=None, **environment):
    """The command in a process of its own; `reader` is a program that it is piped into."""
    command = [sys.executable, "-m", "pyflow", *words]
    if reader:
        command = ["bash", "-o", "pipefail", "-c", '"$@" | ' + reader, "bash", *command]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["", "gpu", "cuda"])
def test_info_says_what_is_chosen_whatever_was_wished(name):
    done = pyflow("info", PYFLOW_BACKEND=name)
    assert done.returncode == 0 and not done.stderr
    (chosen,) = (line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("chosen:"))
    if name == "gpu":
        assert chosen.startswith("none: PYFLOW_BACKEND=gpu: name must be one of ")
    elif name == "cuda" and not torch.cuda.is_available():
        assert chosen == "none: PYFLOW_BACKEND=cuda: cuda cannot run here: no GPU is available"
    else:
        assert chosen == (name or "auto")


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize("words", [["info"], ["demo", "--help"], ["bench", "--help"]])
def test_a_reader_that_leaves_is_no_error(words):
    # true never reads, so that the pipe is closed at the latest when the command ends
    done = pyflow(*words, reader="true")
    assert done.returncode in (0, 141) and not done.stderr
