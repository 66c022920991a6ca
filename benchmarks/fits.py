"""What `pvrt tune` chooses on cards that people own: `python benchmarks/fits.py`.

Plans of models by their published shapes, from arithmetic alone: nothing here is measured. Rates
are half of what a card's data sheet says.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import results

from pvrt_tune.data.source_model import load_skeleton
from pvrt_tune.machine import Machine
from pvrt_tune.plan.cards import named
from pvrt_tune.plan.choose import plan_run
from pvrt_tune.plan.memory_plan import Request
from pvrt_tune.plan.report import misfits
from pvrt_tune.settings import EFFORTS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.fixtures.shapes import folder_of

#: Model, card, GB of host memory, whether it is PV-tuned, whether text is given.
RUNS = (
    ("1B", "RTX 4060", 16, True, False),
    ("3B", "RTX 3060", 32, True, False),
    ("8B", "RTX 4070", 48, True, False),
    ("8B", "RTX 4090", 32, True, False),
    ("8B", "RTX 4090", 96, True, False),
    ("8B", "H100", 128, True, False),
    ("14B", "RTX 4090", 64, True, False),
    ("14B", "L40S", 64, True, False),
    ("14B", "L40S", 192, True, False),
    ("70B", "RTX 4090", 16, False, True),
    ("70B", "RTX 4090", 192, False, False),
)
SIZES = ("device_bytes", "host_bytes", "disk_bytes")


def main() -> None:
    """Plan all runs and store what was chosen."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model, name, host, tuned, given in RUNS:
            card, recipe = named(name), EFFORTS["standard"]
            recipe = recipe if tuned else replace(recipe, training=None)
            machine = Machine(host * 10**9, int(card.memory * 1e9), 10**12)
            path = str(folder_of(model, Path(folder)))
            request = Request(path, recipe, "cuda", not given)
            plan = plan_run(load_skeleton(path), request, card.speed(), machine)
            problems = misfits(plan, machine)
            assert not problems, problems
            row = {
                "model": model,
                "card": card.name,
                "card_gb": card.memory,
                "host_gb": host,
                "text_given": given,
                **{size: max(getattr(phase, size) for phase in plan.phases) for size in SIZES},
                "file_bytes": plan.result.file_bytes,
                "hours": plan.seconds / 3600,
                "pv_hours": sum(p.seconds for p in plan.phases if p.name == "PV-Tuning") / 3600,
                "choices": plan.request.recipe.choices,
                "stream": plan.stream,
                "basis": plan.basis,
            }
            rows.append(row)
            print(row, flush=True)
    results.store("fits", rows)


if __name__ == "__main__":
    main()
