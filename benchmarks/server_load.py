"""A server under load, and beside `transformers serve` -> benchmarks/results/server_load.json.

    python benchmarks/server_load.py CHECKPOINT [--dense FOLDER] [--engine local] [--seconds 300]

Three parts, each of which can be left out and then stays as it was stored:

--seconds: `--streams` clients stream completions from one server for so long. Errors, time to first
token, time between tokens, and the memory of the server's processes over time.

--prompt: a short request while a prompt of so many tokens is read. Its first token, and the time
between the others.

--repeats: tokens per second, and per CPU second of the server, at 1, 4 and 16 requests at once. Of
the embedded engine on CHECKPOINT and, with --dense, on a dense model, and of `transformers serve`
on that, one after the other.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import needs
import psutil  # type: ignore[import-untyped]
import results
import serving
from machine import describe
from processes import cpu_seconds, family
from server_conformance import KEY, served
from tables import renew
from tokenizers import Tokenizer

from pvrt.format.grid import open_folder

WORDS = ("the", "river", "old", "tower", "light", "stone", "garden", "winter", "road", "voice")
QUIET = ("--served-model-name", "model", "--log-level", "warning")
AT_ONCE = (1, 4, 16)
TOKENS = 32


@dataclass
class Measured:
    """What the streams of one phase gave. Times in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tokens: int = 0


async def stream(client: httpx.AsyncClient, body: dict[str, Any], into: Measured) -> None:
    """One streamed completion; whatever is not a whole answer is an error."""
    started = last = time.perf_counter()
    count, finished, text = 0, False, ""
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise ValueError(f"{response.status_code} {(await response.aread())[:200]!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(str(event["error"]))
                choice = event["choices"][0] if event["choices"] else {}
                finished = finished or bool(choice.get("finish_reason"))
                if event.get("usage"):
                    into.tokens += event["usage"]["completion_tokens"]
                if choice.get("text"):
                    text += choice["text"]
                    now = time.perf_counter()
                    (into.between if count else into.first).append(now - last)
                    last, count = now, count + 1
        if not finished:
            raise ValueError("the stream ended without a finish_reason")
        into.texts.append(text)
    except Exception as error:  # counted, whatever it is
        into.errors.append(f"{type(error).__name__}: {error}"[:200])
        # A server that refuses at once would be asked a thousand times a second.
        await asyncio.sleep(max(0.0, 0.5 - (time.perf_counter() - started)))


def request(number: int) -> dict[str, Any]:
    """A completion of random length: short and long prompts and answers mixed, all different."""
    chance = random.Random(number)
    prompt = " ".join(chance.choices(WORDS, k=chance.choice((8, 30, 120))))
    return {
        "model": "model",
        "prompt": f"{number} {prompt}",
        "max_tokens": chance.choice((16, 48, 96)),
        "temperature": 0.8,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


async def sustain(url: str, streams: int, seconds: float) -> Measured:
    """Keep so many streams busy for so long."""
    result, end, numbers = Measured(), time.monotonic() + seconds, iter(range(10**9))
    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=600, limits=limits
    ) as client:

        async def worker() -> None:
            while time.monotonic() < end:
                await stream(client, request(next(numbers)), result)

        await asyncio.gather(*(worker() for _ in range(streams)))
    return result


def resident(pid: int) -> int:
    """Resident bytes of a process and its children."""
    total = 0
    for each in family(psutil.Process(pid)):
        try:
            total += each.memory_info().rss
        except psutil.Error:
            continue
    return total


def slope(points: list[tuple[float, int]]) -> float:
    """Growth in bytes per minute by the Theil-Sen estimator over the second half of the points.

    The first half warms up: caches fill and allocators grow to what the load needs.
    """
    late = points[len(points) // 2 :]
    rises = [(b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(late) for b in late[i + 1 :]]
    return 60 * statistics.median(rises) if rises else 0.0


def percentiles(values: list[float]) -> dict[str, float]:
    """Median and 95th percentile in milliseconds."""
    ordered = sorted(values)
    places = {"p50_ms": 0.5, "p95_ms": 0.95}
    return {
        name: round(1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)], 1)
        for name, share in places.items()
        if ordered
    }


def load(checkpoint: Path, engine: str, streams: int, seconds: float) -> dict[str, Any]:
    """One server under so many streams."""
    with served(checkpoint, engine, *QUIET) as server:
        points: list[tuple[float, int]] = []
        process, started = psutil.Process(server.pid), time.monotonic()
        before = cpu_seconds(process)

        async def run() -> Measured:
            async def watch() -> None:
                while True:
                    points.append((time.monotonic() - started, resident(server.pid)))
                    await asyncio.sleep(max(seconds / 100, 0.5))

            watcher = asyncio.create_task(watch())
            try:
                return await sustain(server.url, streams, seconds)
            finally:
                watcher.cancel()

        result = asyncio.run(run())
        elapsed, cpu = time.monotonic() - started, cpu_seconds(process) - before
    return {
        "engine": engine,
        "streams": streams,
        "seconds": round(elapsed, 1),
        "requests": len(result.texts),
        "errors": len(result.errors),
        "error_examples": sorted(set(result.errors))[:5],
        "tokens_per_second": round(result.tokens / elapsed, 1),
        "tokens_per_cpu_second": round(result.tokens / cpu, 1),
        "ttft": percentiles(result.first),
        "itl": percentiles(result.between),
        "memory_bytes": [points[0][1], max(size for _, size in points), points[-1][1]],
        "memory_bytes_per_minute": round(slope(points)),
    }


async def timed(server: serving.Server, body: dict[str, Any]) -> list[tuple[float, float]]:
    """(wall, CPU seconds of the server) from a streamed completion's start to each of its texts."""
    headers = {"Authorization": f"Bearer {KEY}"}
    process, started = psutil.Process(server.pid), time.perf_counter()
    before, points = cpu_seconds(process), []
    async with (
        httpx.AsyncClient(base_url=server.url, headers=headers, timeout=600) as client,
        client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0].get("text"):
                points.append((time.perf_counter() - started, cpu_seconds(process) - before))
    return points


def beside(checkpoint: Path, engine: str, prompt: int) -> dict[str, Any]:
    """A short request alone, and while a long prompt is read: milliseconds, wall and CPU."""
    chance = random.Random(0)
    plain = {"model": "model", "temperature": 0, "ignore_eos": True}

    def words(count: int) -> str:
        return " ".join(chance.choices(WORDS, k=count))

    async def short(server: serving.Server) -> dict[str, dict[str, float]]:
        points = await timed(server, {**plain, "prompt": words(8), "max_tokens": 24})
        gaps = [[b[i] - a[i] for a, b in itertools.pairwise(points)] for i in (0, 1)]
        found = {
            "first": points[0],
            "gap_median": [statistics.median(each) for each in gaps],
            "gap_most": [max(each) for each in gaps],
        }
        names = ("ms", "cpu_ms")
        return {
            key: {name: round(1000 * value, 1) for name, value in zip(names, pair, strict=True)}
            for key, pair in found.items()
        }

    async def both(server: serving.Server) -> dict[str, Any]:
        await short(server)  # compiles and allocates
        alone = await short(server)
        # Most words of this list are one token each.
        long = timed(server, {**plain, "prompt": words(prompt), "max_tokens": 1})
        reading = asyncio.create_task(long)
        await asyncio.sleep(1)
        company = await short(server)
        under_way = not reading.done()
        await reading
        return {"prompt": prompt, "alone": alone, "beside": company, "under_way": under_way}

    with served(checkpoint, engine, *QUIET) as server:
        return {"engine": engine, **asyncio.run(both(server))}


def transformers_serve(model: Path, *flags: str) -> AbstractContextManager[serving.Server]:
    """`transformers serve` on a model folder, in float32 as the embedded engine."""
    port = serving.free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    return serving.running([*command, "--device", "cpu", *flags, "--log-level", "error"], port)


async def burst(
    server: serving.Server, model: str, at_once: int, number: int, tokenizer: Tokenizer
) -> tuple[float, float]:
    """Tokens per second, and per CPU second, of so many greedy completions started together.

    The tokens are those of the answers' texts, by the model's tokenizer: chunks may hold several.
    """
    done = Measured()
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=600) as client:

        def body(place: int) -> dict[str, Any]:
            prompt = " ".join(random.Random(1000 * number + place).choices(WORDS, k=30))
            fields = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
            return {**fields, "stream": True}

        process, started = psutil.Process(server.pid), time.perf_counter()
        before = cpu_seconds(process)
        await asyncio.gather(*(stream(client, body(place), done) for place in range(at_once)))
        seconds, cpu = time.perf_counter() - started, cpu_seconds(process) - before
    if done.errors:
        raise RuntimeError(done.errors[0])
    tokens = sum(len(tokenizer.encode(text).ids) for text in done.texts)
    return tokens / seconds, tokens / cpu


def throughput(checkpoint: Path, dense: Path | None, repeats: int) -> list[dict[str, Any]]:
    """Median tokens per second of servers, one after the other on this machine."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    servers: dict[str, tuple[Callable[[], Any], str]] = {
        f"pvrt, {open_folder(checkpoint).linear_bits_per_weight():.1f} bits": (
            lambda: served(checkpoint, "local", *QUIET),
            "model",
        ),
    }
    if dense is not None:
        servers |= peers(dense)
    result: list[dict[str, Any]] = []
    for name, (start, model) in servers.items():
        rates: dict[int, list[tuple[float, float]]] = {at_once: [] for at_once in AT_ONCE}
        problem = None
        with start() as server:
            try:
                asyncio.run(burst(server, model, 1, 0, tokenizer))  # compiles and allocates
                for number in range(1, repeats + 1):
                    for at_once, values in rates.items():
                        values.append(asyncio.run(burst(server, model, at_once, number, tokenizer)))
                        wall, cpu = values[-1]
                        print(f"{name:48} {at_once:3} at once {wall:8.1f} tokens/s, {cpu:8.1f} CPU")
                        sys.stdout.flush()
            except RuntimeError as error:  # a peer that breaks is a result, not our end
                problem = str(error)
                print(f"{name:48} {problem}", flush=True)
        for at_once, values in rates.items():
            row: dict[str, Any] = {"server": name, "at_once": at_once, "tokens_per_second": None}
            if values and not problem:
                wall, cpu = (
                    round(statistics.median(each), 2) for each in zip(*values, strict=True)
                )
                row |= {"tokens_per_second": wall, "tokens_per_cpu_second": cpu}
            said = {"repeats": len(values)} if problem is None else {"problem": problem}
            result.append({**row, **said})
    return result


def peers(dense: Path) -> dict[str, tuple[Callable[[], Any], str]]:
    """Servers of a dense model."""
    return {
        "pvrt, dense": (lambda: served(dense, "local", *QUIET), "model"),
        "transformers serve, dense": (lambda: transformers_serve(dense), str(dense)),
        "transformers serve --continuous-batching, dense": (
            lambda: transformers_serve(dense, "--continuous-batching"),
            str(dense),
        ),
    }


def main() -> None:
    """Measure, store, renew the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dense", type=Path, help="the dense model, for the comparison")
    parser.add_argument("--engine", default="local", choices=["local", "vllm"])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=4000, help="tokens of the long prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    arguments = parser.parse_args()
    needs.check("server_load", [needs.writable(results.FOLDER)])
    stored = dict(results.load("server_load"))
    about = describe()
    measured: dict[str, Any] = {}
    if arguments.seconds:
        measured["load"] = load(
            arguments.checkpoint, arguments.engine, arguments.streams, arguments.seconds
        )
        print(json.dumps(measured["load"], indent=1), flush=True)
    if arguments.prompt:
        measured["beside"] = beside(arguments.checkpoint, arguments.engine, arguments.prompt)
        print(json.dumps(measured["beside"], indent=1), flush=True)
    if arguments.repeats:
        measured["throughput"] = throughput(
            arguments.checkpoint, arguments.dense, arguments.repeats
        )
    runs = {name: {"commit": about["commit"], "note": arguments.note} for name in measured}
    result = {
        **about,
        "checkpoint": arguments.checkpoint.name,
        "runs": {**stored.get("runs", {}), **runs},
        **{name: stored[name] for name in ("load", "beside", "throughput") if name in stored},
        **measured,
    }
    results.store("server_load", result)
    renew()


if __name__ == "__main__":
    main()
