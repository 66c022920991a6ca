"""The whole original model, only to be run: on the device, or block by block from the host."""

from typing import Any

import torch
from torch import Tensor, nn

from pvrt_tune.data.source_model import Source
from pvrt_tune.model_blocks import find_blocks
from pvrt_tune.settings import TuneJob


def original(source: Source, dtype: torch.dtype | None, job: TuneJob) -> Any:
    """The model of a job on its device, in `dtype` or its own floating type.

    With `job.stream` the weights of its blocks stay where the source has them, as pages of the
    model's files, and each block is on the device only while it computes.
    """
    if not job.stream:
        return source.dense(dtype, job.device)
    model = source.dense(dtype)
    stream_blocks(model, job.device)
    return model


def stream_blocks(model: nn.Module, device: str) -> None:
    """Have the blocks of a model on the host come to a device one by one when they compute.

    All the rest moves there now.
    """
    blocks = find_blocks(model).blocks
    inside = {id(parameter) for parameter in blocks.parameters()}
    moved: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in inside:
                if id(parameter) not in moved:
                    moved[id(parameter)] = _on(device, parameter)
                setattr(module, name, moved[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for block in blocks:
        _Visits(block, device)


def _on(device: str, parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.to(device), requires_grad=False)


class _Visits:
    """Brings a block's weights to a device for a forward pass, and drops them there after it."""

    def __init__(self, block: nn.Module, device: str) -> None:
        self._device = device
        self._home = [
            (module, name, parameter)
            for module in block.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        block.register_forward_pre_hook(self._come)
        block.register_forward_hook(self._go)

    def _come(self, block: nn.Module, args: Any) -> None:
        for module, name, parameter in self._home:
            setattr(module, name, _on(self._device, parameter))

    def _go(self, block: nn.Module, args: Any, output: Any) -> None:
        for module, name, parameter in self._home:
            setattr(module, name, parameter)
