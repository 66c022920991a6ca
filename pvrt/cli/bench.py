"""`pvrt bench`: the speed of a model on this machine, or of the GPU's kernels."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pvrt.cli.shared import AsJson, Checkpoint, Dtype, say
from pvrt.errors import RunError

if TYPE_CHECKING:
    import torch

    from pvrt.tools.bench_model import Speed


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
    dtype: Annotated[Dtype, typer.Option(help="auto: float32 on a CPU.")] = Dtype.auto,
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


def engine_speed(
    path: Path, dtype: Dtype, prompt_tokens: int, new_tokens: int, repeats: int
) -> "tuple[Speed, int, torch.device]":
    """Speed of the embedded engine on a folder, weights in bytes that a token reads, and where."""
    import torch

    from pvrt.hf.progress_bars import no_progress_bar
    from pvrt.tools.bench_model import measure
    from pvrt.tools.gpu_energy import energy_counter
    from pvrt_server.engine.engine import Engine
    from pvrt_server.engine.sampling import SamplingParams
    from pvrt_server.engine.sequences import TokenEvent
    from pvrt_server.options import ServeOptions

    # The same prompt again and again, which must be read every time.
    options = ServeOptions.model_validate({"dtype": dtype.value, "prefix_reuse": False})
    with no_progress_bar():
        loaded = Engine.load(path, options)
    with loaded as engine:
        prompt = [1 + i % 200 for i in range(prompt_tokens)]

        def generate(prompt_ids: Any, count: int) -> Any:
            params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
            events = engine.generate(prompt_ids, params)
            return (event for event in events if isinstance(event, TokenEvent))

        device = torch.device(engine.device)
        energy = energy_counter(device)
        speed = measure(generate, prompt, new_tokens, repeats, energy=energy)
        return speed, engine.bytes_per_token, device


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
