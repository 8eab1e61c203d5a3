"""The header of a report: hardware, software and load of the machine."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import pyflow
from pyflow import _native

HERE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """Return the repository that contains this file, or None for an installed package."""
    root = HERE.parent
    return root if (root / "pyflow" / "__init__.py").exists() else None


def facts(device: str, threads: int, others: float | None) -> dict[str, str]:
    """Return the facts of the header in the order in which they are printed.

    `others` is the share of the CPU that other processes took during the measurement.
    """
    facts = {
        "CPU": _cpu_name(),
        "instruction set": _isa(),
        "threads": f"{threads} of {os.cpu_count()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "compiler": _compiler(),
        "huge pages": _huge_pages(),
        "pyflow": pyflow.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if others is not None:
        facts["CPU taken by others"] = f"{others:.0%}"
    if device == "cuda":
        facts = {"GPU": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda), **facts}
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    info = dict(line.replace("\t", "").split(":", 1) for line in reversed(lines) if ":" in line)
    name = info.get("model name", platform.machine()).strip()
    if "cpu family" in info:
        name += f" (family {info['cpu family'].strip()} model {info['model'].strip()})"
    return name


def _isa() -> str:
    return _native.isa() or "none (reference)"


def _compiler() -> str:
    return _native.compiler() or "none"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown" if importlib.util.find_spec(package) else "none"


def _huge_pages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return text[text.index("[") + 1 : text.index("]")]


@functools.cache
def _commit() -> str:
    root = checkout()
    if root is None:
        return "installed"
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def cpu_seconds() -> tuple[float, float] | None:
    """Return (CPU seconds used by all processes, CPU seconds available) since boot, or None if unknown."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    ticks = [int(value) for value in fields]
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), sum(ticks) / os.sysconf("SC_CLK_TCK")
