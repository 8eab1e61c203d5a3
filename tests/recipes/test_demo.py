"""What arguments may be, --out above all: the rest is refused in one line, before anything is loaded or trained."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

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
    # short enough, but not for its .json
    "a" * 251 + ".png": "File name too long",
    "a\0b.png": "null",
}


def unreachable(*given: object, **named: object) -> None:
    pytest.fail("reached in spite of --out")


@pytest.fixture(params=cli.demos())
def name(request):
    return request.param


@pytest.fixture
def recipe(name, monkeypatch) -> ModuleType:
    """A demo's module, which fails the test when it loads data or trains."""
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
def test_what_cannot_be_written_is_refused(recipe, name, out, folder, capsys):
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
        ("--seed", "-1", "must be in [0, 2**32), got -1\n"),
        ("--seed", str(2**64), f"must be in [0, 2**32), got {2**64}\n"),
    ],
)
def test_numbers_and_devices_that_cannot_be_are_refused(recipe, name, option, value, why, capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", name, option, value])
    assert f"pyflow demo {name}: error: argument {option}: {why}" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "written"), [("a", "a.png"), ("new/v1.5.SVG", "new/v1.5.SVG"), (".a", ".a.png")])
def test_the_name_that_is_drawn_is_the_name_that_is_said(recipe, name, given, written, tmp_path, capsys, monkeypatch):
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
def test_data_that_cannot_be_kept_are_refused(name, folder, capsys, monkeypatch):
    """torchvision makes the folder for its downloads."""
    monkeypatch.setattr(f"pyflow.recipes.{name.replace('-', '_')}.demo", unreachable)
    mnist = SimpleNamespace(MNIST=lambda root, **_: os.makedirs(f"{root}/MNIST"), CIFAR10=None)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=mnist))
    (folder / "data").write_text("")
    assert cli.main(["demo", name, "--data", "mnist", "--out", str(folder / "a.png")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"demo {name}: --data mnist could not be loaded or downloaded") and error.count("\n") == 1


def test_what_was_written_before_stays_until_the_end(tmp_path):
    for name in ("a.png", "a.json"):
        (tmp_path / name).write_text("an earlier run's")
    (tmp_path / "link.png").symlink_to(tmp_path / "elsewhere.png")
    before = files(tmp_path)
    for name in ("a.png", "link.png"):
        assert _demo.picture(tmp_path / name) == tmp_path / name
    assert files(tmp_path) == before


def test_a_file_that_is_read_only_is_refused(tmp_path):
    (tmp_path / "a.json").touch(0o444)
    if os.access(tmp_path / "a.json", os.W_OK):
        pytest.skip("root writes it")
    with pytest.raises(_demo.Refused, match=r"--out must be a file .*a\.json': Permission denied"):
        _demo.picture(tmp_path / "a.png")


def test_a_format_whose_program_is_missing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(_demo.Refused, match=r"--out must be a picture that matplotlib can draw, .*'xelatex' not found"):
        _demo.picture(tmp_path / "a.pgf")


def test_all_is_refused_before_the_first_demo(folder, capsys, monkeypatch):
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


def test_bench_is_refused_before_it_measures(folder, capsys, monkeypatch):
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
