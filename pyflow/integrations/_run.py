"""Run a script with classes of other packages on pyflow's kernels."""

from __future__ import annotations

import argparse
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
    _add_options(parser)
    parser.add_argument("script", help="a Python file, or a module after -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")


def _add_options(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(packages())
    parser.add_argument(
        "--patch", action="append", default=[], metavar="PACKAGE",
        help=f"one of {known}; several with commas (default: all that are installed)",
    )  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true", help="print what was patched, and at the end what ran")
    parser.add_argument("-m", dest="module", action="store_true", help="run a module, as python -m does")


def run(args: argparse.Namespace) -> int:
    asked, arguments = _split(args.arguments)
    names = [name for each in [*args.patch, *asked.patch] for name in each.replace(",", " ").split()]
    verbose = args.verbose or asked.verbose
    try:
        report = patch(*names)
    except ValueError as error:
        print(f"pyflow run: {error}", file=sys.stderr)
        return 2
    if not args.module and not Path(args.script).is_file():
        print(f"pyflow run: {args.script} is no file", file=sys.stderr)
        return 2
    # processes that the script starts
    os.environ["PYFLOW_PATCH"] = ",".join(names) or "all"
    if verbose:
        print(f"pyflow run: {report}", file=sys.stderr)
    sys.argv = [args.script, *arguments]
    try:
        if args.module:
            sys.path.insert(0, os.getcwd())
            runpy.run_module(args.script, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(args.script).resolve().parent))
            runpy.run_path(args.script, run_name="__main__")
    finally:
        if verbose:
            print(f"pyflow run: {_summary()}", file=sys.stderr)
    return 0


def _split(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options among the words after a script, and the words that are the script's: all after a --."""
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_options(parser)
    # those that it does not know stay in order
    options, rest = parser.parse_known_args(words[:end])
    return options, rest + words[end + 1 :]


def _summary() -> str:
    counts = {kind: each for kind, each in totals().items() if each[0] or each[1]}
    if not counts:
        return "no object of a patched class ran"
    lines = ["calls of objects of patched classes"]
    for kind, (fast, fallback) in sorted(counts.items()):
        lines.append(f"  {kind}: {fast} fast, {fallback.total()} as in the package")
        lines += [f"    {count} because {reason}" for reason, count in fallback.most_common(3)]
    return "\n".join(lines)
