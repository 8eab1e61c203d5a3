"""Builds the documentation site: python .ci/docs.py [folder of the site]

The pages keep their places, so that the links between them are the same here and where the source is shown: build/pages
holds links to the files of the checkout, and mkdocs reads that. A broken link or anchor, a name of the reference that
does not exist, and any other warning end the build.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "AGENTS.md", "docs", "benchmarks/results")
NEEDED = ("mkdocs", "material", "mkdocstrings", "griffe")


def missing():
    """Return why the site cannot be built here, or None."""
    if not (ROOT / "mkdocs.yml").exists():
        return f"pyflow: the pages are in a checkout, got {ROOT} without mkdocs.yml"
    without = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if without:
        return f"pyflow: the site needs {', '.join(without)}: pip install -r requirements.txt, or pip install '.[docs]'"
    return None


def main(site="build/docs"):
    if why := missing():
        return why
    folder = Path(site).resolve()
    if folder.exists() and any(folder.iterdir()) and not (folder / "objects.inv").exists():
        return f"pyflow: the folder of the site must be new, empty or an earlier site, got {site}"
    tree = ROOT / "build" / "pages"
    shutil.rmtree(tree, ignore_errors=True)
    for page in PAGES:
        link = tree / page
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(ROOT / page)
    (tree / "site.css").symlink_to(ROOT / ".ci" / "site.css")
    # built beside the earlier site, which stays if this fails; --quiet would hide warnings from --strict
    new = folder.with_name(folder.name + ".new")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(new)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(new, ignore_errors=True)
        found = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("INFO")]
        return "\n".join(["pyflow: the site does not build:", *found])
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    print(f"open {site}/index.html")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
