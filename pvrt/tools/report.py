"""What `pvrt inspect` says about a checkpoint, as data and as text."""

from collections.abc import Iterator
from typing import Any

from pvrt.format.aqlm import Checkpoint
from pvrt.format.grid import GridCheckpoint


def describe(checkpoint: Checkpoint | GridCheckpoint) -> dict[str, Any]:
    """Scheme, layers, true bits per weight, and which bytes are not quantised."""
    dense = checkpoint.dense_bytes()
    total = checkpoint.file_bytes()
    return {
        "path": str(checkpoint.path),
        "architecture": (checkpoint.config.get("architectures") or ["unknown"])[0],
        "scheme": checkpoint.scheme_names,
        "quantized_layers": len(checkpoint.layers),
        "layers": {
            name: {
                "scheme": str(layer.scheme),
                "weights": layer.out_features * layer.in_features,
                "bits": checkpoint.layer_bits(layer),
            }
            for name, layer in checkpoint.layers.items()
        },
        "bits_per_weight_linears": checkpoint.linear_bits_per_weight(),
        "bits_per_weight_file": checkpoint.file_bits_per_weight(),
        "file_bytes": total,
        "dense_bytes": sum(dense.values()),
        "dense_tensors": dense,
    }


def as_text(report: dict[str, Any], shown: int = 8) -> str:
    """The report for a terminal; the largest `shown` dense tensors are named."""
    dense: dict[str, int] = report["dense_tensors"]
    share = report["dense_bytes"] / report["file_bytes"]
    lines = [
        f"{report['path']}  ({report['architecture']})",
        *_schemes(report["layers"]),
        f"bits per weight   {report['bits_per_weight_linears']:.3f} in the quantised linears, "
        "all that decoding needs included",
        f"                  {report['bits_per_weight_file']:.3f} over the whole file",
        f"size              {_megabytes(report['file_bytes'])}, of which "
        f"{_megabytes(report['dense_bytes'])} ({share:.0%}) are not quantised:",
    ]
    for name, size in list(dense.items())[:shown]:
        lines.append(f"  {_megabytes(size):>12}  {name}")
    if len(dense) > shown:
        rest = sum(list(dense.values())[shown:])
        lines.append(f"  {_megabytes(rest):>12}  {len(dense) - shown} smaller tensors")
    return "\n".join(lines)


def _schemes(layers: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line per scheme, and which layers have it where they are few."""
    for scheme in dict.fromkeys(layer["scheme"] for layer in layers.values()):
        those = {name: layer for name, layer in layers.items() if layer["scheme"] == scheme}
        weights, bits = (sum(layer[key] for layer in those.values()) for key in ("weights", "bits"))
        which = ", ".join(those) if len(those) <= 2 else f"{len(those)} quantised layers"
        yield f"scheme            {scheme}, {bits / weights:.3f} bits per weight: {which}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
