"""pvrt: two-bit language models by PV-Tuning, decoded by its own kernels, served by vLLM.

Importing pvrt is cheap (no torch) and makes transformers able to load AQLM checkpoints:
`import pvrt; AutoModelForCausalLM.from_pretrained(path)`.
"""

from pvrt.api.compare import compare
from pvrt.api.evaluate import evaluate
from pvrt.api.tune import tune
from pvrt.errors import PvrtError
from pvrt.hf.import_hook import when_imported
from pvrt.hf.load import load
from pvrt.version import __version__

__all__ = ["PvrtError", "__version__", "compare", "evaluate", "load", "tune"]


def _register_with_transformers() -> None:
    """Teach transformers our format; with versions too old for that, to refuse it.

    Nothing is raised here: whatever else this process does with transformers is not our affair.
    """
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
