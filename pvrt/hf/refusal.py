"""What stands in for our quantizer where torch or transformers is too old for it."""

from typing import NoReturn

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)

from pvrt.errors import PvrtError


def refuse(error: PvrtError) -> None:
    """Let transformers raise an error for every AQLM model, and for no other.

    Its own reader of "aqlm" would take lm_head for quantised and leave it random, and its own class
    for the block of config.json stops at several schemes in words of its own.
    """

    class Refused:
        def __init__(self, *_: object, **__: object) -> None:
            raise error

        @classmethod
        def from_dict(cls, *_: object, **__: object) -> NoReturn:
            raise error

    AUTO_QUANTIZER_MAPPING["aqlm"] = AUTO_QUANTIZATION_CONFIG_MAPPING["aqlm"] = Refused
