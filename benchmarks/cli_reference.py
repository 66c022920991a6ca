"""Write docs/cli.md from the commands themselves: `python benchmarks/cli_reference.py`.

With --check nothing is written, and the exit code says whether the page is up to date.
"""

import sys
from pathlib import Path

import typer.main
from typer.cli import get_docs_for_click

from pvrt.cli import app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"


def reference() -> str:
    """All commands with their arguments and options, in Markdown."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="pvrt")
    return f"{text.strip()}\n".replace("# `pvrt`\n", "# Command line\n", 1)


def main() -> None:
    """Write the page, or check it."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(reference(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != reference():
        sys.exit("docs/cli.md is stale: python benchmarks/cli_reference.py")


if __name__ == "__main__":
    main()
