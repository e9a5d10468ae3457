"""The methods: what each does to a model, how it is trained, and what is served in the end."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import variator_kernels as vk

from .. import internals
from ..harness import options
from ..rivals import layers, token_merging, token_pruning, width
from .training import Weights

RATE, DECODER_RATE, PLUGIN_RATE, PROJECTION_RATE = 1e-4, 3e-4, 1.5e-3, 1e-3
"""Of whole encoders and decoders, plugins, and A: chosen before any table was made."""
RATES = [RATE, DECODER_RATE, PLUGIN_RATE, PROJECTION_RATE]
Build = Callable[[Any, Any], Any]
"""A copy of the original, or what the stage before made of it, and the task, to a model: what of it
gets gradients is trained."""


class Stage(NamedTuple):
    """A part of the training; several share a method's steps evenly."""

    build: Build
    rate: float = RATE
    weights: Weights | None = None
    """None: those of the task."""
    start: Callable[[Any, Any], None] = lambda model, task: None
    """Gives what was built its values before it is trained."""


class Method(NamedTuple):
    """One point of the table and the picture."""

    name: str
    setting: str = ""
    """Methods of one name and other settings are a curve."""
    stages: tuple[Stage, ...] = ()
    ratio: Any = 1
    """Of plugins, where they run."""
    precision: str | None = None
    takes: str = ""
    """The name of a method whose trained weights of this setting it takes."""
    neutral: Build | None = None
    """The method where it must change nothing."""
    packed: bool = True
    """Served with packed weights; False: as Hugging Face runs it."""

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self.name, self.setting)))


def plug(
    ratio: int, placements: tuple[str, ...], precision: str | None, model: Any, task: Any
) -> Any:
    """Plugins at their initial values; the model is frozen."""
    if internals.is_projected(model):
        model = vk.merge(model)
    model.requires_grad_(False)
    vk.patch(model, ratio, (ratio,), placements=placements, precision=precision,
             optimize="encoder")  # fmt: skip
    for parameter in vk.plugin_parameters(model):
        parameter.requires_grad_(True)
    return model


def calibrate(model: Any, task: Any) -> None:
    """Merges in front of a decoder's keys start from the mean."""
    if not task.decoder:
        vk.calibrate(model, task.calibration)


def project(size: dict[str, float], start: str, model: Any, task: Any) -> Any:
    """``size``: ``params``, or ``ffn`` as a share of the original's."""
    given: dict[str, Any] = dict(size)
    if "ffn" in given:
        given["ffn"] = max(1, round(given["ffn"] * model.config.intermediate_size))
    return vk.project(model, task.calibration, start=start, **given)


def select(size: dict[str, float], model: Any, task: Any) -> Any:
    """Hard pruning, as ``vk.project`` does it."""
    return vk.merge(project(size, "select", model, task)).requires_grad_(True)


def narrow(share: float, model: Any, task: Any) -> Any:
    return width.prune(model, share, task.calibration).requires_grad_(True)


def changed(change: Callable[..., Any], *settings: Any) -> Build:
    """By a rival that looks at no data; the whole model is trained."""
    return lambda model, task: change(model, *settings).requires_grad_(True)


def unpruned(model: Any, task: Any) -> Any:
    """Thresholds that keep everything."""
    found = token_pruning.learned(model, 1.0)
    for block in found.blocks:
        block.threshold.data.fill_(-1.0)
    return found


def _plugins(ratio: int, placements: tuple[str, ...], precision: str | None = None) -> Stage:
    return Stage(partial(plug, ratio, placements, precision), PLUGIN_RATE, start=calibrate)


def _projection(size: dict[str, float]) -> Stage:
    return Stage(partial(project, size, "pca"), PROJECTION_RATE)


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


LABELS, WHOLE = Weights(labels=1.0), {"ffn": 1.0}


def encoders(count: int) -> list[Method]:
    """For an encoder of ``count`` layers."""
    made = [Method("original", packed=False), Method("original, packed")]
    made.append(Method("int8", precision="int8"))

    def add(name: str, setting: Any, build: Build, neutral: Build, **more: Any) -> None:
        setting = setting if isinstance(setting, str) else _percent(setting)
        made.append(Method(name, setting, (Stage(build, **more),), neutral=neutral))

    for name, places in (("plugins", ("ffn",)), ("plugins, keys too", ("ffn", "attention_kv"))):
        for k in (2, 4, 8):
            level, stage = dict.fromkeys(places, k), _plugins(k, places)
            made.append(Method(name, f"k={k}", (stage,), level))
            stage = _plugins(k, places, "int8")
            made.append(Method(f"{name}, int8", f"k={k}", (stage,), level, "int8", takes=name))
    for share in (0.5, 0.25):
        size = {"ffn": share}
        add("projected", share, partial(project, size, "pca"), partial(project, WHOLE, "pca"),
            rate=PROJECTION_RATE)  # fmt: skip
        stages = _projection(size), _plugins(4, ("ffn",))
        made.append(Method("projected, plugins", f"{_percent(share)}, k=4", stages, {"ffn": 4}))
        add("FFN selected", share, partial(select, size), partial(select, WHOLE))
        add("FFN pruned", share, partial(narrow, share), partial(narrow, 1.0))
        fixed = partial(changed, token_pruning.fixed)
        add("tokens pruned", share, fixed(share), fixed(1.0))
        add("thresholds", share, changed(token_pruning.learned, share), unpruned)
    for share in (0.1, 0.2, 0.3):
        merging = partial(changed, token_merging.merging)
        add("tokens merged", share, merging(share), merging(0.0))
    for keep in sorted({round(count * share) for share in (2 / 3, 1 / 2, 1 / 3)}, reverse=True):
        if 0 < keep < count:
            setting, whole = f"{keep} of {count}", changed(layers.drop, count)
            add("layers dropped", setting, changed(layers.drop, keep), whole, weights=LABELS)
            add("student", setting, changed(layers.drop, keep, True), whole)
    return made


def decoders(count: int) -> list[Method]:
    """For a decoder; its plugins merge keys."""
    made = [Method("original", packed=False), Method("original, packed")]
    keys = ("attention_kv",)
    for k in (2, 4):
        made.append(Method("plugins at keys", f"k={k}", (_plugins(k, keys),), {keys[0]: k}))
    for share in (0.75, 0.5):
        size, whole = {"params": share}, partial(select, {"params": 1.0})
        stages = _projection(size), _plugins(2, keys)
        name = _percent(share)
        made.append(Method("projected", name, stages[:1], neutral=whole))
        made.append(Method("projected, plugins at keys", f"{name}, k=2", stages, {keys[0]: 2}))
        pruned = Stage(partial(select, size), DECODER_RATE)
        made.append(Method("pruned", name, (pruned,), neutral=whole))
    return made


def chosen(every: list[Method], names: list[str] | None) -> list[Method]:
    """Those whose name or label is asked for, and always the first, which speed is over.

    Raises:
        ValueError: a word names none.
    """
    if names is None:
        return every
    known = {word for method in every for word in (method.name, method.label)}
    options.check("methods", names, sorted(known))
    return [every[0], *(m for m in every[1:] if {m.name, m.label} & set(names))]


def served(method: Method, model: Any) -> Any:
    """``model`` as it is measured: merged, its weights packed where they are not to change."""
    if internals.is_projected(model):
        model = vk.merge(model)
    model.eval().requires_grad_(False)
    if not method.packed:
        return model
    if hasattr(model, "blocks"):
        internals.freeze_weights(model)
        return model
    if method.ratio == 1:  # at that ratio no plugin runs: it is for the packed products alone
        vk.patch(model, 1, (2,), placements=("attention_kv",), optimize="encoder",
                 precision=method.precision)  # fmt: skip
    return vk.freeze(model)
