"""Settings of the whole suite: no network, and one thread, since toy models only lose to more."""

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # spinning threads are ruinous on a busy machine
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"

import zlib

import pytest
import torch

torch.set_num_threads(1)

pytest_plugins = ["tests.fixtures.instruction_sets"]


@pytest.fixture(autouse=True)
def _same_draws_in_every_run(request: pytest.FixtureRequest) -> None:
    """A test that fails must fail again: its random numbers follow from its name alone."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def device() -> Iterator[str]:
    """The name of a simulated accelerator; see tests/fixtures/simulated_device.py."""
    from tests.fixtures.simulated_device import simulated_device

    with simulated_device() as name:
        yield name
