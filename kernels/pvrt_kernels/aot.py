"""Compile GPU kernels for cards that are not here, and read what the compilers made of them.

Triton compiles for any architecture without a driver; its wheel brings ptxas, cuobjdump and
nvdisasm, with which registers, spills, shared memory and the machine instructions are read. The
specialisations are those that a launch infers: pointers at multiples of 16 bytes, sizes plain
integers.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from pvrt_kernels import gpu
from pvrt_kernels.lut_gemv import UNSPECIALISED
from pvrt_kernels.plans import Plan, Shape, halved, matches

ARCHITECTURES = (80, 86, 89, 90, 120)
SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB for one program
REGISTERS = 65536  # of an SM, for all threads of its programs

_LINE = re.compile(
    r"^(?P<label>\.L_x_\d+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)"
    r"(?:\s+`\((?P<target>\.L_x_\d+)\))?",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Variant:
    """One binary of a kernel: a plan's compile-time side, a scheme, and a type of x."""

    plan: Plan
    num_codebooks: int
    size: int
    group: int
    parts: int = 1
    has_bias: bool = False
    dtype: str = "fp16"

    @property
    def scheme(self) -> str:
        """Written as everywhere, 2x8g8."""
        return f"{self.num_codebooks}x{self.size.bit_length() - 1}g{self.group}"

    @property
    def name(self) -> str:
        """Kernel, tokens, rows and warps of a program, and what is not the plainest case."""
        plan = self.plan
        extra = f" parts{self.parts}" if self.parts > 1 else ""
        extra += " bias" if self.has_bias else ""
        extra += f" {self.dtype}" if self.dtype != "fp16" else ""
        tokens = "" if plan.kernel == "decode" else f" tokens{plan.tokens}"
        return f"{plan.kernel}{tokens} rows{plan.rows} warps{plan.warps}{extra}"


@dataclass(frozen=True)
class Binary:
    """What a variant became: counts of machine instructions, in all and in its main loop."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: Counter[str]
    loop: Counter[str]
    narrow_code_loads: int
    code_loads: int

    def count(self, pattern: str) -> int:
        """Instructions whose name matches a regular expression from its beginning."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))

    @property
    def load_128_count(self) -> int:
        """Loads of 16 bytes per thread from global memory."""
        return self.count(r"LDG\.E.*\.128")


SCHEMES = ((2, 256, 8), (1, 65536, 8), (1, 65536, 16), (1, 256, 8), (1, 256, 4), (4, 256, 8))
TOKENS = (1, 2, 4, 8, 16, 32, 64)  # per program


def shipped_variants() -> list[Variant]:
    """All that the tables of configs/ can choose, and the Gluon kernel, for the usual schemes.

    In float16 with one partition; for 2x8g8 also with three and a bias, and in bfloat16.
    """
    variants = []
    for scheme in SCHEMES:
        for plan in dict.fromkeys(_shipped_plans(Shape(*scheme, 4096, 4096))):
            variants.append(Variant(plan, *scheme))
            if scheme == (2, 256, 8) and plan.kernel != "decode" and plan.tokens in (1, 4, 16):
                variants.append(Variant(plan, *scheme, parts=3, has_bias=True))
                variants.append(Variant(plan, *scheme, dtype="bf16"))
    return variants


def _shipped_plans(shape: Shape) -> Iterator[Plan]:
    """Plans for a scheme, with repetitions."""
    yield gpu.DECODE
    for file in sorted((files("pvrt_kernels") / "configs").iterdir(), key=lambda f: f.name):
        rules = json.loads(file.read_text())["rules"]
        for tokens in TOKENS:
            rule = next(rule for rule in rules if matches(rule, shape, tokens))
            plan = Plan(rule["kernel"], tokens, rule["rows"], rule["warps"])
            yield plan
            yield halved(plan, tokens)
    for tokens in (1, 2, 4):
        yield Plan("direct", tokens, 128, 4)  # where results have to be deterministic
    if shape.width == "8bit" and gpu.gluon_gathers():
        yield Plan("lut_gluon", 1, 1024, 8)
        yield Plan("lut_gluon", 1, 2048, 8)


def compile_variant(variant: Variant, architecture: int) -> Binary:
    """Compile for sm_<architecture> and read the binary."""
    import triton
    from triton.backends.compiler import GPUTarget

    function, types, constants = _arguments(variant)
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*")
    }
    source = _source(variant)(function, signature, values, aligned)
    options = gpu.compile_options(variant.plan)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


def _arguments(variant: Variant) -> tuple[Any, dict[str, str], dict[str, Any]]:
    plan = variant.plan
    kind = f"*{variant.dtype}"
    constants: dict[str, Any] = {
        "BOOKS": variant.num_codebooks,
        "SIZE": variant.size,
        "GROUP": variant.group,
        "ROWS": plan.rows,
    }
    if plan.kernel == "decode":
        from pvrt_kernels.tile_gemm import decode_rows

        types = {"words_ptr": "*i32", "book_ptr": kind, "scales_ptr": kind, "weight_ptr": kind}
        sizes = ("rows", "groups", "first_row", "end_row")
        return decode_rows, types | dict.fromkeys(sizes, "i32"), constants
    words = "*i64" if plan.kernel == "direct" else "*i32"
    types = {"x_ptr": kind, "words_ptr": words, "books_ptr": kind, "scales_ptr": kind}
    types |= {"bias_ptr": kind, "y_ptr": kind, "partial_ptr": "*fp32", "arrived_ptr": "*i32"}
    constants |= {"TOKENS": plan.tokens, "PARTS": variant.parts, "HAS_BIAS": variant.has_bias}
    return gpu._kernel(plan.kernel), types | dict.fromkeys(UNSPECIALISED, "i32"), constants


def _source(variant: Variant) -> Any:
    if variant.plan.kernel == "lut_gluon":
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def _read(cubin: bytes, shared_bytes: int) -> Binary:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = _run(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    instructions, loop = _count(code)
    spills = sum(n for name, n in instructions.items() if name.startswith(("LDL", "STL")))
    # Codes are what is loaded with evict_first, and nothing else is.
    codes = {name: n for name, n in instructions.items() if re.match(r"LDG\.E.*\.EF", name)}
    return Binary(
        registers=int(found[1]),
        spill_bytes=max(int(found[2]) + int(found[3]), 4 * spills),
        shared_bytes=shared_bytes,
        instructions=instructions,
        loop=loop,
        narrow_code_loads=sum(n for name, n in codes.items() if ".128" not in name),
        code_loads=sum(codes.values()),
    )


def _count(code: str) -> tuple[Counter[str], Counter[str]]:
    """Instructions of a disassembly by name, and those of its longest loop."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loop: list[str] = []
    for line in _LINE.finditer(code):
        if line["label"]:
            labels[line["label"]] = len(names)
            continue
        names.append(line["name"])
        start = labels.get(line["target"] or "")
        if start is not None and len(names) - start > len(loop):
            loop = names[start:]
    return Counter(names), Counter(loop)


def _run(*command: object) -> str:
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def complaints(variant: Variant, architecture: int, binary: Binary) -> list[str]:
    """What keeps a binary from being used: spills, narrow loads, too large for an SM."""
    found = []
    plan = variant.plan
    if binary.spill_bytes:
        found.append(f"{binary.spill_bytes} bytes of registers are spilled")
    if binary.registers * 32 * plan.warps > REGISTERS:
        found.append(f"{binary.registers} registers for {plan.warps} warps do not fit an SM")
    if binary.shared_bytes > SHARED_LIMIT[architecture] << 10:
        found.append(f"{binary.shared_bytes} bytes of shared memory are more than it has")
    threads_per_row = plan.warps * 32 / plan.rows
    if not binary.code_loads or (binary.narrow_code_loads and threads_per_row <= 1):
        loads = f"{binary.narrow_code_loads} of {binary.code_loads}"
        found.append(f"{loads} loads of codes are narrower than 16 bytes")
    return found


def triton_version() -> str:
    """Of the compiler that `compile_variant` uses."""
    return version("triton")
