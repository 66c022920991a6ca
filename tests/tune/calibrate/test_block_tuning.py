"""P and V steps on one block: its loss, what moves, and when codes had better stay."""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt_tune.calibrate.block_tuning import BlockLoss, Examples, finetune_block
from pvrt_tune.data.activations import Activations
from pvrt_tune.fit.grid import GridLinear
from pvrt_tune.fit.layer import quantize_linear
from pvrt_tune.model_blocks import find_blocks, linears, observe
from pvrt_tune.model_calls import record_inputs
from pvrt_tune.settings import FinetuneSettings, FitSettings, Recipe
from tests.fixtures.c_library import without_c_library
from tests.fixtures.toy import toy_model

SETTINGS = FinetuneSettings(epochs=4, move_codes=True)
FIT = FitSettings(rounds=1, kmeans_iterations=4, beam=2)


@dataclass
class Problem:
    """A quantised block, what it is to do, and the seed of its batches."""

    block: nn.Module
    examples: Examples

    def tuned(self, settings: FinetuneSettings, compute: torch.dtype = torch.float32) -> Any:
        """A tuned copy of the block, and the report."""
        block, generator = deepcopy(self.block), torch.Generator().manual_seed(0)
        return block, finetune_block(block, self.examples, settings, compute, generator)

    def error(self, block: nn.Module) -> float:
        """Of the outputs on all batches."""
        loss = BlockLoss.of(iter(self.examples.targets))
        inputs, arguments = self.examples.inputs, self.examples.arguments
        with torch.no_grad():
            pairs = zip(inputs, self.examples.targets, strict=True)
            return sum(float(loss(block(x, **arguments[0]), y)) for x, y in pairs)


def problem_of(scheme: str) -> Problem:
    model = toy_model("llama").requires_grad_(False)
    blocks = find_blocks(model)
    tokens = torch.randint(0, 256, (32, 64), generator=torch.Generator().manual_seed(1))
    shape = (*tokens.shape, model.config.hidden_size)
    inputs, targets = (Activations(torch.empty(shape), 2, "cpu") for _ in range(2))
    arguments = record_inputs(model, blocks, tokens, 2, inputs)[0]
    block = blocks.blocks[0]
    moments = observe(block, inputs, arguments, targets)
    recipe = Recipe(scheme=scheme, fit=FIT)
    for name, linear in list(linears(block)):
        generator = torch.Generator().manual_seed(2)
        made = quantize_linear(linear, moments[name], recipe, generator, torch.float32)
        block.set_submodule(name, made.module)
    return Problem(block, Examples(inputs, targets, arguments))


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problem_of("2x4g8")


def codes_of(block: nn.Module) -> dict[str, Tensor]:
    layers = {n: m for n, m in block.named_modules() if isinstance(m, AQLMLinear | GridLinear)}
    assert layers
    return {name: layer.codes.clone() for name, layer in layers.items()}


def moved(problem: Problem, block: nn.Module) -> bool:
    before, after = codes_of(problem.block), codes_of(block)
    return any(bool((before[name] != after[name]).any()) for name in before)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["2x4g8", "w2g64"])
def test_codes_move_and_win(scheme: str, compute: torch.dtype) -> None:
    problem = problem_of(scheme)
    still, without = problem.tuned(replace(SETTINGS, move_codes=False))
    moving, report = problem.tuned(SETTINGS, compute)
    assert not moved(problem, still)
    assert without.moved == 0
    assert moved(problem, moving)
    assert report.moved > 0
    assert report.after < without.after < report.before
    assert problem.error(moving) < problem.error(still) < problem.error(problem.block)


def test_without_the_c_library_codes_move_alike(problem: Problem) -> None:
    ours, _ = problem.tuned(SETTINGS)
    with without_c_library():
        theirs, report = problem.tuned(SETTINGS)
    assert moved(problem, ours) and moved(problem, theirs)
    assert report.after < report.before
    assert problem.error(theirs) == pytest.approx(problem.error(ours), rel=0.05)


def test_what_is_left_is_a_quantised_block_without_gradients(problem: Problem) -> None:
    block, _ = problem.tuned(SETTINGS)
    assert {name: type(module) for name, module in block.named_modules()} == {
        name: type(module) for name, module in problem.block.named_modules()
    }
    before, after = problem.block.state_dict(), block.state_dict()
    assert before.keys() == after.keys()
    assert all(before[n].shape == t.shape and before[n].dtype == t.dtype for n, t in after.items())
    assert not any(parameter.requires_grad for parameter in block.parameters())


def test_codes_stay_where_moving_them_does_harm(problem: Problem) -> None:
    """Whole weights that jump in every step lower no error: what is tuned then is what would be
    with `move_codes: false`.
    """
    wild = replace(SETTINGS, code_learning_rate=1.0)
    block, report = problem.tuned(wild)
    assert not moved(problem, block)
    assert report.moved == 0
    assert report.after < report.before


def test_a_block_without_codes_is_tuned_too(problem: Problem) -> None:
    """All of its layers stayed dense: what is trained are its weights."""
    dense = find_blocks(toy_model("llama", seed=1)).blocks[0].requires_grad_(False)
    block, report = Problem(dense, problem.examples).tuned(SETTINGS)
    assert report.moved == 0
    assert report.after < report.before
    assert not any(parameter.requires_grad for parameter in block.parameters())


def test_no_epochs_change_nothing(problem: Problem) -> None:
    block, report = problem.tuned(replace(SETTINGS, epochs=0))
    assert report.before == report.after
    after = block.state_dict()
    assert all(torch.equal(tensor, after[n]) for n, tensor in problem.block.state_dict().items())


def test_the_loss_is_half_of_each_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 5, 8, generator=generator)
    target[:, 0] *= 1000  # the first token's
    output = (
        target + 0.1 * torch.randn(2, 5, 8, generator=generator) * target.norm(dim=-1)[..., None]
    )
    loss = BlockLoss.of(iter([target]))
    error, size = (output - target).double().square().sum(-1), target.double().square().sum(-1)
    wanted = 0.5 * ((error / size).mean() + error.sum() / size.sum())
    assert float(loss(output, target)) == pytest.approx(float(wanted), rel=1e-5)


def test_the_huge_states_of_one_token_do_not_hide_the_others() -> None:
    """Where everything is wrong but the first token, nearly half of all is wrong."""
    target = torch.ones(1, 64, 8)
    target[:, 0] *= 1000
    output = torch.zeros_like(target)
    output[:, 0] = target[:, 0]
    loss = BlockLoss.of(iter([target]))
    assert float(loss(output, target)) == pytest.approx(0.5 * 63 / 64, rel=1e-3)
    assert float(loss(torch.zeros_like(target), target)) == pytest.approx(1.0, rel=1e-3)


def test_targets_of_zeros_have_an_error_that_is_a_number() -> None:
    loss = BlockLoss.of(iter([torch.zeros(1, 4, 8)]))
    assert torch.isfinite(loss(torch.ones(1, 4, 8), torch.zeros(1, 4, 8)))
    assert float(loss(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8))) == 0.0
