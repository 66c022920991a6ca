"""Models that keep what they have read in ways of their own: the engine goes on from there."""

from pathlib import Path

import pytest
import torch

from pvrt_server.engine.engine import Engine
from pvrt_server.engine.sampling import SamplingParams
from pvrt_server.engine.sequences import TokenEvent
from pvrt_server.options import ServeOptions
from tests.fixtures.decoders import decoder
from tests.fixtures.toy import toy_tokenizer


@pytest.mark.parametrize("name", ["minimax", "mamba", "rwkv", "openai-gpt"])
def test_greedy_tokens_are_the_whole_models(tmp_path: Path, name: str) -> None:
    """A cache class of its own, states in the place of one, a list of states, and nothing."""
    model = decoder(name)
    model.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    prompt, params = [256, *range(40, 60)], SamplingParams(max_tokens=6, temperature=0.0)
    options = ServeOptions.model_validate({"dtype": "float32", "max_model_len": 64})
    with Engine.load(tmp_path, options) as engine:
        events = [e for e in engine.generate(prompt, params) if isinstance(e, TokenEvent)]
    found = [event.token_id for event in events]
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *found]]), use_cache=False).logits[0]
    assert found == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
