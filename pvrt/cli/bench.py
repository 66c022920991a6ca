"""`pvrt bench`: the speed of a model on this machine, or of the GPU's kernels."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from pvrt.api.arguments import Dtype
from pvrt.cli.shared import AsJson, say
from pvrt.errors import RunError

Form = Literal["md", "json", "csv"]


class _BenchGroup(TyperGroup):
    """`pvrt bench DIR` is `pvrt bench model DIR`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Anything but the name of a command is for `model`."""
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["model", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_BenchGroup,
    no_args_is_help=True,
    help="Measure a model, or (pvrt bench kernels) the kernels of this GPU or CPU.",
)


@app.command("model")
def model(
    paths: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders of checkpoints or dense models.")
    ],
    prompt_tokens: Annotated[
        str, typer.Option("--prompt-tokens", "-p", help="Lengths of prompts, with commas; 0: none.")
    ] = "128",
    new_tokens: Annotated[
        str, typer.Option("--new-tokens", "-n", help="Lengths of answers, with commas; 0: none.")
    ] = "64",
    depth: Annotated[
        str, typer.Option("--depth", "-d", help="Tokens that are there before, with commas.")
    ] = "0",
    repeats: Annotated[int, typer.Option("--repeats", "-r", min=1, help="Runs of a test.")] = 5,
    dtype: Annotated[Dtype, typer.Option(help="auto: float32 on a CPU.")] = "auto",
    form: Annotated[Form, typer.Option("--output", "-o", help="Form of the table.")] = "md",
    as_json: AsJson = False,
) -> None:
    """Tokens per second of the embedded engine, one request at a time: llama-bench's table.

    t/s is the median run, p10 and p90 are of runs; ms is the time to the first token (pp) or from
    token to token (tg). memory is the share of this machine's bandwidth that reading the weights
    takes.
    """
    import torch

    from pvrt.api.engine import engine_speed
    from pvrt.format.grid import open_folder
    from pvrt.tools.bench_model import Case, memory
    from pvrt.tools.bench_rows import as_text, row
    from pvrt.tools.sizes import Sizes

    prompts, answers = _counts("-p", prompt_tokens), _counts("-n", new_tokens)
    tests = [
        test
        for before in _counts("-d", depth)
        for test in (
            *(Case(prompt=count, depth=before) for count in prompts if count),
            *(Case(new=count, depth=before) for count in answers if count),
        )
    ]
    if not tests:
        raise RunError("-p 0 -n 0 leaves nothing to measure")
    sizes = {path: Sizes.of(open_folder(path)) for path in paths}  # all are read before one runs
    rows = []
    for path, size in sizes.items():
        found = engine_speed(path, dtype, tests, repeats)
        columns = {
            "model": str(path),
            "model_size": size.file_bytes,
            "model_n_params": size.weights,
            "backend": found.device.type.upper(),
            "n_threads": torch.get_num_threads(),
        }
        for speed in found.speeds:
            rate = speed.tokens_per_second
            read = memory(rate, found.bytes_per_token, found.device) if speed.test.new else None
            rows.append(row(columns, speed, read))
    print(as_text(rows, "json" if as_json else form))


def _counts(option: str, text: str) -> list[int]:
    """Whole numbers between commas. Raises RunError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise RunError(f"{option} {text} is not a list of whole numbers like 128 or 128,512")
    return [int(part) for part in parts]


@app.command("kernels")
def kernels(
    path: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A checkpoint, for its layers.")
    ] = None,
    scheme: Annotated[str, typer.Option(help="Without DIR: scheme of common layers.")] = "2x8g8",
    tune: Annotated[
        bool, typer.Option("--tune", help="Try all kernels; this card then uses the fastest.")
    ] = False,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="This CPU's kernels, in every instruction set it has.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Time of every layer's GPU kernel, against copying its codes and against a dense weight."""
    from pvrt.tools import bench_cpu_kernels, bench_kernels

    tell = (lambda line: None) if as_json else say
    if cpu and tune:
        raise RunError("--tune is for a GPU: the CPU's kernels are chosen by the library")
    if cpu:
        records = bench_cpu_kernels.run(path, scheme, tell)
    else:
        records = bench_kernels.run(path, scheme, tune, tell)
    if as_json:
        print(json.dumps(records))
