"""How the API reference reads the docstrings: what is no section of Google's style is still shown as it is meant."""

from __future__ import annotations

import re

import griffe

GROUP = re.compile(r"^Parameters that control .*:$")
FIELD = re.compile(r"^    (\w+) (\(.*)$")


def markdown(docstring: str) -> str:
    """`Parameters that control ...:` becomes a heading, and each field under it an item of a list."""
    lines, inside = [], False
    for line in docstring.splitlines():
        if GROUP.match(line):
            inside = True
            line = f"**{line}**\n"
        elif line and not line.startswith(" "):
            inside = False
        elif inside:
            line = FIELD.sub(r"* **`\1`** \2", line)
        lines.append(line)
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_):
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
