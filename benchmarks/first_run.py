"""Times both README commands and measures WikiText-2: writes results/first_run.json.

    PVRT_DATA=FOLDER .venv/bin/python benchmarks/first_run.py     # all, about an hour on 2 cores
    .venv/bin/python benchmarks/first_run.py --only perplexity    # renew one part

Run after `make quickstart` and `make test` have installed their packages, so that times are those
of the work. Perplexity is taken over the whole WikiText-2 test split in windows of 2048 tokens
and is only reported: nothing was chosen by it.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import data
import machine
import machines
import needs
import quickstart
import results
import tables


def measure_quickstart() -> dict[str, Any]:
    """Seconds of `make quickstart`, and what it found."""
    started = time.monotonic()
    found = machines.run_quickstart()
    if found is None:
        sys.exit("first_run: make quickstart failed")
    manifest = json.loads((machines.TUNED / "pvrt.json").read_text())
    seconds = time.monotonic() - started
    return {"quickstart_seconds": seconds, "scheme": manifest["scheme"], **found}


def measure_tests() -> dict[str, Any]:
    """Seconds of `make test`, and how many passed."""
    figures = machines.run_tests()
    if figures.pop("tests_failed"):
        sys.exit("first_run: make test failed")
    return figures


def measure_perplexity() -> dict[str, Any]:
    """WikiText-2 test perplexity of the original and of the tuned model, float32."""
    figures: dict[str, Any] = {}
    models = {"original": str(quickstart.smollm2()), "2bit": str(machines.TUNED)}
    for name, model in models.items():
        options = ["--text", str(data.need(data.TEST)), "--context", "2048", "--json"]
        result = json.loads(quickstart.pvrt("eval", model, *options, capture=True))
        figures[f"wikitext2_ppl_{name}"] = result["value"]
        figures["wikitext2_windows"] = result["windows"]
    return figures


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "quickstart": measure_quickstart,
    "tests": measure_tests,
    "perplexity": measure_perplexity,
}


def main() -> None:
    """Measure the chosen parts and merge them into the result file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parts = parser.parse_args().only
    if "perplexity" in parts:
        data.need(data.TEST)  # asked before the hour, not after it
    needs.check("first_run", [needs.writable(results.FOLDER)])
    for part in parts:
        figures = PARTS[part]()
        stored = dict(results.load("first_run"))
        results.store("first_run", {**stored, **figures, **machine.describe()})
        tables.renew()
        print(f"{part}: {figures}", flush=True)


if __name__ == "__main__":
    main()
