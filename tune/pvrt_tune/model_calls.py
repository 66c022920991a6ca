"""How a model calls its blocks and its output head: recorded without running them.

A block is called again with what it was called with, its hidden states apart: models differ in what
else they give their blocks, and in what they expect back.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pvrt.errors import RunError, SourceError
from pvrt_tune.data.activations import Activations
from pvrt_tune.data.source_model import fill
from pvrt_tune.model_blocks import BlockList, find_blocks

#: What blocks return: their hidden states, or a tuple that begins with them.
_FORMS: tuple[Callable[[Tensor], Any], ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, None),
    lambda hidden: (hidden, None, None),
)


_NO_STATES = "they get no hidden states [batch, length, width], one after the other"
_CHANGED = "the model changes their hidden states between them"


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is given and passes the hidden states on."""

    def __init__(self, block: nn.Module, form: Callable[[Tensor], Any] = _FORMS[0]) -> None:
        super().__init__()
        # Some models read attributes of a block (its attention type) before calling it.
        self.__dict__["block"] = block
        self.form = form
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # By name: a block is called again with all but its first argument.
        signature = inspect.signature(self.__dict__["block"].forward)
        given = signature.bind(*args, **kwargs).arguments
        hidden, *others = given
        named: dict[str, Any] = {}
        for name in others:
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                named |= given[name]
            else:
                named[name] = given[name]
        self.calls.append((given[hidden], named))
        return self.form(given[hidden])


class _LastBlockReached(Exception):
    """Ends a recording pass before the output head is computed."""


class _LastRecorder(_Recorder):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        super().forward(*args, **kwargs)
        raise _LastBlockReached


def record_inputs(
    model: Any, blocks: BlockList, tokens: Tensor, batch: int, hidden: Activations
) -> list[list[dict[str, Any]]]:
    """Run the embeddings on all tokens [samples, length] and record what the blocks would get.

    Hidden states go to `hidden`. Returns each block's keyword arguments by batch. `batch` must
    divide the number of samples: blocks then see equal shapes, and one copy of their masks and
    rotary tables serves all batches; of what depends on the tokens (embeddings of every layer) each
    has its own. The blocks and the output head of `model` are not run and may be on the meta
    device. Raises SourceError for a model whose blocks cannot be run one after the other.
    """
    embeddings = model.get_input_embeddings()
    form = _form(model, blocks, tokens)
    # From float32 embeddings on, rotary tables and masks are float32 too.
    widen = embeddings.register_forward_hook(lambda m, args, out: out.float())
    try:
        with _standing_in(model, blocks, form, _LastRecorder) as recorders:
            arguments: list[list[dict[str, Any]]] = [[] for _ in recorders]
            for number, part in enumerate(torch.split(tokens, batch)):
                for recorder in recorders:
                    recorder.calls.clear()
                try:
                    with torch.inference_mode():
                        model(input_ids=part.to(embeddings.weight.device), use_cache=False)
                except _LastBlockReached:
                    pass
                hidden[number] = recorders[0].calls[0][0]
                copies: dict[int, Tensor] = {}
                for own, recorder in zip(arguments, recorders, strict=True):
                    first = own[0] if own else None
                    own.append(_detached(recorder.calls[0][1], copies, first))
    finally:
        widen.remove()
    return arguments


@contextmanager
def _standing_in(
    model: Any, blocks: BlockList, form: Callable[[Tensor], Any], last: type[_Recorder]
) -> Iterator[list[_Recorder]]:
    """Recorders in the places of a model's blocks, the last one of a kind of its own."""
    modules = model.get_submodule(blocks.name)
    originals = list(modules)
    recorders = [_Recorder(block, form) for block in originals[:-1]]
    recorders.append(last(originals[-1], form))
    try:
        for index, recorder in enumerate(recorders):
            modules[index] = recorder
        yield recorders
    finally:
        for index, block in enumerate(originals):
            modules[index] = block


def _form(model: Any, blocks: BlockList, tokens: Tensor) -> Callable[[Tensor], Any]:
    """What a model expects its blocks to return, found by trying: the next block gets hidden states
    of the shape that the first got. Raises SourceError for a model whose blocks are called in
    another way.
    """
    reason = ""
    embeddings = model.get_input_embeddings()
    some = tokens[:1, :2].to(embeddings.weight.device)
    for form in _FORMS:
        with _standing_in(model, blocks, form, _LastRecorder) as recorders, _told_apart(embeddings):
            try:
                with torch.inference_mode():
                    model(input_ids=some, use_cache=False)
            except _LastBlockReached:
                calls = [call[0] for recorder in recorders for call in recorder.calls]
                shapes = {part.shape if isinstance(part, Tensor) else None for part in calls}
                once = all(len(recorder.calls) == 1 for recorder in recorders)
                width = getattr(model.config.get_text_config(), "hidden_size", None)
                if once and shapes == {(*some.shape, width)}:
                    if all(torch.equal(part, calls[0]) for part in calls):
                        return form
                    reason = _CHANGED
                reason = reason or _NO_STATES
            except Exception as error:  # a model fails in its own ways on a form that it lacks
                reason = reason or str(error).split("\n")[0]
    raise _not_apart(model, reason or _NO_STATES)


def _not_apart(model: Any, reason: str) -> SourceError:
    """The sentence about a model whose blocks are no blocks of their own."""
    return SourceError(f"the blocks of {type(model).__name__} cannot be tuned one by one: {reason}")


@contextmanager
def _told_apart(embeddings: nn.Module) -> Iterator[None]:
    """Embeddings that are not all zero, as those of a model without weights are."""

    def numbered(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.arange(output.numel(), device=output.device).view(output.shape).to(output) % 64

    hook = embeddings.register_forward_hook(numbered)
    try:
        yield
    finally:
        hook.remove()


class _Touched(Exception):
    """Something looked into what it was only to pass on."""


class _Sealed:
    """Stands for what a block gets beside its hidden states: it may be handed on, nothing else."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise _Touched

    def __getattr__(self, name: str) -> Any:
        raise _Touched


_SEALED = _Sealed()


def _check_passes_one(model: Any, blocks: BlockList, some: Tensor) -> None:
    """Raise SourceError where a block needs more of the one before than its hidden states.

    The blocks must be on the meta device.
    """
    form = _form(model, blocks, some)
    (hidden, named), *_ = _given(model, blocks, some, form)
    output = form(hidden)
    if not isinstance(output, tuple) or len(output) == 1:
        return
    # Nothing that a block does not return goes to the next one.
    returned = _on_meta(blocks.blocks[0], hidden, named)
    if not isinstance(returned, tuple | list) or len(returned) != len(output):
        returned = [_SEALED] * len(output)
    others = [None if own is None else _SEALED for own in returned[1:]]
    calls = _given(model, blocks, some, lambda hidden: (hidden, *others))
    for block, (hidden, named) in zip(blocks.blocks, calls, strict=False):
        given = any(value is _SEALED for value in named.values())
        if given and _on_meta(block, hidden, named) is _SEALED:
            raise _not_apart(model, "they pass more on than hidden states")


def _given(
    model: Any, blocks: BlockList, some: Tensor, form: Callable[[Tensor], Any]
) -> list[tuple[Tensor, dict[str, Any]]]:
    """What each block is called with where the others return what `form` makes."""
    with (
        _standing_in(model, blocks, form, _LastRecorder) as recorders,
        suppress(Exception),  # of a model that looks at what it then drops
        torch.inference_mode(),
    ):
        model(input_ids=some, use_cache=False)
    return [call for recorder in recorders for call in recorder.calls]


def _on_meta(block: nn.Module, hidden: Tensor, named: dict[str, Any]) -> Any:
    """What a block on the meta device returns: the seal where it touched it, None if it fails."""
    try:
        with torch.inference_mode():
            own = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), named)
            return block(hidden.to("meta"), **own)
    except _Touched:
        return _SEALED
    except Exception:  # not all of a block can run without numbers
        return None


def check_calls(model: Any, blocks: BlockList) -> None:
    """Raise SourceError where a skeleton shows that its blocks cannot be tuned one by one."""
    for target, source in model.all_tied_weights_keys.items():
        if target.startswith(f"{blocks.name}."):
            raise _not_apart(model, f"they share weights ({target} is {source})")
    for name, module in model.named_modules():
        if type(module) is type(blocks.blocks[0]) and not name.startswith(f"{blocks.name}."):
            where = f"{blocks.name}, and {name} outside it"
            raise _not_apart(model, f"they are in more than one list ({where})")
    probe = deepcopy(model)
    outside = {
        # Pages of zeros that nobody reads cost nothing; norms pass on what they get.
        name: (torch.zeros if tensor.dim() > 1 else torch.ones)(tensor.shape, dtype=tensor.dtype)
        for name, tensor in model.state_dict().items()
        if not name.startswith(f"{blocks.name}.")
    }
    fill(probe, outside, "cpu")
    _check_passes_one(probe, find_blocks(probe), torch.zeros(1, 2, dtype=torch.int64))


class _HeadReached(Exception):
    """Ends a pass at the output head, with what entered it."""


class _Outputs(_Recorder):
    """Stands in for the last block: returns what it is told to."""

    value: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.form(self.value)


@contextmanager
def _outputs(model: Any, blocks: BlockList, tokens: Tensor) -> Iterator[_Outputs]:
    """What stands for the blocks of a model, to be told the last one's outputs before a pass."""
    with _standing_in(model, blocks, _form(model, blocks, tokens), _Outputs) as recorders:
        outputs = recorders[-1]
        assert isinstance(outputs, _Outputs)
        yield outputs


def run_head(model: Any, blocks: BlockList, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Logits [batch, length, vocabulary] of the last block's outputs for tokens [batch, length].

    The blocks of `model` are not run and may be on the meta device.
    """
    with _outputs(model, blocks, tokens) as outputs, torch.no_grad():
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
        with _outputs(model, blocks, tokens) as outputs:
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


def _detached(value: Any, copies: dict[int, Tensor], first: Any = None) -> Any:
    """A copy of all tensors outside inference mode, so that training may use them.

    What blocks share (`copies`, by identity of the original) stays shared, and so does what is the
    same in the first batch.
    """
    if isinstance(value, Tensor):
        if id(value) not in copies:
            same = isinstance(first, Tensor) and torch.equal(value, first)
            copies[id(value)] = first if same else value.clone()
        return copies[id(value)]
    if isinstance(value, dict):
        firsts = first if isinstance(first, dict) else {}
        return {key: _detached(item, copies, firsts.get(key)) for key, item in value.items()}
    if isinstance(value, tuple | list):
        others = first if isinstance(first, tuple | list) else [None] * len(value)
        return type(value)(_detached(i, copies, f) for i, f in zip(value, others, strict=True))
    return value
