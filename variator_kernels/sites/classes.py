"""The classes that patched modules get: subclasses of their own, made by name on demand.

``patch`` swaps an instance's ``__class__``. That keeps parameter names, copies and pickles: a
pickle stores ``variator_kernels.sites.classes.<Name>``, which ``__getattr__`` below makes again
in a fresh process. A subclass keeps the name of its original, since ``transformers`` and the
sharding tools look classes up by name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .attention_layer import AttentionLayer
from .attention_refusals import UNREAD
from .carrier import Carrier
from .decoder import CausalAttentionLayer, Decoder
from .encoder import Encoder
from .families import FAMILIES
from .family import ORIGINAL, ROW, Family
from .inline import attributes
from .mixins import Block, BlockInline, BlockNorm, BlockWithMethod, Layer
from .unchanged import module_of

_POSITIONS = "variator_positions"
_READ = ("input_ids", "inputs_embeds", "position_ids", "cache_position", "output_attentions")
when_patched: list[Callable[[], None]] = []
"""Called when a model is patched or unpickled."""


def _method(original: type, name: str) -> Callable[[Any, Tensor], Tensor]:
    """In the place of a block's method that is the sublayer."""
    dense = getattr(original, name)

    def feed_forward(self: Any, attention_output: Tensor) -> Tensor:
        return self._at_site(attention_output, functools.partial(dense, self))

    return feed_forward


def _roles(family: Family) -> dict[str, type[nn.Module]]:
    roles: dict[str, type[nn.Module]] = {family.encoder: Decoder if family.decoder else Encoder}
    if family.attention is not None:
        kind = CausalAttentionLayer if family.decoder else AttentionLayer
        roles[family.attention.layer] = kind
        if family.attention.carrier:
            roles[family.attention.carrier_class] = Carrier
    if family.block_norm_class:
        roles[family.block_norm_class] = BlockNorm
    if family.called:
        return roles | {family.block: BlockInline}
    if family.block == family.layer:
        return roles | {family.block: BlockWithMethod}
    return roles | {family.block: Block, family.layer: Layer}


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Pickles of a class that no name in this module leads to: the family is the user's own."""
    reduced: Any = nn.Module.__reduce_ex__(self, protocol)
    family = getattr(type(self), ROW)
    return _restored, (family, type(self).__name__), *reduced[2:]


def _restored(family: Family, name: str) -> nn.Module:
    for call in when_patched:
        call()
    kind = patched_class(family, name)
    return kind.__new__(kind)


@functools.cache
def patched_class(family: Family, name: str) -> type[nn.Module]:
    """The subclass that replaces the family's class ``name`` (its encoder, block, FFN or
    self-attention sublayer)."""
    original = getattr(module_of(family), name)
    mixin = _roles(family)[name]
    body: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"A patched ``{name}``: {mixin.__doc__}",
        ORIGINAL: original,
        ROW: family,
    }
    if FAMILIES.get(family.name) is not family:
        body["__reduce_ex__"] = _reduce
    if issubclass(mixin, Encoder):
        # generate() reads the encoder's signature to learn which arguments it takes.
        signature = inspect.signature(original.forward)
        forward: Any = mixin.forward
        copy: Any = types.FunctionType(
            forward.__code__, forward.__globals__, "forward", None, forward.__closure__
        )
        copy.__signature__ = signature
        body["forward"] = copy
        names = list(signature.parameters)[1:]
        wanted = (name for name in (family.mask, *_READ, *UNREAD) if name in names)
        body[_POSITIONS] = {name: names.index(name) for name in wanted}
    if mixin is BlockWithMethod:
        body[family.method] = _method(original, family.method)
    if mixin is AttentionLayer:
        # Some give a tensor in one version of transformers and a tuple in another.
        called, paths = inspect.signature(original.forward), family.attention
        assert paths is not None
        names = list(called.parameters)[2:]
        bare = called.return_annotation in (Tensor, "torch.Tensor", "Tensor")
        body["variator_bare"] = bare or not (paths.returns or "output_attentions" in names)
        body["variator_turned"] = names.index(paths.turned) if paths.turned in names else -1
    if mixin is Carrier:
        assert family.attention is not None
        names = list(inspect.signature(original.forward).parameters)[1:]
        body[_POSITIONS] = {name: names.index(name) for name in family.attention.carried}
    if mixin is BlockInline:
        dropouts = (family.outer_dropout, family.inner_dropout)
        body |= attributes(family.called, dropouts)
    kind = type(name, (mixin, original), body)
    # Where transformers looks up, by the class's full name, which hidden states can be returned.
    library = importlib.import_module("transformers.modeling_utils")
    recorded = getattr(library, "_CAN_RECORD_REGISTRY", {})
    dict.__setitem__(recorded, str(kind), getattr(original, "_can_record_outputs", None))
    return kind


def patched_encoders(model: nn.Module) -> list[nn.Module]:
    """Every patched encoder inside ``model``, or that it is."""
    return [module for module in model.modules() if isinstance(module, Encoder)]


def __getattr__(name: str) -> type[nn.Module]:
    for family in FAMILIES.values():
        if name in _roles(family):
            for call in when_patched:
                call()
            return patched_class(family, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
