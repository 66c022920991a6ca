"""Run a notebook and keep what its cells print and draw: `python benchmarks/notebook.py FILE...`.

Each notebook runs in this process, in a new folder of its own, in one namespace. That needs no
kernel and no Jupyter. Of a cell's output, what it prints and its matplotlib figures are kept.
"""

import argparse
import base64
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # bars are no output


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Run all code cells in the working directory; their outputs take the place of those that they
    had. Returns the namespace that they leave. What a cell raises is the caller's.
    """
    import matplotlib

    matplotlib.use("Agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        number += 1
        printed = StringIO()
        source = "".join(cell["source"])
        with redirect_stdout(printed):
            exec(compile(source, f"cell {number}", "exec"), namespace)
        cell["execution_count"] = number
        cell["outputs"] = [*_text(printed.getvalue()), *_figures()]
    return namespace


def _text(printed: str) -> Iterator[dict[str, Any]]:
    if printed:
        lines = printed.splitlines(keepends=True)
        yield {"name": "stdout", "output_type": "stream", "text": lines}


def _figures() -> Iterator[dict[str, Any]]:
    """The figures that a cell drew, which are closed."""
    from matplotlib import pyplot

    for number in pyplot.get_fignums():
        picture = BytesIO()
        # Without the version of matplotlib, which would change the file and nothing to see.
        pyplot.figure(number).savefig(picture, dpi=80, metadata={"Software": None})
        data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
        yield {"data": data, "metadata": {}, "output_type": "display_data"}
    pyplot.close("all")


def main() -> None:
    """Run notebooks and write them with their outputs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    for file in parser.parse_args().files:
        place = file.resolve()
        notebook = json.loads(place.read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            run(notebook)
        place.write_text(
            json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        print(f"{file}: {len(notebook['cells'])} cells", file=sys.stderr)


if __name__ == "__main__":
    main()
