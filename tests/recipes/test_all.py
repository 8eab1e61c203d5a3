"""`pyflow demo all` on two tiny demos: separate processes, a summary, one self-contained page."""

from __future__ import annotations

import argparse
import base64
import os
import re
import sys
from html.parser import HTMLParser

import pytest

from pyflow.recipes import _all

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
DEMO = f"""
import sys, pathlib
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.write_bytes({PIXEL!r})
out.with_name("second.png").write_bytes({PIXEL!r})
print("loss <0.5> & falling", *sys.argv[1:])
print("step 1\\rstep 2", file=sys.stderr)
"""
FAILING = """
import sys
print("so far")
print("bar 1%\\rdemo bad: the data are missing", file=sys.stderr)
sys.exit(3)
"""


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name == "src"]
        self.links += [value for name, value in attrs if name == "href"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def two_demos(monkeypatch):
    scripts = {"good-one": DEMO, "bad": FAILING}
    monkeypatch.setattr(_all, "demos", lambda: [*scripts])
    monkeypatch.setattr(_all, "command", lambda name: [sys.executable, "-c", scripts[name], name])
    return scripts


def run(*argv):
    parser = argparse.ArgumentParser()
    _all.add_arguments(parser)
    return _all.run(parser.parse_args([*map(str, argv)]))


def test_the_page_shows_both_demos_and_the_failure(two_demos, tmp_path, capsys):
    stale = tmp_path / "good-one" / "old.png"
    stale.parent.mkdir()
    stale.write_bytes(b"an earlier run's")
    os.utime(stale, (0, 0))
    assert run("--quick", "--seed", 5, "--device", "cpu", "--out", tmp_path) == 1
    printed = capsys.readouterr()
    assert "== good-one ==" in printed.out and "loss <0.5> & falling" in printed.out
    assert "step 1\rstep 2" in printed.err and "the data are missing" in printed.err
    assert re.search(r"good-one +\d+\.\d s  2 picture\(s\)  ok", printed.out)
    assert re.search(r"bad +\d+\.\d s  0 picture\(s\)  failed, exit status 3", printed.out)
    assert f"wrote {tmp_path / 'index.html'}" in printed.out

    text = (tmp_path / "index.html").read_text()
    page = Page(text)
    assert not page.open
    assert page.links == ["#good-one", "#bad"]
    assert [base64.b64decode(source.partition("base64,")[2]) for source in page.sources] == [PIXEL, PIXEL]
    assert all(source.startswith("data:image/png;") for source in page.sources)
    assert "http" not in text and "quick runs" in text
    assert "loss &lt;0.5&gt; &amp; falling" in text and "so far" in text
    assert "<pre>demo bad: the data are missing</pre>" in text and "failed, exit status 3" in text
    where = f"--quick --seed 5 --device cpu --out {tmp_path / 'good-one' / 'good_one.png'}"
    assert f"<code>pyflow demo good-one {where}</code>" in text


def test_the_exit_status_is_0_if_all_demos_succeed(two_demos, tmp_path):
    two_demos.pop("bad")
    assert run("--out", tmp_path / "deep" / "folder") == 0
    text = (tmp_path / "deep" / "folder" / "index.html").read_text()
    assert "full runs" in text and "failed" not in text.partition("</style>")[2]


def test_the_page_is_written_after_each_demo(two_demos, tmp_path, monkeypatch):
    play = _all.play

    def interrupted(name, *args):
        if name == "bad":
            raise KeyboardInterrupt
        return play(name, *args)

    monkeypatch.setattr(_all, "play", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--out", tmp_path)
    assert "falling" in (tmp_path / "index.html").read_text()


def test_demos_are_run_by_the_pyflow_command():
    assert _all.command("nice") == [sys.executable, "-m", "pyflow", "demo", "nice"]
