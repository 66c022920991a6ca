"""Attention of one token in 16 bits: what transformers' own gives, wherever it is used."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pvrt_tune.data import one_token
from tests.fixtures.toy import toy_model

#: Grouped heads; keys wider than values; windows that slide, and are passed.
MODELS = ["llama", "phi3", "deepseek_v3", "gemma3_text"]


def continued(model: Any, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Logits [rows, steps, vocabulary] of tokens [rows, steps] one after the other."""
    with torch.inference_mode():
        output = model(prompt, use_cache=True)
        steps = []
        for step in range(tokens.shape[1]):
            token = tokens[:, step : step + 1]
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            steps.append(output.logits[:, -1])
    return torch.stack(steps, 1).double()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_usual_attention(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_model(name).to(torch.bfloat16)
    exact = toy_model(name)
    exact.load_state_dict(model.state_dict())
    prompt, tokens = torch.randint(0, 256, (3, 5)), torch.randint(0, 256, (3, 40))
    wanted, usual = continued(exact, prompt, tokens), continued(model, prompt, tokens)
    calls: list[tuple[int, ...]] = []
    attend = one_token._attend

    def counted(query: Tensor, *others: Any) -> Tensor:
        calls.append(tuple(query.shape))
        return attend(query, *others)

    monkeypatch.setattr(one_token, "_attend", counted)
    with one_token.fast_for_one_token():
        found = continued(model, prompt, tokens)
        assert bool(calls) == (model.config._attn_implementation == "sdpa")
    assert all(shape[2] == 1 for shape in calls)
    # As near to exact arithmetic as the usual one, up to chance.
    assert (found - wanted).norm() < 1.3 * (usual - wanted).norm()
    # float32 and what comes after are left alone.
    calls.clear()
    with one_token.fast_for_one_token():
        continued(model.float(), prompt, tokens[:, :1])
    continued(model.bfloat16(), prompt, tokens[:, :1])
    assert not calls
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__name__ == "sdpa_attention_forward"
