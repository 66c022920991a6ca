"""Hooks of mkdocs: what pages of docs/ link to outside of it is part of the site, too.

Pages link as they do in a repository: `../CONTRIBUTING.md`, `../benchmarks/results/pareto.png`. The
site has these files below `repository/`, and the links are turned there.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "repository"
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the project's own pages, every file that a page links to, and what those link to."""
    ahead = [Path("docs") / file.src_uri for file in files.documentation_pages()]
    found = {Path(file.name) for file in ROOT.glob("*.md")}
    ahead += found
    while ahead:
        page = ahead.pop()
        text = (ROOT / page).read_text(encoding="utf-8")
        targets = {_target(page, match["path"]) for match in _LINK.finditer(text)}
        new = {target for target in targets if target and target.parts[0] != "docs"} - found
        found |= new
        ahead += (target for target in new if target.suffix == ".md")
    for path in sorted(found):
        file = File.generated(config, f"{FOLDER}/{path}", abs_src_path=str(ROOT / path))
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links between docs/ and the rest of the repository."""
    uri = Path(page.file.src_uri)
    inside = uri.parts[0] != FOLDER
    here = Path("docs") / uri if inside else uri.relative_to(FOLDER)
    depth = "../" * (len(uri.parts) - 1)

    def turned(match: re.Match[str]) -> str:
        target, anchor = _target(here, match["path"]), match["anchor"] or ""
        if target is None:
            return match[0]
        if target.parts[0] == "docs":
            return f"{depth}{target.relative_to('docs')}{anchor}"
        return f"{depth}{FOLDER}/{target}{anchor}"

    return _LINK.sub(turned, markdown)


def _target(page: Path, link: str) -> Path | None:
    """The file that a page's link means, from the root; None where it is none of the repository."""
    found = (ROOT / page.parent / link).resolve()
    return found.relative_to(ROOT) if found.is_file() and found.is_relative_to(ROOT) else None
