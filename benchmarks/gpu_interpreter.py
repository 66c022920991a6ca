"""Errors of the GPU kernels in Triton's interpreter: writes results/gpu_interpreter.json.

    .venv/bin/python benchmarks/gpu_interpreter.py      # no GPU, minutes

A small awkward layer (70 outputs, 96 inputs) in every scheme, by every kernel that the tables or
the tuner may choose, in float16 against float64: what `gpu.py` does first on a card. It has no
Gluon and cannot multiply bfloat16 (tests/kernels/gpu/test_choose.py teaches it to).
"""

import json
import os
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import gpu as bench_gpu
import machine
import torch

from pvrt.format.scheme import Scheme
from pvrt.tools import bench_kernels
from pvrt.tools.bench_kernels import blocks_of
from pvrt_kernels.gpu import choose, launch
from pvrt_kernels.gpu.choose import DENSE, Plan, Shape

RESULT = machine.ROOT / "benchmarks" / "results" / "gpu_interpreter.json"
TOKENS = (1, 2, 3, 4, 9, 33)
OUTPUTS, INPUTS = 70, 96


def plans_of(shape: Shape, tokens: int) -> list[Plan]:
    """What the tuner may choose for a layer and a number of tokens, one of each kernel."""
    card = choose.describe_gpu(torch.device("cpu"))
    found: dict[str, Plan] = {}
    for plan in bench_kernels.candidates(card, shape, tokens):
        if plan != DENSE and plan.kernel != "lut_gluon":  # Gluon has no interpreter
            found.setdefault(plan.kernel, plan)
    return [*found.values(), DENSE]


def main() -> None:
    """Every scheme, number of tokens and kernel."""
    torch.manual_seed(0)
    bench = bench_gpu.Bench(torch.device("cpu"), True, float("inf"))
    rows = []
    for scheme in bench_gpu.SCHEMES:
        form = Scheme.parse(scheme)
        layer, exact = bench_gpu.checked_layer(bench, scheme, OUTPUTS, INPUTS, torch.float16)
        for tokens in TOKENS:
            book = (form.num_codebooks, form.codebook_size, form.in_group_size)
            x = bench.x(tokens, INPUTS)
            for plan in plans_of(Shape(*book, OUTPUTS, INPUTS), tokens):
                product = launch.multiply_decoded if plan == DENSE else partial(launch.launch, plan)
                call = partial(product, x, blocks_of(layer), None, layer.partition_sizes)
                errors = bench_gpu.poisoned(bench, call, x, exact)
                verdict = bench_gpu.verdict(
                    scheme, torch.float16, [OUTPUTS, INPUTS], tokens, plan, errors
                )
                assert verdict["passed"], verdict
                kept = ("scheme", "tokens", "error")
                rows.append({"kernel": plan.kernel, **{key: verdict[key] for key in kept}})
        print(f"{scheme}: {len(rows)} products so far", flush=True)
    result = {"layer": [OUTPUTS, INPUTS], "rows": rows, **machine.describe()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
