"""What the docstrings say in reStructuredText, as Markdown: formulas (as MathML), literal blocks, tables."""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

MATH = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*| *$))*)", re.MULTILINE)
LITERAL = re.compile(r"^( *)(.*?)::\n\n((?:\1 {2,}.*\n?| *\n)+)", re.MULTILINE)
TABLE = re.compile(r"^( *)(=+ (?:=+ ?)+)\n(?:.*\n)*?\1\2\n(?:.*\n)*?\1\2$", re.MULTILINE)
ROLE = re.compile(r":math:(`+)(.+?)\1")


def markdown(text: str) -> str:
    """The same docstring in Markdown."""

    def formula(match: re.Match[str]) -> str:
        tex = " ".join(match[2].split())
        return f'{match[1]}<div class="formula">{convert(tex, display="block")}</div>\n\n'

    def literal(match: re.Match[str]) -> str:
        indent, before = match[1], match[2].rstrip()
        lines = match[3].rstrip().splitlines()
        cut = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        body = [indent + line[cut:] if line.strip() else "" for line in lines]
        head = f"{indent}{before}:\n\n" if before else ""
        return head + "\n".join([f"{indent}```text", *body, f"{indent}```"]) + "\n\n"

    def table(match: re.Match[str]) -> str:
        return "\n".join([f"{match[1]}```text", *match[0].splitlines(), f"{match[1]}```"])

    text = ROLE.sub(lambda match: convert(match[2]), MATH.sub(formula, text))
    return TABLE.sub(table, LITERAL.sub(literal, text))


class FromRst(griffe.Extension):
    """Applied to every object that is read."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called by griffe, with each."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
