"""`pvrt serve`: a checkpoint over the OpenAI API."""

from enum import StrEnum
from typing import Annotated

import typer

from pvrt.api.arguments import Dtype
from pvrt.cli.shared import Checkpoint


class EngineChoice(StrEnum):
    """Engines of `pvrt serve`."""

    auto = "auto"
    vllm = "vllm"
    local = "local"


def serve(
    context: typer.Context,
    path: Checkpoint,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    engine: Annotated[
        EngineChoice,
        typer.Option(help="auto is vLLM where it is installed and can run the folder."),
    ] = EngineChoice.auto,
    dtype: Annotated[Dtype, typer.Option(help="Type to compute in.")] = "auto",
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Longest prompt plus answer, in tokens (default: what fits)."),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name in the API (default: the folder's).")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="PVRT_API_KEY", help="Key that clients must send."),
    ] = None,
    allowed_hosts: Annotated[
        str | None,
        typer.Option(
            help="Names, with commas, that clients may call the server by, beside localhost and "
            "numbers (default: on 127.0.0.1 without a key none, else any)."
        ),
    ] = None,
    allowed_origins: Annotated[
        str | None,
        typer.Option(help="Origins whose pages may call the server, with commas; * for all."),
    ] = None,
    log_level: Annotated[
        str, typer.Option(help="debug, info, warning, error or critical.")
    ] = "info",
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Sequences that run at once (embedded engine: 16).")
    ] = None,
    max_num_queued_reqs: Annotated[
        int | None, typer.Option(help="Requests that run or wait (embedded engine: 256).")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Start, test the server, print a table and end.")
    ] = False,
) -> None:
    """Serve a checkpoint over the OpenAI API. Flags after -- go to vLLM as they are."""
    from pvrt_server.options import ServeOptions

    # The flags above are its fields, which know their ranges; checked before anything is imported.
    values = {name: value for name, value in context.params.items() if name != "path"}
    options = ServeOptions(**values, extra=tuple(context.args))
    from pvrt_server.launch import serve as run

    raise typer.Exit(run(path, options))
