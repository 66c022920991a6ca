"""One block of experts: pvrt::aqlm_grouped_linear against dense products with the same experts.

`python benchmarks/vllm_experts.py`. 8 experts, 2 per token, in half of Mixtral's width (so that the
dense peer fits beside others on a small machine). Process CPU seconds, one thread, medians; every
repeat routes anew, so that weights come from memory and not from a cache.
"""

import json
import statistics
import time
from collections.abc import Callable

import machine
import results
import torch
from torch import Tensor
from torch.nn import functional as F

from pvrt.format.scheme import Scheme
from pvrt_kernels.grouped import aqlm_grouped_linear, aqlm_pack_group

EXPERTS, CHOSEN, HIDDEN, WIDTH, REPEATS = 8, 2, 2048, 7168, 15


def packed(
    scheme: Scheme, out_features: int, in_features: int, sizes: list[int]
) -> Callable[..., Tensor]:
    """The grouped product with random experts."""
    shape = scheme.codes_shape(out_features, in_features)
    codes = torch.randint(0, scheme.codebook_size, (EXPERTS, *shape)).to(scheme.code_dtype)
    codebooks = torch.randn(EXPERTS, len(sizes), *scheme.codebooks_shape).to(torch.bfloat16)
    scales = torch.rand(EXPERTS, *scheme.scales_shape(out_features)).to(torch.bfloat16)
    weight = aqlm_pack_group(codes, codebooks, scales, torch.bfloat16, sizes)
    return lambda x, index: aqlm_grouped_linear(x, index, weight)


def dense(out_features: int, in_features: int) -> Callable[..., Tensor]:
    """The same with dense bfloat16 experts."""
    weight = torch.randn(EXPERTS, out_features, in_features, dtype=torch.bfloat16)

    def product(x: Tensor, index: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], out_features)
        for expert in set(index.tolist()):
            rows = (index == expert).nonzero().flatten()
            y[rows] = F.linear(x[rows], weight[expert])
        return y

    return product


def seconds(first: Callable[..., Tensor], second: Callable[..., Tensor], tokens: int) -> float:
    """Median CPU seconds of a block for some tokens."""
    times = []
    for repeat in range(REPEATS):
        generator = torch.Generator().manual_seed(repeat)
        index = torch.cat(
            [torch.randperm(EXPERTS, generator=generator)[:CHOSEN] for _ in range(tokens)]
        )
        x = torch.randn(tokens * CHOSEN, HIDDEN, generator=generator).to(torch.bfloat16)
        started = time.process_time()
        gate, up = first(x, index).chunk(2, -1)
        second(F.silu(gate) * up, index)
        times.append(time.process_time() - started)
    return statistics.median(times)


def main() -> None:
    """Measure and store."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    peers = {"bfloat16": (dense(2 * WIDTH, HIDDEN), dense(HIDDEN, WIDTH))}
    for name in ("2x8g8", "1x16g8"):
        scheme = Scheme.parse(name)
        peers[name] = (
            packed(scheme, 2 * WIDTH, HIDDEN, [WIDTH, WIDTH]),
            packed(scheme, HIDDEN, WIDTH, [HIDDEN]),
        )
    rows = []
    for tokens in (1, 4, 32):
        measured = {name: seconds(*pair, tokens) for name, pair in peers.items()}
        for name, value in measured.items():
            ratio = round(measured["bfloat16"] / value, 2)
            rows.append(
                {"weights": name, "tokens": tokens, "cpu_ms": round(1e3 * value, 2), "speed": ratio}
            )
            print(json.dumps(rows[-1]), flush=True)
    about = {**machine.describe(), "machine_shared": True, "experts": EXPERTS, "per_token": CHOSEN}
    shape = {"hidden": HIDDEN, "width": WIDTH, "threads": 1, "repeats": REPEATS}
    results.store("vllm_experts", {**about, **shape, "rows": rows})


if __name__ == "__main__":
    main()
