"""Text that a model writes: tokens drawn from its own probabilities, and from nothing else."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from pvrt.errors import DataError
from pvrt_tune.data.sampled import from_model
from pvrt_tune.data.text import Windows
from tests.fixtures.toy import toy_model

ROWS = 4000


class _Fixed(nn.Module):
    """An output head that gives the same logits everywhere."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Buffer(logits)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*hidden.shape[:-1], -1)


def _writer(logits: torch.Tensor) -> PreTrainedModel:
    model: PreTrainedModel = toy_model("llama")
    model.lm_head = _Fixed(logits)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_drawn_as_often_as_the_model_says(dtype: torch.dtype) -> None:
    size = toy_model("llama").config.vocab_size
    shares = torch.zeros(size)
    shares[[0, 7, 8, 200, size - 2]] = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    tokens = from_model(_writer(shares.log().to(dtype)), Windows(ROWS, 4, seed=0)).tokens[:, 2:]
    found = torch.bincount(tokens.flatten(), minlength=size) / tokens.numel()
    assert not found[shares == 0].any()  # also behind the last token that has a chance
    torch.testing.assert_close(found, shares, atol=0.025, rtol=0)
    # Rows and steps are drawn for themselves.
    assert abs(float(((tokens[:, 0] == 0) & (tokens[:, 1] == 0)).float().mean()) - 0.25) < 0.03


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_logits_are_no_numbers_is_named(value: float) -> None:
    logits = torch.zeros(toy_model("llama").config.vocab_size)
    logits[3] = value
    with pytest.raises(DataError, match="outputs are not numbers"):
        from_model(_writer(logits), Windows(2, 8, seed=0))
