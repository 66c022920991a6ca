"""What `pvrt inspect` says about a checkpoint, as data and as text."""

from collections import Counter
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
        "bits_per_weight_linears": checkpoint.linear_bits_per_weight(),
        "bits_per_weight_file": checkpoint.file_bits_per_weight(),
        "file_bytes": total,
        "dense_bytes": sum(dense.values()),
        "dense_tensors": dense,
        "layers": bits_by_layer(checkpoint),
    }


def as_text(report: dict[str, Any], shown: int = 8) -> str:
    """The report for a terminal; the largest `shown` dense tensors are named."""
    dense: dict[str, int] = report["dense_tensors"]
    share = report["dense_bytes"] / report["file_bytes"]
    lines = [
        f"{report['path']}  ({report['architecture']})",
        f"scheme            {report['scheme']}, {report['quantized_layers']} quantised layers",
        f"bits per weight   {report['bits_per_weight_linears']:.3f} in the quantised linears, "
        "all that decoding needs included",
        f"                  {report['bits_per_weight_file']:.3f} over the whole file",
        f"size              {_megabytes(report['file_bytes'])}, of which "
        f"{_megabytes(report['dense_bytes'])} ({share:.0%}) are not quantised:",
    ]
    if len({layer["scheme"] for layer in report["layers"].values()}) > 1:
        lines[2:2] = _by_kind(report["layers"])
    for name, size in list(dense.items())[:shown]:
        lines.append(f"  {_megabytes(size):>12}  {name}")
    if len(dense) > shown:
        rest = sum(list(dense.values())[shown:])
        lines.append(f"  {_megabytes(rest):>12}  {len(dense) - shown} smaller tensors")
    return "\n".join(lines)


def bits_by_layer(checkpoint: Checkpoint | GridCheckpoint) -> dict[str, dict[str, Any]]:
    """Scheme, weights and true bits per weight of every quantised layer, by name."""
    found = {}
    for name, layer in checkpoint.layers.items():
        weights = layer.out_features * layer.in_features
        bits = checkpoint.layer_bits(layer) / weights
        found[name] = {"scheme": str(layer.scheme), "weights": weights, "bits_per_weight": bits}
    return found


def _by_kind(layers: dict[str, dict[str, Any]]) -> list[str]:
    """A line for every kind of layer: its mean bits, and how many have which scheme."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, layer in layers.items():
        parts = [part for part in name.split(".") if not part.isdigit()]
        kinds.setdefault(".".join(parts[-2:]), []).append(layer)
    lines = []
    for kind, members in kinds.items():
        weights = sum(layer["weights"] for layer in members)
        bits = sum(layer["bits_per_weight"] * layer["weights"] for layer in members) / weights
        counts = Counter(layer["scheme"] for layer in members)
        shown = ", ".join(f"{count} x {scheme}" for scheme, count in sorted(counts.items()))
        lines.append(f"  {bits:>9.3f} bits  {kind}: {shown}")
    return lines


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
