"""A model's decoder blocks, and what is done to one of them.

Any decoder works whose blocks are one ModuleList of modules that map hidden states to hidden
states; linear layers are found by module discovery, there is no list of architectures.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pvrt.errors import RunError, SourceError
from pvrt.format.scheme import GridScheme, Scheme
from pvrt.modules.experts import ExpertList
from pvrt_tune.data.activations import Activations
from pvrt_tune.shapes import BlockShape


@dataclass(frozen=True)
class BlockList:
    """The decoder blocks of a model and the dotted name of their list."""

    name: str
    blocks: nn.ModuleList

    def prefix(self, index: int) -> str:
        """Dotted name of one block, with a trailing dot."""
        return f"{self.name}.{index}."


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is given and passes the hidden states on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Some models read attributes of a block (its attention type) before calling it.
        self.__dict__["block"] = block
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.calls.append((hidden_states, kwargs))
        return hidden_states


class _LastBlockReached(Exception):
    """Ends a recording pass before the output head is computed."""


class _LastRecorder(_Recorder):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        super().forward(hidden_states, **kwargs)
        raise _LastBlockReached


def find_blocks(model: nn.Module) -> BlockList:
    """The list of decoder blocks: of all ModuleLists, the one holding most linear weights.

    Raises SourceError when the model has no list of blocks with linear layers.
    """
    best, most = None, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            weights = sum(linear.weight.numel() for _, linear in linears(module))
            if weights > most:
                best, most = BlockList(name, module), weights
    if best is None:
        raise SourceError(f"{type(model).__name__} has no list of blocks with linear layers")
    return best


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of all linear layers inside a module that are to be quantised.

    Routers and gates, which stand beside a list of experts, are not: they decide, and are small.
    """
    routers: set[int] = set()
    for _, parent in module.named_modules():
        children = list(parent.children())
        if any(isinstance(child, ExpertList) for child in children):
            routers |= {id(child) for child in children if isinstance(child, nn.Linear)}
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear) and id(child) not in routers:
            yield name, child


def check_divisible(blocks: BlockList, scheme: Scheme | GridScheme) -> None:
    """Raise SourceError for the first linear layer that the scheme's groups do not divide."""
    for index, block in enumerate(blocks.blocks):
        for name, linear in linears(block):
            if not scheme.divides(linear.out_features, linear.in_features):
                fits = [g for g in (4, 8, 16, 32, 64, 128) if linear.in_features % g == 0]
                advice = f"groups of {fits[-1]} would fit" if fits else "no usual group fits"
                raise SourceError(
                    f"{blocks.prefix(index)}{name} has {linear.in_features} inputs, which scheme "
                    f"{scheme} cannot cut into groups of {scheme.in_group_size}; {advice}"
                )


def record_inputs(
    model: Any, blocks: BlockList, tokens: Tensor, batch: int, hidden: Activations
) -> list[dict[str, Any]]:
    """Run the embeddings on all tokens [samples, length] and record what the blocks would get.

    Hidden states go to `hidden`. Returns each block's keyword arguments (rotary tables, masks).
    `batch` must divide the number of samples: blocks then see equal shapes, and one copy of their
    masks and rotary tables serves all batches. The blocks and the output head of `model` are not
    run and may be on the meta device.
    """
    embeddings = model.get_input_embeddings()
    # From float32 embeddings on, rotary tables and masks are float32 too.
    widen = embeddings.register_forward_hook(lambda m, args, out: out.float())
    modules = model.get_submodule(blocks.name)
    originals = list(modules)
    recorders = [_Recorder(block) for block in originals[:-1]] + [_LastRecorder(originals[-1])]
    arguments: list[dict[str, Any]] = []
    try:
        for index, recorder in enumerate(recorders):
            modules[index] = recorder
        for number, part in enumerate(torch.split(tokens, batch)):
            for recorder in recorders:
                recorder.calls.clear()
            try:
                with torch.inference_mode():
                    model(input_ids=part.to(embeddings.weight.device), use_cache=False)
            except _LastBlockReached:
                pass
            hidden[number] = recorders[0].calls[0][0]
            if not arguments:
                copies: dict[int, Tensor] = {}
                arguments = [_detached(recorder.calls[0][1], copies) for recorder in recorders]
    finally:
        widen.remove()
        for index, block in enumerate(originals):
            modules[index] = block
    return arguments


class _HeadReached(Exception):
    """Ends a pass at the output head, with what entered it."""


class _Outputs(_Recorder):
    """Stands in for the last block: returns what it is told to."""

    value: Tensor

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.value


@contextmanager
def _outputs(model: Any, blocks: BlockList) -> Iterator[_Outputs]:
    """What stands for the blocks of a model, to be told the last one's outputs before a pass."""
    modules = model.get_submodule(blocks.name)
    originals = list(modules)
    outputs = _Outputs(originals[-1])
    try:
        for index, block in enumerate([*map(_Recorder, originals[:-1]), outputs]):
            modules[index] = block
        yield outputs
    finally:
        for index, block in enumerate(originals):
            modules[index] = block


def run_head(model: Any, blocks: BlockList, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Logits [batch, length, vocabulary] of the last block's outputs for tokens [batch, length].

    The blocks of `model` are not run and may be on the meta device.
    """
    with _outputs(model, blocks) as outputs, torch.no_grad():
        outputs.value = hidden
        logits: Tensor = model(input_ids=tokens.to(hidden.device), use_cache=False).logits
    return logits


def head_inputs(
    model: Any, blocks: BlockList, tokens: Tensor, hidden: Activations
) -> Iterator[Tensor]:
    """What enters the output head for tokens [samples, length], batch by batch: [n, width].

    `hidden` are the last block's outputs. The blocks and the output head of `model` are not run and
    may be on the meta device. Raises RunError for a model that does not call its head.
    """

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _HeadReached(args[0])

    embeddings = model.get_input_embeddings()
    hooks = [
        embeddings.register_forward_hook(lambda m, args, out: out.float()),
        model.get_output_embeddings().register_forward_pre_hook(stop),
    ]
    try:
        with _outputs(model, blocks) as outputs:
            batch = len(hidden[0])
            for part, outputs.value in zip(torch.split(tokens, batch), hidden, strict=True):
                try:
                    with torch.inference_mode():
                        model(input_ids=part.to(embeddings.weight.device), use_cache=False)
                except _HeadReached as reached:
                    yield reached.args[0].flatten(0, -2)
                else:
                    raise RunError(
                        f"{type(model).__name__} does not call its output head as a module; "
                        "--keep-embeddings leaves it in 16 bits"
                    )
    finally:
        for hook in hooks:
            hook.remove()


def _detached(value: Any, copies: dict[int, Tensor]) -> Any:
    """A copy of all tensors outside inference mode, so that training may use them.

    What blocks share (`copies`, by identity of the original) stays shared.
    """
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copies[id(value)] = value.clone()
        return copies[id(value)]
    if isinstance(value, dict):
        return {key: _detached(item, copies) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_detached(item, copies) for item in value)
    return value


#: Tokens that blocks compute at once. Steps of block tuning are as large: a given text teaches a
#: block more in many steps than in few.
STEP_TOKENS = 512


def batch_size(samples: int, length: int) -> int:
    """Windows computed at once: about `STEP_TOKENS` tokens, and all batches of one size."""
    sizes = range(max(1, min(samples, STEP_TOKENS // length)), 0, -1)
    return next(size for size in sizes if samples % size == 0)


def run_block(
    block: nn.Module,
    hidden: Tensor,
    arguments: dict[str, Any],
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """Output hidden states in float32 of one block for one batch, with products in `compute`."""
    low = compute is torch.bfloat16
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=low):
        output: Tensor | tuple[Tensor, ...] = block(hidden, **arguments)
    return (output[0] if isinstance(output, tuple) else output).float()


def observe(
    block: nn.Module,
    inputs: Activations,
    arguments: dict[str, Any],
    outputs: Activations | None = None,
    compute: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """One pass over all batches with products in `compute`: the input second moment of each linear.

    Returns H = mean over tokens of x x^T, [in, in] float32, by layer name. Layers that share their
    input (q, k, v) share one tensor. The block's outputs go to `outputs`, where it is given.

    An expert sees only the tokens routed to it. With n of them, fewer than the floor n0 = in (H has
    full rank from there on), its moment is filled up with the mean over all experts' tokens:
    H = (sum of x x^T + (n0 - n) H_all) / n0. Without any token it is H_all. A layer is left out
    when no token at all reached it or its fellow experts.
    """
    moments: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    with torch.no_grad():
        for number, hidden in enumerate(inputs):
            with _linear_inputs(block) as seen:
                output = run_block(block, hidden, arguments, compute)
            if outputs is not None:
                outputs[number] = output
            _accumulate(moments, counts, seen)
    for name, experts in block.named_modules():
        if isinstance(experts, ExpertList):
            for projection in experts.names:
                fellows = [f"{name}.{index}.{projection}" for index, _ in experts.named_children()]
                _fill_up(moments, counts, fellows)
    done: set[int] = set()
    for name, moment in moments.items():
        if id(moment) not in done:
            moment /= counts[name]
            done.add(id(moment))
    return moments


def observe_bytes(shape: BlockShape, tokens: int, width: int) -> int:
    """Peak of `observe` for batches of `tokens` tokens, with the block in float32."""
    # Hidden states that come in, the residual, and what the batch before left; inputs of all
    # linears, which hooks keep; the outputs of the widest siblings.
    states = 4 * tokens * (3 * width + shape.read + shape.widest)
    return 4 * shape.parameters + shape.moments + int(states)


def _fill_up(moments: dict[str, Tensor], counts: dict[str, int], fellows: list[str]) -> None:
    """Raise the sums of experts that saw too few tokens to the floor; see `observe`."""
    reached = [name for name in fellows if name in moments]
    if not reached:
        return
    overall = torch.zeros_like(moments[reached[0]])
    for name in reached:
        overall += moments[name]
    overall /= sum(counts[name] for name in reached)
    floor = len(overall)
    for name in fellows:
        if name not in moments:
            moments[name], counts[name] = overall.clone(), 1
        elif counts[name] < floor:
            # A tensor of its own: gate and up projection shared the sum, and come here in turn.
            moments[name] = moments[name] + (floor - counts[name]) * overall
            counts[name] = floor


@contextmanager
def _linear_inputs(block: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the input of every linear layer during one forward pass."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, linear in linears(block):

        def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            seen[name] = args[0]

        handles.append(linear.register_forward_pre_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _accumulate(
    moments: dict[str, Tensor], counts: dict[str, int], seen: dict[str, Tensor]
) -> None:
    """Add x^T x and the tokens of one batch; inputs that are the same are multiplied once."""
    # By input: the first layer that read it, whose moment the others share.
    first: dict[int, str] = {}
    for name, x in seen.items():
        counts[name] = counts.get(name, 0) + x.numel() // x.shape[-1]
        if id(x) in first:
            moments.setdefault(name, moments[first[id(x)]])
            continue
        first[id(x)] = name
        flat = x.reshape(-1, x.shape[-1]).float()
        if name in moments:
            moments[name].addmm_(flat.T, flat)
        else:
            moments[name] = flat.T @ flat
