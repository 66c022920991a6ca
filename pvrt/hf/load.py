"""A model folder as a model of transformers; importing this is cheap."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from pvrt.format.folder import StoredModel


def load(
    path: "str | Path | StoredModel", *, dense: bool = False, **kwargs: Any
) -> "PreTrainedModel":
    """Load a model folder (quantised or dense) as a transformers causal language model.

    Args:
        path: The folder, or one that `pvrt.tune` has returned, which is not checked again.
        dense: Decode the quantised layers once into ordinary linear layers. That is fastest where
            no kernel for the device exists, and takes the memory of the original model.
        kwargs: For `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: The folder is not sound.
    """
    from pvrt.versions import require_tested_versions

    require_tested_versions()
    from pvrt.hf.quantizer import load_model

    return load_model(path, dense=dense, **kwargs)
