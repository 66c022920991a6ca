"""Features x engines x clients of `pvrt serve` -> benchmarks/results/server_conformance.json.

    python benchmarks/server_conformance.py CHECKPOINT [--engines local vllm]
        [--only "openai async"]

Rows of engines and clients that are not asked for stay as they are.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import clients
import results
import serving
from clients.client import Where
from tables import renew

KEY = "conformance"
# In 16 bits two tokens may be the likeliest, and greedy decoding takes either.
QUIET = ("--served-model-name", "model", "--log-level", "warning", "--dtype", "float32")
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
{%- for message in messages %}
{%- if message.role == "tool" %}<|im_start|>user
<tool_response>{{ message.content }}</tool_response>
{%- else %}<|im_start|>{{ message.role }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}
{%- endif %}<|im_end|>
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
    with TemporaryDirectory() as links:
        folder = Path(links) / checkpoint.name
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


def rows(checkpoint: Path, engine: str, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row per client and feature on one engine."""
    with (
        with_tools(checkpoint) as folder,
        served(folder, engine, *QUIET) as server,
    ):
        for client in names:
            for row in clients.rows(client, Where(server.url, "model", KEY)):
                yield {"engine": engine, **row}


def client_of(row: dict[str, Any]) -> str:
    """A row's client without its version."""
    return str(row["client"]).rstrip(".0123456789 ")


def main() -> None:
    """Measure, store, renew the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--engines", nargs="+", default=["local", "vllm"], choices=FLAGS)
    order = list(clients.CLIENTS)
    parser.add_argument("--only", nargs="+", default=order, choices=order, help="these clients")
    arguments = parser.parse_args()
    stored = [
        row
        for row in results.load("server_conformance")
        if row["engine"] not in arguments.engines or client_of(row) not in arguments.only
    ]
    for engine in arguments.engines:
        for row in rows(arguments.checkpoint, engine, arguments.only):
            stored.append(row)
            mark = {True: "ok  ", None: "-   ", False: "FAIL"}[row["pass"]]
            print(
                f"{mark} {engine:6} {row['client']:22} {row['feature']:36} "
                f"{row.get('problem', '')}",
                flush=True,
            )
    stored.sort(key=lambda row: (list(FLAGS).index(row["engine"]), order.index(client_of(row))))
    results.store("server_conformance", stored)
    renew()
    asked = [row["pass"] for row in stored if row["pass"] is not None]
    print(f"{sum(asked)} of {len(asked)} pass")


if __name__ == "__main__":
    main()
