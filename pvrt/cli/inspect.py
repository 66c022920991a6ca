"""`pvrt inspect`: what a checkpoint holds."""

import json
from typing import Annotated

import typer

from pvrt.cli.shared import AsJson, Checkpoint


def inspect(
    path: Checkpoint,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also read and check every tensor.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Scheme, layers, true bits per weight, and which bytes are not quantised."""
    from pvrt.format.grid import open_checkpoint
    from pvrt.tools.report import as_text, describe

    opened = open_checkpoint(path)
    if verify:
        from pvrt.hf.declared import check_tensors, read_config_of

        check_tensors(opened, read_config_of(opened))
        opened.verify()
    report = describe(opened)
    print(json.dumps(report) if as_json else as_text(report))
