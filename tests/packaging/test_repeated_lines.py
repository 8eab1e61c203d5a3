"""Code is not copied between the files of csrc: what two of them need belongs in a header."""

import re

from ..building import ROOT

MOST = 10  # equal lines in a row
# says nothing: comments, includes, pragmas, braces, namespaces
EMPTY = re.compile(r"(//|#include|#pragma|namespace\b|[{}();,\s]*$|\} else \{$)")


def code_lines(path):
    """Return the (number, text) of all lines that say something, without comments and spacing."""
    lines = enumerate(path.read_text().splitlines(), 1)
    stripped = ((number, " ".join(line.partition("//")[0].split())) for number, line in lines)
    return [(number, text) for number, text in stripped if not EMPTY.match(text)]


def repeats(lines_of, most):
    """Yield the places (name, line) of two equal runs of more than `most` lines; lines_of: name -> code_lines."""
    first = {}
    for name, lines in lines_of.items():
        for start in range(len(lines) - most):
            run = tuple(text for _, text in lines[start : start + most + 1])
            place = (name, lines[start][0])
            if run in first:
                yield first[run], place
            first.setdefault(run, place)


def test_repeats_are_found():
    one = [(n, f"x = {n};") for n in range(5)]
    two = [(n + 90, text) for n, text in [(0, "y;"), *one]]
    assert list(repeats({"a": one, "b": two}, 4)) == [(("a", 0), ("b", 90))]
    assert not list(repeats({"a": one, "b": two}, 5))


def test_no_two_places_of_csrc_hold_the_same_lines():
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu"})
    assert len(files) > 50
    lines_of = {str(path.relative_to(ROOT)): code_lines(path) for path in files}
    assert not list(repeats(lines_of, MOST))
