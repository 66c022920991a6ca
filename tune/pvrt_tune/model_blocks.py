"""A model's decoder blocks, and what is done to one of them.

Any decoder works whose blocks are one ModuleList of modules that map hidden states to hidden
states; linear layers are found by module discovery, there is no list of architectures.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pvrt.errors import RunError, SourceError
from pvrt.format.folder import is_finite
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


_ROUTERS = ("router", "gate")  # names of what decides beside a list of experts


def find_blocks(model: nn.Module) -> BlockList:
    """The list of decoder blocks: of all ModuleLists, the one holding most linear weights.

    Of a model that reads images as well, of those in its text part. Raises SourceError when the
    model has no list of blocks with linear layers.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if isinstance(model, PreTrainedModel):
        text = {id(module) for module in model.get_decoder().modules()}
        lists = [(name, module) for name, module in lists if id(module) in text] or lists
    best, most = None, 0
    for name, module in lists:
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
        children = dict(parent.named_children())
        if any(isinstance(child, ExpertList) for child in children.values()):
            routers |= {id(child) for child in children.values() if isinstance(child, nn.Linear)}
            deciding = (children[name] for name in _ROUTERS if name in children)
            routers |= {id(part) for child in deciding for part in child.modules()}
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear) and id(child) not in routers:
            yield name, child


def in_experts(module: nn.Module, name: str) -> bool:
    """Whether a layer inside a module is a part of an expert, which tokens may not reach."""
    parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
    return any(isinstance(module.get_submodule(parent), ExpertList) for parent in parents)


def divisible(module: nn.Module, scheme: Scheme | GridScheme) -> Iterator[tuple[str, nn.Linear]]:
    """Those of `linears` that the scheme's groups divide; the others stay dense."""
    for name, linear in linears(module):
        if scheme.divides(linear.out_features, linear.in_features):
            yield name, linear


def check_readers(model: Any, blocks: BlockList, scheme: Scheme | GridScheme) -> None:
    """Raise SourceError for layers of a skeleton whose grids transformers could not load."""
    if not isinstance(scheme, GridScheme):
        return
    if _reads_weights(model, blocks):
        raise SourceError(
            f"transformers cannot load {type(model).__name__} from grids: its code reads the "
            "weights of linear layers, which grids do not have; give a --scheme of codebooks"
        )
    for index, block in enumerate(blocks.blocks):
        experts = [module for module in block.modules() if isinstance(module, ExpertList)]
        if any(module.fused_in_files or module.identities for module in experts):
            raise SourceError(
                f"{blocks.prefix(index)} has experts that are stored fused or change nothing, "
                "which transformers cannot load from grids; give a --scheme of codebooks"
            )
        if not scheme.symmetric and experts:
            raise SourceError(
                f"{blocks.prefix(index)} has experts, which transformers cannot load from "
                f"asymmetric grids; give --scheme {scheme}s or one of codebooks"
            )
        for name, linear in linears(block):
            if type(linear) is not nn.Linear:
                raise SourceError(
                    f"{blocks.prefix(index)}{name} is a {type(linear).__name__}, which "
                    "transformers cannot load from grids; give a --scheme of codebooks"
                )


def _reads_weights(model: Any, blocks: BlockList) -> bool:
    """Whether a model's class cannot initialise itself around linear layers without a weight."""
    bare = deepcopy(model)
    for _, linear in linears(bare.get_submodule(blocks.name)):
        del linear.weight
    try:
        for module in bare.modules():
            bare._init_weights(module)
    except AttributeError as error:
        return "weight" in str(error)
    return False


def _check_linear(blocks: BlockList) -> None:
    """Raise SourceError for blocks that have most of their weights in no linear layers."""
    weights = {
        name: parameter
        for name, parameter in blocks.blocks.named_parameters(prefix=blocks.name)
        if parameter.dim() > 1
    }
    others = dict(weights)
    for name, module in blocks.blocks.named_modules(prefix=blocks.name):
        if isinstance(module, nn.Linear):
            others.pop(f"{name}.weight", None)
    if 2 * sum(p.numel() for p in others.values()) > sum(p.numel() for p in weights.values()):
        largest = max(others, key=lambda name: others[name].numel())
        raise SourceError(
            f"most weights of the blocks are in no linear layers ({largest}, say), and pvrt "
            "quantises those alone: it would leave nearly all of the model as it is"
        )


def check_divisible(blocks: BlockList, scheme: Scheme | GridScheme) -> list[str]:
    """Names of the linear layers that stay dense, for the scheme's groups do not divide them.

    Raises SourceError when that are most of the weights, or when most are in no linear layers.
    """
    every = [
        (f"{blocks.prefix(index)}{name}", linear)
        for index, block in enumerate(blocks.blocks)
        for name, linear in linears(block)
    ]
    dense = {
        name: linear
        for name, linear in every
        if not scheme.divides(linear.out_features, linear.in_features)
    }
    _check_linear(blocks)
    weights = sum(linear.weight.numel() for linear in dense.values())
    if 2 * weights > sum(linear.weight.numel() for _, linear in every):
        name, linear = next(iter(dense.items()))
        fits = [g for g in (4, 8, 16, 32, 64, 128) if linear.in_features % g == 0]
        advice = f"groups of {fits[-1]} would fit" if fits else "no usual group fits"
        raise SourceError(
            f"{name} has {linear.in_features} inputs, which scheme {scheme} cannot cut into groups "
            f"of {scheme.in_group_size}; {advice}"
        )
    return list(dense)


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
        output: Tensor | Sequence[Tensor] = block(hidden, **arguments)
    return (output if isinstance(output, Tensor) else output[0]).float()


def observe(
    block: nn.Module,
    inputs: Activations,
    arguments: Sequence[dict[str, Any]],
    outputs: Activations | None = None,
    compute: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """One pass over all batches with products in `compute`: the input second moment of each linear.

    arguments: the block's other ones, by batch.

    Returns H = mean over tokens of x x^T, [in, in] float32, by layer name. Layers that share their
    input (q, k, v) share one tensor. The block's outputs go to `outputs`, where it is given.

    An expert sees only the tokens routed to it. With n of them, fewer than the floor n0 = in (H has
    full rank from there on), its moment is filled up with the mean over all experts' tokens:
    H = (sum of x x^T + (n0 - n) H_all) / n0. Without any token it is H_all. A layer is left out
    when no token at all reached it or its fellow experts. Raises RunError for inputs that overflow.
    """
    moments: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    with torch.no_grad():
        for number, hidden in enumerate(inputs):
            with _linear_inputs(block) as seen:
                output = run_block(block, hidden, arguments[number], compute)
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
            if not is_finite(moment):
                raise RunError(
                    f"the inputs of {name} are too large: their squares overflow float32; the "
                    "block's weights are damaged"
                )
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
