"""The original model block by block: what it computes is the same, and little is on the device."""

import gc
from pathlib import Path

import pytest
import torch

from pvrt_tune.data.source_model import load_source
from pvrt_tune.original import original
from pvrt_tune.settings import Recipe, TuneJob
from tests.fixtures import simulated_device
from tests.fixtures.toy import toy_model, toy_tokenizer


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "gemma3_text", "mixtral"])
def test_blocks_that_come_and_go_compute_the_same(name: str, tmp_path: Path, device: str) -> None:
    toy_model(name).save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    source = load_source(str(tmp_path))
    tokens = torch.randint(0, 256, (2, 24)).to(device)
    found, peaks = [], []
    for stream in (False, True):
        gc.collect()
        before = simulated_device.current_bytes()
        simulated_device.reset_peak()
        job = TuneJob(str(tmp_path), tmp_path, Recipe(), device=device, stream=stream)
        model = original(source, None, job)
        with torch.no_grad():
            found.append(model(tokens, use_cache=False).logits.cpu())
            cached = model(tokens, use_cache=True)  # as text is sampled
            found.append(model(tokens[:, -1:], past_key_values=cached.past_key_values).logits.cpu())
        peaks.append(simulated_device.peak_bytes() - before)
        if stream:
            blocks = model.base_model.layers
            assert {p.device.type for p in blocks.parameters()} == {"cpu"}
            size = [sum(p.nbytes for p in block.parameters()) for block in blocks]
            assert peaks[0] - peaks[1] >= sum(size) - max(size)
        del model, cached
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
