"""Finding a model's widths, and refusing models that would not come out right."""

from __future__ import annotations

from typing import Any

from torch import nn

from .families import FAMILIES
from .family import follow
from .find import find, is_patched
from .residual import Block, Blocks, Layout, Part, Residual, Sublayer, names_of, set_roles
from .residual_rows import FFN_FAMILIES, RESIDUAL_FAMILIES, WHY_FIXED
from .wrappers import check_values

KNOWN = (*RESIDUAL_FAMILIES, *FFN_FAMILIES)


def layout_of(model: Any) -> Layout:
    """What of ``model`` lies along its stream and its FFNs.

    Raises:
        TypeError: it is no module. ValueError: its family or class is not known, it is patched or
        wrapped, or some of it is not what its class makes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in KNOWN or not hasattr(model, "base_model"):
        raise ValueError(
            f"model must be of transformers and of a model_type in {KNOWN}, got a "
            f"{type(model).__name__} of model_type {kind!r}"
        )
    if is_patched(model):
        raise ValueError(
            "model must not be patched: unpatch() it, project it, and patch the result"
        )
    check_values(model)
    for name, module in model.named_modules():
        if "_hf_hook" in module.__dict__:
            raise ValueError(
                f"model must hold its weights itself, accelerate's hook is on {name or 'it'}: "
                "load it onto one device"
            )
    if kind in RESIDUAL_FAMILIES:
        layout = _along_stream(model, RESIDUAL_FAMILIES[kind])
    else:
        layout = _ffn_alone(model, kind)
    set_roles(layout, model)
    _check_linear(model, layout)
    return layout


def _along_stream(model: Any, row: Residual) -> Layout:
    if type(model).__name__ not in row.classes:
        raise ValueError(
            f"model must be one of {row.classes} for model_type {row.name!r}, got a "
            f"{type(model).__name__}"
        )
    base, names = model.base_model, {id(m): name for name, m in model.named_modules()}
    stacks = []
    for stack in row.stacks:
        if stack.root and getattr(base, stack.root, None) is None:
            continue  # a T5EncoderModel
        root = follow(base, stack.root)
        blocks = [
            Block(
                names[id(block)],
                tuple(_sublayer(part, names[id(block)], model) for part in stack.parts),
            )
            for block in follow(root, stack.blocks)
        ]
        norm = names[id(follow(root, stack.norm))]
        stacks.append(Blocks(names[id(root)], tuple(blocks), norm))
    weight = model.get_input_embeddings().weight
    head = next((name for name in row.heads if isinstance(_at(model, name), nn.Linear)), "")
    embeddings = tuple(name for name in names_of(weight, model) if name != head)
    tied = bool(head) and model.get_submodule(head).weight is weight
    return Layout(
        row.name,
        tuple(stacks),
        embeddings,
        head,
        tied,
        row,
        hidden_field=row.hidden,
        ffn_field=row.ffn,
    )


def _sublayer(part: Part, block: str, model: nn.Module) -> Sublayer:
    def full(paths: tuple[str, ...]) -> tuple[str, ...]:
        named = (f"{block}.{path}" for path in paths)
        return tuple(name for name in named if _at(model, name) is not None)

    return Sublayer(
        f"{block}.{part.norm}",
        full(part.reads),
        f"{block}.{part.writes}",
        part.inner,
        full(part.memory),
    )


def _ffn_alone(model: Any, kind: str) -> Layout:
    """A BERT's FFNs, from the row that patching uses."""
    row = FAMILIES[kind]
    found = find(model, (row,))
    names = {id(m): name for name, m in model.named_modules()}
    blocks = []
    for block, layer in zip(found.blocks, found.layers, strict=True):
        reads = [names[id(follow(layer, path))] for path in (row.w_in[0], row.w_gate) if path]
        part = Sublayer("", tuple(reads), names[id(follow(layer, row.w_out))], True, ())
        blocks.append(Block(names[id(block)], (part,)))
    stack = Blocks(names[id(found.encoder)], tuple(blocks), "")
    hidden = "dim" if hasattr(found.encoder.config, "dim") else "hidden_size"
    return Layout(kind, (stack,), fixed=WHY_FIXED, hidden_field=hidden, ffn_field=row.inner_size)


def _at(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _check_linear(model: nn.Module, layout: Layout) -> None:
    """What is projected is a plain matrix: not quantised, no adapter around it."""
    for name in layout.roles:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        value = module._parameters.get(leaf)
        if value is None or not value.is_floating_point():
            raise ValueError(
                f"model's {path} must have a plain floating point {leaf}, a {type(module).__name__}"
                " has none: project the model before it is quantised or gets adapters"
            )
        if len(layout.roles[name]) == 2 and not isinstance(module, (nn.Linear, nn.Embedding)):
            raise ValueError(
                f"model's {path} must be a plain nn.Linear or nn.Embedding, got "
                f"{type(module).__name__}"
            )
