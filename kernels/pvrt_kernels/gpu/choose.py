"""Which GPU kernel runs a product, and how: from tables, never from a benchmark while serving.

A table is a JSON file for one kind of GPU, a list of rules that are tried in order:

    {"scheme": "2x8g8", "max_tokens": 1, "kernel": "lut", "rows": 1024, "warps": 8}

A rule holds for up to `max_tokens` tokens (absent: any number), for one `scheme` or a width of
codes ("8bit", "16bit"), and, where it says so, from `min_rows` outputs on, and for one `layer`
[out_features, in_features]. Kernels are lut_cuda, tile_cuda, lut, direct and tile; dense, without
rows and warps, decodes once and calls cuBLAS. `split` programs share a tile of rows; where a rule
names none, it follows from the number of SMs.

The user's own table (`pvrt bench kernels --tune` measures one) comes before the one that pvrt
brings for the card, and that before the rules for unknown cards (`configs/any.json`).
"""

import json
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from pvrt_kernels.gpu import nvrtc
from pvrt_kernels.gpu.layout import block_count, split_codebooks

CUDA = ("lut_cuda", "tile_cuda")
KERNELS = (*CUDA, "lut", "direct", "tile", "dense")
MOST_TOKENS = 64  # of one program
STAGE_BYTES = 32  # code bytes of a row that a table of lut_cuda serves
# Sums that programs which share rows may keep at a time, 16 MiB: a layer that has more (the head of
# a large vocabulary, for many tokens) has tiles enough to fill a card without sharing.
MOST_SUMS = 1 << 22
VERSION = 1  # of the packed layout and of the rules: a table for another one is not used


@dataclass(frozen=True)
class Gpu:
    """What a choice depends on."""

    name: str
    capability: tuple[int, int]
    sms: int
    compiles_cuda: bool = False  # NVRTC is here


@dataclass(frozen=True)
class Shape:
    """A weight [out_features, in_features] of M codebooks: `size` codewords of `group` weights."""

    num_codebooks: int
    size: int
    group: int
    out_features: int
    in_features: int

    @property
    def scheme(self) -> str:
        """Written as everywhere, 2x8g8."""
        return f"{self.num_codebooks}x{self.size.bit_length() - 1}g{self.group}"

    @property
    def width(self) -> str:
        """Width of stored codes, "8bit" or "16bit"."""
        return "8bit" if self.size <= 256 else "16bit"

    @property
    def blocks(self) -> int:
        """Blocks of 16 bytes per row."""
        return block_count(self.in_features // self.group, self.num_codebooks, self.size)


@dataclass(frozen=True)
class LaunchConfig:
    """A kernel and its launch: tokens and rows per program, warps, programs per tile of rows."""

    kernel: str
    tokens: int = 1
    rows: int = 0
    warps: int = 4
    split: int = 1


DENSE = LaunchConfig("dense")
_SLOTS = 16  # warps that are taken to run on an SM at a time


def describe_gpu(device: torch.device) -> Gpu:
    """The GPU of a device; a stand-in of 4 SMs for a CPU, where Triton's interpreter runs."""
    if device.type != "cuda":
        return Gpu("interpreter", (8, 9), 4)
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    compiles = nvrtc.missing(capability) is None
    return Gpu(properties.name, capability, properties.multi_processor_count, compiles)


def choose(
    gpu: Gpu, shape: Shape, tokens: int, dtype: torch.dtype, deterministic: bool
) -> LaunchConfig:
    """The launch config for a number of tokens; the same arguments always give the same one."""
    if gpu.capability < (8, 0):  # no tensor cores that Triton can use
        return DENSE
    if deterministic or dtype == torch.float32:  # others add in any order, or have float16 inputs
        if tokens > 4:
            return DENSE
        return fit(LaunchConfig("direct", 0, 128, 4, 0), gpu, shape, tokens)
    for rule in rules(gpu.name):
        if matches(rule, shape, tokens) and takes(rule["kernel"], gpu, shape):
            if rule["kernel"] == "dense":
                return DENSE
            config = LaunchConfig(
                rule["kernel"], 0, rule["rows"], rule["warps"], rule.get("split", 0)
            )
            return fit(config, gpu, shape, tokens)
    return DENSE


def matches(rule: dict[str, Any], shape: Shape, tokens: int) -> bool:
    """Whether a rule is about this weight and number of tokens."""
    return (
        tokens <= rule.get("max_tokens", tokens)
        and rule.get("scheme", shape.scheme) in (shape.scheme, shape.width)
        and rule.get("min_rows", 1) <= shape.out_features
        and rule.get("layer", [shape.out_features, shape.in_features])
        == [shape.out_features, shape.in_features]
    )


def takes(kernel: str, gpu: Gpu, shape: Shape) -> bool:
    """Whether a kernel can be had for a weight (in 16 bits): those of CUDA are for some."""
    groups = {"lut_cuda": (8, 16, 32), "tile_cuda": (8, 16)}
    return kernel not in CUDA or (
        gpu.compiles_cuda
        and shape.num_codebooks in (1, 2, 4)
        and shape.group in groups[kernel]
        and shape.width == "8bit"
    )


def fit(config: LaunchConfig, gpu: Gpu, shape: Shape, tokens: int) -> LaunchConfig:
    """Fill in tokens per program (from the batch) and, where it is 0, split (from the SMs)."""
    tile = config.kernel in ("tile", "tile_cuda")
    largest = MOST_TOKENS if tile else 1 if config.kernel == "lut" else 4
    least = 8 if tile else 1
    per_program = min(max(1 << (tokens - 1).bit_length(), least), largest)
    if tokens > per_program or tokens * shape.out_features > MOST_SUMS:
        return replace(config, tokens=per_program, split=1)
    config = replace(config, tokens=per_program)
    if config.split == 0 and config.kernel in CUDA:
        return least_cost(config, gpu, shape)
    if config.split == 0:
        if -(-shape.out_features // config.rows) * shape.blocks < gpu.sms:
            config = halved(config, shape)
        tiles = -(-shape.out_features // config.rows)
        split = best_split(tiles, shape.blocks, gpu.sms * max(1, _SLOTS // config.warps))
        config = replace(config, split=split)
    return replace(config, split=min(config.split, shape.blocks))


def least_cost(config: LaunchConfig, gpu: Gpu, shape: Shape) -> LaunchConfig:
    """The rows (at most the config's) and the split of a CUDA kernel that take the least time.

    As measured on an H100 (benchmarks/results): an SM takes its programs one beside the other. In
    units of 0.056 us, a stage of lut_cuda costs an SM 6 for each row of a thread and word of a
    table, and 2 for the table; a program costs 8 besides. Of one or two tokens two programs are to
    run at a time: a last one without a second does not keep the SM busy. In units of 0.08 us, a
    block of codes of tile_cuda costs 2 for each 128 rows, and 1 for each 8 tokens. Its programs do
    not share rows: what they would add up costs more than it saves.
    """
    threads, words = 32 * config.warps, (config.tokens + 1) // 2
    lut = config.kernel == "lut_cuda"
    stages = -(-shape.blocks * 16 // STAGE_BYTES) if lut else shape.blocks

    def cost(rows: int, split: int) -> int:
        tiles = -(-shape.out_features // rows)
        programs = -(-tiles * split // gpu.sms)
        steps = -(-stages // split)
        if not lut:
            return programs * steps * (2 * rows // 128 + config.tokens // 8)
        look_up = 6 * words * (rows // threads) * steps
        alone = 2 * look_up // 3 if programs % 2 and words == 1 else 0
        return programs * (look_up + 2 * words * steps + 8) + alone + split // 2

    rows, split = min(
        ((config.rows >> halvings, split)
         for halvings in range(3) if config.rows >> halvings >= (threads if lut else 128)
         for split in range(1, min(stages, 64) + 1 if lut else 2)),
        key=lambda each: cost(*each),
    )  # fmt: skip
    return replace(config, rows=rows, split=split)


def halved(config: LaunchConfig, shape: Shape) -> LaunchConfig:
    """A smaller tile, for a layer too small to fill the card, where there is one.

    Lookups in tables of 3, 5 or 6 codebooks would lack registers with fewer warps.
    """
    odd = split_codebooks(shape.num_codebooks)[1] > 0
    if config.warps <= 4 or (config.kernel == "lut" and odd):
        return config
    return replace(config, rows=config.rows // 2, warps=config.warps // 2)


def best_split(tiles: int, blocks: int, slots: int) -> int:
    """Programs per tile so that the last to finish is early; of equal ones the smallest.

    `slots` programs run at a time. Each takes ceil(blocks / split) steps, and about one step more
    to start and to finish.
    """

    def cost(split: int) -> int:
        waves = -(-tiles * split // slots)
        return waves * (-(-blocks // split) + 1)

    return min(range(1, min(blocks, 64) + 1), key=lambda split: (cost(split), split))


@lru_cache(maxsize=16)
def rules(name: str) -> tuple[dict[str, Any], ...]:
    """Rules for a card: the user's, then the shipped ones, then those for unknown cards."""
    own = user_table(name)
    tables = [read_table(own)] if own.is_file() else []
    folder = files("pvrt_kernels.gpu") / "configs"
    shipped = [json.loads(file.read_text()) for file in folder.iterdir()]
    tables += [table for table in shipped if name in table["names"]]
    tables += [table for table in shipped if not table["names"]]
    return tuple(rule for table in tables if table for rule in table["rules"])


def user_table(name: str) -> Path:
    """Where `pvrt bench kernels --tune` writes for a card: $XDG_CACHE_HOME/pvrt/kernels."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    stem = "".join(c if c.isalnum() else "-" for c in name.lower())
    return cache / "pvrt" / "kernels" / f"{stem}.json"


def read_table(path: Path) -> dict[str, Any] | None:
    """A user's table; None for one of another version. Raises ValueError when it is malformed."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["version"] != VERSION:
            return None
        for rule in table["rules"]:
            if rule["kernel"] not in KERNELS:
                raise ValueError(f"unknown kernel {rule['kernel']!r}")
            if rule["kernel"] != "dense":
                LaunchConfig(rule["kernel"], 0, int(rule["rows"]), int(rule["warps"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a table of kernels ({error}); delete it or measure it anew with "
            "pvrt bench kernels --tune"
        ) from error
    return dict(table)
