"""Every shipped GPU kernel compiled for every architecture: writes results/kernels_aot.json.

    .venv/bin/python benchmarks/kernels_aot.py        # the installed Triton, 40 minutes
    .venv/bin/python benchmarks/kernels_aot.py lut    # one kernel

Needs no GPU. Fails when a binary spills, reads codes other than 16 bytes at a time where it is made
to, or needs more registers or shared memory than an SM has. Turing (sm_75) is compiled for the one
kernel that is used there. A row is the most that any binary of a kernel takes on an architecture;
rows of other versions of Triton are kept.
"""

import sys

import machine
import results
import triton

sys.path.insert(0, str(machine.ROOT))
from tests.fixtures import aot


def main() -> None:
    """Compile all, print what is wrong, store the largest figures."""
    asked = sys.argv[1:]
    variants = [v for v in aot.shipped_variants() if not asked or v.config.kernel in asked]
    jobs = [(variant, arch) for variant in variants for arch in aot.ARCHITECTURES]
    jobs += [(variant, 75) for variant in variants if variant.config.kernel == "decode"]
    rows: dict[tuple[str, int], results.Row] = {}
    wrong = 0
    for number, (variant, architecture) in enumerate(jobs, 1):
        binary = aot.compile_variant(variant, architecture)
        for complaint in aot.complaints(variant, architecture, binary):
            wrong += 1
            print(f"{variant.name}, {variant.scheme}, sm_{architecture}: {complaint}", flush=True)
        kernel = variant.name.split()[0]
        place = {"triton": triton.__version__, "kernel": kernel, "arch": f"sm_{architecture}"}
        figures = ("registers", "spill_bytes", "shared_bytes")
        row = rows.setdefault(
            (kernel, architecture), {**place, "binaries": 0, **dict.fromkeys(figures, 0)}
        )
        row["binaries"] += 1
        row.update({name: max(row[name], getattr(binary, name)) for name in figures})
        if number % 10 == 0:
            print(f"{number} of {len(jobs)} compiled", flush=True)
    known = results.load("kernels_aot")
    stored = results.renewed(known, rows.values(), "triton", "kernel", "arch")
    results.store("kernels_aot", stored)
    print(f"Triton {triton.__version__}: {len(jobs)} binaries, {wrong} complaints")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
