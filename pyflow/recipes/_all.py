"""Run every demo, one after another, and collect their pictures and printed text on one page.

Each demo runs in its own process. The page embeds its pictures and loads nothing, so it can be opened from disk or
sent as one file.
"""

from __future__ import annotations

import argparse
import base64
import html
import mimetypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO

from ..cli import Refused, check_writable, cpu_model, demos, installed_version

SHARED = ("seed", "device", "backend")
PICTURES = (".png", ".jpg", ".svg")

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; padding: 2rem 1.25rem;
       max-width: 72rem; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.25rem; margin: 3rem 0 .25rem; padding-top: .75rem; border-top: 1px solid #ddd; }
p { margin: .25rem 0 .75rem; color: #555; }
table { border-collapse: collapse; margin: 1.25rem 0; }
th, td { text-align: left; padding: .3rem 1.5rem .3rem 0; border-bottom: 1px solid #eee; font-weight: normal; }
th { color: #777; }
td.seconds { text-align: right; font-variant-numeric: tabular-nums; }
.failed { color: #b00020; }
img { display: block; max-width: 100%; margin: 1rem 0; border: 1px solid #eee; }
pre { font: 13px/1.45 ui-monospace, monospace; background: #f7f7f8; padding: .9rem 1rem; overflow-x: auto; }
a { color: #0a58a5; text-decoration: none; }
"""


@dataclass(frozen=True)
class Result:
    """Result of one demo: stdout (`printed`), the last lines of stderr (`said`) and the pictures."""

    name: str
    command: str
    status: int
    seconds: float
    printed: str
    said: str
    pictures: tuple[Path, ...]

    @property
    def verdict(self) -> str:
        return "ok" if self.status == 0 else f"failed, exit status {self.status}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="short runs of all demos, five minutes in total")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/demos"), metavar="DIR",
        help="folder for index.html and one folder per demo (default outputs/demos)",
    )  # fmt: skip
    for name in SHARED:
        parser.add_argument(f"--{name}", help="passed to every demo")


def run(args: argparse.Namespace) -> int:
    """Run all demos; returns the exit status: 0, or 1 if a demo failed."""
    shared = ["--quick"] * args.quick
    for name in SHARED:
        if getattr(args, name) is not None:
            shared += [f"--{name}", getattr(args, name)]
    page, results = args.out / "index.html", []
    folders = {name: args.out / name for name in demos()}
    try:
        check_writable("a folder", args.out, [args.out, *folders.values()], [page])
    except Refused as error:
        print(f"demo all: {error}", file=sys.stderr)
        return 1
    for name, folder in folders.items():
        print(f"\n== {name} ==", flush=True)
        out = str(folder / f"{name.replace('-', '_')}.png")
        results.append(play(name, [*command(name), *shared, "--out", out], folder))
        # written after each demo: an interrupted run keeps the results so far
        page.write_text(document(results, args.quick), encoding="utf-8")
    print(f"\n{summary(results)}\n\nwrote {page}")
    return max((result.status != 0 for result in results), default=0)


def command(name: str) -> list[str]:
    return [sys.executable, "-m", "pyflow", "demo", name]


def play(name: str, argv: Sequence[str], folder: Path) -> Result:
    """Run one demo in its own process and pass its output through."""
    began, clock = time.time(), time.perf_counter()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        texts = bytearray(), bytearray()
        pipes = ((process.stdout, sys.stdout, texts[0]), (process.stderr, sys.stderr, texts[1]))
        readers = [threading.Thread(target=pass_on, args=each) for each in pipes]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    seconds = time.perf_counter() - clock
    # one second of slack: file times can be coarser than time.time()
    pictures = [p for p in folder.rglob("*") if p.suffix in PICTURES and p.stat().st_mtime >= began - 1]
    printed, said = (text.decode("utf-8", "replace") for text in texts)
    last = [line.rpartition("\r")[2] for line in said.rstrip().split("\n")[-12:]]
    shown = " ".join(("pyflow demo", *argv[argv.index(name) :])) if name in argv else " ".join(argv)
    return Result(name, shown, process.returncode, seconds, printed, "\n".join(last), tuple(sorted(pictures)))


def pass_on(pipe: IO[bytes], to: TextIO, kept: bytearray) -> None:
    """Copy a pipe in chunks, not by lines: progress bars write no newlines."""
    while chunk := os.read(pipe.fileno(), 65536):
        kept += chunk
        to.write(chunk.decode("utf-8", "replace"))
        to.flush()


def summary(results: Sequence[Result]) -> str:
    width = max((len(result.name) for result in results), default=0) + 2
    lines = [f"{r.name:<{width}}{r.seconds:>8.1f} s  {len(r.pictures)} picture(s)  {r.verdict}" for r in results]
    return "\n".join([*lines, f"{'all':<{width}}{sum(r.seconds for r in results):>8.1f} s"])


def document(results: Sequence[Result], quick: bool) -> str:
    """Return the page as HTML."""
    versions = ", ".join(f"{name} {installed_version(name)}" for name in ("pyflow-kernels", "torch", "numpy"))
    size = "quick runs: they check that everything works; the results are not representative" if quick else "full runs"
    rows = "".join(
        f'<tr><td><a href="#{r.name}">{r.name}</a></td><td class="seconds">{r.seconds:.1f} s</td>'
        f"<td{'' if r.status == 0 else ' class=failed'}>{r.verdict}</td></tr>"
        for r in results
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>pyflow demos</title>\n<style>{STYLE}</style>\n'
        f"</head>\n<body>\n<h1>pyflow demos</h1>\n"
        f"<p>{size}; {html.escape(versions)}; {html.escape(cpu_model())}; {time.strftime('%Y-%m-%d %H:%M')}</p>\n"
        f"<table><tr><th>demo</th><th>time</th><th>result</th></tr>{rows}</table>\n"
        f"{''.join(map(section, results))}</body>\n</html>\n"
    )


def section(result: Result) -> str:
    parts = [f'<h2 id="{result.name}">{result.name}</h2>', f"<p><code>{html.escape(result.command)}</code></p>"]
    if result.status:
        parts.append(f'<p class="failed">{result.verdict}</p><pre>{html.escape(result.said)}</pre>')
    parts += [f'<img src="{embedded(path)}" alt="{html.escape(path.stem)}">' for path in result.pictures]
    if result.printed.strip():
        parts.append(f"<pre>{html.escape(result.printed.strip())}</pre>")
    return "\n".join(parts) + "\n"


def embedded(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
