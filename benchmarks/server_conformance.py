"""Features x engines x clients of `pvrt serve` -> benchmarks/results/server_conformance.json.

    python benchmarks/server_conformance.py CHECKPOINT [--clients PYTHON] [--engines local vllm]
        [--only "openai async"]

Rows of engines and clients that are not asked for stay as they are. PYTHON is an interpreter with
langchain-openai, litellm and mcp (they want an older openai than pvrt's tests have); without it
their rows are left out.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import results
import serving
from tables import renew

KEY = "conformance"
OURS = ("openai", "openai async")
THEIRS = ("langchain", "litellm")
#: Without eager execution vLLM compiles for minutes on a CPU.
FLAGS: dict[str, list[str]] = {
    "local": [],
    "vllm": ["--", "--enforce-eager", "--max-num-seqs", "8"],
}


#: ChatML with tools in Hermes' form, for checkpoints whose own template knows none.
TOOL_TEMPLATE = """\
{%- if tools %}<|im_start|>system
Call a tool as <tool_call>{"name": ..., "arguments": {...}}</tool_call>. Tools:
{%- for tool in tools %}
{{ tool.function | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@contextmanager
def with_tools(checkpoint: Path) -> Iterator[Path]:
    """A checkpoint whose template knows tools: itself, or links to it beside such a template."""
    template = checkpoint / "chat_template.jinja"
    if template.is_file() and "tools" in template.read_text(encoding="utf-8"):
        yield checkpoint
        return
    with TemporaryDirectory() as room:
        folder = Path(room) / checkpoint.name
        folder.mkdir()
        for file in checkpoint.iterdir():
            if file.is_file() and file.name != template.name:
                (folder / file.name).symlink_to(file.absolute())
        (folder / template.name).write_text(TOOL_TEMPLATE, encoding="utf-8")
        yield folder


@contextmanager
def served(
    checkpoint: Path, engine: str, *flags: str, key: str | None = KEY
) -> Iterator[serving.Server]:
    """`pvrt serve` while the block runs."""
    port = serving.free_port()
    guard = ["--api-key", key] if key else []
    command = serving.pvrt(checkpoint, port, engine, *flags, *guard, *FLAGS[engine])
    with serving.running(command, port) as server:
        yield server


def rows(
    checkpoint: Path, engine: str, names: Sequence[str], clients: str | None
) -> Iterator[dict[str, Any]]:
    """One row per client and feature on one engine."""
    script = Path(__file__).with_name("server_clients.py")
    with (
        with_tools(checkpoint) as folder,
        served(folder, engine, "--served-model-name", "model", "--log-level", "warning") as server,
    ):
        for name in names:
            python = str(clients) if name in THEIRS else sys.executable
            command = [python, str(script), name, server.url, "model", KEY]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            for line in run.stdout.splitlines():
                if not line.startswith('{"client"'):
                    continue  # libraries print too
                row = json.loads(line)
                problem = row.pop("problem")
                said = {} if problem is None else {"problem": problem}
                yield {"engine": engine, **row, "pass": problem is None, **said}


def client_of(row: dict[str, Any]) -> str:
    """A row's client without its version."""
    return str(row["client"]).rstrip(".0123456789 ")


def main() -> None:
    """Measure, store, renew the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--clients", help="an interpreter with langchain-openai and litellm")
    parser.add_argument("--engines", nargs="+", default=["local", "vllm"], choices=FLAGS)
    parser.add_argument("--only", nargs="+", choices=(*OURS, *THEIRS), help="these clients alone")
    arguments = parser.parse_args()
    names = arguments.only or (*OURS, *(THEIRS if arguments.clients else ()))
    replaced = names if arguments.only else (*OURS, *THEIRS)
    stored = [
        row
        for row in results.load("server_conformance")
        if row["engine"] not in arguments.engines or client_of(row) not in replaced
    ]
    for engine in arguments.engines:
        for row in rows(arguments.checkpoint, engine, names, arguments.clients):
            stored.append(row)
            mark = "ok  " if row["pass"] else "FAIL"
            print(
                f"{mark} {engine:6} {row['client']:22} {row['feature']:36} "
                f"{row.get('problem', '')}",
                flush=True,
            )
    order = (*OURS, *THEIRS)
    stored.sort(key=lambda row: (list(FLAGS).index(row["engine"]), order.index(client_of(row))))
    results.store("server_conformance", stored)
    renew()
    failed = sum(not row["pass"] for row in stored)
    print(f"{len(stored) - failed} of {len(stored)} pass")


if __name__ == "__main__":
    main()
