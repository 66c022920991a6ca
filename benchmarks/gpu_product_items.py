"""Runs one item of gpu_product.py in this process: `gpu_product_items.py NAME --folder WORK ...`.

An item makes several checks, of which one that fails stops no other. Figures and failures go to
NAME.json in the work folder as soon as they are known.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gpu_product_real as real
import gpu_product_shapes as shapes
import gpu_product_toy as toy
import torch
from gpu_item import HERE, Item


def tests(item: Item) -> None:
    """The suite's tests of a second device, on a real one."""
    root = HERE.parent
    files = [
        *("tests/pvrt/test_device.py", "tests/tune/test_device.py", "tests/server/test_device.py"),
        *("tests/tune/plan/test_peak_bytes.py", "tests/kernels/test_embedding.py"),
        *("tests/pvrt/modules/test_aqlm_embedding.py", "tests/pvrt/cli/test_compare.py"),
    ]
    with item.check("tests"):
        chosen = item.some(files, files[:1])
        # Without workspaces of cuBLAS, which tests of exact peaks do not expect.
        small = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "0"}
        environment = {**os.environ, **item.some({"PVRT_TEST_DEVICE": "cuda", **small}, {})}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
        command += ["-n", str(item.some(4, 1)), *chosen]
        lines: list[str] = []
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=root, env=environment, stdout=pipe, text=True) as done:
            assert done.stdout is not None
            for line in done.stdout:
                print(line, end="", flush=True)
                lines.append(line.rstrip())
        item.note(output=lines[-400:])
        assert done.returncode == 0, "\n".join(lines[-30:])


def main() -> None:
    """Run one item."""
    items: dict[str, Callable[[Item], None]] = {
        **{f.__name__: f for f in (toy.doctor, toy.toy, toy.engine, toy.serve, toy.bench)},
        **{f.__name__: f for f in (toy.variants, toy.layouts, real.plan, real.tune, real.loaded)},
        **{f.__name__: f for f in (real.sampling, shapes.layer_fit, shapes.pv_step, tests)},
        "load_float16": partial(toy.load, dtype=torch.float16),
        "load_bfloat16": partial(toy.load, dtype=torch.bfloat16),
    }
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=items)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--text", type=Path)
    options = parser.parse_args()
    text = options.text
    if text is None:
        from pvrt.tools.perplexity import default_text

        text = options.folder / f"{options.name}.txt"
        text.write_text(default_text())
    item = Item(options.name, options.folder, options.device, options.dry_run, options.model, text)
    items[options.name](item)
    item.note()


if __name__ == "__main__":
    main()
