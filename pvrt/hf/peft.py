"""LoRA of peft on layers in codes. peft knows linear layers by their classes, and ours is none."""

import warnings
from typing import Any


def register() -> None:
    """Have peft take AQLMLinear for the layer of the same format that it knows from elsewhere.

    Adapters are beside the layer, whose codes stay as they are; they cannot be merged into it.
    """
    from peft.tuners.lora import aqlm, model
    from peft.tuners.tuners_utils import BaseTunerLayer

    from pvrt.modules.aqlm_linear import AQLMLinear

    theirs = model.dispatch_aqlm

    def dispatch(target: Any, adapter_name: str, **options: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, AQLMLinear):
            with warnings.catch_warnings():  # of a class that peft has not heard of
                warnings.filterwarnings("ignore", message="Unsupported layer type")
                return aqlm.AqlmLoraLinear(target, adapter_name, **options)
        return theirs(target, adapter_name, **options)

    model.dispatch_aqlm = dispatch
