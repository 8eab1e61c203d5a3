"""Digests of definitions: what a function computes and what it uses, whatever stands around it."""

from __future__ import annotations

import sys

import pytest

from pyflow import _definitions

PACKAGE = "pyflow_test_package"
HALF = """
SCALE = 0.5
def half(x):
    return SCALE * x
"""
LAYER = '''
import functools
from .half import half
class Base:
    order = 1
    def forward(self, x):
        return half(x)
class Layer(Base):
    """Halves."""
    # a comment
    @property
    def width(self):
        return self._width
    @width.setter
    def width(self, value):
        self._width = value
    def forward(self, x: "int", scale=(1, 2)) -> "int":
        """Return a half."""
        def inner(y):
            return y[1:]
        if x is None:
            raise ValueError(f"x must not be {x!r:>3}, got {scale}")
        z: int = super().forward(x)
        return inner([z])
    @staticmethod
    def other(x):
        return x
'''


def digests(tmp_path, monkeypatch, layer=LAYER, half=HALF):
    """Return the digests of everything that the class Layer of a package is made of, by name within it."""
    folder = tmp_path / str(len([*tmp_path.iterdir()])) / PACKAGE
    folder.mkdir(parents=True)
    for name, text in {"__init__": "", "half": half, "layer": layer}.items():
        (folder / f"{name}.py").write_text(text)
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        monkeypatch.delitem(sys.modules, name)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(folder.parent)
        module = __import__(f"{PACKAGE}.layer").layer
    found = _definitions.definitions(module.Layer, frozenset({PACKAGE}), frozenset())
    return {name.removeprefix(f"{PACKAGE}."): _definitions.digest(name, same) for name, same in found.items()}


def test_a_class_is_made_of_its_bases_and_methods_and_what_they_use(tmp_path, monkeypatch):
    found = digests(tmp_path, monkeypatch)
    assert {*found} == {
        "half.half", "layer.Base", "layer.Base.forward", "layer.Layer", "layer.Layer.forward", "layer.Layer.other",
        "layer.Layer.width",
    }  # fmt: skip
    assert all(found.values()) and len({*found.values()}) == len(found)


@pytest.mark.parametrize(
    "old, new",
    [
        ('"""Halves."""', '"""Divides by two.\n\n    Twice."""'),
        ("    # a comment\n", "\n\n\n"),
        ('x: "int", scale=(1, 2)) -> "int":', "x, scale=(1, 2)):  # noqa"),
        ("        z: int = super", "        z = super"),
        ('        """Return a half."""\n', ""),
        ("return inner([z])", "return inner(\n            [z],\n        )"),
        ("class Base:", "def unused(x):\n    return 2 * x\nclass Base:"),
        ("import functools", "from collections import OrderedDict"),
    ],
)
def test_what_computes_nothing_leaves_a_digest_as_it_is(old, new, tmp_path, monkeypatch):
    assert LAYER.count(old) == 1
    assert digests(tmp_path, monkeypatch, LAYER.replace(old, new)) == digests(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "old, new, name",
    [
        ("y[1:]", "y[:1]", "layer.Layer.forward"),
        ("y[1:]", "y[-1:]", "layer.Layer.forward"),
        ("scale=(1, 2)", "scale=(1, 3)", "layer.Layer.forward"),
        ("scale=(1, 2)", "*, scale=(1, 2)", "layer.Layer.forward"),
        ("if x is None", "if x is not None", "layer.Layer.forward"),
        ("return self._width", "return 2 * self._width", "layer.Layer.width"),
        ("self._width = value", "self._width = value + 1", "layer.Layer.width"),
        ("order = 1", "order = 2", "layer.Base"),
        ("class Layer(Base):", "class Layer(Base, dict):", "layer.Layer"),
        ("        return x\n", "        return -x\n", "layer.Layer.other"),
        ("    @staticmethod\n    def other(x)", "    @classmethod\n    def other(x)", "layer.Layer.other"),
    ],
)
def test_what_computes_something_else_changes_the_digest_of_its_name(old, new, name, tmp_path, monkeypatch):
    assert old in LAYER
    before, after = (digests(tmp_path, monkeypatch, text) for text in (LAYER, LAYER.replace(old, new)))
    assert {key for key in before if before[key] != after[key]} == {name}


def test_numbers_and_functions_of_other_modules_count(tmp_path, monkeypatch):
    before = digests(tmp_path, monkeypatch)
    for half in (HALF.replace("0.5", "0.25"), HALF.replace("SCALE * x", "x * SCALE")):
        after = digests(tmp_path, monkeypatch, half=half)
        assert {key for key in before if before[key] != after[key]} == {"half.half"}


def test_wrappers_of_other_packages_do_not_count_and_tables_do(tmp_path, monkeypatch):
    wrap = "import contextlib, functools\nfrom .half import half\nTABLE = {'half': half}\n"
    layer = f"""{wrap}
class Layer:
    @contextlib.contextmanager
    def forward(self, x):
        yield TABLE[x], cached()
@functools.lru_cache
def cached():
    return 1
"""
    before = digests(tmp_path, monkeypatch, layer)
    assert {*before} == {"half.half", "layer.Layer", "layer.Layer.forward", "layer.cached"}
    # the wrapper's source differs between versions of Python: the digest is that of the function alone
    module = sys.modules[f"{PACKAGE}.layer"]
    found = _definitions.definitions(module.Layer, frozenset({PACKAGE}), frozenset())
    assert all(each.__globals__["__name__"].startswith(PACKAGE) for each in found[f"{PACKAGE}.layer.Layer.forward"])
    changed = digests(tmp_path, monkeypatch, layer.replace("return 1", "return 2"))
    assert {key for key in before if before[key] != changed[key]} == {"layer.cached"}


def test_a_function_without_source_has_no_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(_definitions.inspect, "getsourcefile", lambda function: None)
    assert not digests(tmp_path, monkeypatch)["half.half"]
