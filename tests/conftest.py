"""Settings of the whole suite: no network, one thread each, and how its processes share the work.

Toy models only lose to more threads than one. `make test` uses the other cores for other tests.
"""

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else its import asks the network for prices
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # spinning threads are ruinous on a busy machine
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"

import zlib

import psutil  # type: ignore[import-untyped]
import pytest
import torch

torch.set_num_threads(1)

pytest_plugins = ["tests.fixtures.instruction_sets"]

WORKER_MEMORY = 4 << 30  # bytes: torch and vLLM, toy models, and an engine in its own process


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: a worker for each core that this process may use and has memory for."""
    memory: int = psutil.virtual_memory().available // WORKER_MEMORY
    return max(1, min(len(os.sched_getaffinity(0)), memory))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What starts vLLM is skipped where there is none: on the newest of everything, say."""
    if item.get_closest_marker("vllm") and find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the longest tests come first: short ones then fill the cores until the end."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """What imports made stays: gc.collect(), which many tests call, need not look through it."""
    gc.collect()
    gc.freeze()


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
