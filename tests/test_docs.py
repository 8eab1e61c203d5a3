"""The pages for users: their examples run, their links exist, their tables are those of the result files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pyflow.benchmarks import pages, registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="this folder holds the tests alone")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    text = page.read_text()
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        # empty lines in front, so that an error names its line of the page
        lines = "\n" * text[: block.start(1)].count("\n")
        exec(compile(lines + block[1], str(page), "exec"), names)


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
