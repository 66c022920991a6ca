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
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="As --verify, and compute: layers by this machine's kernels, and the greedy "
            "tokens that pvrt.json holds.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Scheme, layers, true bits per weight, and which bytes are not quantised."""
    from pvrt.format.grid import open_checkpoint
    from pvrt.tools.report import as_text, describe

    opened = open_checkpoint(path)
    if verify or deep:
        from pvrt.hf.declared import check_tensors, read_config_of

        check_tensors(opened, read_config_of(opened))
        opened.verify()
    report = describe(opened)
    lines = [as_text(report)]
    if deep:
        from pvrt.tools import deep as computed

        report["deep"] = found = computed.check_deep(opened)
        lines.append(computed.as_text(found))
    print(json.dumps(report) if as_json else "\n".join(lines))
