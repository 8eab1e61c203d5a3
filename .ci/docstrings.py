"""Docstrings as Markdown, for the reference of the site.

Docstrings are plain text in sections. Sections become labels, arguments become lists, examples become code, words that
Markdown would take for markup are escaped, and a public name in backticks becomes a link to its entry.
"""

import re
from pathlib import Path

import griffe

SECTION = re.compile(r"(Args|Returns|Raises|Notes|Source|Example|Attributes):")
LISTS = ("Args", "Raises", "Attributes")
# `name: text` at the margin of a section; more of the text is indented
ITEM = re.compile(r"((?:\*{0,2}\w+|\.\.\.)(?:, (?:\*{0,2}\w+|\.\.\.))*): (.*)")
ENTRIES = re.compile(r"^::: (\S+)", re.MULTILINE)


def entries():
    """Return public name -> entry of the reference; of a function that hides the module of its name it ends twice."""
    pages = (Path(__file__).parent.parent / "docs" / "reference").glob("*.md")
    paths = [path for page in pages for path in ENTRIES.findall(page.read_text())]
    return {re.sub(r"(\.\w+)\1$", r"\1", path): path for path in paths}


def escaped(text, known=()):
    """Return plain text as Markdown; what stands in backticks is code."""
    parts = re.split(r"(`[^`]+`)", text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            part = re.sub(r"([\\*_\[\]#|{}~])", r"\\\1", part)
            part = part.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        elif (name := part[1:-1]) in known:
            part = f"[{part}][{known[name]}]"
        parts[i] = part
    return "".join(parts)


def listed(lines, known):
    """Yield the items of a section as a list; lines that belong to no item are paragraphs."""
    for line in lines:
        item = ITEM.fullmatch(line)
        if item:
            names = ", ".join(f"`{name}`" for name in item[1].split(", "))
            yield f"- {names}: {escaped(item[2], known)}"
        else:
            yield ("" if line[:1] == " " else "\n" * bool(line)) + escaped(line, known)


def markdown(text, known=()):
    """Return a docstring as Markdown."""
    done, lines = [], text.splitlines()
    while lines:
        line = lines.pop(0)
        section = SECTION.fullmatch(line)
        if not section:
            done.append(escaped(line, known))
            continue
        body = []
        while lines and (not lines[0] or lines[0][0] == " "):
            body.append(lines.pop(0)[4:])
        while body and not body[-1]:
            body.pop()
        name = section[1]
        done += ["", f"**{name}**", ""]
        if name == "Example":
            done += ["```pycon", *body, "```"]
        elif name in LISTS or (name == "Returns" and ITEM.fullmatch(body[0])):
            done += listed(body, known)
        else:
            done += [escaped(line, known) for line in body]
        done.append("")
    return "\n".join(done)


class Docstrings(griffe.Extension):
    def __init__(self):
        self.known = entries()

    def on_instance(self, *, obj, **_):
        if obj.docstring:
            known, package = dict(self.known), ".".join(obj.path.split(".")[:2]) + "."
            # a short name in a method may be that of another method
            if obj.parent is None or not obj.parent.is_class:
                known |= {name.removeprefix(package): path for name, path in known.items() if name.startswith(package)}
            obj.docstring.value = markdown(obj.docstring.value, known)
