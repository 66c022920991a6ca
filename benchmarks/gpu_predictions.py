"""What the GPU kernels should reach, computed, not measured: writes results/gpu_predictions.json.

    .venv/bin/python benchmarks/gpu_predictions.py

For one token a kernel is as slow as its slowest resource. Per SM and step (16 bytes of codes of
every row of a program) these are: bytes from memory at 92 % of the card's bandwidth; wavefronts of
shared memory, where 32 lookups in a table of 256 take 3.15 clocks on average (random codes, 32
banks, simulated here) and other accesses one; instructions, 4 per clock, counted in the compiled
loop; for 16-bit codes 32-byte sectors of L2, at a bandwidth that is an assumption. To that come 2
us per launch for starting, the first loads and the last program's sum: an assumption too. Programs
are spread over SMs as `plans` plans them, so that uneven shares cost what they would.
"""

import json
import sys
from collections import Counter
from typing import Any

import gpu_llama
import machine
import torch

from pvrt_kernels.gpu import choose
from pvrt_kernels.gpu.choose import Gpu, Plan, Shape

sys.path.insert(0, str(machine.ROOT))
from tests.fixtures import aot
from tests.fixtures.aot import Binary, Variant

RESULT = machine.ROOT / "benchmarks" / "results" / "gpu_predictions.json"
#: SMs, GHz, GB/s, architecture, L2 GB/s (assumed).
CARDS = {
    "NVIDIA GeForce RTX 3090": (82, 1.695, 936, 86, 1900),
    "NVIDIA GeForce RTX 4090": (128, 2.52, 1008, 89, 2400),
    "NVIDIA GeForce RTX 5090": (170, 2.407, 1792, 120, 3500),
    "NVIDIA A100-SXM4-80GB": (108, 1.41, 2039, 80, 3000),
    "NVIDIA H100 80GB HBM3": (132, 1.755, 3350, 90, 5000),
}
LAYERS = ((4096, 4096), (6144, 4096), (12288, 4096), (22016, 4096), (4096, 11008), (28672, 8192))
LAUNCH = 2e-6
MEMORY = 0.92  # of the stated bandwidth, as copies usually reach
BETWEEN = 5 * 1.5e-6  # norms, rotations, attention and gate of a block, beside its four products


def lookup_clocks() -> float:
    """Wavefronts of 32 lookups in a table of 256 words: the busiest bank, equal words once."""
    generator = torch.Generator().manual_seed(0)
    total = 0
    for _ in range(4000):
        words = set(torch.randint(0, 256, (32,), generator=generator).tolist())
        total += max(Counter(word % 32 for word in words).values())
    return total / 4000


def resources(
    card: str, plan: Plan, shape: Shape, binary: Binary, lookup: float
) -> dict[str, float]:
    """Clocks of an SM per step of one program, by what takes them."""
    sms, ghz, bandwidth, _, cache = CARDS[card]
    per_clock = 1e9 / (sms * ghz * 1e9)
    lookups = 16 * plan.rows / 32 if plan.kernel.startswith("lut") else 0
    shared = sum(n for name, n in binary.loop.items() if name.startswith(("LDS", "STS")))
    sectors = plan.rows * 16 / (2 * shape.num_codebooks) * 32 if shape.size > 256 else 0
    return {
        "memory": plan.rows * 16 / (bandwidth * MEMORY * per_clock),
        "shared memory": (shared * plan.warps - lookups) + lookups * lookup,
        "instructions": sum(binary.loop.values()) * plan.warps / 4,
        "L2": sectors / (cache * per_clock),
    }


def predict(card: str, shape: Shape, lookup: float, cache: dict[Any, Binary]) -> dict[str, Any]:
    """Time of one product with one token, and what bounds it."""
    sms, ghz, bandwidth, architecture, _ = CARDS[card]
    capability = divmod(architecture, 10)
    plan = choose.choose(Gpu(card, capability, sms), shape, 1, torch.float16, False)
    variant = Variant(
        Plan(plan.kernel, 1, plan.rows, plan.warps), shape.num_codebooks, shape.size, shape.group
    )
    if (variant, architecture) not in cache:
        cache[variant, architecture] = aot.compile_variant(variant, architecture)
    parts = resources(card, plan, shape, cache[variant, architecture], lookup)
    limit = max(parts, key=lambda name: parts[name])
    programs = -(-shape.out_features // plan.rows) * plan.split
    steps = -(-programs // sms) * -(-shape.blocks // plan.split)
    even = shape.blocks * shape.out_features / plan.rows / sms
    # An SM with more programs than others still shares memory with them: only its own units wait.
    own = max(value for name, value in parts.items() if name not in ("memory", "L2"))
    common = max(parts["memory"], parts["L2"])
    seconds = LAUNCH + max(even * common, steps * own) / (ghz * 1e9)
    read = shape.blocks * 16 * shape.out_features
    return {
        "gpu": card,
        "scheme": shape.scheme,
        "layer": [shape.out_features, shape.in_features],
        "tokens": 1,
        "plan": vars(plan),
        "microseconds": seconds * 1e6,
        "of_bandwidth": read / seconds / (bandwidth * 1e9),
        "bound_by": limit,
        "clocks_per_step": parts,
    }


def decode_rate(
    card: str, llama: gpu_llama.Llama, scheme: tuple[int, int, int], lookup: float, cache: Any
) -> dict[str, Any]:
    """Tokens per second of whole steps with a float16 head and 1k tokens in the cache."""
    bandwidth = CARDS[card][2] * 1e9
    block = sum(
        predict(card, Shape(*scheme, *layer), lookup, cache)["microseconds"] * 1e-6
        for layer in llama.linears
    )
    cached = 2 * 2 * llama.layers * llama.kv_heads * 1024 * llama.head
    rest = (2 * llama.vocabulary * llama.hidden + cached) / (bandwidth * MEMORY)
    seconds = llama.layers * (block + BETWEEN) + rest
    return {
        "gpu": card,
        "model": llama.name,
        "scheme": Shape(*scheme, 1, 1).scheme,
        "tokens_per_second": 1 / seconds,
    }


def main() -> None:
    """Predict, print a table of decode rates and layers, store all."""
    lookup = lookup_clocks()
    cache: dict[Any, Binary] = {}
    schemes = ((2, 256, 8), (1, 65536, 8), (1, 65536, 16))
    layers = [
        predict(card, Shape(*scheme, *layer), lookup, cache)
        for card in CARDS
        for scheme in schemes
        for layer in LAYERS
    ]
    models = [
        decode_rate(card, llama, scheme, lookup, cache)
        for card in CARDS
        for llama in (gpu_llama.LLAMA2_7B, gpu_llama.LLAMA3_8B)
        for scheme in schemes
    ]
    result = {
        "prediction": True,
        "basis": " ".join((__doc__ or "").split("\n\n", 2)[2].split()),
        "lookup_clocks": lookup,
        **machine.describe(),
        "layers": layers,
        "models": models,
    }
    result["versions"]["triton"] = aot.triton_version()
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for scheme in ("2x8g8", "1x16g8"):
        print(f"| {scheme}: share of bandwidth | " + " | ".join(f"{o} x {i}" for o, i in LAYERS))
        for card in CARDS:
            found = [r for r in layers if (r["gpu"], r["scheme"]) == (card, scheme)]
            cells = " | ".join(f"{r['of_bandwidth']:.0%} ({r['bound_by']})" for r in found)
            print(f"| {card} | {cells} |")
    for row in models:
        print(f"| {row['gpu']} | {row['model']} | {row['scheme']} | {row['tokens_per_second']:.0f}")


if __name__ == "__main__":
    main()
