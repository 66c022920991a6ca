"""The notebook's cells, run in this process: no kernel is needed."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "inside_two_bits.ipynb"


def stored() -> Any:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_notebook_shows_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(tmp_path)
    notebook = stored()
    left = importlib.import_module("notebook").run(notebook)
    assert left["losses"][-1] / math.log(2) < 4.5, "the model has learned next to nothing"
    assert 0 < max(left["errors"]) < 0.5
    calibrated, tuned = (left["figures"][name] for name in ("calibrated", "tuned"))
    assert tuned.against.kl.mean < calibrated.against.kl.mean
    assert tuned.against.noise_floor.mean < tuned.against.kl.mean
    assert max(left["moved"].values()) > 0, "PV-Tuning moved no codes"
    kinds = [output["output_type"] for cell in notebook["cells"] for output in outputs(cell)]
    assert kinds.count("display_data") == 3
    assert [cell["source"] for cell in notebook["cells"]] == [
        cell["source"] for cell in stored()["cells"]
    ]


def outputs(cell: Any) -> list[Any]:
    return cell.get("outputs", [])  # type: ignore[no-any-return]


def test_the_notebook_is_kept_with_its_outputs() -> None:
    cells = stored()["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert sum(bool(outputs(cell)) for cell in code) > len(code) / 2
    text = "".join(line for cell in code for out in outputs(cell) for line in out.get("text", []))
    assert str(ROOT) not in text and "Error" not in text
