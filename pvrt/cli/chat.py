"""`pvrt chat`: a conversation with a model in the terminal, by the embedded engine."""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvrt.api.arguments import Dtype
from pvrt.api.engine import open_engine
from pvrt.cli.shared import Checkpoint, notice
from pvrt.errors import RunError

if TYPE_CHECKING:
    from pvrt_server.engine.engine import Engine
    from pvrt_server.engine.sampling import SamplingParams

_HELP = "Ctrl-C stops an answer, /new begins anew, /exit or Ctrl-D ends."


def chat(
    path: Checkpoint,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy (default: the model's).")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer (default: what the context holds).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: float32 on a CPU.")] = "auto",
) -> None:
    """Talk to a model. Ctrl-C stops an answer, /new begins anew, /exit or Ctrl-D ends."""
    from pvrt_server.errors import RequestError

    with open_engine(path, dtype) as engine:
        if engine.codec.template() is None:
            raise RunError(
                f"{path} has no chat template; pvrt serve answers plain completions of it"
            )
        given: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        params = replace(engine.defaults, **{k: v for k, v in given.items() if v is not None})
        beginning = [{"role": "system", "content": system}] if system else []
        messages = [*beginning]
        if sys.stdin.isatty():
            notice(_HELP)
        for line in _lines():
            if line == "/exit":
                return
            if line == "/new":
                messages = [*beginning]
                continue
            asked = [*messages, {"role": "user", "content": line}]
            try:
                answer = _answer(engine, asked, params)
            except RequestError as error:  # it is too long, or the template refuses it
                notice(f"pvrt: {error}; /new begins anew")
                continue
            messages = [*asked, {"role": "assistant", "content": answer}]


def _lines() -> Iterator[str]:
    """What is typed, line by line, to its end; of a terminal with history and editing."""
    if not sys.stdin.isatty():
        yield from filter(None, (line.strip() for line in sys.stdin))
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() edits lines with it
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


def _answer(engine: "Engine", messages: list[dict[str, Any]], params: "SamplingParams") -> str:
    """Print an answer as it comes, then its speed; the whole text, or what Ctrl-C left of it."""
    from pvrt_server.engine.sequences import TokenEvent

    parts: list[str] = []
    started, first = time.monotonic(), 0.0
    events = engine.generate(engine.codec.encode_chat(messages), params)
    reason = ""
    try:
        for event in events:
            if isinstance(event, TokenEvent):
                first = first or time.monotonic() - started
                parts.append(event.text)
                print(event.text, end="", flush=True)
                reason = event.finish_reason or ""
    except KeyboardInterrupt:
        reason = "interrupted"
    finally:
        events.close()
    print(flush=True)
    if sys.stdout.isatty():
        seconds = time.monotonic() - started - first
        rate = (len(parts) - 1) / seconds if len(parts) > 1 and seconds > 0 else 0.0
        cut = {"length": ", cut: it is as long as it may be", "interrupted": ", stopped"}
        told = f"{len(parts)} tokens, {rate:.0f} a second, the first after {first:.2f} s"
        notice(f"[{told}{cut.get(reason, '')}]")
    return "".join(parts)
