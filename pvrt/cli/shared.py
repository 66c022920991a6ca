"""What several commands share: arguments and options, exit codes, and a line for the reader."""

import sys
from pathlib import Path
from typing import Annotated

import typer

EXIT_PROBLEM = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


Checkpoint = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def say(line: str) -> None:
    """Print a line of progress at once."""
    print(line, flush=True)


def notice(line: str) -> None:
    """Print a line beside the result, which may be JSON."""
    print(line, file=sys.stderr)
