"""AQLM checkpoints in transformers: `AutoModelForCausalLM.from_pretrained(path)`.

transformers 5 has an AQLM quantizer of its own that needs the `aqlm` package and matches the skip
list of published checkpoints ("lm_head.weight", a tensor name) against module names, so that
lm_head is silently replaced by random weights. Ours takes its place and needs no list: a layer is
quantised exactly when the checkpoint holds its codes.
"""

import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from pvrt.errors import CheckpointError
from pvrt.format.aqlm import check_codes, find_layers, read_headers
from pvrt.format.config_block import is_aqlm, parse_quantization_config
from pvrt.format.folder import LayerInfo, StoredModel, TensorInfo
from pvrt.format.grid import is_packed, is_quantised, open_folder
from pvrt.format.scheme import Scheme
from pvrt.hf.declared import check_loaded, check_tensors, read_config_of, read_with
from pvrt.hf.model_class import auto_class
from pvrt.modules.aqlm_embedding import AQLMEmbedding, TiedHead
from pvrt.modules.aqlm_layer import AQLMLayer, packs_on_arrival
from pvrt.modules.experts import are_fused_in_files, module_name, unfuse, without_fusing
from pvrt.modules.whole_model import decode_once, layer_in_codes, pack_model, quantized_layers
from pvrt.versions import COMPRESSED_TENSORS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_EXPERT = re.compile(r"\.experts\.\d+\.")


class AqlmBlock(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of config.json, as it stands there.

    transformers' own class has no place for `schemes`, and stops at what stands for it.
    """

    def __init__(self, **block: Any) -> None:
        self.quant_method = QuantizationMethod.AQLM
        self.block = {**block, "quant_method": "aqlm"}

    def to_dict(self) -> dict[str, Any]:
        """What is written to config.json."""
        return dict(self.block)


class PvrtHfQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is not typed
    """Loads pre-quantised AQLM checkpoints into `AQLMLinear` and `AQLMEmbedding` layers."""

    requires_calibration = True
    _experts: Sequence[str] = ()
    _dtypes: dict[str, torch.dtype]
    _shapes: dict[str, torch.Size]
    quantization_config: AqlmBlock

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """pvrt needs nothing beside itself."""

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        where = str(getattr(model.config, "_name_or_path", "") or "checkpoint")
        schemes = parse_quantization_config(self.quantization_config.block, where)
        files = [Path(file) for file in checkpoint_files or []]
        foreign = [file for file in files if file.suffix != ".safetensors"]
        if foreign or not files:
            named = foreign[0] if foreign else where
            raise CheckpointError(f"{named}: pvrt reads AQLM weights from safetensors files only")
        tensors = read_headers(files)
        layers = find_layers(tensors, schemes)
        conversions = get_model_conversion_mapping(model)
        apart = tensors if are_fused_in_files(conversions) else layers
        if any(_EXPERT.search(name) for name in apart):
            self._experts = unfuse(model, conversions)
        with torch.device("meta"):
            for layer in layers.values():
                name = _module_name(model, module_name(layer.name, conversions))
                module = _in_codes(model.get_submodule(name), name, layer, tensors)
                model.set_submodule(name, module.requires_grad_(False))
        _tie_heads(model)
        self._dtypes = {name: tensor.dtype for name, tensor in model.named_parameters()}
        self._shapes = {name: tensor.shape for name, tensor in model.named_parameters()}

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: "PreTrainedModel | None" = None
    ) -> list[Any]:
        """Experts that were taken apart must not be fused.

        transformers gives the model since 5.21.
        """
        return without_fusing(weight_conversions) if self._experts else weight_conversions

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        # transformers keeps the file's type for every tensor that it renames (a router, an expert).
        kept = model._get_dtype_plan(model.dtype)
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not any(part in name for part in kept):
                parameter.data = parameter.data.to(self._dtypes[name])
        for name, module in quantized_layers(model).items():
            check_codes(module.codes, module.scheme, f"{name}.codes")
        check_loaded(model, self._shapes, Path(str(model.config._name_or_path)))
        if packs_on_arrival(model.device):  # as layers do that arrive by .to(device)
            pack_model(model, model.dtype)

    def _dequantize(self, model: "PreTrainedModel", dtype: Any = None) -> "PreTrainedModel":
        _decode(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` writes the same layout back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codebooks, scales and everything dense train; codes do not.

        (Codebooks and scales of a model on a GPU after `AQLMLinear.unpack`.)
        """
        return True


def _module_name(model: nn.Module, layer: str) -> str:
    """Name of a checkpoint's layer in a model, whose base-model prefix may be there or not."""
    prefix = getattr(model, "base_model_prefix", "")
    for name in (layer, layer.removeprefix(f"{prefix}."), f"{prefix}.{layer}"):
        try:
            model.get_submodule(name)
        except AttributeError:
            continue
        return name
    raise CheckpointError(
        f"the checkpoint quantises {layer}, which {type(model).__name__} does not have; "
        "config.json and the weights belong to different models"
    )


def _in_codes(
    dense: nn.Module, name: str, layer: LayerInfo, tensors: dict[str, TensorInfo]
) -> AQLMLayer:
    """What takes a dense layer's place, its shape checked against the codes."""
    file = tensors[f"{layer.name}.codes"].file
    scheme = layer.scheme
    assert isinstance(scheme, Scheme)
    found = (layer.out_features, layer.in_features)
    if isinstance(dense, nn.Linear):
        wanted = (dense.out_features, dense.in_features)
    elif isinstance(dense, Conv1D):
        wanted = (dense.nf, dense.nx)
    elif isinstance(dense, nn.Embedding):
        wanted = (dense.num_embeddings, dense.embedding_dim)
    else:
        raise CheckpointError(
            f"{file}: {name} is a {type(dense).__name__}, neither a linear layer nor an embedding"
        )
    if found != wanted:
        raise CheckpointError(
            f"{file}: {layer.name}.codes decode to {found[0]} x {found[1]}, config.json "
            f"describes {wanted[0]} x {wanted[1]}"
        )
    module = layer_in_codes(dense, scheme, layer.has_bias, layer.has_in_scales)
    if module is None:
        raise CheckpointError(
            f"{file}: {name} is a {type(dense).__name__}, which pvrt cannot look up in "
            f"codes of {scheme}"
        )
    return module


def _tie_heads(model: "PreTrainedModel") -> None:
    """Let every output head that is tied to an embedding in codes multiply by those."""
    pairs = model.all_tied_weights_keys
    for target, source in list(pairs.items()):
        head, embedding = (model.get_submodule(key.rpartition(".")[0]) for key in (target, source))
        if isinstance(head, AQLMLayer):
            raise CheckpointError(
                f"the checkpoint has codes of {target}, which config.json ties to {source}"
            )
        if isinstance(embedding, AQLMEmbedding):
            if not isinstance(head, nn.Linear):
                raise CheckpointError(
                    f"{target} is tied to codes and a {type(head).__name__}, not a linear layer"
                )
            model.set_submodule(target.rpartition(".")[0], TiedHead(embedding, head.bias))
            del pairs[target]
            _forget_tied(model, source)


def _forget_tied(model: nn.Module, tensor: str) -> None:
    """Drop a tensor, which is gone, from what `tie_weights` reads when it is called again.

    Its keys may be names of tensors or modules, or patterns of them, and are matched alike.
    """
    for name, module in model.named_modules():
        keys, prefix = getattr(module, "_tied_weights_keys", None), f"{name}." if name else ""
        if keys and "all_tied_weights_keys" in vars(module) and tensor.startswith(prefix):
            own = tensor.removeprefix(prefix)
            module._tied_weights_keys = {
                target: source for target, source in keys.items() if not re.match(source, own)
            }


def _decode(model: "PreTrainedModel") -> None:
    """Decode all layers once; heads are tied again as the model's class says."""
    decode_once(model)
    for module in model.modules():
        vars(module).pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def register() -> None:
    """Put pvrt's quantizer in transformers' tables; harmless when repeated."""
    AUTO_QUANTIZER_MAPPING["aqlm"] = PvrtHfQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING["aqlm"] = AqlmBlock


def _need_compressed_tensors(folder: Path) -> None:
    """Raise CheckpointError unless a version is installed that reads the layout as we write it."""
    tested = COMPRESSED_TENSORS
    try:
        version = metadata.version(tested.package)
    except metadata.PackageNotFoundError as error:
        raise CheckpointError(
            f"{folder} holds scalar grids, which transformers reads through a package that is not "
            f"installed: {tested.remedy}"
        ) from error
    if tested.too_old(version) or tested.too_new(version):
        raise CheckpointError(f"{folder} holds scalar grids; {tested.sentence(version)}")


def _decode_grids(model: Any) -> None:
    """Decode layers on grids now. Some versions of transformers wait for the first forward pass."""
    if any(name.endswith(".weight_packed") for name, _ in model.named_parameters()):
        model.hf_quantizer.compressor.decompress_model(model=model)


def load_model(
    path: str | Path | StoredModel, *, dense: bool = False, **kwargs: Any
) -> "PreTrainedModel":
    """See `pvrt.load`."""
    register()
    stored = path if isinstance(path, StoredModel) else open_folder(path)
    folder, config = stored.path, stored.config
    if is_packed(config):
        _need_compressed_tensors(folder)
    kwargs = {"dtype": "auto", "config": None, **kwargs}
    kwargs["config"] = kwargs["config"] or read_config_of(stored)
    shapes, auto = check_tensors(stored, kwargs["config"]), auto_class(kwargs["config"])
    model, report = read_with(
        folder, auto.from_pretrained, folder, output_loading_info=True, **kwargs
    )
    problems = {
        "missing": report["missing_keys"],
        "of another shape": report["mismatched_keys"],
        "unknown to the model": report["unexpected_keys"],
    }
    for what, names in problems.items():
        if names:
            first = sorted(str(name) for name in names)[0]
            raise CheckpointError(f"{folder}: {len(names)} tensors are {what}, first {first}")
    if not is_aqlm(config):  # whose quantizer does the same
        check_loaded(model, shapes, folder)
    if dense and is_quantised(config):
        if is_packed(config):
            _decode_grids(model)
        else:
            _decode(model)
        model.hf_quantizer.remove_quantization_config(model)
    return model.eval()
