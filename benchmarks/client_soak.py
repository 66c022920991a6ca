"""All client libraries at once on one server -> results/reliability.json, key `clients`.

    python benchmarks/client_soak.py CHECKPOINT [--engine local] [--minutes 10]

Each library goes through the features of server_conformance.py again and again, in a thread of its
own. Counts what failed; ends with an error where anything did, or where the server is not well.
"""

import argparse
import json
import sys
import threading
import time
import urllib.request
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import clients
import psutil  # type: ignore[import-untyped]
import results
from clients.client import Where
from clients.features import features
from clients.node_client import NODE
from server_conformance import KEY, QUIET, served, with_tools


def present(name: str) -> bool:
    """Whether a library is installed here; what is not is said."""
    kind = clients.CLIENTS[name]
    node = issubclass(kind, clients.Node)
    module = "pydantic_ai" if name == "pydantic-ai" else kind.distribution.replace("-", "_")
    module = "agents" if name == "openai-agents" else module
    found = (NODE / "node_modules").is_dir() if node else find_spec(module) is not None
    if not found:
        print(f"{name} is not installed", file=sys.stderr)
    return found


def ask(name: str, where: Where, end: float, asked: Counter[str], failed: list[str]) -> None:
    """One library's features over and over, until the end."""
    client = clients.CLIENTS[name](where)
    while time.monotonic() < end:
        for feature, check in features(client):
            # Batches of other sizes round otherwise, and what is drawn at random follows.
            if check is None or feature.endswith("seed") or time.monotonic() > end:
                continue
            try:
                check()
            except Exception as error:  # whatever a wrong answer leads to
                failed.append(f"{name}, {feature}: {type(error).__name__}: {error}"[:300])
                print(failed[-1], file=sys.stderr, flush=True)
            asked[name] += 1
    client.close()


def soak(checkpoint: Path, engine: str, minutes: float) -> dict[str, Any]:
    """Serve, let them all ask, and say what came of it."""
    asked: Counter[str] = Counter()
    failed: list[str] = []
    with with_tools(checkpoint) as folder, served(folder, engine, *QUIET) as server:
        end, where = time.monotonic() + 60 * minutes, Where(server.url, "model", KEY)
        process = psutil.Process(server.pid)
        threads = [
            threading.Thread(target=ask, args=(name, where, end, asked, failed))
            for name in clients.CLIENTS
            if present(name)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with urllib.request.urlopen(f"{server.url}/health", timeout=60) as answer:
            well = answer.status == 200
        open_files, size = process.num_fds(), process.memory_info().rss
    return {
        "engine": engine,
        "minutes": minutes,
        "asked": dict(asked),
        "failed": len(failed),
        "first_failures": failed[:5],
        "well": well,
        "files": open_files,
        "rss_mb": round(size / 1e6),
    }


def main() -> None:
    """Soak, and store what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--engine", default="local", choices=["local", "vllm"])
    parser.add_argument("--minutes", type=float, default=10)
    given = parser.parse_args()
    found = soak(given.checkpoint, given.engine, given.minutes)
    results.store("reliability", {**(results.load("reliability") or {}), "clients": found})
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["failed"]) or not found["well"])


if __name__ == "__main__":
    main()
