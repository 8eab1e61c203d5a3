"""The command line: spelling of demo names, the arguments every demo must accept, `pyflow info`."""

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
    """A demo whose module name has an underscore; returns the list of arguments it gets."""
    received = []
    module = types.ModuleType("pyflow.recipes.two_words", "A demo.")
    module.add_arguments = lambda parser: parser.add_argument("--quick", action="store_true")
    module.run = lambda args: received.append(args) or 7
    monkeypatch.setitem(sys.modules, "pyflow.recipes.two_words", module)
    monkeypatch.setattr(cli, "demos", lambda: ["one", "two-words"])
    return received


@pytest.mark.parametrize("name", ["two-words", "two_words"])
def test_demo_names_accept_hyphens_and_underscores(two_words, name):
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


def test_demos_are_the_modules_of_recipes():
    assert {"fsq", "nice", "sde", "sector"} <= set(cli.demos())
    assert not [name for name in cli.demos() if "_" in name]


def test_without_tqdm_every_demo_says_how_to_install_it():
    # in a subprocess, because failed imports leave packages half imported
    code = "import sys; sys.modules['tqdm'] = None; from pyflow import cli; print([cli.main(['demo', n, '--quick']) for n in cli.demos()])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    names = cli.demos()
    assert done.stdout == f"{[1] * len(names)}\n", done.stderr
    for name, line in zip(names, done.stderr.splitlines(), strict=True):
        # the missing package may be another one of the extra that is imported earlier
        assert re.fullmatch(rf"pyflow demo {name}: [\w.]+ is not installed: pip install 'pyflow-kernels\[demo\]'", line)


@pytest.mark.parametrize("name", cli.demos())
def test_every_demo_accepts_the_arguments_of_demo_all(name):
    try:
        recipe = importlib.import_module(f"pyflow.recipes.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    parser = argparse.ArgumentParser()
    recipe.add_arguments(parser)
    args = parser.parse_args(["--quick", "--out", "a.png", "--seed", "3", "--device", "cpu", "--backend", "cpu"])
    assert args.quick and args.seed == 3 and args.out.name == "a.png"


def pyflow(*words, reader=None, **environment):
    """Run the command in a subprocess, piped into the program `reader` if given."""
    command = [sys.executable, "-m", "pyflow", *words]
    if reader:
        command = ["bash", "-o", "pipefail", "-c", '"$@" | ' + reader, "bash", *command]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["", "gpu", "cuda"])
def test_info_reports_the_backend_chosen_by_the_environment(name):
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
def test_a_closed_pipe_is_no_error(words):
    # `true` exits without reading
    done = pyflow(*words, reader="true")
    assert done.returncode in (0, 141) and not done.stderr
