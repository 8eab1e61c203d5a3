"""Commands, and builds that all processes of a test run share."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = ROOT / "build/native"
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def run(*command, **options):
    """Run a command and return the finished process; a failure shows its output."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def need(*tools):
    missing = [tool for tool in tools if shutil.which(tool, path=PATH) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def building_checkout():
    """Return the lock of what builds in the checkout's own folder."""
    CHECKOUT.parent.mkdir(exist_ok=True)
    return FileLock(f"{CHECKOUT}.lock")


def build(folder, targets, *options):
    """Build CMake targets in a folder, once for all test processes; returns the build's output."""
    need("cmake", "ninja", "c++")
    log, tool = folder / "build.log", {"env": {**os.environ, "PATH": PATH}}
    with FileLock(f"{folder}.lock"):
        if not log.exists():
            run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options, **tool)
            log.write_text(run("cmake", "--build", folder, "--target", *targets, **tool).stdout)
    return log.read_text()


def shared(tmp_path_factory, name):
    """Return a folder shared by all processes of this test run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
