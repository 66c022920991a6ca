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


@pytest.mark.parametrize("name", ["minimax", "mamba", "rwkv", "openai-gpt", "recurrent_gemma"])
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """A cache class of its own, states in the place of one, a list of states, nothing, and layers
    that remember one sequence alone.
    """
    model = decoder(name)
    model.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    prompt, params = [256, *range(40, 60)], SamplingParams(max_tokens=6, temperature=0.0)
    options = ServeOptions.model_validate({"dtype": "float32", "max_model_len": 64})
    with Engine.load(tmp_path, options) as engine:
        streams = [engine.generate(tokens, params) for tokens in (prompt, prompt[::-1])]
        events = [
            step for pair in zip(*streams, strict=False) for step in zip((0, 1), pair, strict=True)
        ]
    for number, tokens in enumerate((prompt, prompt[::-1])):
        found = [e.token_id for n, e in events if n == number and isinstance(e, TokenEvent)]
        whole = model.generate(torch.tensor([tokens]), max_new_tokens=6, do_sample=False)
        assert found == whole[0, len(tokens) :].tolist()[: len(found)]
        assert found
