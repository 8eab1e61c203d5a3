"""Lays the files of a new family of operations: python .ci/new_op.py NAME, or make new-op NAME=...

docs/new_op holds a small family, demo_op, that works in every room. Its files are written to the same places of the
tree under the new name, and three files get lines. All of it is written or nothing.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import keyword
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = "demo_op"
LONGEST = 30  # longer names do not fit into the lines of the example
CPP_KEYWORDS = """
    alignas alignof and asm auto bitand bitor bool break case catch char class compl concept const consteval constexpr
    constinit continue decltype default delete do double else enum explicit export extern false float for friend goto
    if inline int long mutable namespace new noexcept not nullptr operator or private protected public register
    requires return short signed sizeof static struct switch template this throw true try typedef typeid typename
    union unsigned using virtual void volatile while xor
"""
# what the files that get lines get; pyflow/ops/__init__.py gets an import and a name
EDITED = ("pyflow/_schemas.py", "pyflow/ops/__init__.py", "CHANGELOG.md")
SCHEMAS = (
    '    "demo_op": "(Tensor x, float scale, int event_dims) -> (Tensor y, Tensor logdet)",\n'
    '    "demo_op_backward": (\n'
    '        "(Tensor? grad_y, Tensor? grad_logdet, Tensor x, float scale, int event_dims) -> Tensor grad_x"\n'
    "    ),\n"
)
# where tests of a family are, beside its doctest, and names of those that hold every family to a rule
TESTS = "tests/test_{rooms,schemas,operators,warmup}.py tests/{ops,triton,cuda,benchmarks,packaging}"
CHECKS = "every_ or sums_have or hides_a_sum or same_lines or same_bits_on"
CHANGE = "\n- `demo_op`: as plain-torch reference, C++, Triton and CUDA."  # first of the newest version


class Refused(Exception):
    """The reason why nothing is written."""


def files(root: Path, name: str) -> dict[Path, str]:
    """Return path below root -> text of everything that the family adds or changes."""
    check(root, name)
    texts = {}
    for path in example(root):
        place = renamed(str(path.relative_to(root / "docs/new_op")), name)
        texts[Path(place)] = renamed(path.read_text(encoding="utf-8"), name)
    for path in texts:
        if (root / path).exists():
            raise Refused(f"NAME must be new, got {name!r}, but there is {path}")
    schemas, exports, changes = ((root / path).read_text(encoding="utf-8") for path in EDITED)
    exports = put_in_order(r"from \.(\w+) import ", f"from .{name} import {name}\n", exports)
    edited = (
        put_before("}\n\nTAGS = ", renamed(SCHEMAS, name), schemas),
        put_in_order(r'    "(\w+)",$', f'    "{name}",\n', exports),
        put_before("\n- ", renamed(CHANGE, name), changes),
    )
    texts |= {Path(path): text for path, text in zip(EDITED, edited, strict=True)}
    return {path: formatted(root, path, text) for path, text in texts.items()}


def example(root: Path) -> list[Path]:
    found = sorted((root / "docs/new_op").rglob(f"*{EXAMPLE}.*"))
    return [path for path in found if path.suffix in (".h", ".cpp", ".cu", ".py")]


def put_before(mark: str, lines: str, text: str) -> str:
    if mark not in text:
        raise Refused(f"the text {mark.strip()!r} must be where lines are added, and is not there any more")
    at = text.index(mark)
    return text[:at] + lines + text[at:]


def put_in_order(pattern: str, line: str, text: str) -> str:
    """Put a line among those that the pattern matches, by the name in them."""
    lines = text.splitlines(keepends=True)
    names = {i: found[1] for i, each in enumerate(lines) if (found := re.match(pattern, each))}
    if not names:
        raise Refused(f"lines like {line.strip()!r} must be where one is added, and are not there any more")
    name = re.match(pattern, line)[1]
    lines.insert(next((i for i, other in names.items() if other > name), max(names) + 1), line)
    return "".join(lines)


def renamed(text: str, name: str) -> str:
    title = "".join(part.capitalize() for part in name.split("_"))
    return text.replace(EXAMPLE, name).replace("DemoOp", title)


def check(root: Path, name: str) -> None:
    """Raise Refused unless every language and room can have the name."""
    if not name:
        raise Refused("NAME must be given, as in make new-op NAME=demo_op, got ''")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise Refused(f"NAME must be lower-case words of letters and digits joined by single underscores, got {name!r}")
    if len(name) > LONGEST:
        raise Refused(f"NAME must have at most {LONGEST} characters, got {name!r}")
    if name in {*CPP_KEYWORDS.split(), *keyword.kwlist, *keyword.softkwlist, *dir(builtins)}:
        raise Refused(f"NAME must not be a keyword of C++ or Python nor a built-in function, got {name!r}")
    names = {name, *(f"{name}_{what}" for what in ("forward", "backward", "value", "log_slope", "gradient"))}
    # what is visible in the new files: all that headers declare, and what the example uses itself
    headers = sorted((root / "csrc").rglob("*.h"))
    for path in [*headers, root / "pyflow/_schemas.py", root / "pyflow/ops/__init__.py", *example(root)]:
        if any(word in names and EXAMPLE not in word for word in identifiers(path)):
            raise Refused(f"NAME must be new, got {name!r}, which {path.relative_to(root)} uses")


def identifiers(path: Path) -> Iterator[str]:
    """Words of a source file that are not in its comments or strings, and the keys of its tables."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        yield from (token.string for token in tokens if token.type == tokenize.NAME)
        yield from re.findall(r'^    "(\w+)":', text, re.MULTILINE)
    else:
        yield from re.findall(r"\w+", re.sub(r'//.*|"[^"\n]*"', "", text))


def formatted(root: Path, path: Path, text: str) -> str:
    """Return the text as `make format` leaves it, where the formatters are installed: names differ in length."""
    commands = {
        ".py": (["ruff", "check", "--fix-only", "--quiet"], ["ruff", "format", "--quiet"]),
        ".h": (["clang-format"],), ".cpp": (["clang-format"],), ".cu": (["clang-format"],),
    }.get(path.suffix, ())  # fmt: skip
    for tool, *options in commands:
        program = tool_of(root, tool)
        if program is None:
            continue
        named = ["--stdin-filename", str(path), "-"] if tool == "ruff" else [f"--assume-filename={path}"]
        done = subprocess.run([program, *options, *named], input=text, capture_output=True, text=True, cwd=root)
        if done.returncode:
            raise Refused(f"{tool} must accept {path}, got: {done.stderr.strip().splitlines()[-1:]}")
        text = done.stdout
    return text


def tool_of(root: Path, tool: str) -> str | None:
    beside = os.pathsep.join([str(root / ".venv/bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which(tool, path=beside)


def write(root: Path, texts: dict[Path, str]) -> None:
    """Write all files; if one cannot be written, leave every file as it was."""
    before = {path: (root / path).read_bytes() if (root / path).exists() else None for path in texts}
    staged = {path: (root / path).with_name(f".{path.name}.new-op") for path in texts}
    done: list[Path] = []
    try:
        for path, text in texts.items():
            staged[path].write_text(text, encoding="utf-8")
        for path in texts:
            os.replace(staged[path], root / path)
            done.append(path)
    except BaseException:
        for path in done:
            old = before[path]
            if old is None:
                (root / path).unlink()
            else:
                (root / path).write_bytes(old)
        raise
    finally:
        for path in staged.values():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()


def main(arguments: list[str]) -> int:
    name = arguments[0] if arguments else ""
    try:
        texts = files(ROOT, name)
        write(ROOT, texts)
    except Refused as reason:
        print(f"new-op: {reason}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"new-op: every file must be writable, got: {error}; nothing is written", file=sys.stderr)
        return 1
    print("\n".join(("edited   " if str(path) in EDITED else "new      ") + str(path) for path in sorted(texts)))
    missing = [tool for tool in ("ruff", "clang-format") if tool_of(ROOT, tool) is None]
    if missing:
        print(f"not formatted, for want of {' and '.join(missing)}: make format")
    print(f"{len(texts)} files. It computes scale * softplus(x) and its log-determinant. See that it works:")
    print(f"  make build && make test ARGS='{TESTS} pyflow/ops/{name}.py -k \"{name} or {CHECKS}\"'")
    print("Then replace the mathematics; see Add an operation in CONTRIBUTING.md.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
