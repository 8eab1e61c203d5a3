"""Run a script with classes of other packages on pyflow's kernels."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from ._fast import totals
from ._patch import packages, patch

_USAGE = "%(prog)s script.py [--patch PACKAGE] [-v] [arguments of the script] [-- more of them]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = _USAGE
    known = ", ".join(packages())
    parser.add_argument(
        "--patch", action="append", default=[], metavar="PACKAGE",
        help=f"one of {known}; several with commas (default: all that the script imports)",
    )  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true", help="print what was patched, and at the end what ran")
    parser.add_argument("-m", dest="module", action="store_true", help="run a module, as python -m does")
    # unlike REMAINDER it keeps a -- behind the first
    parser.add_argument("script", nargs=argparse.PARSER, help="a Python file, or a module after -m; its arguments")


def run(args: argparse.Namespace) -> int:
    script, *words = args.script
    asked, verbose, arguments = _split(words)
    names = [name for each in [*args.patch, *asked] for name in each.replace(",", " ").split()]
    verbose = verbose or args.verbose
    try:
        report = patch(*names)
    except ValueError as error:
        print(f"pyflow run: {error}", file=sys.stderr)
        return 2
    if not args.module and not Path(script).is_file():
        print(f"pyflow run: {script} is no file", file=sys.stderr)
        return 2
    # processes that the script starts and that import pyflow
    os.environ["PYFLOW_PATCH"] = ",".join(names) or "all"
    sys.argv = [script, *arguments]
    try:
        if args.module:
            sys.path.insert(0, os.getcwd())
            if not _is_module(script):
                print(f"pyflow run: no module named {script}", file=sys.stderr)
                return 2
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(script).resolve().parent))
            runpy.run_path(script, run_name="__main__")
    finally:
        if verbose:
            print(f"pyflow run: {report}", f"pyflow run: {_summary()}", sep="\n", file=sys.stderr)
    return 0


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _split(words: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    """Return packages and verbosity as asked among the words after a script, and its own words: all after a --."""
    names: list[str] = []
    rest: list[str] = []
    verbose, each = False, iter(words)
    for word in each:
        if word == "--":
            rest += each
        elif word in ("-v", "--verbose"):
            verbose = True
        elif word == "--patch" or word.startswith("--patch="):
            names.append(next(each, word) if word == "--patch" else word.partition("=")[2])
        else:
            rest.append(word)
    return names, verbose, rest


def _summary() -> str:
    counts = {kind: each for kind, each in totals().items() if each[0] or each[1]}
    if not counts:
        return "no object of a patched class ran"
    lines = ["calls of objects of patched classes"]
    for kind, (fast, fallback) in sorted(counts.items()):
        lines.append(f"  {kind}: {fast} fast, {fallback.total()} as in the package")
        lines += [f"    {count} because {reason}" for reason, count in fallback.most_common(3)]
    return "\n".join(lines)
