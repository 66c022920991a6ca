"""Items of gpu_product.py at the shapes of 7B models: seconds and peaks against the plan's."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_item import Item

#: What cuBLAS keeps on a Hopper card; a plan has it among what every process takes there.
CUBLAS_BYTES = 32 << 20


def measured(item: Item, name: str, planned: int, work: Callable[[], Any]) -> Any:
    """Result of some work; notes its seconds and peak beside what `pvrt plan` counts for it."""
    cuda = item.device == "cuda"
    if cuda:
        torch.cuda.synchronize()  # torch keeps its memory, as a run does from step to step
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    ratio = planned / peak if peak else None
    item.note(rows={name: {"seconds": seconds, "peak": peak, "planned": planned, "ratio": ratio}})
    if peak and not 0.9 < planned / peak < 1.5:
        raise AssertionError(f"planned {planned / 1e9:.2f} GB, measured {peak / 1e9:.2f} GB")
    return result


def layer_fit(item: Item) -> None:
    """Fits of single layers of 7B shapes, by effort."""
    from pvrt.format.scheme import Scheme
    from pvrt_tune.fit import layer
    from pvrt_tune.fit.additive import fit_layer
    from pvrt_tune.settings import EFFORTS

    for effort in ("quick", "standard"):
        settings = EFFORTS[effort].fit
        for scheme in item.some(("2x8g8", "1x16g8"), ("2x8g8",)):
            for shape in item.some(((4096, 4096), (11008, 4096), (4096, 11008)), ((64, 64),)):
                if effort == "standard" and (scheme != "2x8g8" or shape[1] > 4096):
                    continue
                name = f"{effort} {scheme} {shape[0]}x{shape[1]}"
                with item.check(name):
                    torch.manual_seed(0)
                    weight = torch.randn(shape, device=item.device)
                    x = torch.randn(2 * shape[1], shape[1], device=item.device)
                    moment = x.T @ x / len(x)
                    del x
                    form, own = Scheme.parse(scheme), weight.nbytes + moment.nbytes
                    planned = own + layer.peak_bytes(shape, form, settings, item.device)
                    planned += CUBLAS_BYTES
                    random = torch.Generator().manual_seed(0)
                    work = partial(fit_layer, weight, moment, form, settings, random)
                    # Without a name, or the next fit's peak would count this one.
                    error = measured(item, name, planned, work).relative_error()
                    item.note(fit_errors={name: error})


def pv_step(item: Item) -> None:
    """Steps of a real trainer on a model of 7B shapes with few blocks and random codes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from pvrt.format.scheme import Scheme
    from pvrt.modules.aqlm_linear import AQLMLinear
    from pvrt_tune.data.text import CalibrationData
    from pvrt_tune.distil import trainer
    from pvrt_tune.distil.loss import Teacher
    from pvrt_tune.distil.student import Student
    from pvrt_tune.model_blocks import find_blocks, linears
    from pvrt_tune.plan.skeleton import model_shape
    from pvrt_tune.settings import EFFORTS, TrainSettings

    width, inner, blocks, heads = item.some((4096, 11008, 4, 32), (64, 128, 2, 2))
    config = AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=item.some(32000, 384),
        tie_word_embeddings=False,
    )
    loop = TrainSettings(windows=16, held_out=2, batch=2, microbatch=2)
    length = item.some(1024, 16)
    recipe = replace(EFFORTS["quick"], training=loop, embeddings="keep", length=length)

    def make() -> tuple[Any, Any]:
        torch.manual_seed(0)
        with torch.device(item.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            tokens = torch.randint(0, config.vocab_size, (18, length))
        data = CalibrationData(tokens.cpu(), "random")
        teacher = Teacher(model, data, 16, lambda number: None, lambda number, states: None)
        return teacher, data

    def student() -> Any:
        with torch.device(item.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for block in find_blocks(model).blocks:
            for name, linear in list(linears(block)):
                shape = linear.in_features, linear.out_features
                layer = AQLMLinear(*shape, Scheme.parse("2x8g8"), device=item.device)
                layer.codes.random_(-128, 127)
                layer.codebooks.data.normal_()
                layer.scales.data.fill_(0.02)
                block.set_submodule(name, layer)
        return model

    with torch.device("meta"):
        shape = model_shape(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), recipe)
    host = replace(recipe, training=replace(loop, states="host"))
    variants = {
        "usual": recipe,
        "states on the host": host,
        "low memory": replace(recipe, pv=replace(recipe.pv, low_memory=True)),
        "low memory on the host": replace(host, pv=replace(recipe.pv, low_memory=True)),
    }
    compute = torch.float32 if item.dry else torch.bfloat16
    for name, own in variants.items():
        with item.check(name):
            planned = trainer.peak_bytes(shape, own, compute.itemsize, item.device)
            planned += 2 * shape.parameters  # the teacher, in bfloat16
            teacher, data = make()
            stream = own.training is not None and own.training.states == "host"
            made = Student.of(student(), compute, stream=stream)
            steps = trainer.Trainer(made, teacher, data, own)
            del made
            steps.train_step()  # searches and compiles what later steps do not
            item.note(steps={name: measured(item, name, planned, steps.train_step)})
