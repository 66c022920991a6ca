"""What a checkpoint says of each layer, by the names that vLLM gives the layers."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pvrt.errors import CheckpointError, ServeError
from pvrt.format.config_block import CONFIG_FILE, LayerSchemes
from pvrt.format.folder import in_block
from pvrt.format.scheme import Scheme
from pvrt.vllm_plugin.versions import holds_whole_model, is_skipped

_HEADS = {"lm_head", "output", "output_layer", "embed_out"}


@dataclass(frozen=True)
class End:
    """An embedding or lm_head in codes. `shape` is [vocabulary, width], None where unknown.

    `tied`: the checkpoint has no such layer, and the head multiplies by the weight of an embedding,
    which is `shared`. `in_scales`: the checkpoint has factors for the columns of its weight.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int] | None = None
    tied: bool = False
    shared: bool = False
    in_scales: bool = False

    @property
    def is_head(self) -> bool:
        """Whether it makes logits."""
        return self.name.rpartition(".")[2] in _HEADS

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether a layer of vLLM may be this one."""
        return self.shape is None or self.shape == shape


class Layers:
    """Schemes of a checkpoint's layers and names of its dense ones.

    vLLM renames modules (`rename`), fuses them (`sources`) and does not tell embeddings their names
    (`end`). A draft model's names start with `prefix`. Names that no layer asked for are refused
    after loading (`require_used`): vLLM would leave what they stand for as it was allocated.
    """

    def __init__(self, schemes: LayerSchemes, dense: Iterable[str]) -> None:
        self.prefix = ""
        self.dense = list(dense)
        self._default = schemes.default
        self._named = dict(schemes.named)
        self._ends: list[End] = []
        self._unused = set(self._named)

    def __str__(self) -> str:
        schemes = dict.fromkeys([self._default] if self._default else self._named.values())
        return ", ".join(map(str, schemes))

    def read_ends(self, shapes: Mapping[str, Sequence[int]], tied: bool) -> None:
        """Find embeddings and heads in codes by the names and shapes of a checkpoint's tensors.

        Where `tied`, a head that it does not hold is one with the embeddings of its shape. Raises
        ServeError for factors of columns in any other layer, and where one scheme has all layers.
        """
        for name in shapes:
            if name.endswith(".in_scales") and in_block(name):
                raise ServeError(f"{name}: vLLM can scale the columns of embedding and head alone")
            if name.endswith(".in_scales") and self._default is not None:
                raise ServeError(f"{name}: {CONFIG_FILE} must list the layers of every scheme")
        stored = [name.removesuffix(".codes") for name in shapes if name.endswith(".codes")]
        names = (name for name in self._named or stored if not in_block(name))
        self._ends = []
        for name in names:
            scheme = self._named.get(name, self._default)
            assert scheme is not None
            codes, shape = shapes.get(f"{name}.codes"), None
            if codes is not None and len(codes) == 3:
                shape = codes[0] * scheme.out_group_size, codes[1] * scheme.in_group_size
            self._ends.append(End(name, scheme, shape, in_scales=f"{name}.in_scales" in shapes))
        self._unused |= {end.name for end in self._ends}
        if tied and not any(end.is_head for end in self._ends):
            heads = [replace(end, name="lm_head", tied=True) for end in self._ends]
            self._ends = [*(replace(end, shared=True) for end in self._ends), *heads]

    def rename(self, mapper: Any) -> None:
        """Follow a model that renames its modules, by vLLM's mapper of tensor names."""

        def renamed(name: str) -> str:
            # A mapper may know "lm_head." as the beginning of a name, and not "lm_head".
            found = mapper.apply_list([f"{name}.weight"])
            return found[0].removesuffix(".weight") if found else name

        self.dense = [renamed(name) for name in self.dense]
        self._named = {renamed(name): scheme for name, scheme in self._named.items()}
        self._unused = {renamed(name) for name in self._unused}
        self._ends = [replace(end, name=renamed(end.name)) for end in self._ends]

    def keeps_dense(self, prefix: str, fused: Mapping[str, Sequence[str]]) -> bool:
        """Whether the checkpoint lists a layer, or all source layers of a fused one, as dense.

        Raises ValueError (vLLM's) for a fused layer of which only some source layers are.
        """
        name = self.local(prefix)
        if any(name.startswith(f"{entry}.") for entry in self.dense):  # a whole vision tower, say
            return True
        return is_skipped(name, self.dense, fused)

    def keeps_experts_dense(self, prefix: str, fused: Mapping[str, Sequence[str]]) -> bool:
        """The same of a mixture's experts, which stay unnamed in a model that has others in codes.

        transformers holds experts in no linear layers, so that few lists of dense ones have them.
        """
        begins = f"{self.local(prefix)}."
        unnamed = self._named and not any(name.startswith(begins) for name in self._named)
        return bool(unnamed) or self.keeps_dense(prefix, fused)

    def local(self, prefix: str) -> str:
        """The name of a layer without that of the draft model that it belongs to."""
        return prefix.removeprefix(f"{self.prefix}.") if self.prefix else prefix

    def scheme(self, name: str) -> Scheme:
        """The scheme of a layer in codes. Raises CheckpointError where none is named."""
        self._unused.discard(name)
        scheme = self._named.get(name, self._default)
        if scheme is None:
            raise CheckpointError(
                f"{CONFIG_FILE} does not say what {name} is: list it under schemes if the "
                "checkpoint holds codes for it, in linear_weights_not_to_quantize if it is dense"
            )
        return scheme

    def sources(
        self, prefix: str, fused: Mapping[str, Sequence[str]], count: int
    ) -> list[tuple[str, Scheme]]:
        """Name and scheme of each of the `count` source layers of a linear layer.

        A layer that the checkpoint itself stores fused has one of each, `count` times. Raises
        CheckpointError where a scheme is not named, ServeError where vLLM does not say which source
        layer is where, and they have different schemes.
        """
        whole = self.local(prefix)
        parent, _, last = whole.rpartition(".")
        names = [f"{parent}.{name}".removeprefix(".") for name in fused.get(last, [])]
        if not names or whole in self._named or names == [whole]:
            return [(whole, self.scheme(whole))] * count
        found = [(name, self.scheme(name)) for name in names]
        if len(found) == count:
            return found
        schemes = {scheme: name for name, scheme in found}
        if len(schemes) > 1:
            pairs = ", ".join(f"{name} {scheme}" for scheme, name in schemes.items())
            raise ServeError(
                f"{whole}: vLLM splits this layer in a way of its own and needs one scheme for all "
                f"of it, not {pairs}; give these layers one scheme"
            )
        return [(whole, found[0][1])] * count

    def end(self, prefix: str, is_head: bool, shape: tuple[int, int]) -> End | None:
        """The embedding or head in codes that a layer of vLLM is; None for a dense one.

        Few models tell embeddings their names: the shape decides then, [vocabulary, width].
        Raises ServeError if several would do.
        """
        name = self.local(prefix)
        found = [end for end in self._ends if end.name == name]
        if not found:
            found = [end for end in self._ends if end.is_head == is_head and end.fits(shape)]
        if len(found) > 1:
            names = " and ".join(sorted({end.name for end in found}))
            raise ServeError(
                f"{names} have the same shape, and vLLM's model does not say which of them its "
                f"layer {name or 'without a name'} is; keep all but one of them dense"
            )
        if not found:
            return None
        self._unused.discard(found[0].name)
        return found[0]

    def require_used(self) -> None:
        """Raise ServeError if the checkpoint holds codes that no layer of the model took."""
        if self._unused and holds_whole_model():
            names = sorted(self._unused)
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise ServeError(
                f"the checkpoint holds codes for {', '.join(names[:4])}{more}, which vLLM's model "
                "keeps in layers of another name or kind: it would run without these weights; "
                "keep these layers dense, or serve with pvrt serve --engine local"
            )


def same_scheme(names: Collection[str], layers: Layers, what: str) -> Scheme:
    """The one scheme of layers that one kernel call multiplies by. Raises ServeError if unequal."""
    schemes = {layers.scheme(name): name for name in names}
    if len(schemes) > 1:
        pairs = ", ".join(f"{name} {scheme}" for scheme, name in schemes.items())
        raise ServeError(f"{what} need one scheme in vLLM, not {pairs}; give these layers one")
    return next(iter(schemes))
