"""The student of PV-Tuning: a calibrated model whose quantised weights are made trainable."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pvrt.errors import RunError
from pvrt.modules.aqlm_layer import AQLMLayer
from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt.modules.experts import ExpertList
from pvrt_tune import parallel
from pvrt_tune.data.text import CalibrationData
from pvrt_tune.distil.loss import final_hidden, on_device
from pvrt_tune.fit.grid import GridLinear
from pvrt_tune.model_blocks import find_blocks
from pvrt_tune.pv.dense import decoded
from pvrt_tune.pv.host_memory import HostMemory
from pvrt_tune.pv.representation import Representation, represent
from pvrt_tune.pv.streamed import StreamedLinear, StreamedWeight


@dataclass
class Student:
    """A model that computes with decoded weights, and the representations behind them.

    compute: the type of decoded weights, which are copies, and of products (by autocast); a sharded
    run keeps float32 shards and gathers them in that type. streamed: weights by layer name that are
    decoded whenever they are used, instead of all others.
    """

    model: Any
    representations: dict[str, Representation]
    compute: torch.dtype
    streamed: dict[str, StreamedWeight] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, compute: torch.dtype, *, stream: bool = False) -> "Student":
        """Decode the quantised layers of all blocks of a float32 model into trainable weights, in
        place, or stream them. Embedding and output head stay as they are: their codes do not move.

        In a run of several ranks, decoded weights are sharded and every rank represents its rows.
        Raises RunError when they are to stream, which one process alone can do.
        """
        if stream and parallel.world() > 1:
            raise RunError("states: host is for one process; leave it out under torchrun")
        host = HostMemory(next(model.parameters()).device)
        kept = compute if parallel.world() == 1 else torch.float32
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        representations, streamed = {}, {}
        for name, module in list(model.named_modules()):
            if isinstance(module, ExpertList):  # every weight must have a gradient, on every rank
                module.all_compute = True
            if not isinstance(module, AQLMLinear | GridLinear) or module in ends:
                continue
            if stream:
                representations[name] = represent(module)
                streamed[name] = StreamedWeight(representations[name], compute, host)
                model.set_submodule(name, StreamedLinear(streamed[name], module.bias))
                continue
            dense, whole = decoded(module, kept)
            model.set_submodule(name, dense)
            rows = parallel.rows_of(module.out_features)
            representations[name] = whole if parallel.world() == 1 else represent(module, rows)
        student = cls(model, representations, compute, streamed)
        if not stream:
            device = next(model.parameters()).device.type
            parallel.shard(find_blocks(model).blocks, student.weights().values(), device, compute)
        return student

    def final_hidden(self, data: CalibrationData) -> Tensor:
        """What enters the output head for windows of text, [windows, length, width]."""
        device = next(self.model.parameters()).device
        low = self.compute is torch.bfloat16
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            hidden = final_hidden(self.model, *on_device(data, device))
        return hidden.to(self.compute)

    def weights(self) -> dict[str, nn.Parameter]:
        """The decoded weights by layer name; none that are streamed."""
        names = [name for name in self.representations if name not in self.streamed]
        return {name: self.model.get_parameter(f"{name}.weight") for name in names}

    def dense(self, freeze_embeddings: bool) -> dict[str, nn.Parameter]:
        """All other parameters that are trained, by name. freeze_embeddings leaves out embedding
        and output head, except what they have of codebooks and scales.
        """
        decoded = {id(weight) for weight in self.weights().values()}
        if freeze_embeddings:
            ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
            dense = [end for end in ends if end is not None and not isinstance(end, AQLMLayer)]
            decoded |= {id(p) for end in dense for p in end.parameters()}
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if id(parameter) not in decoded and parameter.is_floating_point()
        }
