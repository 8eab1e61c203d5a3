"""Makes the virtual environment `make` works in, or brings it up to date: python .ci/environment.py .venv

Uses a torch that the running Python can import; installs the pinned one only if there is none.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# prints torch's version if it is new enough, nothing otherwise
TORCH = """
import re
try:
    import torch
except ImportError:
    raise SystemExit
if [int(n) for n in re.findall(r"[0-9]+", torch.__version__)[:2]] >= [2, 11]:
    print(torch.__version__)
"""
FOLDERS = "import sys; print(chr(10).join(p for p in sys.path if p.endswith(('site-packages', 'dist-packages'))))"
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"


def ask(python, code):
    return subprocess.run([str(python), "-c", code], stdout=subprocess.PIPE, text=True).stdout.strip()


def main(folder):
    if sys.version_info < (3, 11):
        needs = (
            "pyflow: the development environment needs Python 3.11 or newer, {} is {}.{}; "
            "make PYTHON=/path/to/python3.11"
        )
        return needs.format(sys.executable, *sys.version_info[:2])
    python = folder / "bin" / "python"
    if not python.exists():
        try:
            import ensurepip  # noqa: F401
        except ImportError:
            return (
                "pyflow: this Python cannot make virtual environments (Debian and Ubuntu: apt-get install python3-venv)"
            )
        print(f"making {folder} with {sys.executable}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    version = ask(python, TORCH)
    if not version and ask(sys.executable, TORCH):
        # a .pth file, since --system-site-packages of a venv's Python shows the packages of its parent
        (Path(ask(python, SITE)) / "borrowed.pth").write_text(ask(sys.executable, FOLDERS) + "\n")
        version = ask(python, TORCH)
    wanted = ["-r", str(ROOT / "requirements.txt")]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        if version:
            # no requirement may install another torch
            print(f"using torch {version}", flush=True)
            constraints.write(f"torch=={version}\n")
            constraints.flush()
            wanted += ["-c", constraints.name]
        else:
            wanted += ["-r", str(ROOT / "requirements-torch.txt")]
        environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
        return subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
