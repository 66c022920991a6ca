"""Which of transformers' classes a config.json is of: one that reads text, or images as well."""

from typing import Any


def auto_class(config: Any) -> Any:
    """The `AutoModelFor...` of a transformers config: of the class that it names, else for text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    whole, text = (
        auto._model_mapping.get(type(config), None)
        for auto in (AutoModelForImageTextToText, AutoModelForCausalLM)
    )
    named = config.architectures or []
    if whole is not None and (text is None or whole.__name__ in named):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM
