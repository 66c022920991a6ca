"""What is computed from the times and the energy of runs."""

from collections.abc import Iterator, Sequence

import pytest
import torch

from pvrt.tools.bench_model import measure
from pvrt.tools.gpu_energy import energy_counter


class Machine:
    """A run takes 2 seconds and 30 joules for the prompt, then 0.5 s and 4 J for every token."""

    def __init__(self) -> None:
        self.seconds, self.joules = 100.0, 7.0

    def generate(self, prompt_ids: Sequence[int], count: int) -> Iterator[int]:
        self.seconds, self.joules = self.seconds + 1.5, self.joules + 30
        for token in range(count):
            self.seconds, self.joules = self.seconds + 0.5, self.joules + 4
            yield token


def test_rates_and_energy_are_of_the_measured_runs() -> None:
    machine = Machine()
    speed = measure(
        machine.generate, [1] * 8, 5, 3, lambda: machine.seconds, lambda: machine.joules
    )
    assert speed.ttft_seconds == pytest.approx(2.0)
    assert speed.decode_tokens_per_second == pytest.approx(2.0)
    assert speed.joules_per_token == pytest.approx((30 + 5 * 4) / 5)


def test_without_a_counter_there_is_no_energy() -> None:
    machine = Machine()
    assert energy_counter(torch.device("cpu")) is None
    assert measure(machine.generate, [1], 2, 1, lambda: machine.seconds).joules_per_token is None
