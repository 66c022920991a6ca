"""Llama-like models on the CPU: prompts through transformers, each step through one call of C.

A token of a small model takes milliseconds, of which transformers' Python alone would take most.
So decoding, of one sequence or of many at once, is a program of the C library
(`pvrt_kernels.cpu.decoder_program`), over the same packed weights and the same caches. What is not
quantised is kept in the 16 bits that the checkpoint has it in, which halves what a token reads and
changes no result. Everything is computed in float32, but for the products of prompts of models
whose authors chose 16 bits.
"""

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

from pvrt.kv_cache import cache_name, cache_shape
from pvrt.modules.aqlm_embedding import TiedHead
from pvrt.modules.aqlm_layer import AQLMLayer, pack
from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt_kernels.cpu import products
from pvrt_kernels.cpu.decoder_program import MOST_ROWS, Program, Rounded, Step
from pvrt_kernels.packed import PackedWeight, aqlm_packed_linear
from pvrt_server.engine.models import weight_bytes

_FIRST_CAPACITY = 256
_FEW_ROWS = 4
_WIDENED_ROWS = 1024  # of a 16-bit weight, at a time, where it is multiplied by many tokens


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """Keys and values of one layer, written into a part of a sequence's buffer."""

    def __init__(self, buffer: Tensor, length: int) -> None:
        super().__init__()
        self.buffer = buffer.unsqueeze(1)  # [2, 1, kv_heads, capacity, dim]
        self.length = length
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        for store, new in zip(self.buffer, (key_states, value_states), strict=True):
            store[:, :, self.length : end] = new
        self.length = end
        keys, values = self.buffer[:, :, :, :end]
        return keys, values

    def get_seq_length(self) -> int:
        return self.length


@dataclass
class _State:
    """One sequence: its first `length` tokens are in cache [layers, 2, kv_heads, capacity, dim]."""

    cache: Tensor
    length: int = 0


class CpuModel:
    """A Llama-like model, packed or dense, decoding up to `rows` sequences at once.

    `backend.runs_in_c` says which models these are. A dense one may be given in 16 bits: all sums
    are in float32 in any case. Its layers are replaced. rounds: products of prompts may round their
    factors and results to bfloat16, where the CPU multiplies that.
    """

    def __init__(self, model: Any, rows: int = 1, *, rounds: bool = False) -> None:
        self.model = model
        self._rounding = products.bfloat16_products if rounds else nullcontext
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.generation_config = model.generation_config
        self._rows = min(rows, MOST_ROWS)
        config, decoder = model.config, model.model
        attention = decoder.layers[0].self_attn
        self._kv_heads, self._dim = config.num_key_value_heads, attention.head_dim
        self._limit = cache_shape(config).longest
        self._embedding, self._head = _ends(model)
        self._scales, self._head_scales = (
            _in_scales(decoder.embed_tokens),
            _in_scales(model.lm_head),
        )
        for parent, name, linear in _linears_of(model):
            if type(linear) is nn.Linear:
                setattr(parent, name, _DenseLinear(linear))
        for parameter in model.parameters():  # norms and biases
            if parameter.dim() == 1:
                parameter.data = parameter.data.float()
        self._logits = torch.empty(self._rows, config.vocab_size)
        # Rounded and looked through first, where only the largest logit is asked for.
        self._scores = Rounded(self._head) if isinstance(self._head, Tensor) else None
        self._program = self._build()
        self.bytes_per_token = self._program.bytes_read
        self.weight_bytes = weight_bytes(model)
        if self._scores is not None:
            self.weight_bytes += self._scores.rows.nbytes + self._scores.bounds.nbytes
        self._positions = 0  # that queries and keys can be rotated to

    def start(self) -> _State:
        """See LanguageModel."""
        return _State(self._room_for(_FIRST_CAPACITY))

    def read(self, state: _State, tokens: Sequence[int], keep: int) -> Tensor:
        """See LanguageModel."""
        if len(tokens) == 1:
            return self.step([state], tokens)[:keep]
        self._extend(state, len(tokens))
        cache = Cache(layers=[_Layer(layer, state.length) for layer in state.cache])
        with self._rounding():
            output = self.model.model(
                inputs_embeds=self.model.model.embed_tokens(torch.tensor([tokens])).float(),
                use_cache=True,
                **{cache_name(): cache},
            )
        state.length += len(tokens)
        x = output.last_hidden_state[0, len(tokens) - keep :]
        return _product(x if self._head_scales is None else x * self._head_scales, self._head)

    def step(
        self, states: Sequence[_State], tokens: Sequence[int], argmax_only: bool = False
    ) -> Tensor:
        """See LanguageModel."""
        for state in states:
            self._extend(state, 1)
        steps = [
            Step(token, state.length, state.cache)
            for state, token in zip(states, tokens, strict=True)
        ]
        # Four tokens share what a row of lm_head costs, which is then less than looking twice.
        self._program.run(steps, argmax_only and len(steps) < _FEW_ROWS)
        for state in states:
            state.length += 1
        return self._logits[: len(steps)]

    def copy(self, state: _State, length: int) -> _State:
        """See LanguageModel."""
        cache = self._room_for(length)
        cache[:, :, :, :length] = state.cache[:, :, :, :length]
        return _State(cache, length)

    def _room_for(self, tokens: int) -> Tensor:
        capacity = _FIRST_CAPACITY
        while capacity < tokens:
            capacity *= 2
        layers = self.model.config.num_hidden_layers
        shape = (layers, 2, self._kv_heads, min(capacity, self._limit), self._dim)
        # Mapped, not allocated: the system gives memory to those parts only that are written, and
        # has all of it back with the tensor, where malloc would keep it for others, as written.
        mapped = mmap.mmap(-1, 4 * math.prod(shape), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(mapped, dtype=torch.float32).view(shape)

    def _extend(self, state: _State, tokens: int) -> None:
        end = state.length + tokens
        if end > state.cache.shape[3]:
            cache = self._room_for(end)
            cache[:, :, :, : state.length] = state.cache[:, :, :, : state.length]
            state.cache = cache
        if end > self._positions:
            self._positions = min(max(end, 2 * self._positions, _FIRST_CAPACITY), self._limit)
            positions = torch.arange(self._positions).unsqueeze(0)
            cosine, sine = self.model.model.rotary_emb(self._logits, positions)
            self._program.rotate(cosine[0].contiguous(), sine[0].contiguous())

    def _build(self) -> Program:
        model, config = self.model.model, self.model.config
        program, epsilon = Program(), config.rms_norm_eps
        heads, kv_heads, dim = config.num_attention_heads, self._kv_heads, self._dim
        rows = self._rows
        hidden = torch.empty(rows, config.hidden_size)
        qkv = torch.empty(rows, (heads + 2 * kv_heads) * dim)
        attended = torch.empty(rows, heads * dim)
        gates = torch.empty(rows, 2 * config.intermediate_size)
        product = torch.empty(rows, config.intermediate_size)
        program.embed(self._embedding, hidden, in_scales=self._scales)
        for layer in model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            projections = [attention.q_proj, attention.k_proj, attention.v_proj]
            _linears(program, projections, hidden, qkv, norm=layer.input_layernorm)
            program.attend(
                qkv,
                attended,
                heads=heads,
                kv_heads=kv_heads,
                dim=dim,
                scale=attention.scaling,
                query_norm=_norm(getattr(attention, "q_norm", None)),
                key_norm=_norm(getattr(attention, "k_norm", None)),
                epsilon=epsilon,
            )
            _linears(program, [attention.o_proj], attended, hidden, accumulate=True)
            norm = layer.post_attention_layernorm
            _linears(program, [mlp.gate_proj, mlp.up_proj], hidden, gates, norm=norm)
            program.gate(gates, product)
            _linears(program, [mlp.down_proj], product, hidden, accumulate=True)
        norm = _norm(model.norm)
        assert norm is not None
        if self._head_scales is not None:
            norm = norm * self._head_scales
        program.logits(hidden, self._logits, self._head, norm, epsilon, self._scores)
        return program


class _DenseLinear(nn.Module):
    """A layer of transformers with its weight in 16 bits where that loses nothing."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features = layer.out_features
        self.weight = nn.Parameter(_narrow(layer), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = _product(x.flatten(0, -2), self.weight).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def _product(x: Tensor, weight: PackedWeight | Tensor) -> Tensor:
    """x [tokens, in] in float32 times a weight [out, in], packed or of 32 or 16 bits; float32."""
    if isinstance(weight, PackedWeight):
        return aqlm_packed_linear(x, weight)
    if x.shape[0] <= _FEW_ROWS:
        return products.dense_linear(x, weight)
    if weight.dtype == x.dtype:
        return F.linear(x, weight)
    if weight.dtype == torch.bfloat16 and products.may_round(x.dtype):
        return F.linear(x.bfloat16(), weight).float()
    return torch.cat([F.linear(x, rows.float()) for rows in torch.split(weight, _WIDENED_ROWS)], -1)


def _ends(model: Any) -> tuple[PackedWeight | Tensor, PackedWeight | Tensor]:
    """The weights of embedding and output head; one and the same where they are tied."""
    embedding, head = model.model.embed_tokens, model.lm_head
    if isinstance(head, TiedHead):
        return _end(embedding), _end(embedding)
    if isinstance(embedding, AQLMLayer) or isinstance(head, AQLMLayer):
        return _end(embedding), _end(head)
    tied = head.weight is embedding.weight
    weight = _narrow(embedding)
    if tied:
        head.weight = embedding.weight
    return weight, weight if tied else _narrow(head)


def _in_scales(module: Any) -> Tensor | None:
    """What the columns of an embedding's or head's codes are multiplied by, float32 [width]."""
    module = module.embedding if isinstance(module, TiedHead) else module
    scales: Tensor | None = getattr(module, "in_scales", None)
    return None if scales is None else scales.detach().float().contiguous()


def _end(module: Any) -> PackedWeight | Tensor:
    if not isinstance(module, AQLMLayer):
        return _narrow(module)
    packed = module.packed or pack([module], torch.float32)
    assert packed is not None
    return packed.weight


def _linears_of(model: Any) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The layers of attentions and MLPs, with what they are part of and as what."""
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, module in list(parent.named_children()):
                if name.endswith("_proj"):
                    yield parent, name, module


def _narrow(module: Any) -> Tensor:
    """A weight in 16 bits where that loses nothing; the module gets the narrow one as well."""
    weight: Tensor = module.weight.detach()
    if weight.dtype != torch.float32:
        return weight
    for dtype in (torch.bfloat16, torch.float16):
        narrow = weight.to(dtype)
        if torch.equal(narrow.float(), weight):
            module.weight = nn.Parameter(narrow, requires_grad=False)
            return narrow
    return weight


def _norm(module: Any) -> Tensor | None:
    return None if module is None else module.weight.detach().float().contiguous()


def _linears(
    program: Program,
    layers: list[Any],
    x: Tensor,
    y: Tensor,
    *,
    norm: Any = None,
    accumulate: bool = False,
) -> None:
    """y = the layers' outputs one after the other; one operation where they are packed in one.

    norm is the model's normalisation of x before them, if there is one.
    """
    shared = getattr(layers[0], "packed", None)
    options: dict[str, Any] = {
        "norm": _norm(norm),
        "epsilon": 0.0 if norm is None else norm.variance_epsilon,
        "accumulate": accumulate,
    }
    if shared is not None and all(getattr(layer, "packed", None) is shared for layer in layers):
        bias = None if shared.bias is None else shared.bias.float()
        program.linear(x, y, shared.weight, bias, **options)
        return
    at = 0
    for layer in layers:
        weight: PackedWeight | Tensor
        if isinstance(layer, AQLMLinear):
            assert layer.packed is not None
            weight, rows = layer.packed.weight, layer.out_features
        else:
            weight, rows = layer.weight.detach(), layer.out_features
        bias = None if layer.bias is None else layer.bias.detach().float()
        program.linear(x, y[:, at : at + rows], weight, bias, **options)
        at += rows
