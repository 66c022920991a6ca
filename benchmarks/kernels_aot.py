"""Every shipped GPU kernel compiled for every architecture: writes results/kernels_aot.json.

    .venv/bin/python benchmarks/kernels_aot.py                # the installed Triton, 10 minutes
    .venv/bin/python benchmarks/kernels_aot.py --also OTHER/bin/python    # and another version
    .venv/bin/python benchmarks/kernels_aot.py --missing      # only what the file does not have

Needs no GPU. Fails when a binary spills, reads codes other than 16 bytes at a time where it is made
to, or needs more registers or shared memory than an SM has. Turing (sm_75) is compiled for the one
kernel that is used there. Records of other binaries in the file are kept.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

import machine
import triton

sys.path.insert(0, str(machine.ROOT))
from tests.fixtures import aot

RESULT = machine.ROOT / "benchmarks" / "results" / "kernels_aot.json"


def row(variant: aot.Variant, architecture: int) -> tuple[dict[str, Any], list[str]]:
    """The record of one binary, and what is wrong with it."""
    binary = aot.compile_variant(variant, architecture)
    record = {
        **identity(variant, architecture),
        "registers": binary.registers,
        "spill_bytes": binary.spill_bytes,
        "shared_bytes": binary.shared_bytes,
        "load_128_count": binary.load_128_count,
    }
    return record, aot.complaints(variant, architecture, binary)


def identity(variant: aot.Variant, architecture: int) -> dict[str, Any]:
    """What a record is about."""
    return {
        "kernel": variant.name,
        "scheme": variant.scheme,
        "arch": f"sm_{architecture}",
        "triton": triton.__version__,
    }


def stored() -> dict[tuple[str, ...], dict[str, Any]]:
    """The records of the file by what they are about."""
    records = json.loads(RESULT.read_text()) if RESULT.is_file() else []
    return {key(record): record for record in records}


def key(record: dict[str, Any]) -> tuple[str, ...]:
    """What names a binary."""
    return record["triton"], record["scheme"], record["kernel"], record["arch"]


def store(rows: list[dict[str, Any]]) -> None:
    """Put records into the file, in place of those of the same binaries."""
    merged = stored() | {key(record): record for record in rows}
    lines = ",\n ".join(json.dumps(merged[k]) for k in sorted(merged))
    RESULT.write_text(f"[\n {lines}\n]\n")


def main() -> None:
    """Compile all, print what is wrong, store the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--also", help="a Python with another Triton to run this with as well")
    parser.add_argument("--schemes", nargs="+", help="only these, 2x8g8 for example")
    parser.add_argument("--missing", action="store_true", help="leave out what the file has")
    options = parser.parse_args()
    variants = [v for v in aot.shipped_variants() if v.scheme in (options.schemes or v.scheme)]
    jobs = [(v, a) for v in variants for a in aot.ARCHITECTURES]
    jobs += [(v, 75) for v in variants if v.plan.kernel == "decode"]
    known = stored() if options.missing else {}
    jobs = [job for job in jobs if key(identity(*job)) not in known]
    rows: list[dict[str, Any]] = []
    wrong = 0
    for number, (variant, architecture) in enumerate(jobs, 1):
        record, complaints = row(variant, architecture)
        rows.append(record)
        wrong += len(complaints)
        for complaint in complaints:
            print(f"{variant.name}, {variant.scheme}, sm_{architecture}: {complaint}", flush=True)
        if number % 10 == 0 or number == len(jobs):
            store(rows)
            print(f"{number} of {len(jobs)} compiled", flush=True)
    print(f"Triton {triton.__version__}: {len(rows)} binaries, {wrong} complaints")
    if options.also is not None:
        wrong += subprocess.run(
            [options.also, __file__, *["--missing"] * options.missing]
        ).returncode
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
