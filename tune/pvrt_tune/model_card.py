"""The model card of a checkpoint: README.md with the front matter that the hub reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pvrt.format.config_block import is_aqlm
from pvrt.format.folder import MANIFEST_FILE, StoredModel
from pvrt.tools.compare import Comparison
from pvrt.versions import COMPRESSED_TENSORS
from pvrt_tune.data.provenance import Provenance

CARD_FILE = "README.md"
REPORT_FILE = "report.html"


def discard(out: Path) -> None:
    """Remove card and report of a folder whose checkpoint is about to change."""
    for name in (CARD_FILE, REPORT_FILE):
        (out / name).unlink(missing_ok=True)


def model_card(
    stored: StoredModel, origin: Provenance, command: str, found: Comparison | None
) -> str:
    """The card of an opened checkpoint: what it is, how it was made, its figures and how it runs.

    origin: of the model that it was made from; command: the one that made it; found: its figures,
    None where they were not measured.
    """
    manifest = json.loads((stored.path / MANIFEST_FILE).read_text(encoding="utf-8"))
    name = origin.hub_id or manifest["base_model"]["name"]
    tags = ["pvrt", stored.config["quantization_config"]["quant_method"]]
    front = {
        **origin.licence,
        **(
            {"base_model": origin.hub_id, "base_model_relation": "quantized"}
            if origin.hub_id
            else {}
        ),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name} at {stored.file_bits_per_weight():.2f} bits per weight",
        _what(manifest, stored, origin, name),
        _figures(found),
        f"## Made by\n\n```\n{command}\n```",
        _made(manifest),
        _use(stored),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _what(manifest: Mapping[str, Any], stored: StoredModel, origin: Provenance, name: str) -> str:
    licence = origin.licence.get("license")
    return (
        f"A compressed copy of {name}: scheme {stored.scheme_names}, "
        f"{stored.linear_bits_per_weight():.3f} bits per weight in the quantised layers of its "
        f"blocks, {stored.file_bytes() / 1e6:.1f} MB in all. SHA-256 of the original, as pvrt "
        f"computes it: `{manifest['base_model']['sha256']}`.\n\n"
        + (
            f"Licence of the original: {origin.licence.get('license_name', licence)}. It holds for "
            "this copy, too."
            if licence
            else "The original does not state its licence. Find out what it allows before you pass "
            "this copy on."
        )
    )


def _figures(found: Comparison | None) -> str:
    if found is None:
        return ""
    rows = ["| | original | this model |", "|---|---|---|"]
    (model,), original, floor = found.models, found.original, found.noise_floor
    assert model.kl is not None
    rows += [
        f"| file | {original.sizes.file_bytes / 1e6:.1f} MB | "
        f"{model.sizes.file_bytes / 1e6:.1f} MB |",
        f"| bits per weight, whole file | {original.bits_per_weight:.2f} | "
        f"{model.bits_per_weight:.2f} |",
        f"| perplexity | {original.perplexity:.2f} | {model.perplexity:.2f} |",
        f"| KL to the original, nats per token | noise floor {floor.mean:.6f} | "
        f"{model.kl.mean:.4f} ± {model.kl.standard_error:.4f} |",
        f"| same likeliest token | | {model.kl.same_top:.1%} |",
    ]
    return (
        "## Figures\n\n" + "\n".join(rows) + f"\n\nOn {found.windows} windows of {found.context} "
        f"tokens of {found.text}. The noise floor is the original in "
        f"bfloat16 against itself in float32. Plots and answers side by side: {REPORT_FILE}."
    )


def _made(manifest: Mapping[str, Any]) -> str:
    versions = "; ".join(
        ", ".join(f"{name} {version}" for name, version in each.items())
        for each in manifest["versions"]
    )
    data = manifest["data"]
    tuned = "calibrated block by block"
    if "pv" in manifest:
        tuned += f", then PV-tuned for {manifest['pv']['step']} steps"
    return (
        f"It was {tuned}. Text: {data['origin']} (SHA-256 of its tokens `{data['sha256']}`). "
        f"Versions: {versions}. Every setting: {MANIFEST_FILE}."
    )


def _use(stored: StoredModel) -> str:
    ours = is_aqlm(stored.config)
    install = "Install pvrt" if ours else f"`{COMPRESSED_TENSORS.remedy}`"
    first = "import pvrt  # teaches transformers the format\n" if ours else ""
    return (
        f"## Use\n\n{install}, then:\n\n```python\n{first}"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained(FOLDER)\n"
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n```\n\n"
        "`pvrt serve FOLDER` answers OpenAI's protocol."
    )
