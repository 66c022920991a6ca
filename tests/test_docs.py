"""The pages: commands that there are, Python that compiles, and a site that builds strictly."""

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

from tests.fixtures.commands import check_command, shown
from tests.fixtures.imports import ROOT

DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "examples" / "README.md"]
#: What a browser fetches by itself.
LOADED = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(https?:[^\"' >]+)")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pages
def test_every_command_that_a_page_shows_is_one(page: Path) -> None:
    for words in shown(page.read_text(encoding="utf-8")):
        check_command(words)


def test_a_command_that_is_none_is_found() -> None:
    page = "```\nPVRT=1 pvrt tune MODEL -o out --bit 3   # a comment --x\npvrt serves out\n```\n"
    first, second = shown(page)
    with pytest.raises(AssertionError, match="pvrt tune has no --bit"):
        check_command(first)
    with pytest.raises(AssertionError, match="no command pvrt serves"):
        check_command(second)
    check_command(["serve", "out", "--port", "1", "--", "--enforce-eager"])
    check_command(["bench", "kernels", "--cpu"])


@pages
def test_python_that_a_page_shows_compiles(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^ *```python\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        ast.parse(dedent(block))


def test_every_page_is_in_the_navigation() -> None:
    """The builder would only mention it."""
    listed: set[str] = set()

    def walk(node: object) -> None:
        if isinstance(node, str):
            listed.add(node)
        elif isinstance(node, list | dict):
            for child in node if isinstance(node, list) else node.values():
                walk(child)

    walk(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert {page.name for page in DOCS.glob("*.md")} == {
        name for name in listed if not name.startswith("repository/")
    }


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip("the group docs is not installed: pip install --group docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(
            r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(https?:[^\"' >]+)", text
        )
        assert not loaded, (page, loaded)
    api = (tmp_path / "python.html").read_text(encoding="utf-8")
    assert 'id="pvrt.tune"' in api and "keep_embeddings" in api
    assert (tmp_path / "repository" / "benchmarks" / "results" / "pareto.png").is_file()
