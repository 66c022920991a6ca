"""pvrt: two-bit language models by PV-Tuning, decoded by its own kernels, served by vLLM.

Importing pvrt is cheap (no torch) and makes transformers able to load AQLM checkpoints:
`import pvrt; AutoModelForCausalLM.from_pretrained(path)`.
"""

from typing import TYPE_CHECKING, Any

from pvrt.hf.import_hook import when_imported

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from pvrt.format.folder import StoredModel

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def _register_with_transformers() -> None:
    """Teach transformers our format; with versions too old for that, to refuse it.

    Nothing is raised here: whatever else this process does with transformers is not our affair.
    """
    from pvrt.errors import PvrtError
    from pvrt.versions import require_tested_versions

    try:
        require_tested_versions()
    except PvrtError as error:
        from pvrt.hf.refusal import refuse

        refuse(error)
        return
    from pvrt.hf.quantizer import register

    register()


def _register_with_peft() -> None:
    from pvrt.hf.peft import register

    register()


# The quantizer table is complete only once modeling_utils is: its imports go round in a circle.
when_imported("transformers.modeling_utils", _register_with_transformers)
when_imported("peft.tuners.lora.model", _register_with_peft)


def load(
    path: "str | Path | StoredModel", *, dense: bool = False, **kwargs: Any
) -> "PreTrainedModel":
    """Load a model folder (quantised or dense) as a transformers causal language model.

    A folder that `pvrt.format.grid.open_folder` has opened is not checked again.

    With dense=True quantised layers are decoded once into ordinary linear layers: the fastest
    choice where no kernel for the device exists, at the memory of the original model. kwargs go to
    `AutoModelForCausalLM.from_pretrained`. Raises CheckpointError for a folder that is not sound.
    """
    from pvrt.versions import require_tested_versions

    require_tested_versions()
    from pvrt.hf.quantizer import load_model

    return load_model(path, dense=dense, **kwargs)
