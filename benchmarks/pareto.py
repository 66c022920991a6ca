"""Quality against bytes, side by side: pvrt and what others make, one protocol; pareto.json.

    PVRT_DATA=FOLDER PVRT_PEERS=VENVS python benchmarks/pareto.py all        # what is missing
    PVRT_DATA=FOLDER VENVS/HQQ/bin/python benchmarks/pareto.py make HQQ "3 bits g64"
    PVRT_DATA=FOLDER python benchmarks/pareto.py evaluate HQQ "3 bits g64"
    PVRT_DATA=FOLDER python benchmarks/pareto.py rows    # writes results/pareto.json

Every tool gets the same original (a GGUF, dequantised and rounded to bfloat16) and the same web
text, and its files are measured as whole files. Its weights are then put into the original's
architecture in float32 and measured by `pareto_evaluate`. All stages are kept in --work: `all` goes
on where it was stopped. Then `pareto_plot.py` draws, and `tables.py` renews docs/quality.md.

VENVS has an environment per tool, VENVS/TOOL/bin/python, with torch, transformers, accelerate and
hqq or auto-round; a tool without one runs in this. `make` by hand wants the repository's roots on
PYTHONPATH. llama.cpp's programs are looked for on the PATH. The source distribution of
llama-cpp-python has their sources: cmake -B build vendor/llama.cpp; cmake --build build --target
llama-quantize llama-imatrix llama-bench. Speeds want a quiet machine: `pareto.py speed`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import data
import machine
import pareto_evaluate as protocol
import quickstart
import results
from pareto_tools import TOOLS, Case, Tool, dense

from pvrt.format.atomic import write_synced

PEERS = "PVRT_PEERS"
KEY = ("model", "tool", "method")
#: Where pvrt is imported from in a tool's environment.
SOURCES = ":".join(str(machine.ROOT / name) for name in ("", "tune", "server", "kernels"))
FLOAT32 = ("original", "float32")  # what all are compared with; only its perplexities are measured


class Work:
    """The folder of one model: WORK/NAME."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.work / options.name
        self.settings = protocol.Settings(
            windows=options.windows, items=options.items, prompts=options.prompts
        )

    # ---- the original -------------------------------------------------------------------------

    @property
    def model(self) -> Path:
        """The original in bfloat16."""
        folder = self.folder / "original-hf"
        if not folder.is_dir():
            data.as_folder(self.options.model or quickstart.smollm2(), folder)
        return folder

    @property
    def gguf(self) -> Path:
        """The same values as GGUF."""
        file = self.folder / "original.gguf"
        if not file.is_file():
            from pareto_gguf import to_bfloat16

            partial = file.with_suffix(".partial")
            to_bfloat16(self.options.model or quickstart.smollm2(), partial)
            partial.rename(file)
        return file

    def reference(self, part: str) -> dict[str, Any]:
        """Of the original in float32, made once for these settings; tasks have none."""
        from safetensors.torch import load_file, save_file

        if part == "tasks":
            return {}
        settings = "-".join(map(str, self.settings.of(part).values()))
        file = self.folder / f"reference-{part}-{settings}.safetensors"
        if not file.is_file():
            made = protocol.reference(part, self.original(), self.tokenizer(), self.settings)
            partial = file.with_suffix(".partial")
            save_file({key: tensor.contiguous() for key, tensor in made.items()}, partial)
            partial.rename(file)
        return load_file(file)

    def original(self) -> Any:
        """The original in float32."""
        import torch

        return dense(self.model, torch.float32)

    @cached_property
    def parameters(self) -> int:
        """Its parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.original().parameters())

    def tokenizer(self) -> Any:
        """The original's."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    # ---- one row ------------------------------------------------------------------------------

    def place(self, tool: str, method: str) -> Path:
        """A row's own folder."""
        return self.folder / tool / method.replace(" ", "_").replace(",", "")

    def case(self, tool: str, method: str) -> Case:
        """What the tool is handed."""
        place, earlier = self.place(tool, method), TOOLS[tool].before(method)
        before = self.place(tool, earlier) if earlier else None
        return Case(self.model, self.gguf, data.need(data.WEB), place, place.parent, before)

    def made(self, tool: str, method: str) -> bool:
        """Whether a row's weights are there."""
        return (self.place(tool, method) / "made.json").is_file()

    def make(self, tool: Tool, method: str) -> None:
        """Run a tool, then keep its weights and facts; seconds are those of all that it took."""
        from safetensors.torch import save_file

        case, earlier, spent_before = self.case(tool.name, method), tool.before(method), {}
        if earlier is not None:
            if not self.made(tool.name, earlier):
                self.make(tool, earlier)
            spent_before = _read(self.place(tool.name, earlier) / "made.json")
        shutil.rmtree(case.out, ignore_errors=True)  # of a try that was stopped
        case.out.mkdir(parents=True)
        started, spent = time.monotonic(), machine.cpu_seconds()
        tool.make(case, method)
        facts = {
            "bytes": tool.size(case),
            "seconds": _total(spent_before, "seconds", time.monotonic() - started),
            "cpu_seconds": _total(spent_before, "cpu_seconds", machine.cpu_seconds() - spent),
            **(about := machine.describe()),
            "versions": {**about["versions"], **tool.versions()},
        }
        save_file(tool.weights(case), self.place(tool.name, method) / "dense.safetensors")
        _write(case.out / "made.json", facts)
        print(f"{tool.name} {method}: {facts}", flush=True)

    def load(self, tool: str, method: str) -> Any:
        """A row's weights in the original's architecture."""
        import torch
        from safetensors.torch import load_file

        if (tool, method) == ("original", "bfloat16"):
            return dense(self.model, torch.bfloat16)
        found = load_file(self.place(tool, method) / "dense.safetensors")
        given = {}
        if "lm_head.weight" in found:  # a head of its own
            given["tie_word_embeddings"] = False
        model = dense(self.model, torch.float32, **given)
        wanted = {name for name, _ in model.named_parameters()}
        if wanted != found.keys():
            sys.exit(f"{tool} {method} has other tensors: {sorted(wanted ^ found.keys())[:4]}")
        model.load_state_dict(found, strict=False)
        return model

    def evaluate(self, tool: str, method: str, parts: list[str]) -> None:
        """Measure what is not measured yet by these settings, part by part."""
        file = self.place(tool, method) / "evaluated.json"
        done = _read(file)
        missing = [
            part for part in parts if done.get(part, {}).get("settings") != self.settings.of(part)
        ]
        if not missing:
            return
        tokenizer = self.tokenizer()
        model = None if (tool, method) == FLOAT32 else self.load(tool, method)
        for part in missing:
            reference, started = self.reference(part), time.monotonic()
            found = protocol.measure(part, model, tokenizer, reference, self.settings)
            done[part] = {"settings": self.settings.of(part), **found}
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(file, done)
            seconds = time.monotonic() - started
            print(f"{tool} {method}, {part} in {seconds:.0f} s: {found}", flush=True)

    def speed(self, tool: Tool, method: str) -> None:
        """Time the files as they are now; the others of the machine should be idle."""
        file = self.place(tool.name, method) / "made.json"
        rate = tool.tokens_per_second(self.case(tool.name, method))
        shared = machine.shared(os.cpu_count() or 1)
        _write(file, _read(file) | {"decode_tokens_per_s": rate, "shared_machine": shared})
        print(f"{tool.name} {method}: {rate} tokens/s", flush=True)

    # ---- the table ----------------------------------------------------------------------------

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for everything that is made and has its perplexity."""
        original = _read(self.place(*FLOAT32) / "evaluated.json")
        floor = _read(self.place("original", "bfloat16") / "evaluated.json")
        for name, tool in TOOLS.items():
            for method in tool.methods:
                place = self.place(name, method)
                facts, found = _read(place / "made.json"), _read(place / "evaluated.json")
                if not facts or "wikitext2" not in found:
                    continue
                yield {
                    "model": self.options.name,
                    "tool": name,
                    "method": method,
                    "bytes": facts["bytes"],
                    "bits_file": round(8 * facts["bytes"] / self.parameters, 3),
                    "wikitext2_ppl": _figure(found, "wikitext2", "ppl_second_half"),
                    "original_ppl": _figure(original, "wikitext2", "ppl_second_half"),
                    "kl": _figure(found, "wikitext2", "kl"),
                    "kl_noise_floor": _figure(floor, "wikitext2", "kl"),
                    "wikitext2_ppl_all": _figure(found, "wikitext2", "ppl"),
                    "c4_ppl": _figure(found, "c4", "ppl"),
                    "original_c4_ppl": _figure(original, "c4", "ppl"),
                    "c4_kl": _figure(found, "c4", "kl"),
                    "greedy_equal": _figure(found, "greedy", "equal"),
                    "zero_shot": {task: _figure(found, "tasks", task) for task in protocol.TASKS},
                    "settings": {
                        part: found.get(part, {}).get("settings") for part in protocol.PARTS
                    },
                    "seconds": facts["seconds"],
                    "cpu_seconds": facts["cpu_seconds"],
                    "decode_tokens_per_s": facts.get("decode_tokens_per_s"),
                    "shared_machine": facts.get("shared_machine"),
                    **{name: facts[name] for name in ("machine", "versions", "commit")},
                }

    def store(self) -> None:
        """Put the rows into results/pareto.json."""
        stored = results.renewed(results.load("pareto"), self.rows(), *KEY)
        results.store("pareto", stored)


def _total(before: dict[str, Any], name: str, seconds: float) -> float:
    return round(float(before.get(name, 0)) + seconds, 1)


def _figure(found: dict[str, Any], part: str, name: str) -> float | None:
    value = found.get(part, {}).get(name)
    return None if value is None else round(value, 5)


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _write(file: Path, value: dict[str, Any]) -> None:
    write_synced(file, json.dumps(value, indent=1).encode())


def interpreter(tool: str) -> str:
    """The Python that has a tool."""
    own = Path(os.environ.get(PEERS, ".")) / tool / "bin" / "python"
    return str(own) if PEERS in os.environ and own.exists() else sys.executable


def each(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The rows that are named; without names all."""
    for name, tool in TOOLS.items():
        for method in tool.methods:
            if options.tool in (None, name) and options.method in (None, method):
                yield name, method


def everything(work: Work, options: argparse.Namespace) -> None:
    """Make and measure what is missing; a tool that fails costs its own row."""
    for name in (data.WEB, *chain.from_iterable(map(protocol.files, options.parts))):
        data.need(name)  # asked before the hours, not after them
    work.evaluate(*FLOAT32, [part for part in protocol.TEXTS if part in options.parts])
    # Made here: a tool's environment may lack what that takes.
    print(f"the original is {work.model} and {work.gguf}", flush=True)
    for tool, method in each(options):
        if not work.made(tool, method):
            given = ["--work", str(options.work), "--name", options.name]
            given += ["--model", str(options.model)] if options.model else []
            command = [interpreter(tool), __file__, "make", tool, method, *given]
            if subprocess.run(command, env=os.environ | {"PYTHONPATH": SOURCES}).returncode:
                print(f"{tool} {method} was not made", file=sys.stderr, flush=True)
                continue
        work.evaluate(tool, method, options.parts)
        work.store()


def main() -> None:
    """One stage, or all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("make", "evaluate", "speed", "rows", "all"))
    parser.add_argument("tool", nargs="?", choices=TOOLS)
    parser.add_argument("method", nargs="?")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "pareto")
    parser.add_argument("--name", default="smollm2-135m")
    parser.add_argument("--model", type=Path, help="a .gguf file; SmolLM2-135M without it")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--parts", nargs="+", choices=protocol.PARTS, default=protocol.PARTS)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    work = Work(options)
    if options.stage == "all":
        everything(work, options)
    elif options.stage == "rows":
        work.store()
    for tool, method in each(options) if options.stage in ("make", "evaluate", "speed") else ():
        if options.stage == "make" and not work.made(tool, method):
            work.make(TOOLS[tool], method)
        elif options.stage == "evaluate" and work.made(tool, method):
            work.evaluate(tool, method, options.parts)
        elif options.stage == "speed" and work.made(tool, method):
            work.speed(TOOLS[tool], method)


if __name__ == "__main__":
    main()
