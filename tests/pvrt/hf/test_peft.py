"""LoRA of peft on layers in codes, where peft is installed."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import pvrt  # noqa: F401
from tests.fixtures.toy import write_toy

peft = pytest.importorskip("peft", reason="peft is not installed")


def test_adapters_are_trained_saved_and_loaded(tmp_path: Path) -> None:
    write_toy(tmp_path / "model")

    def base() -> torch.nn.Module:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", dtype=torch.float32
        )
        return model

    model = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    tokens = torch.arange(16)[None]
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(10):
        loss = model(tokens, labels=tokens).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    with torch.inference_mode():
        torch.testing.assert_close(again(tokens).logits, model.eval()(tokens).logits)
