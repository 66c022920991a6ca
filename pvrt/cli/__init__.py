"""The command line. The only module that looks up; every import is made when it is needed."""

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import pvrt
from pvrt.errors import PvrtError, RunError
from pvrt.instruction_set import check_choice

app = typer.Typer(
    name="pvrt",
    help="Compress language models to two bits per weight, measure them and serve them.\n\n"
    "Start with: pvrt tune MODEL -o OUT, then pvrt serve OUT.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _BenchGroup(TyperGroup):
    """`pvrt bench DIR` is `pvrt bench model DIR`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Anything but the name of a command is for `model`."""
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["model", *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(
    cls=_BenchGroup,
    no_args_is_help=True,
    help="Measure a model, or (pvrt bench kernels) the kernels of this GPU.",
)
app.add_typer(bench_app, name="bench")

EXIT_PROBLEM = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class Effort(StrEnum):
    """Presets of `pvrt tune`."""

    quick = "quick"
    standard = "standard"
    best = "best"


class EngineChoice(StrEnum):
    """Engines of `pvrt serve`."""

    auto = "auto"
    vllm = "vllm"
    local = "local"


class Activations(StrEnum):
    """Where `pvrt tune` keeps hidden states."""

    auto = "auto"
    memory = "memory"
    disk = "disk"


class Dtype(StrEnum):
    """Floating types to compute in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Checkpoint = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


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


@app.command()
def tune(
    model: Annotated[
        str, typer.Argument(help="A model folder, a .gguf file, or a hub id like org/name.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the checkpoint.")],
    scheme: Annotated[
        str | None,
        typer.Option(
            help="Codebooks x bits g group: 2x8g8 is 2 bits, 3x8g8 is 3; or a scalar grid: w4g128 "
            "is 4 bits in groups of 128, w4g128s symmetric. [default: 2x8g8]"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: a .txt/.jsonl file, a folder, or a Hugging Face dataset "
            "(name or name:split). Without it the model writes its own."
        ),
    ] = None,
    effort: Annotated[Effort, typer.Option(help="Time against quality.")] = Effort.standard,
    config: Annotated[
        Path | None,
        typer.Option(help="A YAML or JSON file with settings of the recipe, over --effort."),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(
            "--for", help="Time in all, like 40m or 2h30m: the best checkpoint by then is left."
        ),
    ] = None,
    pv: Annotated[
        bool, typer.Option("--pv/--no-pv", help="PV-Tuning after calibration (from --effort).")
    ] = True,
    samples: Annotated[
        int | None, typer.Option(help="Calibration windows (from --effort).")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window (from --effort).")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of everything random. [default: 0]")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.")
    ] = "auto",
    activations: Annotated[
        Activations,
        typer.Option(help="Where hidden states are kept; auto takes memory if they fit."),
    ] = Activations.auto,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", "--continue", help="Go on with the run in OUT; fail if there is none."
        ),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard the run in OUT and start again.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start although the plan says that it does not fit.")
    ] = False,
) -> None:
    """Compress a model. Interrupt it at any time: the same command goes on where it stopped."""
    from pvrt_tune import parallel
    from pvrt_tune.pipeline import tune as run
    from pvrt_tune.settings import TuneJob
    from pvrt_tune.settings.options import Changes, build

    if resume and restart:
        raise RunError("--resume and --restart exclude each other; give one of them")
    changes = Changes(scheme, samples, length, seed, pv)
    say = _say if parallel.speaks() else lambda line: None
    recipe, limit_seconds = build(effort.value, config, changes, limit, say)
    job = TuneJob(
        model,
        out,
        recipe,
        data,
        _device(device),
        activations.value,
        seconds=limit_seconds,
        resume=resume,
        restart=restart,
        force=force,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        checkpoint = run(job, _say)
    except KeyboardInterrupt:
        if parallel.speaks():
            _say(f"stopped; what is finished is in {out}. The same command goes on from there.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if parallel.speaks():
        from pvrt.tools.report import as_text, describe

        print(as_text(describe(checkpoint), shown=3))
        print(f"next: pvrt serve {out}")


def _device(choice: str) -> str:
    from pvrt.device import checked_device

    return checked_device(choice)


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(help="A model folder (config.json is enough), a .gguf file, or a hub id."),
    ],
    scheme: Annotated[str, typer.Option(help="As for tune.")] = "2x8g8",
    data: Annotated[
        bool,
        typer.Option("--data/--no-data", help="Whether tune will get --data, or sample its text."),
    ] = False,
    effort: Annotated[Effort, typer.Option(help="As for tune.")] = Effort.standard,
    samples: Annotated[int | None, typer.Option(help="As for tune.")] = None,
    length: Annotated[int | None, typer.Option(help="As for tune.")] = None,
    device: Annotated[
        str, typer.Option(help="As for tune; a GPU may be planned for where there is none.")
    ] = "auto",
    host_memory: Annotated[
        float | None, typer.Option(min=0, help="GB of host memory (default: what is free here).")
    ] = None,
    device_memory: Annotated[
        float | None, typer.Option(min=0, help="GB of GPU memory (default: what is free here).")
    ] = None,
    activations: Annotated[Activations, typer.Option(help="As for tune.")] = Activations.auto,
    as_json: AsJson = False,
) -> None:
    """Say what tune would need and give: memory, disk, time, size. Reads config.json alone."""
    from pvrt_tune.plan.on_machine import plan_here
    from pvrt_tune.settings import TuneJob
    from pvrt_tune.settings.options import Changes, build

    recipe, _ = build(effort.value, None, Changes(scheme, samples, length))
    report, problem = plan_here(
        TuneJob(model, Path(), recipe, device=device, activations=activations.value),
        sampled=not data,
        host_memory=host_memory,
        device_memory=device_memory,
    )
    if as_json:
        print(json.dumps({**report, "problem": problem}))
        return
    from pvrt_tune.plan.report import as_text

    print(as_text(report))
    print("this run does not fit: " + problem if problem else "this run fits")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, or any model tune takes.")],
    text: Annotated[
        Path | None,
        typer.Option(help="A text file. Without it: the language reference of this Python."),
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    windows: Annotated[
        int | None, typer.Option(min=1, help="At most this many windows (default: all).")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: float32 on a CPU.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Perplexity on held-out text (non-overlapping windows)."""
    from pvrt.tools import perplexity as ev

    place = _device(device)
    name = str(text) if text is not None else "the Python language reference"
    body = ev.read_text(text) if text is not None else ev.default_text()
    loaded, tokenizer = _load_any(model, dtype, place)

    started = last = time.monotonic()

    def progress(done: int, total: int, value: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 10 or done == total:
            left = (now - started) / done * (total - done)
            print(f"window {done}/{total}  {value:.3f}  {left:.0f} s left", file=sys.stderr)
            last = now

    tokens = ev.windows(body, tokenizer, context, windows)
    result = ev.perplexity(loaded, tokens, name, progress)
    if as_json:
        print(json.dumps({"model": model, **asdict(result)}))
    else:
        print(
            f"perplexity {result.value:.4f} @ {result.context} tokens, {result.windows} windows "
            f"of {result.text}"
        )


def _load_any(model: str, dtype: Dtype, device: str) -> tuple[Any, Any]:
    """A dense model or a checkpoint, decoded once, with its tokenizer."""
    import torch

    from pvrt.format.aqlm import read_config

    path = Path(model)
    chosen = dtype.value
    if dtype is Dtype.auto:
        chosen = "float32" if device == "cpu" else "auto"
    if path.is_dir() and read_config(path).get("quantization_config"):
        from transformers import AutoTokenizer

        loaded = pvrt.load(path, dense=True, dtype=chosen)
        return loaded.to(device), AutoTokenizer.from_pretrained(path)
    from pvrt_tune.data.source_model import load_source

    source = load_source(model)
    wanted = None if chosen == "auto" else getattr(torch, chosen)
    return source.dense(wanted, device), source.tokenizer


@app.command()
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
        opened.verify()
    report = describe(opened)
    print(json.dumps(report) if as_json else as_text(report))


@bench_app.command("model")
def bench(
    path: Checkpoint,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Runs after one warm-up.")] = 5,
    dtype: Annotated[Dtype, typer.Option(help="auto: float32 on a CPU.")] = Dtype.auto,
    as_json: AsJson = False,
) -> None:
    """Tokens per second of the embedded engine, one request at a time (medians)."""
    from pvrt.tools.bench_model import measure, memory
    from pvrt_server.engine.engine import Engine
    from pvrt_server.engine.sampling import SamplingParams
    from pvrt_server.engine.sequences import TokenEvent
    from pvrt_server.options import ServeOptions

    # The same prompt again and again, which must be read every time.
    options = ServeOptions.model_validate({"dtype": dtype.value, "prefix_reuse": False})
    with Engine.load(path, options) as engine:
        prompt = [1 + i % 200 for i in range(prompt_tokens)]

        def generate(prompt_ids: Any, count: int) -> Any:
            params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
            events = engine.generate(prompt_ids, params)
            return (event for event in events if isinstance(event, TokenEvent))

        speed = measure(generate, prompt, new_tokens, repeats)
        read = None
        if engine.device == "cpu":
            read = memory(speed.decode_tokens_per_second, engine.bytes_per_token)
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
            "this machine reads from memory"
        )


@bench_app.command("kernels")
def bench_kernels(
    path: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A checkpoint, for its layers.")
    ] = None,
    scheme: Annotated[str, typer.Option(help="Without DIR: scheme of common layers.")] = "2x8g8",
    tune: Annotated[
        bool, typer.Option("--tune", help="Try all kernels; this card then uses the fastest.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Time of every layer's GPU kernel, against copying its codes and against a dense weight."""
    from pvrt.tools.bench_kernels import run

    records = run(path, scheme, tune, (lambda line: None) if as_json else _say)
    if as_json:
        print(json.dumps(records))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})
def serve(
    context: typer.Context,
    path: Checkpoint,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    engine: Annotated[
        EngineChoice, typer.Option(help="auto is vLLM where it is installed.")
    ] = EngineChoice.auto,
    dtype: Annotated[Dtype, typer.Option(help="Type to compute in.")] = Dtype.auto,
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


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Name what is missing or mismatched here, each with the command that mends it."""
    from pvrt.tools.doctor import examine

    findings = list(examine())
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            print(f"{finding.level:8} {finding.name:14} {finding.text}")
            if finding.remedy and finding.level != "ok":
                print(f"{'':23} -> {finding.remedy}")
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(EXIT_PROBLEM)


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> NoReturn:
    """Run the command line; user errors are one sentence on stderr and exit code 2."""
    # OpenMP's waiting threads spin by default: with one other busy process on 2 cores a sort took
    # 280 ms instead of 4. Sleeping instead costs a few percent on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except PvrtError as error:
        print(f"pvrt: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)
