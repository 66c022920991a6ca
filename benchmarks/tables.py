"""Write the tables of README.md from benchmarks/results/*.json: `python benchmarks/tables.py`.

With --check nothing is written and the exit code says whether the README is up to date.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def first_run(result: dict[str, Any]) -> str:
    """The table of the first real run."""
    rows = [
        ("WikiText-2 test perplexity, original", f"{result['wikitext2_ppl_original']:.2f}"),
        ("WikiText-2 test perplexity, tuned", f"{result['wikitext2_ppl_2bit']:.2f}"),
        ("bits per weight, quantised linears", f"{result['bits_per_weight_linears']:.3f}"),
        ("bits per weight, whole file", f"{result['bits_per_weight_file']:.3f}"),
        ("`make quickstart`, packages installed", f"{result['quickstart_seconds']:.0f} s"),
        ("`make test`, packages installed", f"{result['test_seconds']:.0f} s"),
        ("tests passed", str(result["tests_passed"])),
    ]
    lines = [f"| SmolLM2-135M-Instruct, {result['scheme']}, {result['machine']} | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows])


def render(text: str) -> str:
    """README text with every table between its markers renewed from its result file."""
    for name, table in {"first_run": first_run}.items():
        file = RESULTS / f"{name}.json"
        if file.is_file():
            body = table(json.loads(file.read_text(encoding="utf-8")))
            begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
            before, _, rest = text.partition(begin)
            _, _, after = rest.partition(end)
            text = f"{before}{begin}{body}\n{end}{after}"
    return text


def main() -> None:
    """Renew README.md, or check it."""
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = render(old)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if new == old else "README.md is stale: python benchmarks/tables.py")
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
