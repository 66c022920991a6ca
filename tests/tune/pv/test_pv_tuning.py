"""PV-Tuning: representations, the loss, every strategy, resumed runs."""

import math
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import pvrt
from pvrt.errors import RunError
from pvrt.format.scheme import GridScheme, Scheme
from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt_kernels import aqlm_dequantize
from pvrt_kernels.cpu import nearest
from pvrt_tune import parallel
from pvrt_tune.data.sampled import from_model
from pvrt_tune.data.text import CalibrationData, Windows
from pvrt_tune.distil import loss as distill
from pvrt_tune.distil.loss import Head, Teacher, check_head, final_hidden, kl_loss
from pvrt_tune.distil.stage import teacher_of
from pvrt_tune.distil.student import Student
from pvrt_tune.distil.trainer import Trainer
from pvrt_tune.fit.grid import GridLinear
from pvrt_tune.machine import compute_dtype
from pvrt_tune.pipeline import tune
from pvrt_tune.pv.optimizer import STRATEGIES, WHOLE_PARTS, PVLayer, PVOptimizer
from pvrt_tune.pv.representation import AdditiveRepresentation, GridRepresentation, represent
from pvrt_tune.settings import PVSettings, Recipe, StrategyName, TrainSettings, TuneJob
from pvrt_tune.store import Store
from tests.fixtures.c_library import without_c_library
from tests.fixtures.interrupted import interrupted_at
from tests.fixtures.toy import toy_model, toy_tokenizer
from tests.tune.test_pipeline import QUICK


def layer_of(scheme: str = "2x4g8", rows: int = 24, width: int = 32) -> AQLMLinear:
    generator = torch.Generator().manual_seed(0)
    layer = AQLMLinear(width, rows, Scheme.parse(scheme))
    with torch.no_grad():
        size = layer.scheme.codebook_size
        codes = torch.randint(size, layer.codes.shape, generator=generator)
        layer.codes.copy_(codes.to(layer.codes.dtype))
        layer.codebooks.copy_(torch.randn(layer.codebooks.shape, generator=generator))
        layer.scales.copy_(torch.rand(layer.scales.shape, generator=generator) + 0.5)
    return layer


def groups_of(representation: AdditiveRepresentation) -> Tensor:
    return representation.decode().view(-1, representation.group_size)


# ---- representations ----


@pytest.mark.parametrize("scheme", ["2x4g8", "1x8g8", "2x8g4", "1x10g8"])
def test_pulling_back_is_the_chain_rule_of_decoding(scheme: str) -> None:
    layer = layer_of(scheme)
    representation = represent(layer)
    grad = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    pulled = representation.pull_back(grad)
    decoded = aqlm_dequantize(layer.codes, layer.codebooks, layer.scales)
    books, scales = torch.autograd.grad(decoded, (layer.codebooks, layer.scales), grad)
    torch.testing.assert_close(pulled["codebooks"], books)
    torch.testing.assert_close(pulled["scales"], scales)
    torch.testing.assert_close(representation.decode(), layer.dequantize().detach())


def test_one_codebook_finds_the_nearest_entry_of_all() -> None:
    representation = AdditiveRepresentation(layer_of("1x6g8"))
    generator = torch.Generator().manual_seed(2)
    chosen = torch.randperm(96, generator=generator)[:40]
    target = torch.randn(40, 8, generator=generator)
    proposal = representation.nearest(target, chosen)
    book = representation.codebooks.squeeze()
    scale = representation.scales.view(-1)[chosen // 4]
    every = scale[:, None, None] * book
    best = (every - target[:, None]).square().sum(2).min(1)
    torch.testing.assert_close((proposal.values - target).square().sum(1), best.values)
    representation.assign(chosen, proposal, torch.ones(len(chosen), dtype=torch.bool))
    torch.testing.assert_close(groups_of(representation)[chosen], proposal.values)


@pytest.mark.parametrize("scheme", ["2x4g8", "3x8g8", "2x8g4"])
def test_a_proposal_is_never_further_away_and_means_what_it_says(scheme: str) -> None:
    representation = AdditiveRepresentation(layer_of(scheme))
    generator = torch.Generator().manual_seed(3)
    before = groups_of(representation).clone()
    chosen = torch.arange(0, len(before), 2)
    noise = 0.7 * torch.randn(before.shape, generator=generator)
    target = (before + noise)[chosen]
    proposal = representation.nearest(target, chosen)
    old = (before[chosen] - target).square().sum(1)
    new = (proposal.values - target).square().sum(1)
    assert (new <= old + 1e-5).all() and (new < old - 1e-3).any()
    representation.assign(chosen, proposal, torch.ones(len(chosen), dtype=torch.bool))
    after = groups_of(representation)
    torch.testing.assert_close(after[chosen], proposal.values)
    torch.testing.assert_close(after[1::2], before[1::2])


def test_codes_of_several_codebooks_move_together() -> None:
    """Near a weight the nearest other sum mostly differs in both codes."""
    layer = layer_of("2x6g8")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        layer.codebooks[1] *= 0.6  # later codebooks hold what the earlier ones left
    representation = AdditiveRepresentation(layer)
    everything = torch.arange(96)
    before = groups_of(representation).clone()
    target = before + 0.3 * before.std() * torch.randn(before.shape, generator=generator)
    proposal = representation.nearest(target, everything)
    first, second = representation.codebooks.squeeze(2)
    sums = (first[:, None] + second).reshape(-1, 8)
    every = representation.scales.view(-1)[everything // 4][:, None, None] * sums
    best = (every - target[:, None]).square().sum(2).min(1).values
    old = (before - target).square().sum(1)
    new = (proposal.values - target).square().sum(1)
    assert (best < old).sum() > 10
    assert float((old - new).sum()) > 0.95 * float((old - best).sum())


def test_at_the_weight_itself_nothing_moves() -> None:
    representation = AdditiveRepresentation(layer_of())
    codes = representation.codes.clone()
    everything = torch.arange(96)
    same = representation.nearest(groups_of(representation), everything)
    representation.assign(everything, same, torch.ones(len(everything), dtype=torch.bool))
    assert torch.equal(codes, representation.codes)


def test_stochastic_rounding_is_unbiased_between_two_entries() -> None:
    layer = AQLMLinear(1, 4000, Scheme(1, 1, 1))
    with torch.no_grad():
        layer.codebooks.copy_(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1))
        layer.scales.fill_(1)
    representation = AdditiveRepresentation(layer)
    draws = torch.rand(4000, generator=torch.Generator().manual_seed(4))
    proposal = representation.nearest(torch.full((4000, 1), 0.3), torch.arange(4000), draws)
    assert abs(float(proposal.values.mean()) - 0.3) < 0.03


@pytest.mark.parametrize("target", [0.3, 0.9])
def test_stochastic_rounding_of_grids_is_unbiased(target: float) -> None:
    layer = GridLinear(4000, 1, GridScheme.parse("w2g4000s"))
    with torch.no_grad():
        layer.codes.fill_(2)
        layer.scales.fill_(1)
    representation = GridRepresentation(layer)
    assert not representation.decode().any()
    draws = torch.rand(4000, generator=torch.Generator().manual_seed(4))
    proposal = representation.nearest(torch.full((4000, 1), target), torch.arange(4000), draws)
    assert abs(float(proposal.values.mean()) - target) < 0.03


@pytest.mark.parametrize("scheme", ["w2g8", "w3g16s"])
def test_grids_decode_pull_back_and_round_each_weight(scheme: str) -> None:
    generator = torch.Generator().manual_seed(6)
    layer = GridLinear(32, 24, GridScheme.parse(scheme))
    with torch.no_grad():
        layer.codes.copy_(torch.randint(layer.scheme.levels + 1, (24, 32), generator=generator))
        layer.scales.copy_(torch.rand(layer.scales.shape, generator=generator) + 0.5)
        if layer.zeros is not None:
            layer.zeros.copy_(torch.randint(4, layer.zeros.shape, generator=generator))
    representation = GridRepresentation(layer)
    decoded = layer.dequantize()
    torch.testing.assert_close(representation.decode(), decoded.detach())
    grad = torch.randn(24, 32, generator=generator)
    (scales,) = torch.autograd.grad(decoded, layer.scales, grad)
    torch.testing.assert_close(representation.pull_back(grad)["scales"], scales)
    target = representation.decode() + 2 * torch.randn(24, 32, generator=generator)
    chosen = torch.arange(0, 24 * 32, 3)
    proposal = representation.nearest(target.view(-1, 1)[chosen], chosen)
    best = torch.full((24, 32), torch.inf)
    for code in range(layer.scheme.levels + 1):
        representation.codes.fill_(code)
        best = torch.minimum(best, (representation.decode() - target).abs())
    reached = (proposal.values - target.view(-1, 1)[chosen]).abs().squeeze(1)
    torch.testing.assert_close(reached, best.view(-1)[chosen])
    representation.assign(chosen, proposal, torch.ones(len(chosen), dtype=torch.bool))
    torch.testing.assert_close(representation.decode().view(-1, 1)[chosen], proposal.values)


def test_rows_of_a_rank_are_a_slice_of_the_whole() -> None:
    layer = layer_of()
    part = AdditiveRepresentation(layer, slice(8, 16))
    torch.testing.assert_close(part.decode(), layer.dequantize().detach()[8:16])


# ---- the loss ----


@pytest.mark.parametrize("multiplier, cap, bias", [(1.0, None, False), (0.3, 5.0, True)])
def test_the_chunked_loss_and_its_gradients_are_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, multiplier: float, cap: float | None, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(5)
    vocabulary, width, count = 50, 12, 17
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_(True)
    offset = torch.randn(vocabulary, generator=generator) if bias else None
    hidden = torch.randn(count, width, generator=generator).requires_grad_(True)
    target = torch.randn(count, 7, generator=generator)
    teacher = Head(torch.randn(vocabulary, 7, generator=generator), None, 1.0, None)
    head = Head(weight, offset, multiplier, cap)
    wanted = F.log_softmax(teacher.logits(target), -1)
    whole = F.kl_div(
        F.log_softmax(head.logits(hidden), -1), wanted, log_target=True, reduction="batchmean"
    )
    expected = torch.autograd.grad(whole, (hidden, weight))
    monkeypatch.setattr(distill, "CHUNK_BYTES", 4 * vocabulary * 5)  # chunks of 5, 5, 5, 2
    loss = kl_loss(hidden, head, target, teacher)
    torch.testing.assert_close(loss, whole)
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_packed_documents_do_not_see_each_other() -> None:
    model = toy_model("llama")
    tokens = from_model(model, Windows(2, 12, seed=0)).tokens
    tokens[1, 5:] = tokens[0, :7]  # the second window's second document begins the first window
    positions = torch.stack([torch.arange(12), torch.cat([torch.arange(5), torch.arange(7)])])
    data = CalibrationData(tokens, "", positions)
    separate = Teacher(model, data, 4, lambda number: None, lambda number, kept: None)
    separate.prepare([0, 1])
    first, second = separate.hidden([0, 1])
    torch.testing.assert_close(second[5:], first[:7])
    joined = Teacher(model, replace(data, positions=None), 4, separate.load, separate.save)
    joined.prepare([0, 1])
    first, second = joined.hidden([0, 1])
    assert float((second[5:] - first[:7]).abs().max()) > 0.1


def test_a_model_that_ignores_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_model("llama")
    tokens = from_model(model, Windows(1, 12, seed=0)).tokens
    check_head(model, tokens, separate_documents=True)

    def blind(model: Any, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        return final_hidden(model, tokens)

    monkeypatch.setattr(distill, "final_hidden", blind)
    with pytest.raises(RunError, match="lets packed documents see each other"):
        check_head(model, tokens, separate_documents=True)


def test_states_of_the_original_model_are_mapped_from_their_pieces(tmp_path: Path) -> None:
    """Host memory would grow with the text: 34 GB at effort best and a width of 4096."""
    model = toy_model("llama")
    data = CalibrationData(torch.randint(0, 256, (10, 16)), "random")
    state = Store(tmp_path)
    computed: list[weakref.ref[Tensor]] = []

    def load(number: int) -> Tensor | None:
        piece = state.load(f"teacher-{number}")
        return None if piece is None else piece.tensors["hidden"]

    def save(number: int, hidden: Tensor | None) -> None:
        assert hidden is not None  # nothing was kept before
        computed.append(weakref.ref(hidden))
        state.save(f"teacher-{number}", {"hidden": hidden}, {})

    teacher = Teacher(model, data, 4, load, save)
    teacher.finish(lambda done, total: None)
    assert [states() for states in computed] == [None, None, None]
    mapped = Path("/proc/self/maps").read_text()
    assert all(str(file) in mapped for file in (tmp_path / "pieces").iterdir())
    with torch.no_grad():
        wanted = final_hidden(model, data.tokens[[9, 0]]).bfloat16()
    assert torch.equal(teacher.hidden([9, 0]), wanted)


# ---- strategies ----


@dataclass(frozen=True)
class Problem:
    """A toy teacher, a folder with its 2-bit student, and tokens that the teacher likes."""

    folder: Path
    tokens: Tensor

    def trainer(self, recipe: Recipe, run: Path | None = None) -> Trainer:
        """A fresh trainer on the calibrated student; `run` keeps what the teacher computes."""
        training = recipe.training
        assert training is not None
        teacher = AutoModelForCausalLM.from_pretrained(self.folder / "dense", dtype=torch.float32)
        compute = compute_dtype(training.compute, "cpu")
        student = Student.of(pvrt.load(self.folder / "out", dtype="float32"), compute)
        data = CalibrationData(self.tokens, "the teacher")
        if run is None:
            states = Teacher(teacher, data, 4, lambda number: None, lambda number, kept: None)
        else:
            states = teacher_of(teacher, data, Store(run, writes=parallel.rank() == 0))
        if training.teacher_first:
            states.finish(lambda done, total: None)
        return Trainer(student, states, data, recipe)


LOOP = TrainSettings(
    steps=24, batch=4, microbatch=2, held_out=8, evaluate_every=12, compute="float32"
)
SETTINGS = Recipe(
    training=LOOP,
    pv=PVSettings(learning_rate=5e-3, code_learning_rate=0.03, fraction=0.02),
)


def problem_of(architecture: str, folder: Path) -> Problem:
    """Embedding and output head of the student are in codes."""
    model = toy_model(architecture)
    with torch.no_grad():  # logits worth learning: a random model is close to uniform
        model.get_output_embeddings().weight.mul_(8)
    model.save_pretrained(folder / "dense")
    toy_tokenizer().save_pretrained(folder / "dense")
    recipe = replace(QUICK, samples=16)
    tune(TuneJob(str(folder / "dense"), folder / "out", recipe), lambda line: None)
    tokens = from_model(model, Windows(40, 24, seed=1)).tokens
    return Problem(folder, tokens)


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    return problem_of("llama", tmp_path_factory.mktemp("pv"))


def codes_of(trainer: Trainer) -> dict[str, Tensor]:
    representations = trainer.student.representations
    return {name: r.tensors()["codes"].clone() for name, r in representations.items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_learns_and_moves_what_it_should(
    problem: Problem, tmp_path: Path, strategy: StrategyName
) -> None:
    learn_and_move(problem, tmp_path, strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "continuous"])
def test_every_strategy_does_so_without_the_c_library(
    problem: Problem, tmp_path: Path, strategy: StrategyName
) -> None:
    with without_c_library():
        learn_and_move(problem, tmp_path, strategy)


def learn_and_move(problem: Problem, tmp_path: Path, strategy: StrategyName) -> None:
    """Train with a strategy; assert that it learns, moves codes if it should, and stays exact."""
    pv = replace(SETTINGS.pv, strategy=strategy)
    if strategy == "stochastic":  # every rounded group is noise: it needs smaller steps
        pv = replace(pv, code_learning_rate=0.002)
    if strategy == "subspace":  # nothing accumulates: one step has to reach the next entry
        pv = replace(pv, code_learning_rate=0.1)
    trainer = problem.trainer(replace(SETTINGS, pv=pv))
    before = codes_of(trainer)
    outcome = trainer.run(Store(tmp_path), lambda line: None)
    assert outcome.best < 0.95 * outcome.before
    after = codes_of(trainer)
    moved = any(not torch.equal(before[name], after[name]) for name in before)
    if strategy != "linearized":  # which rounds back to where it was, but for the largest steps
        assert moved is (strategy != "continuous")
    for name, weight in trainer.student.weights().items():
        decoded = trainer.student.representations[name].decode()
        torch.testing.assert_close(weight.detach(), decoded)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("scheme", ["1x8g8", "2x8g8", "1x10g8", "w2g8"])
def test_no_groups_need_no_search(scheme: str, stochastic: bool) -> None:
    """A layer whose groups are all at their nearest values has none to move in a step."""
    layer = layer_of(scheme) if "x" in scheme else GridLinear(32, 24, GridScheme.parse(scheme))
    representation, none = represent(layer), torch.arange(0)
    draws = torch.rand(0) if stochastic else None
    with without_c_library():
        proposal = representation.nearest(torch.empty(0, representation.group_size), none, draws)
    assert proposal.values.shape == (0, representation.group_size)
    assert len(proposal.moves) == len(proposal.codes) == 0
    before = representation.decode()
    representation.assign(none, proposal, proposal.moves)
    assert torch.equal(representation.decode(), before)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("strategy", ["subspace-straight-through", "stochastic"])
@pytest.mark.parametrize("scheme", ["2x4g8", "w2g8"])
def test_a_rank_without_rows_of_a_layer_takes_its_steps(
    scheme: str, strategy: StrategyName, low_memory: bool
) -> None:
    """Of many ranks, the last hold none of a narrow layer's rows."""
    layer = layer_of(scheme) if "x" in scheme else GridLinear(32, 24, GridScheme.parse(scheme))
    settings = PVSettings(strategy=strategy, low_memory=low_memory)
    rank = PVLayer(represent(layer, slice(24, 24)), torch.empty(0, 32), settings)
    grad = torch.empty(0, 32)
    assert rank.step(grad, 1.0, torch.Generator().manual_seed(0)) == 0
    for name, gradient in rank.pull_back(grad).items():
        assert gradient.shape == rank.representation.continuous()[name].shape


def loop_with(**changes: Any) -> Recipe:
    return replace(SETTINGS, training=replace(LOOP, **changes))


def steps_with(**changes: Any) -> Recipe:
    return replace(SETTINGS, pv=replace(SETTINGS.pv, **changes))


def changes_of_one_step(problem: Problem, recipe: Recipe) -> tuple[Trainer, float]:
    """A trainer warmed up until codes move, and the share of groups that its next step moves."""
    trainer = problem.trainer(recipe)
    for _ in range(6):
        figures = trainer.train_step()
    return trainer, figures["changed"]


def test_a_subspace_bounds_how_many_groups_move(problem: Problem) -> None:
    fast = steps_with(strategy="straight-through", code_learning_rate=0.1)
    bound = steps_with(code_learning_rate=0.1, fraction=0.002)
    _, free = changes_of_one_step(problem, fast)
    trainer, bounded = changes_of_one_step(problem, bound)
    groups = [layer.groups for layer in trainer.optimizer.layers.values()]
    allowed = sum(math.ceil(0.002 * count) for count in groups) / sum(groups)
    assert free > 0.01
    assert 0 < bounded <= allowed + 1e-9


def test_choosing_by_gain_spends_the_budget_on_groups_that_move(problem: Problem) -> None:
    """By distance alone, groups that cannot move yet take part of the budget."""
    bold = steps_with(fraction=0.005, code_learning_rate=0.1)
    _, published = changes_of_one_step(problem, replace(bold, pv=replace(bold.pv, gain_pool=1)))
    _, by_gain = changes_of_one_step(problem, bold)
    assert by_gain > published > 0


@pytest.mark.parametrize("scheme", ["1x8g8", "2x8g8", "2x4g4", "3x7g16", "1x3g4"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_proposals_in_c_and_in_torch_are_the_same(
    scheme: str, stochastic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(scheme, rows=40, width=64)
    representation = represent(layer)
    assert isinstance(representation, AdditiveRepresentation)
    representation.scales[3] = 0
    representation.scales[5] *= -1
    books = representation.codebooks
    if len(books) > 1:  # equal sums: the codes that are there stay
        books[0, 1], books[1, 1] = books[0, 0], books[1, 0]
    generator = torch.Generator().manual_seed(3)
    values = groups_of(representation)
    groups = torch.randperm(len(values), generator=generator)[:400]
    away = torch.rand(len(groups), 1, generator=generator)
    target = values[groups] + away * torch.randn(values[groups].shape, generator=generator)
    target[:20] = values[groups[:20]]
    draws = torch.rand(len(groups), generator=generator) if stochastic else None
    in_c = representation.nearest(target, groups, draws)
    monkeypatch.setattr(nearest, "can_search", lambda books, kept: False)
    in_torch = representation.nearest(target, groups, draws)
    scaled = representation.scales.reshape(-1)[groups // (64 // representation.group_size)] != 0
    assert 0.1 < float(in_c.moves.float().mean()) < 0.95
    assert not bool((in_c.moves | in_torch.moves)[~scaled].any())
    # Equal sums have several codes, and near ties may be told apart otherwise.
    same = (in_c.codes == in_torch.codes).all(1)
    assert float(same.float().mean()) >= 0.95
    assert torch.equal(in_c.moves[same], in_torch.moves[same])
    torch.testing.assert_close(in_c.values[same], in_torch.values[same])
    assert in_c.bounds is not None and in_torch.bounds is not None
    torch.testing.assert_close(in_c.bounds[same], in_torch.bounds[same], rtol=1e-3, atol=1e-3)
    if not stochastic:
        left = [(target - proposal.values).norm(dim=1) for proposal in (in_c, in_torch)]
        torch.testing.assert_close(left[0], left[1], rtol=1e-3, atol=1e-3)


def test_ways_to_save_memory_change_nothing(problem: Problem) -> None:
    figures = [
        problem.trainer(loop_with(**changes)).train_step()
        for changes in (
            {},
            {"microbatch": 4},
            {"recompute_activations": True},
            {"teacher_first": True},
        )
    ]
    for other in figures[1:]:
        assert other["train_kl"] == pytest.approx(figures[0]["train_kl"], rel=1e-4)
        assert other["gradient_norm"] == pytest.approx(figures[0]["gradient_norm"], rel=1e-3)


@pytest.mark.slow
def test_a_resumed_trainer_goes_on_bit_for_bit(problem: Problem, tmp_path: Path) -> None:
    settings = loop_with(evaluate_every=4)
    whole = problem.trainer(settings)
    whole.run(Store(tmp_path / "whole"), lambda line: None)
    with interrupted_at("PV step 16/") as tell:
        problem.trainer(settings).run(Store(tmp_path / "stopped"), tell)
    resumed = problem.trainer(settings)
    lines: list[str] = []
    resumed.run(Store(tmp_path / "stopped"), lines.append)
    assert lines[0].startswith("PV step 16/")
    ours, theirs = resumed.optimizer.tensors(), whole.optimizer.tensors()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name].local, theirs[name].local), name


@pytest.mark.slow
def test_low_memory_keeps_two_bytes_per_weight_and_learns_as_well(
    problem: Problem, tmp_path: Path
) -> None:
    outcomes = []
    for low_memory in (False, True):
        trainer = problem.trainer(steps_with(low_memory=low_memory))
        outcomes.append(trainer.run(Store(tmp_path / str(low_memory)), lambda line: None))
        layer = next(iter(trainer.optimizer.layers.values()))
        assert layer.latent is not None
        kept = [tensor for name, tensor in layer.tensors().items() if name not in WHOLE_PARTS]
        if low_memory:
            assert (
                sum(tensor.nbytes for tensor in kept)
                < 2.4 * layer.groups * layer.representation.group_size
            )
    full, low = (outcome.best for outcome in outcomes)
    assert low < outcomes[1].before * 0.95
    assert low == pytest.approx(full, rel=0.1)


@pytest.mark.slow
def test_a_student_that_computes_in_bfloat16_learns_as_well(
    problem: Problem, tmp_path: Path
) -> None:
    outcomes = {}
    for compute in ("float32", "bfloat16"):
        trainer = problem.trainer(loop_with(compute=compute))
        outcomes[compute] = trainer.run(Store(tmp_path / compute), lambda line: None)
    weights, model = trainer.student.weights(), trainer.student.model
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert model.get_input_embeddings().codebooks.dtype is torch.float32
    # What is trained is float32, and decoded weights are copies of it.
    trained = [*trainer.optimizer.continuous.values(), *trainer.tensors().values()]
    assert {t.dtype for t in trained if t.is_floating_point()} == {torch.float32}
    for name, representation in trainer.student.representations.items():
        assert torch.equal(weights[name], representation.decode().bfloat16())
    full, low = outcomes["float32"], outcomes["bfloat16"]
    assert low.before == pytest.approx(full.before, rel=0.02)
    assert low.best == pytest.approx(full.best, rel=0.05)
    assert low.best < 0.9 * low.before


def test_auto_is_bfloat16_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[str, bool] = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert compute_dtype("auto", "cuda:0") is torch.bfloat16
    assert compute_dtype("auto", "cpu") is torch.float32
    found["amx_bf16"] = True
    assert compute_dtype("auto", "cpu") is torch.bfloat16
    assert compute_dtype("float32", "cpu") is torch.float32
    assert compute_dtype("bfloat16", "cpu") is torch.bfloat16


@pytest.mark.parametrize("name", ["block.latent", "block.limits", "block.exp_avg"])
def test_a_parameter_may_have_any_name(problem: Problem, name: str) -> None:
    trainer = problem.trainer(SETTINGS)
    dense = {name: torch.nn.Parameter(torch.ones(3))}
    weights = trainer.student.weights()
    representations = trainer.student.representations
    optimizer = PVOptimizer(representations, weights, dense, SETTINGS.pv)
    assert name in optimizer.student()
    assert optimizer.optimizer()[name].keys() == {"exp_avg", "exp_avg_sq"}


@pytest.mark.slow
def test_experts_without_tokens_have_gradients_too(tmp_path: Path) -> None:
    """Ranks could not sum the gradients of an expert that only some of them used."""
    model = toy_model("mixtral")
    model.save_pretrained(tmp_path / "dense")
    toy_tokenizer().save_pretrained(tmp_path / "dense")
    tune(TuneJob(str(tmp_path / "dense"), tmp_path / "out", QUICK), lambda line: None)
    settings = loop_with(batch=1, microbatch=1, held_out=1)
    trainer = Problem(tmp_path, torch.tensor([[1], [2]])).trainer(settings)  # one token a step
    trainer.train_step()
