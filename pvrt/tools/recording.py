"""What a causal language model says about windows of text, kept without the model.

Logits of one token are vocabulary wide; the hidden state that they come from is small. So the final
hidden states are kept, exact, and of the model its output head alone: models are loaded one after
the other, and no logits are ever whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pvrt.errors import SourceError
from pvrt.kv_cache import cache_name
from pvrt.tools.perplexity import check_known

#: Receives (done, total) of windows and prompts.
Progress = Callable[[int, int], None]

_CHECKED = 32  # tokens on which a head alone is compared with its model


@dataclass(frozen=True)
class Head:
    """A model without its blocks: it turns final hidden states into logits by its own code.

    vocabulary: width of the logits.
    """

    model: Any
    base: "_Base"
    vocabulary: int

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, width] -> [n, vocabulary] float32 on the model's device."""
        self.base.hidden = hidden.unsqueeze(0).to(self.model.device)
        # The tokens only say how many there are: the base that would read them is gone.
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.model.device)
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        self.base.hidden = None
        return logits.float()


class _Base(nn.Module):
    """Stands where a model's blocks were, and hands out the hidden states that it is given."""

    def __init__(self, output: type) -> None:
        super().__init__()
        self.output = output
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The given states, in the form of the base model's own output."""
        return self.output(last_hidden_state=self.hidden)


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation of a prompt: tokens, and the hidden state [width] behind each."""

    tokens: list[int]
    hidden: list[Tensor]


@dataclass(frozen=True)
class Recording:
    """A model's final hidden states, and its head.

    tokens [windows, context] int64; hidden [windows, context - 1, width], in the type that the
    model computes in, before every token but the first of its window; a continuation per prompt.
    """

    head: Head
    tokens: Tensor
    hidden: Tensor
    continuations: list[Continuation]


@torch.inference_mode()
def record(
    model: Any,
    tokens: Tensor,
    prompts: Sequence[Sequence[int]] = (),
    new_tokens: int = 0,
    progress: Progress = lambda done, total: None,
) -> Recording:
    """Run a model over windows [n, context] and continue every prompt; its blocks are let go.

    The model cannot be used afterwards. Raises SourceError for a model whose logits are not numbers
    or do not follow from its final hidden states, DataError for tokens that it does not know.
    """
    check_known(tokens, model.config)
    base, hidden = model.base_model, []
    if base is model:
        raise _unfollowed(model)
    for number, window in enumerate(tokens, 1):
        states = base(input_ids=window[None].to(model.device), use_cache=False).last_hidden_state
        hidden.append(states[0, :-1].cpu())
        progress(number, len(tokens) + len(prompts))
    ends, continuations = _ends(model), []
    for number, prompt in enumerate(prompts, len(tokens) + 1):
        continuations.append(_continue(model, prompt, new_tokens, ends))
        progress(number, len(tokens) + len(prompts))
    sample = tokens[:1, :_CHECKED].to(model.device)
    wanted = model(input_ids=sample, use_cache=False).logits[0].float()
    if bool(wanted.isnan().any()):
        raise SourceError(
            f"{type(model).__name__} gives logits that are not numbers in {model.dtype}; measure "
            "it in a wider type (--dtype)"
        )
    output = base(input_ids=sample, use_cache=False)
    stub = _Base(type(output))
    setattr(model, model.base_model_prefix, stub)
    head = Head(model, stub, wanted.shape[1])
    found = head.logits(output.last_hidden_state[0])
    if not bool((found - wanted).abs().max() < 0.01 * wanted.std().clamp_min(1e-30)):
        raise _unfollowed(model)
    return Recording(head, tokens, torch.stack(hidden), continuations)


def _unfollowed(model: Any) -> SourceError:
    return SourceError(
        f"{type(model).__name__} computes its logits in a way that pvrt cannot follow, so that "
        "its KL cannot be measured"
    )


def _ends(model: Any) -> set[int]:
    """Tokens that end an answer."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    if ids is None:
        ids = model.config.get_text_config().eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _continue(model: Any, prompt: Sequence[int], count: int, ends: set[int]) -> Continuation:
    """Up to `count` greedy tokens, the one that ends the answer included."""
    step, cache = torch.tensor([list(prompt)], device=model.device), None
    tokens: list[int] = []
    hidden: list[Tensor] = []
    hook = model.base_model.register_forward_hook(
        lambda module, given, output: hidden.append(output.last_hidden_state[0, -1].cpu())
    )
    try:
        while len(tokens) < count and not ends.intersection(tokens[-1:]):
            output = model(input_ids=step, use_cache=True, **{cache_name(): cache})
            cache = output[cache_name()]
            tokens.append(int(output.logits[0, -1].argmax()))
            step = torch.tensor([tokens[-1:]], device=model.device)
    finally:
        hook.remove()
    return Continuation(tokens, hidden)
