"""The embedded engine under load for half an hour: errors, and whether memory, files, threads grow.

    python benchmarks/soak.py [--minutes 30] [--streams 64]

`pvrt serve` serves a toy checkpoint. Every stream sends one request after the other, chosen at
random: short and long prompts, streamed or not, tools that must be called, answers of a schema, and
clients that leave in the middle. Whoever gets 429 comes again when it is told to, which is counted.
Writes the key `soak` of results/reliability.json.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import machine
import numpy as np
import psutil  # type: ignore[import-untyped]
import results

sys.path.insert(0, str(machine.ROOT))
from tests.fixtures.toy import CHAT_TEMPLATE, write_toy

_EVERY = 5.0  # seconds between samples
_PATIENCE = 600.0  # seconds that no answer takes unless something hangs
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass
class Load:
    """The clients' side: what was asked, by kind, and what went wrong."""

    client: httpx.AsyncClient
    draw: random.Random
    asked: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    async def stream(self, end: float) -> None:
        """One request after the other until the end."""
        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "short": self._short,
            "streamed": self._streamed,
            "long prompt": self._long,
            "schema": self._schema,
            "tool": self._tool,
            "cancelled": self._cancelled,
            "refused": self._refused,
        }
        while time.monotonic() < end:
            name = self.draw.choice(list(kinds))
            try:
                await kinds[name]()
                self.asked[name] += 1
            except (httpx.HTTPError, ValueError, KeyError, AssertionError) as error:
                self.errors.append(f"{name}: {type(error).__name__}: {error}"[:300])
                print(self.errors[-1], file=sys.stderr, flush=True)

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self.client.post(path, json=body)
        while answer.status_code == 429:  # as clients do that are told when to come again
            self.asked["told to come again"] += 1
            await asyncio.sleep(float(answer.headers["Retry-After"]))
            answer = await self.client.post(path, json=body)
        assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
        said: dict[str, Any] = answer.json()
        return said

    async def _short(self) -> None:
        await self._post(COMPLETIONS, {"prompt": self._words(3), "max_tokens": 8})

    async def _long(self) -> None:
        said = await self._post(COMPLETIONS, {"prompt": self._words(60), "max_tokens": 4})
        assert said["usage"]["prompt_tokens"] > 200

    async def _streamed(self) -> None:
        body = {"messages": [self._hello()], "max_tokens": 12, "stream": True}
        async with self.client.stream("POST", CHAT, json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]", lines[-1:]

    async def _cancelled(self) -> None:
        body = {"prompt": self._words(5), "max_tokens": 200, "stream": True}
        async with self.client.stream("POST", COMPLETIONS, json=body) as answer:
            async for _ in answer.aiter_lines():
                break

    async def _schema(self) -> None:
        names = [f"n{self.draw.randrange(8)}"]
        if self.draw.random() < 0.02:  # one that was never compiled
            names.append(f"n{self.draw.random()}")
        schema = {
            "type": "object",
            "properties": {name: {"enum": [1, 2]} for name in names},
            "required": names,
        }
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        body = {"messages": [self._hello()], "response_format": form, "max_tokens": 60}
        said = await self._post(CHAT, body)
        answer = json.loads(said["choices"][0]["message"]["content"])
        assert answer.keys() == set(names)

    async def _tool(self) -> None:
        parameters = {
            "type": "object",
            "properties": {"a": {"enum": ["x", "y"]}},
            "required": ["a"],
        }
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        body = {"messages": [self._hello()], "tools": [tool], "tool_choice": "required"}
        said = await self._post(CHAT, {**body, "max_tokens": 60})
        call = said["choices"][0]["message"]["tool_calls"][0]["function"]
        assert json.loads(call["arguments"])["a"] in ("x", "y")

    async def _refused(self) -> None:
        answer = await self.client.post(COMPLETIONS, json={"prompt": [10**9], "max_tokens": 1})
        assert answer.status_code == 400, answer.text

    def _hello(self) -> dict[str, str]:
        return {"role": "user", "content": self._words(4)}

    def _words(self, count: int) -> str:
        return " ".join(str(self.draw.randrange(100, 1000)) for _ in range(count))


async def watched(process: psutil.Process, end: float) -> list[dict[str, float]]:
    """Samples of a server: megabytes, open files and threads."""
    samples, started = [], time.monotonic()
    while time.monotonic() < end:
        with process.oneshot():
            samples.append(
                {
                    "minutes": (time.monotonic() - started) / 60,
                    "rss_mb": process.memory_info().rss / 1e6,
                    "files": process.num_fds(),
                    "threads": process.num_threads(),
                }
            )
        await asyncio.sleep(_EVERY)
    return samples


def slope(samples: list[dict[str, float]], key: str) -> float:
    """How fast something grew in the second half, per minute, by least squares."""
    late = samples[len(samples) // 2 :]
    return float(np.polyfit([s["minutes"] for s in late], [s[key] for s in late], 1)[0])


async def soak(url: str, process: psutil.Process, streams: int, minutes: float) -> dict[str, Any]:
    """Load a server, and what came of it."""
    end = time.monotonic() + 60 * minutes
    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    async with httpx.AsyncClient(base_url=url, timeout=_PATIENCE, limits=limits) as client:
        load = Load(client, random.Random(0))
        before = process.cpu_times()
        watching = asyncio.create_task(watched(process, end))
        await asyncio.gather(*(load.stream(end) for _ in range(streams)))
        samples = await watching
        after = process.cpu_times()
        assert (await client.get("/health")).status_code == 200
    middle = samples[len(samples) // 2]
    return {
        "minutes": minutes,
        "streams": streams,
        "requests": dict(load.asked),
        "errors": len(load.errors),
        "first_errors": load.errors[:5],
        "rss_mb": [round(s["rss_mb"]) for s in (samples[0], middle, samples[-1])],
        "rss_mb_per_minute": round(slope(samples, "rss_mb"), 3),
        "files": [round(s["files"]) for s in (samples[0], middle, samples[-1])],
        "threads": [round(s["threads"]) for s in (samples[0], middle, samples[-1])],
        "server_cpu_seconds": round(sum(after[:2]) - sum(before[:2])),
    }


def main() -> None:
    """Serve, soak, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--streams", type=int, default=64)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "toy"
        write_toy(folder)
        template = "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
        (folder / "chat_template.jinja").write_text(template + CHAT_TEMPLATE, encoding="utf-8")
        command = [sys.executable, "-m", "pvrt", "serve", str(folder), "--engine", "local"]
        command += ["--port", "0", "--log-level", "warning"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            line = next(line for line in server.stdout if "is served at" in line)
            url = line.split()[-1].removesuffix("/v1")
            found = asyncio.run(soak(url, psutil.Process(server.pid), given.streams, given.minutes))
        finally:
            server.terminate()
            found_code = server.wait(_PATIENCE)
    found["exit_code"] = found_code
    results.store("reliability", {**(results.load("reliability") or {}), "soak": found})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
