"""What every demo does around its own work: outputs are checked first, metrics written last, refusals are one line."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import pyflow


class Refused(RuntimeError):
    """What cannot be done here; the text says why in one sentence."""


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def seed(text: str) -> int:
    """An argument that every generator takes, scikit-learn's too."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be in [0, 2**32), got {value}")
    return value


def device(text: str) -> str:
    """An argument that is a device of this machine."""
    try:
        torch.empty(1, device=text)
    # what torch raises differs with what it was built for
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"must be a device that is here, got {text!r}: {why}") from error
    return text


def run(name: str, args: argparse.Namespace, work: Callable[[], dict[str, object]], folders: Iterable[str] = ()) -> int:
    """The demo; 0, or 1 after one sentence about what is missing.

    `work` draws args.out and returns the metrics, which go beside it. `folders` are endings of further folders
    written there: "_log" is a_log beside a.png.
    """
    try:
        with pyflow.backend(args.backend):
            args.out = picture(args.out, folders)
            figures = work()
    except (RuntimeError, ValueError) as error:
        if not isinstance(error, Refused) and not str(error).startswith("backend:"):
            raise
        print(f"demo {name}: {error}", file=sys.stderr)
        return 1
    metrics = args.out.with_suffix(".json")
    metrics.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\nwrote {args.out} and {metrics.name}")
    return 0


def picture(out: Path, folders: Iterable[str] = ()) -> Path:
    """The picture's path, a .png where it has no suffix; raises Refused unless it can be drawn and written."""
    if os.path.isdir(out):
        raise Refused(f"--out must be a file, got the folder {str(out)!r}")
    # where matplotlib sees a suffix; without one it would write a .png under another name than ours
    suffix = os.path.splitext(out)[1]
    if not suffix:
        out, suffix = out.with_name(f"{out.name}.png"), ".png"
    # "a." ends in a format without a name, which matplotlib would take for its default
    check_format(out, suffix[1:] or suffix)
    beside = [out.with_name(out.stem + ending) for ending in folders]
    check_writable("a file", out, [out.parent, *beside], [out, out.with_suffix(".json")])
    return out


def check_format(out: Path, name: str) -> None:
    """Raises Refused unless matplotlib draws this format here."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    figure.text(0, 0, "a")
    # drawn once, since some formats it lists need more: .pgf LaTeX, .webp a Pillow built with it
    try:
        figure.savefig(io.BytesIO(), format=name)
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise Refused(f"--out must be a picture that matplotlib can draw, got {str(out)!r}: {why}") from error


def check_writable(what: str, out: Path, folders: Iterable[Path], files: Iterable[Path]) -> None:
    """Raises Refused unless the folders can be made and all can be written; makes the folders and no file."""
    for check, paths in ((_check_folder, folders), (_check_file, files)):
        for path in paths:
            try:
                check(path)
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or error
                where = "" if path == out else f"{str(path)!r}: "
                raise Refused(f"--out must be {what} that can be written, got {str(out)!r}: {where}{why}") from error


def _check_folder(path: Path) -> None:
    # where a file is in the way, the next line says "not a directory"
    with contextlib.suppress(FileExistsError):
        path.mkdir(parents=True, exist_ok=True)
    # permission bits say little: root ignores them, a read-only mount ignores root
    tempfile.TemporaryFile(dir=path).close()


def _check_file(path: Path) -> None:
    # a link may point to a file that is yet to be written
    path = Path(os.path.realpath(path))
    try:
        path.open("xb").close()
    except FileExistsError:
        path.open("r+b").close()
    else:
        path.unlink()
