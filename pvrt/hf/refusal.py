"""What stands in for our quantizer where torch or transformers is too old for it."""

from typing import NoReturn

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from pvrt.errors import PvrtError


def refuse(error: PvrtError) -> None:
    """Let transformers raise an error for every AQLM model, and for no other.

    Its own reader of "aqlm" would take lm_head for quantised and leave it random.
    """

    def refused(*_: object, **__: object) -> NoReturn:
        raise error

    AUTO_QUANTIZER_MAPPING["aqlm"] = refused
