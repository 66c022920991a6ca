"""What is computed from the times and the energy of runs."""

from collections.abc import Iterator, Sequence

import pytest
import torch

from pvrt.tools.bench_model import Case, Speed, measure, percentile
from pvrt.tools.bench_rows import as_text, row
from pvrt.tools.gpu_energy import energy_counter


class Machine:
    """A token of a prompt takes 2 s and 3 J, one of an answer 0.5 s and 4 J. What a prompt shares
    with the one before it is known. bursts: all of an answer comes at its end.
    """

    def __init__(self, *, bursts: bool = False) -> None:
        self.seconds, self.joules, self.known, self.bursts = 100.0, 7.0, [0], bursts

    def generate(self, prompt_ids: Sequence[int], count: int) -> Iterator[int]:
        known = 0
        for asked, before in zip(prompt_ids[:-1], self.known, strict=False):
            if asked != before:
                break
            known += 1
        self.known = list(prompt_ids)
        fresh = len(prompt_ids) - known - 1  # the last one gives the first token of the answer
        self.seconds, self.joules = self.seconds + 2 * fresh, self.joules + 3 * fresh
        for token in range(count):
            late = count * (token == 0) if self.bursts else 1
            self.seconds, self.joules = self.seconds + 0.5 * late, self.joules + 4
            yield token


def measured(test: Case, *, bursts: bool = False) -> Speed:
    machine = Machine(bursts=bursts)
    return measure(machine.generate, test, 3, lambda: machine.seconds, lambda: machine.joules)


def test_a_prompt_and_an_answer_are_measured_apart() -> None:
    answer = measured(Case(new=5))
    assert answer.tokens_per_second == pytest.approx(2.0)
    assert answer.joules_per_token == pytest.approx(4)
    prompt = measured(Case(prompt=8))
    assert prompt.tokens_per_second == pytest.approx(8 / 14.5)
    assert prompt.joules_per_token == pytest.approx((7 * 3 + 4) / 8)


def test_what_was_there_before_costs_nothing() -> None:
    assert measured(Case(new=5, depth=100)).tokens_per_second == pytest.approx(2.0)
    assert measured(Case(prompt=8, depth=100)).tokens_per_second == pytest.approx(8 / 14.5)


def test_tokens_that_come_in_a_burst_make_no_rate_higher() -> None:
    burst = measured(Case(new=64), bursts=True)
    assert burst.wait(0.5) == 0  # all came at once
    assert burst.tokens_per_second == pytest.approx(2.0)


def test_without_a_counter_there_is_no_energy() -> None:
    machine = Machine()
    assert energy_counter(torch.device("cpu")) is None
    assert (
        measure(machine.generate, Case(new=2), 1, lambda: machine.seconds).joules_per_token is None
    )


def test_percentiles_lie_between_neighbours() -> None:
    assert [percentile([3, 1, 2], share) for share in (0, 0.25, 0.5, 1)] == [1, 1.5, 2, 3]
    speed = Speed(Case(new=12), [1.0, 2.0, 4.0], [1.0])
    assert speed.rate(0.0) == 3 and speed.tokens_per_second == 6 and speed.rate(1.0) == 12


def test_tests_have_the_names_that_llama_bench_gives_them() -> None:
    names = [str(Case(prompt=512)), str(Case(new=64, depth=1024))]
    assert names == ["pp512", "tg64 @ d1024"]


def test_rows_say_the_same_in_every_form() -> None:
    model = {"model": "out", "model_size": 10**6, "model_n_params": 2 * 10**6}
    model |= {"backend": "CPU", "n_threads": 2}
    rows = [row(model, Speed(Case(new=4), [2.0, 1.0, 4.0], [0.5]), None)]
    table = as_text(rows, "md").splitlines()
    assert [cell.strip() for cell in table[0].split("|")][1:7] == [
        *("model", "size", "params", "backend", "threads", "test")
    ]
    assert len({len(line) for line in table}) == 1
    assert [cell.strip() for cell in table[2].split("|")][1:9] == [
        *("out", "1.0 MB", "2.0 M", "CPU", "2", "tg4", "2.0", "1.1")
    ]
    heads, values = (line.split(",") for line in as_text(rows, "csv").splitlines())
    assert dict(zip(heads, values, strict=True))["tokens_per_second"] == "2.0"
