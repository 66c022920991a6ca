"""`pvrt bench`: the speed of a model on this machine, or of the GPU's kernels."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pvrt.api.arguments import Dtype
from pvrt.api.engine import engine_speed
from pvrt.cli.shared import AsJson, Checkpoint, say
from pvrt.errors import RunError


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
    path: Checkpoint,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Runs after one warm-up.")] = 5,
    dtype: Annotated[Dtype, typer.Option(help="auto: float32 on a CPU.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Tokens per second of the embedded engine, one request at a time (medians)."""
    from pvrt.tools.bench_model import memory

    speed, bytes_per_token, device = engine_speed(path, dtype, prompt_tokens, new_tokens, repeats)
    read = memory(speed.decode_tokens_per_second, bytes_per_token, device)
    if as_json:
        more = {} if read is None else asdict(read)
        print(json.dumps({"model": str(path), **asdict(speed), **more}))
        return
    low, high = speed.decode_spread
    print(
        f"{path}: prefill {speed.prefill_tokens_per_second:.1f} tokens/s (first token after "
        f"{speed.ttft_seconds * 1000:.0f} ms for {prompt_tokens}), decode "
        f"{speed.decode_tokens_per_second:.1f} tokens/s ({low:.1f} to {high:.1f}, "
        f"{repeats} runs of {new_tokens})"
    )
    if read is not None:
        print(
            f"{read.bytes_per_token / 1e6:.0f} MB of weights per token: "
            f"{read.bandwidth_fraction:.0%} of the {read.bytes_per_second / 1e9:.1f} GB/s that "
            f"this {'machine reads from' if device.type == 'cpu' else 'GPU copies in its'} memory"
        )
    if speed.joules_per_token is not None:
        print(f"{speed.joules_per_token:.3g} J of the GPU per new token, prompts included")


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
