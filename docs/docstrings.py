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
        indent, rows = match[1], []
        columns = [slice(*run.span()) for run in re.finditer("=+", match[0].splitlines()[0])]
        columns[-1] = slice(columns[-1].start, None)
        for line in match[0].splitlines():
            cells = [line[column].strip() for column in columns]
            if not line.startswith(f"{indent}="):
                if line[columns[0]].strip():
                    rows.append(cells)
                else:  # a row that goes on
                    rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
        head, *body = (f"{indent}| {' | '.join(cells)} |" for cells in rows)
        return "\n".join([head, f"{indent}|{'---|' * len(columns)}", *body]).replace("``", "`")

    text = ROLE.sub(lambda match: convert(match[2]), MATH.sub(formula, text))
    return TABLE.sub(table, LITERAL.sub(literal, text))


class FromRst(griffe.Extension):
    """Applied to every object that is read."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called by griffe, with each."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
