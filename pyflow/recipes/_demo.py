"""What all demos share: arguments, output checked before the work, errors in one line, metrics as JSON."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

import pyflow

from .. import _backend
from ..cli import Refused as Refused
from ..cli import check_writable

T = TypeVar("T")


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    out: str,
    seed: str,
    beside: str = "metrics",
    quick: str = "a short run, to check that everything works",
    device: str | None = None,
) -> None:
    """Add the arguments that every demo has: --seed, --out, --device, --backend and --quick.

    Args:
        out: default path of the picture.
        seed: what the seed determines.
        beside: what is written next to the picture.
        quick: help text of --quick.
        device: default device; None: cuda if available, else cpu.
    """
    parser.add_argument("--seed", type=seed_number, default=0, help=f"seed of {seed} (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path(out), metavar="FILE",
        help=f"picture to write (default {out}); {beside} are written beside it",
    )  # fmt: skip
    parser.add_argument(
        "--device", type=device_name, default=device, help=f"default {device or 'cuda if available, else cpu'}"
    )
    parser.add_argument(
        "--backend", help="auto, cpu, triton, cuda or reference (default: PYFLOW_BACKEND if it is set, else auto)"
    )
    parser.add_argument("--quick", action="store_true", help=quick)


def positive(text: str) -> int:
    """Parse an argument that is an integer of at least 1 that fits 64 bits."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2**63, got {value}")
    return value


def seed_number(text: str) -> int:
    """Parse a seed: the range that torch, NumPy and scikit-learn all accept."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be in [0, 2**32), got {value}")
    return value


def device_name(text: str) -> str:
    """Parse a device on which this machine can allocate a tensor and read it back."""
    try:
        torch.zeros(1, device=text).cpu()
    # the exception depends on how torch was built
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"must be a device that is here, got {text!r}: {why}") from error
    return text


def bar(steps: int, name: str) -> tqdm:
    """Return a progress bar of `steps` steps, to be used in a `with` block."""
    return tqdm(total=steps, desc=f"{name:<16}", unit="step", dynamic_ncols=True, mininterval=0.2)


def tracked(values: Sequence[T], name: str, unit: str) -> tqdm[T]:
    """Return the values with a progress bar that advances by one per value."""
    return tqdm(values, desc=name or None, unit=unit, dynamic_ncols=True)


def chosen_device(args: argparse.Namespace) -> torch.device:
    """Return the device of --device, or the default: cuda if available, else cpu."""
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def run(name: str, args: argparse.Namespace, work: Callable[[], dict[str, object]], folders: Iterable[str] = ()) -> int:
    """Run a demo; returns the exit status: 0, or 1 after printing in one sentence what is missing.

    Args:
        name: name of the demo.
        args: parsed arguments; args.out is replaced by the checked path, args.backend by the backend that runs.
        work: draws the picture args.out and returns the metrics, which are written beside it.
        folders: suffixes of further folders that `work` writes: "_log" stands for a_log beside a.png.
    """
    try:
        args.backend = args.backend or _backend.current()
        with _chosen_backend(args.backend):
            args.out = picture(args.out, folders)
            results = work()
    except (Refused, pyflow.BackendUnavailable) as error:
        print(f"demo {name}: {error}", file=sys.stderr)
        return 1
    metrics = args.out.with_suffix(".json")
    metrics.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwrote {args.out} and {metrics.name}")
    return 0


def _chosen_backend(name: str) -> pyflow.backend:
    try:
        return pyflow.backend(name)
    except ValueError as error:
        raise Refused(str(error)) from error


def picture(out: Path, folders: Iterable[str] = ()) -> Path:
    """Return the picture's path, with .png if it has no suffix; raises Refused if it cannot be drawn or written."""
    if os.path.isdir(out):
        raise Refused(f"--out must be a file, got the folder {str(out)!r}")
    # split as matplotlib does, which adds .png itself where it sees no suffix
    suffix = os.path.splitext(out)[1]
    if not suffix:
        out, suffix = out.with_name(f"{out.name}.png"), ".png"
    # "a." has an empty format name, for which matplotlib would use its default
    check_format(out, suffix[1:] or suffix)
    beside = [out.with_name(out.stem + ending) for ending in folders]
    check_writable("a file", out, [out.parent, *beside], [out, out.with_suffix(".json")])
    return out


def check_format(out: Path, name: str) -> None:
    """Raise Refused unless matplotlib can write this format on this machine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    figure.text(0, 0, "a")
    # a listed format can still fail: .pgf needs LaTeX, .webp a Pillow built with it
    try:
        figure.savefig(io.BytesIO(), format=name)
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise Refused(f"--out must be a picture that matplotlib can draw, got {str(out)!r}: {why}") from error


@contextlib.contextmanager
def threads(n: int | None) -> Iterator[None]:
    """Set torch's number of CPU threads for a block; None leaves it unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read afterwards includes its work."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
