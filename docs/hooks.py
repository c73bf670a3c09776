"""What MkDocs asks while it builds the site: pages and files of the repository that a page links to come along.

Links in the pages are relative paths in the repository, so that they work there as well. A file outside of docs/ is
shown below ``repository/`` of the site, pages rendered, other files as they are; a link to a folder becomes its name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
TEST = re.compile(r"(?<=<td>)tests/[^<\s]+::\w+(?=</td>)")
HEADLESS = re.compile(r"(?<!!)\[([^\[\]]*)\]\(([^)\s]+)\)")
ELSEWHERE = "repository"


def place(path: Path) -> str:
    """Where a file of the repository is in the site's sources."""
    inside = path.is_relative_to(DOCS)
    return path.relative_to(DOCS).as_posix() if inside else f"{ELSEWHERE}/{path.relative_to(ROOT).as_posix()}"


def target(link: str, page: Path) -> Path | None:
    """The file or folder of the repository that a link on a page means; None for any other link."""
    name = link.split("#")[0]
    path = (page.parent / name).resolve()
    return path if name and "://" not in name and path.is_relative_to(ROOT) and path.exists() else None


def on_files(files: Files, config: Any) -> Files:
    """Add what is linked to, page by page."""
    pages = sorted(DOCS.rglob("*.md"))
    seen = set(pages)
    while pages:
        page = pages.pop()
        for _, link, _ in LINK.findall(page.read_text(encoding="utf-8")):
            path = target(link, page)
            if path is None or path in seen or path.is_dir() or path.is_relative_to(DOCS):
                continue
            seen.add(path)
            files.append(File.generated(config, place(path), abs_src_path=str(path)))
            if path.suffix == ".md":
                pages.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the links that leave docs/, or lead into it, into links of the site."""
    source = page.file.src_uri
    inside = not source.startswith(f"{ELSEWHERE}/")
    path = DOCS / source if inside else ROOT / source.removeprefix(f"{ELSEWHERE}/")

    def rewritten(match: re.Match[str]) -> str:
        found = target(match[2], path)
        if found is None or found.is_dir():
            return match[0]
        _, mark, anchor = match[2].partition("#")
        return f"{match[1]}{os.path.relpath(place(found), Path(source).parent)}{mark}{anchor}{match[3]}"

    def unlinked(match: re.Match[str]) -> str:
        found = target(match[2], path)
        return match[1] if found is not None and found.is_dir() else match[0]

    return _outside_fences(markdown, lambda text: LINK.sub(rewritten, HEADLESS.sub(unlinked, text)))


def on_page_content(html: str, **_: Any) -> str:
    """Let the long names of tests in tables break into lines."""
    return TEST.sub(lambda match: re.sub("(/|::|_)", r"\1<wbr>", match[0]), html)


def _outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else change(part) for part in parts)
