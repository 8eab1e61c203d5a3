"""Wrong arguments, above all --out, are refused in one line before anything is loaded or trained."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import pyflow
from pyflow import cli
from pyflow.recipes import _all, _data, _demo

WRONG = {
    "": "must be a file, got the folder",
    "some.folder": "must be a file, got the folder",
    "new.folder": "Format 'folder' is not supported",
    "a.txt": "Format 'txt' is not supported",
    "a.json": "Format 'json' is not supported",
    "a.": "Format '.' is not supported",
    "file/a.png": "Not a directory",
    "file/deeper/a.png": "Not a directory",
    "metrics.png": "Is a directory",
    "metrics": "Is a directory",
    "/proc/nonexistent/a.png": "No such file or directory",
    "a" * 256 + ".png": "File name too long",
    # the name of its .json is too long
    "a" * 251 + ".png": "File name too long",
    "a\0b.png": "null",
}


def unreachable(*given: object, **named: object) -> None:
    pytest.fail("reached despite a wrong --out")


@pytest.fixture(params=cli.demos())
def name(request):
    return request.param


@pytest.fixture
def recipe(name, monkeypatch) -> ModuleType:
    """A demo's module; loading data or training fails the test."""
    try:
        module = importlib.import_module(f"pyflow.recipes.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(module, "demo", unreachable)
    for load in ("load", "gallery", "photographs"):
        monkeypatch.setattr(_data, load, unreachable)
    return module


@pytest.fixture
def folder(tmp_path) -> Path:
    for made in ("some.folder", "metrics.json"):
        (tmp_path / made).mkdir()
    (tmp_path / "file").write_text("kept")
    return tmp_path


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("out", WRONG, ids=[out[:24].replace("\0", "NUL") for out in WRONG])
def test_an_out_that_cannot_be_written_is_refused(recipe, name, out, folder, capsys):
    before = files(folder)
    assert cli.main(["demo", name, "--quick", "--out", str(folder / out)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"demo {name}: --out must be a ") and WRONG[out] in printed.err
    assert printed.err.count("\n") == 1 and not printed.out
    assert files(folder) == before


@pytest.mark.parametrize(
    "option, value, why",
    [
        ("--device", "nowhere", "must be a device that is here, got 'nowhere': "),
        ("--device", "meta", "must be a device that is here, got 'meta': "),
        ("--seed", "-1", "must be in [0, 2**32), got -1\n"),
        ("--seed", str(2**64), f"must be in [0, 2**32), got {2**64}\n"),
    ],
)
def test_seeds_and_devices_out_of_range_are_refused(recipe, name, option, value, why, capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", name, option, value])
    assert f"pyflow demo {name}: error: argument {option}: {why}" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "written"), [("a", "a.png"), ("new/v1.5.SVG", "new/v1.5.SVG"), (".a", ".a.png")])
def test_the_printed_path_is_the_written_file(recipe, name, given, written, tmp_path, capsys, monkeypatch):
    def demo(*given: object) -> dict[str, object]:
        (args,) = (each for each in given if isinstance(each, argparse.Namespace))
        args.out.write_text("drawn")
        return {"loss": 1}

    monkeypatch.setattr(recipe, "demo", demo)
    for load in ("load", "gallery", "photographs"):
        monkeypatch.setattr(_data, load, lambda *_: None)
    assert cli.main(["demo", name, "--out", str(tmp_path / given)]) == 0
    picture = tmp_path / written
    metrics = picture.with_suffix(".json")
    assert set(files(tmp_path)) == {picture, metrics}
    assert json.loads(metrics.read_text()) == {"loss": 1}
    assert f"wrote {picture} and {metrics.name}\n" in capsys.readouterr().out


def test_the_log_of_loss_only_is_checked(folder, capsys, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.setattr("pyflow.recipes.loss_only.demo", unreachable)
    (folder / "a_log").write_text("")
    assert cli.main(["demo", "loss-only", "--out", str(folder / "a.png")]) == 1
    assert capsys.readouterr().err.endswith(f"{str(folder / 'a_log')!r}: Not a directory\n")


@pytest.mark.parametrize("name", ["nice", "bigan-qp"])
def test_downloads_that_cannot_be_stored_are_refused(name, folder, capsys, monkeypatch):
    """torchvision creates the folder for its downloads."""
    monkeypatch.setattr(f"pyflow.recipes.{name.replace('-', '_')}.demo", unreachable)
    mnist = SimpleNamespace(MNIST=lambda root, **_: os.makedirs(f"{root}/MNIST"), CIFAR10=None)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=mnist))
    (folder / "data").write_text("")
    assert cli.main(["demo", name, "--data", "mnist", "--out", str(folder / "a.png")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"demo {name}: --data mnist could not be loaded or downloaded") and error.count("\n") == 1


def test_checking_the_path_keeps_existing_files(tmp_path):
    for name in ("a.png", "a.json"):
        (tmp_path / name).write_text("an earlier run's")
    (tmp_path / "link.png").symlink_to(tmp_path / "elsewhere.png")
    before = files(tmp_path)
    for name in ("a.png", "link.png"):
        assert _demo.picture(tmp_path / name) == tmp_path / name
    assert files(tmp_path) == before


def test_a_read_only_file_is_refused(tmp_path):
    (tmp_path / "a.json").touch(0o444)
    if os.access(tmp_path / "a.json", os.W_OK):
        pytest.skip("root may write read-only files")
    with pytest.raises(_demo.Refused, match=r"--out must be a file .*a\.json': Permission denied"):
        _demo.picture(tmp_path / "a.png")


def test_a_format_that_needs_a_missing_program_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(_demo.Refused, match=r"--out must be a picture that matplotlib can draw, .*'xelatex' not found"):
        _demo.picture(tmp_path / "a.pgf")


def test_demo_all_checks_out_before_the_first_demo(folder, capsys, monkeypatch):
    monkeypatch.setattr(_all, "play", unreachable)
    for page, inside in (("a", "index.html"), ("b", "nice")):
        (folder / page / inside).mkdir(parents=True)
    (folder / "b" / "nice").rmdir()
    (folder / "b" / "nice").write_text("")
    before = files(folder)
    wrong = {
        "file": "Not a directory", "file/deeper": "Not a directory", "/proc/nonexistent": "No such file or directory",
        "a": "index.html': Is a directory", "b": "nice': Not a directory",
    }  # fmt: skip
    for out, why in wrong.items():
        assert cli.main(["demo", "all", "--quick", "--out", str(folder / out)]) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith("demo all: --out must be a folder that can be written, got ")
        assert printed.err.endswith(f"{why}\n") and printed.err.count("\n") == 1 and not printed.out
    assert files(folder) == before


def test_bench_checks_out_before_it_measures(folder, capsys, monkeypatch):
    pytest.importorskip("pytest_benchmark")
    from pyflow.benchmarks import run

    monkeypatch.setattr(run, "Session", unreachable)
    (folder / "a" / "bench.json").mkdir(parents=True)
    wrong = {
        "file": "Not a directory", "/proc/nonexistent": "No such file or directory",
        "a": "bench.json': Is a directory",
    }  # fmt: skip
    for out, why in wrong.items():
        assert cli.main(["bench", "--quick", "--out", str(folder / out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("bench: --out must be a folder that can be written, got ")
        assert error.endswith(f"{why}\n") and error.count("\n") == 1


def test_errors_are_told_apart_by_class(tmp_path, capsys):
    args = argparse.Namespace(backend="reference", out=tmp_path / "a.png")

    def fails(error):
        def work():
            raise error

        return _demo.run("x", args, work)

    for error in (_demo.Refused("no data"), pyflow.BackendUnavailable("fsq: backend cuda cannot run here")):
        assert fails(error) == 1
        assert capsys.readouterr().err == f"demo x: {error}\n"
    with pytest.raises(RuntimeError, match="backend: a bug"):
        fails(RuntimeError("backend: a bug"))


def test_without_a_backend_argument_the_chosen_one_runs(tmp_path, capsys, monkeypatch):
    args = argparse.Namespace(backend=None, out=tmp_path / "a.png")
    with pyflow.backend("reference"):
        assert _demo.run("x", args, lambda: {"backend": args.backend}) == 0
    assert json.loads((tmp_path / "a.json").read_text()) == {"backend": "reference"}
    # as after PYFLOW_BACKEND=vulkan
    args.backend = None
    monkeypatch.setattr("pyflow._backend._process", "vulkan")
    assert _demo.run("x", args, unreachable) == 1
    assert capsys.readouterr().err.startswith("demo x: backend: name must be one of auto, cpu, triton, ")


def test_numbers_beyond_64_bits_are_refused():
    for text in ("0", str(2**63)):
        with pytest.raises(argparse.ArgumentTypeError, match=f", got {text}$"):
            _demo.positive(text)
    assert _demo.positive(str(2**63 - 1)) == 2**63 - 1


def test_no_demo_imports_another():
    names = {name.replace("-", "_") for name in cli.demos()}
    for name in names:
        source = (Path(_demo.__file__).parent / f"{name}.py").read_text()
        imported = {
            word
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom) and node.level == 1
            for word in (node.module, *(alias.name for alias in node.names))
        }
        assert not imported & names, name
