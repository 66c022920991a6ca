"""The checkpoint of a finished run: config, tensors, tokenizer and manifest."""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import pvrt
from pvrt.checkpoint import WriteOptions, quantization_config, write_checkpoint
from pvrt.durable import as_json
from pvrt.linear import quantized_linears
from pvrt.scheme import Scheme
from pvrt_tune.blocks import linears
from pvrt_tune.calibration import CalibrationData
from pvrt_tune.recipe import TuneJob
from pvrt_tune.source import Source


def write(
    job: TuneJob,
    source: Source,
    data: CalibrationData,
    reports: list[dict[str, Any]],
) -> None:
    """Write `source.model`, its blocks quantised by now, to the job's folder."""
    model = source.model.to("cpu")
    scheme = Scheme.parse(job.recipe.scheme)
    quantised = list(quantized_linears(model))
    dense = [name for name, _ in linears(model)]
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    config["architectures"] = [type(model).__name__]
    config["quantization_config"] = quantization_config(scheme, dense, quantised)
    manifest = {
        "pvrt": pvrt.__version__,
        "torch": torch.__version__,
        "scheme": str(scheme),
        "base_model": {"name": Path(source.name).name, "sha256": source.digest},
        "data": {"origin": data.origin, "sha256": data.digest},
        "recipe": asdict(job.recipe),
        "blocks": reports,
    }
    files = _tokenizer_files(source.tokenizer)
    if model.generation_config is not None:
        files["generation_config.json"] = as_json(model.generation_config.to_dict())
    tied = set(model.all_tied_weights_keys)
    tensors = ((name, t) for name, t in model.state_dict().items() if name not in tied)
    write_checkpoint(job.out, config, tensors, WriteOptions(files=files, manifest=manifest))


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}
