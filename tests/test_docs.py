"""The pages for users: their examples run, their links exist, their tables are those of the result files."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyflow
from pyflow.benchmarks import pages, registry

ROOT = Path(__file__).parent.parent
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "SECURITY.md")]
PAGES = [*TOP, *sorted(path for path in (ROOT / "docs").rglob("*.md") if "new_op" not in path.parts)]
COMING = ROOT / "docs" / "coming_from.md"
# what examples import beside pyflow and what it needs
EXTRAS = {
    "causallearn", "diffusers", "dingo", "glasflow", "lightning", "nflows", "normflows", "pandas", "sbi",
    "vector_quantize_pytorch", "zuko",
}  # fmt: skip
REFERENCE = ("", "ops", "nn", "flows", "sde", "stats", "train", "energy", "testing")
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="this folder holds the tests alone")


def run(page, text):
    """Run the examples of a page, or of the part of it that `text` is, one after the other."""
    names, before = {"__name__": "page"}, page.read_text().partition(text)[0]
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        # empty lines in front, so that an error names its line of the page
        lines = "\n" * (before + text[: block.start(1)]).count("\n")
        try:
            exec(compile(lines + block[1], str(page), "exec"), names)
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] not in EXTRAS:
                raise
            pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("page", [page for page in PAGES if page != COMING], ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, page.read_text())


@pytest.mark.parametrize(
    "package", re.findall(r"^## (.*)", COMING.read_text() if COMING.exists() else "", re.MULTILINE)
)
def test_the_line_for_a_package_runs(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(COMING, re.search(rf"^## {package}\n(.*?)(?=^## |\Z)", COMING.read_text(), re.MULTILINE | re.DOTALL)[1])


def rows(path):
    """Return the cells of each row of a file's tables, without dashes and the speed-ups aimed at."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    return [
        tuple(re.sub(r"x \(.*?x\)", "x", cell) for cell in line[2:-2].split(" | ") if cell != "–") for line in lines
    ]


def test_figures_of_the_readme_are_those_of_the_result_files():
    measured = {row for name in ("flows", "models") for row in rows(pages.RESULTS / f"zen5_{name}.md")}
    shown = [row for row in rows(ROOT / "README.md") if re.fullmatch(r"[\d.]+x", row[-1])]
    assert len(shown) >= 8 and set(shown) <= measured


def test_figures_for_a_package_are_those_of_the_result_files():
    sources = [pages.PAGE, *pages.RESULTS.glob("*.md")]
    found = {line for path in sources for line in path.read_text().splitlines()}
    text, known = COMING.read_text(), "\n".join(found)
    rows = [line for line in text.splitlines() if re.match(r"\| .* \| [\d.]+x", line)]
    assert rows and set(rows) <= found
    figures = set(re.findall(r"\d[\d.]*x\b|\d[\d.]* (?:ms|µs|s)\b", text))
    assert not [figure for figure in figures if figure not in known]


@pytest.mark.parametrize("name", REFERENCE)
def test_public_names_are_in_the_reference(name):
    module = importlib.import_module(f"pyflow.{name}".rstrip("."))
    own = module.__name__
    public = getattr(module, "__all__", None) or [
        each for each, value in vars(module).items()
        if callable(value) and value.__module__.startswith(own) and not each.startswith("_")
    ]  # fmt: skip
    page = (ROOT / "docs" / "reference" / f"{name or 'pyflow'}.md").read_text()
    # a function that hides the module of its name has the path of the module before its own
    listed = re.findall(rf"^::: {re.escape(module.__name__)}\.(\w+)(?:\.\1)?$", page, re.MULTILINE)
    assert sorted(listed) == sorted(public)


def test_the_site_builds_with_every_link(tmp_path):
    docs = importlib.util.spec_from_file_location("docs", ROOT / ".ci" / "docs.py")
    module = importlib.util.module_from_spec(docs)
    docs.loader.exec_module(module)
    if why := module.missing():
        pytest.skip(why)
    done = subprocess.run([sys.executable, ROOT / ".ci" / "docs.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        made = (tmp_path / "docs" / "reference" / page.with_suffix(".html").name).read_text()
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE):
            assert f'id="{name}"' in made, name
        assert "doc-symbol-module" not in made, page.name
    elsewhere = re.compile(r'<(?:link|script|img)[^>]*(?:href|src)="https?:')
    assert not [path for path in tmp_path.rglob("*.html") if elsewhere.search(path.read_text())]


def test_docstrings_become_markdown():
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / ".ci" / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "y = x * 2 < `a_b`.\n\nArgs:\n    a, *b: one\n        two_three.\n\nExample:\n    >>> f(1)\n    2"
    lines = [line for line in module.markdown(text, {"a_b": "m.a_b"}).splitlines() if line]
    assert lines == [
        "y = x \\* 2 &lt; [`a_b`][m.a_b].", "**Args**", "- `a`, `*b`: one", "    two\\_three.", "**Example**", "```pycon",
        ">>> f(1)", "2", "```",
    ]  # fmt: skip


def test_the_citation_has_the_version():
    assert f"\nversion: {pyflow.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_exist(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_tables_are_those_of_the_result_files():
    text = pages.PAGE.read_text()
    entries = pages.entries(pages.RESULTS)
    assert pages.page(text, entries) == text, "run: python -m pyflow.benchmarks.pages"
    families = re.findall(r"<!-- table: (\w+) -->", text)
    # a new family has no table until it is measured
    measured = {entry.case.partition("/")[0] for entry in entries}
    assert measured <= set(registry.FAMILIES)
    assert set(families) == {pages.MERGED.get(family, family) for family in measured}


def test_the_tables_of_whole_flows_are_those_of_their_run():
    lines = (pages.RESULTS / "zen5_flows.md").read_text().splitlines()
    assert {line for line in lines if line.startswith("|")} <= set(pages.PAGE.read_text().splitlines())


def test_raw_results_stay_small():
    texts = [path.read_text() for path in pages.RESULTS.glob("*.json")]
    assert sum(map(len, texts)) <= 200_000
    for raw in (text for text in texts if '"benchmarks"' in text):
        assert pages.compact(json.loads(raw)) == raw, "run: python -m pyflow.benchmarks.pages"
