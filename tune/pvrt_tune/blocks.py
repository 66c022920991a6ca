"""The walk over a model's decoder blocks, and what is done to one of them.

Any decoder works whose blocks are one ModuleList of modules that map hidden states to hidden
states; linear layers are found by module discovery, there is no list of architectures.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pvrt.errors import SourceError
from pvrt.scheme import Scheme


@dataclass(frozen=True)
class BlockList:
    """The decoder blocks of a model and the dotted name of their list."""

    name: str
    blocks: nn.ModuleList

    def prefix(self, index: int) -> str:
        """Dotted name of one block, with a trailing dot."""
        return f"{self.name}.{index}."


@dataclass(frozen=True)
class BlockInputs:
    """What enters the blocks: hidden states of every batch, and each block's other arguments.

    hidden: list of [batch, length, width] float32 on the CPU; arguments[i] are the keyword
    arguments of block i (rotary tables, masks), the same for every batch of equal shape.
    """

    hidden: list[Tensor]
    arguments: list[dict[str, Any]]


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
    """(name, layer) of all dense linear layers inside a module."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            yield name, child


def check_divisible(blocks: BlockList, scheme: Scheme) -> None:
    """Raise SourceError for the first linear layer that the scheme's groups do not divide."""
    for index, block in enumerate(blocks.blocks):
        for name, linear in linears(block):
            if not scheme.divides(linear.out_features, linear.in_features):
                fits = [g for g in (4, 8, 16, 32) if linear.in_features % g == 0]
                advice = f"groups of {fits[-1]} would fit" if fits else "no usual group fits"
                raise SourceError(
                    f"{blocks.prefix(index)}{name} has {linear.in_features} inputs, which scheme "
                    f"{scheme} cannot cut into groups of {scheme.in_group_size}; {advice}"
                )


def record_inputs(model: Any, blocks: BlockList, tokens: Tensor, batch: int) -> BlockInputs:
    """Run the embeddings on all tokens [samples, length] and record what the blocks would get.

    `batch` must divide the number of samples: blocks then see equal shapes, and one copy of their
    masks and rotary tables serves all batches.
    """
    # From float32 embeddings on, rotary tables and masks are float32 too.
    widen = model.get_input_embeddings().register_forward_hook(lambda m, args, out: out.float())
    originals = list(blocks.blocks)
    recorders = [_Recorder(block) for block in originals[:-1]] + [_LastRecorder(originals[-1])]
    hidden: list[Tensor] = []
    arguments: list[dict[str, Any]] = []
    try:
        for index, recorder in enumerate(recorders):
            blocks.blocks[index] = recorder
        for part in torch.split(tokens, batch):
            for recorder in recorders:
                recorder.calls.clear()
            try:
                with torch.inference_mode():
                    model(input_ids=part.to(model.device), use_cache=False)
            except _LastBlockReached:
                pass
            hidden.append(recorders[0].calls[0][0].cpu().clone())
            arguments = arguments or [_detached(recorder.calls[0][1]) for recorder in recorders]
    finally:
        widen.remove()
        for index, block in enumerate(originals):
            blocks.blocks[index] = block
    return BlockInputs(hidden, arguments)


def _detached(value: Any) -> Any:
    """A copy of all tensors outside inference mode, so that training may use them."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_detached(item) for item in value)
    return value


def run_block(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Output hidden states of one block for one batch."""
    output: Tensor | tuple[Tensor, ...] = block(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def observe(
    block: nn.Module, inputs: list[Tensor], arguments: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """One pass over all batches: the block's outputs, and the input second moment of each linear.

    Returns outputs (one per batch) and H = mean over tokens of x x^T, [in, in] float32, by layer
    name. Layers that share their input (q, k, v) share one tensor.
    """
    moments: dict[str, Tensor] = {}
    outputs = []
    tokens = 0
    with torch.no_grad():
        for hidden in inputs:
            with _linear_inputs(block) as seen:
                outputs.append(run_block(block, hidden, arguments))
            _accumulate(moments, seen)
            tokens += hidden.shape[0] * hidden.shape[1]
    for moment in {id(moment): moment for moment in moments.values()}.values():
        moment /= tokens
    return outputs, moments


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


def _accumulate(moments: dict[str, Tensor], seen: dict[str, Tensor]) -> None:
    """Add x^T x of one batch; inputs that are the same tensor are multiplied once."""
    products: dict[int, Tensor] = {}
    added: set[int] = set()
    for name, x in seen.items():
        flat = x.reshape(-1, x.shape[-1]).float()
        if id(x) not in products:
            products[id(x)] = flat.T @ flat
        product = products[id(x)]
        if name not in moments:
            moments[name] = product  # shared between the layers of one input
            added.add(id(product))
        elif id(moments[name]) not in added:
            moments[name].add_(product)
            added.add(id(moments[name]))
