"""The command `pyflow`: info, demo, bench, run.

A demo is a module of pyflow.recipes with `add_arguments(parser)`, which adds at least --quick and --out FILE, and
`run(args) -> int`. Demo names are printed with hyphens and also accepted with underscores. `demo all` is
pyflow.recipes._all. pyflow.benchmarks.run and pyflow.integrations._run have the same two functions. A module is
imported only when its command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ._version import __version__


class Refused(RuntimeError):
    """The command cannot run with these arguments on this machine; the text says why in one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # the reader closed the pipe, as head does: drop the rest, including the flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # the exit status that shells report after SIGPIPE


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="pyflow", description="Fused kernels for generative modelling in PyTorch.")
    parser.add_argument("--version", action="version", version=f"pyflow {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    commands.add_parser(
        "info", help="print versions, CPU and backends, with reasons for those that are off; paste it into bug reports"
    )
    demo = commands.add_parser("demo", help="train a model on real data and draw the results", add_help=False)
    names = [*demos(), "all"]
    demo.add_argument("name", nargs="?", type=shown, choices=names, metavar="name", help=", ".join(names))
    commands.add_parser("bench", help="time the operations against torch.compile and other packages", add_help=False)
    commands.add_parser("run", help="run a script with classes of other packages on pyflow's kernels", add_help=False)
    words = [*(sys.argv[1:] if argv is None else argv)]
    if words[:1] == ["run"]:
        # what comes after a script is not for this parser
        return delegate("pyflow.integrations._run", "pyflow run", "demo", words[1:])
    args, rest = parser.parse_known_args(words)
    if args.command == "info":
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        print("\n".join(f"{name + ':':<19} {value}" for name, value in facts()))
        return 0
    if args.command == "demo" and args.name is None:
        asked = not rest or rest in (["-h"], ["--help"])
        print(
            f"usage: pyflow demo name [arguments]\n\ndemos: {', '.join(names)}",
            file=sys.stdout if asked else sys.stderr,
        )
        return 0 if asked else 2
    if args.command == "demo":
        module = "_all" if args.name == "all" else args.name.replace("-", "_")
        return delegate(f"pyflow.recipes.{module}", f"pyflow demo {args.name}", "demo", rest)
    return delegate("pyflow.benchmarks.run", "pyflow bench", "bench", rest)


def demos() -> list[str]:
    """Return the names of the demos without importing them."""
    found = pkgutil.iter_modules([str(Path(__file__).parent / "recipes")])
    return sorted(shown(module.name) for module in found if not module.name.startswith("_"))


def shown(name: str) -> str:
    """Return a demo's name on the command line, given its module's name."""
    return name.replace("_", "-")


def delegate(module: str, prog: str, extra: str, argv: Sequence[str]) -> int:
    """Import a module and run its command; `extra` is the pip extra that installs what the module imports."""
    try:
        command = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "pyflow":
            raise
        print(f"{prog}: {error.name} is not installed: pip install 'pyflow-kernels[{extra}]'", file=sys.stderr)
        return 1
    summary = (command.__doc__ or "").strip().partition("\n")[0]
    parser = argparse.ArgumentParser(prog=prog, description=summary)
    command.add_arguments(parser)
    try:
        return command.run(parser.parse_args(argv))
    except KeyboardInterrupt:
        print(f"{prog}: stopped", file=sys.stderr)
        return 130


def facts() -> Iterator[tuple[str, object]]:
    """Yield (name, value) lines for a bug report."""
    import torch

    from . import _backend, _native

    yield "pyflow", f"{__version__} in {Path(__file__).parent}"
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'no'}, ROCm {torch.version.hip or 'no'})"
    for package in ("triton", "numpy"):
        yield package, installed_version(package)
    yield "system", platform.platform()
    yield "CPU", f"{cpu_model()}, {os.cpu_count()} logical cores"
    if _native.compiled_isas():
        yield "CPU features", " ".join(_native.cpu_features())
        yield "compiled for", " ".join(_native.compiled_isas())
        yield "in use", _native.isa() or "none"
        yield "compiler", _native.compiler()
    else:
        yield "compiled for", "nothing"
    if importlib.util.find_spec("pyflow._host") is None:
        yield "pyflow._host", "left out, as in every wheel: only the tests of a checkout need it"
    yield "threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')})"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    for name, missing in _backend.status().items():
        yield f"{name} backend", f"off: {missing}" if missing else "on"
    unusable = _backend.unusable.get(_backend.current())
    yield "chosen", f"none: {unusable}" if unusable else _backend.current()
    settings = {name: value for name, value in os.environ.items() if name.startswith(("PYFLOW_", "TRITON_"))}
    yield "environment", " ".join(f"{name}={value}" for name, value in sorted(settings.items())) or "nothing set"


def installed_version(package: str) -> str:
    """Return the version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    """Return the processor's name, from /proc/cpuinfo where it is given (not on Arm)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def check_writable(what: str, out: Path, folders: Iterable[Path], files: Iterable[Path]) -> None:
    """Raise Refused unless all folders and files can be written; creates the folders but no file.

    Args:
        what: "a file" or "a folder", for the error text about --out.
        out: value of --out.
        folders: folders that will be written to.
        files: files that will be written.
    """
    for check, paths in ((_check_folder, folders), (_check_file, files)):
        for path in paths:
            try:
                check(path)
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or error
                where = "" if path == out else f"{str(path)!r}: "
                raise Refused(f"--out must be {what} that can be written, got {str(out)!r}: {where}{why}") from error


def _check_folder(path: Path) -> None:
    # if a file has this name, the next line raises "not a directory"
    with contextlib.suppress(FileExistsError):
        path.mkdir(parents=True, exist_ok=True)
    # write for real: root ignores permission bits, and a read-only mount does not show in them
    tempfile.TemporaryFile(dir=path).close()


def _check_file(path: Path) -> None:
    # a symlink may point to a file that does not exist yet
    path = Path(os.path.realpath(path))
    try:
        path.open("xb").close()
    except FileExistsError:
        path.open("r+b").close()
    else:
        path.unlink()
