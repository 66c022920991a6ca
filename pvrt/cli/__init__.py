"""The command line, one module a command. Only these look up to tune and server, when they run."""

import os
import sys
from typing import Annotated, NoReturn

import typer

import pvrt
from pvrt.cli import bench, chat, compare, doctor, inspect, plan, serve, tune
from pvrt.cli import eval as evaluation
from pvrt.cli.shared import EXIT_INTERRUPTED, EXIT_USAGE
from pvrt.errors import PvrtError
from pvrt.instruction_set import check_choice

app = typer.Typer(
    name="pvrt",
    help="Compress language models to two bits per weight, measure them and serve them.\n\n"
    "Start with: pvrt tune MODEL -o OUT, then pvrt serve OUT.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("tune")(tune.tune)
app.command("plan")(plan.plan)
app.command("eval")(evaluation.evaluate)
app.command("compare")(compare.compare)
app.command("inspect")(inspect.inspect)
app.add_typer(bench.app, name="bench")
app.command("serve", context_settings={"allow_extra_args": True})(serve.serve)
app.command("chat")(chat.chat)
app.command("doctor")(doctor.doctor)


def _version(value: bool) -> None:
    if value:
        print(f"pvrt {pvrt.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    check_choice()


def main() -> NoReturn:
    """Run the command line; user errors are one sentence on stderr and exit code 2."""
    # OpenMP's waiting threads spin long by default, which is ruinous on a busy machine: with one
    # other process on 2 cores a sort took 280 ms instead of 4. Sleeping at once makes the fit of a
    # layer take twice its time on an idle one. Spinning shortly does neither.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except PvrtError as error:
        print(f"pvrt: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)
