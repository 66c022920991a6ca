"""The simulated device refuses what a real one refuses, and counts its bytes."""

import gc
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

from tests.fixtures import simulated_device


def on(device: str, *shape: int) -> torch.Tensor:
    return torch.ones(shape, device=device)


REFUSED: dict[str, tuple[type[Exception], str, Callable[[str], object]]] = {
    "a product": (RuntimeError, "same device", lambda d: on(d, 3, 4) @ torch.ones(4, 2)),
    "an update": (RuntimeError, "same device", lambda d: torch.ones(3).add_(on(d, 3))),
    "a list": (RuntimeError, "same device", lambda d: torch.cat([on(d, 3), torch.ones(3)])),
    "an index": (RuntimeError, "indices", lambda d: torch.ones(3)[on(d, 1).long()]),
    "its generator for the CPU": (
        RuntimeError,
        "Expected a 'cpu' device type for generator but found 'sim'",
        lambda d: torch.randperm(3, generator=torch.Generator(d)),
    ),
    "the CPU's generator for it": (
        RuntimeError,
        "Expected a 'sim' device type for generator but found 'cpu'",
        lambda d: torch.rand(3, device=d, generator=torch.Generator()),
    ),
    "the CPU's generator in place": (
        RuntimeError,
        "Expected a 'sim' device type for generator but found 'cpu'",
        lambda d: on(d, 3).normal_(generator=torch.Generator()),
    ),
    "numpy": (TypeError, "convert", lambda d: on(d, 3).numpy()),
    "an address": (RuntimeError, "no address", lambda d: on(d, 3).data_ptr()),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses_what_is_not_its_own(what: str, device: str) -> None:
    error, words, attempt = REFUSED[what]
    with pytest.raises(error, match=words):
        attempt(device)


def test_what_cuda_lets_pass_passes(device: str) -> None:
    x = on(device, 3)
    assert (x * torch.tensor(2.0)).tolist() == [2, 2, 2]
    assert x[torch.tensor([0, 2])].device == x.device
    x[torch.tensor([True, False, False])] = 5
    assert x.cpu().tolist() == [5, 1, 1]
    assert f"{x.sum():.1f}" == "7.0"


def test_operators_are_not_taken_for_updates(device: str) -> None:
    x = torch.tensor([4, 7], device=device)
    assert [(x >> 1).tolist(), (x & 3).tolist(), x.tolist()] == [[2, 3], [0, 3], [4, 7]]
    x >>= 1
    assert x.tolist() == [2, 3]


def test_factories_and_views_are_sound_in_inference_mode(device: str) -> None:
    kept = torch.ones(2, 3, device=device)
    with torch.inference_mode():
        assert torch.tensor([1, 2], device=device).tolist() == [1, 2]
        assert torch.arange(2, 8, 2, device=device).shape == (3,)
        assert kept.unsqueeze(0).shape == (1, 2, 3)


def test_a_module_moves_learns_and_is_copied(device: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 2)
    theirs = deepcopy(layer).to(device)
    for module, place in ((layer, "cpu"), (theirs, device)):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            module(torch.ones(3, 4, device=place)).square().sum().backward()
            optimizer.step()
    assert theirs.weight.device.type == "sim"
    copied = deepcopy(theirs)
    assert isinstance(copied.weight, nn.Parameter) and copied.weight is not theirs.weight
    assert torch.equal(copied.weight.cpu(), layer.weight)
    copied.weight.data = copied.weight.data.to(torch.bfloat16)
    assert copied.weight.dtype == (copied.weight + 0).dtype == torch.bfloat16


def test_one_seed_draws_the_same_on_both(device: str) -> None:
    ours = torch.rand(5, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator(device).manual_seed(7)
    assert generator.device.type == "sim"
    assert torch.equal(torch.rand(5, generator=generator, device=device).cpu(), ours)


def test_live_bytes_count_once_and_the_peak_stays(device: str) -> None:
    gc.collect()
    before = simulated_device.current_bytes()
    simulated_device.reset_peak()
    x = on(device, 256)
    view = x[:128].view(2, 64)
    assert simulated_device.current_bytes() - before == 1024
    del x
    assert simulated_device.current_bytes() - before == 1024  # the view holds it all
    (view + 1).sum()
    del view
    assert simulated_device.current_bytes() == before
    assert simulated_device.peak_bytes() - before >= 1024 + 512
    simulated_device.reset_peak()
    assert simulated_device.peak_bytes() == before
