"""What ``transformers`` saves of a patched model, and what its Trainer loads again.

``save_pretrained`` writes the plain model's checkpoint, which plain ``transformers`` loads without
a warning, and the files of :func:`save_plugins` beside it; of a projected model, what :func:`merge`
makes of it. A Trainer that goes back to such a
folder takes the plugins from there. Both are done around methods of the libraries' own classes: a
model does not know which modules hold it, and ``load_state_dict`` does not know the folder.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import checkpoint, sharding
from .methods.projected import is_projected, merge
from .sites import classes, loading
from .sites.install import attached_keys

_SAVERS = (("transformers.modeling_utils", "PreTrainedModel"), ("peft.peft_model", "PeftModel"))
_LOADERS = ("_load_from_checkpoint", "_load_best_model")
_WRAPPED = "variator_wrapped"


def install() -> None:
    """Wrap what is not wrapped yet; models that hold nothing patched go straight through."""
    try:
        trainer: Any = importlib.import_module("transformers.trainer")
    except ImportError:  # then nobody can use it
        trainer = None
    for module, name in _SAVERS:
        _wrap(getattr(sys.modules.get(module), name, None), "save_pretrained", _saving)
    kinds = [] if trainer is None else [trainer.Trainer]
    for kind in kinds:
        kinds += kind.__subclasses__()
        if kind.__module__.split(".")[0] != __package__:  # ours loads plugins by itself
            for name in _LOADERS:
                _wrap(kind, name, _loading)
            _wrap(kind, "_push_from_checkpoint", _pushing)


def _wrap(kind: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    original = vars(kind).get(name) if kind is not None else None
    if original is not None and not hasattr(original, _WRAPPED):
        wrapped = functools.wraps(original)(wrapper(original))
        setattr(wrapped, _WRAPPED, True)
        setattr(kind, name, wrapped)


def _saving(original: Any) -> Any:
    signature = inspect.signature(original)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        encoders = classes.patched_encoders(self)
        if encoders:
            install()  # a Trainer that was imported since then
        if is_projected(self):
            # Its own keys are P and A, which plain transformers would pass over.
            return merge(self).save_pretrained(*args, **{**kwargs, "state_dict": None})
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        folder = given.get("save_directory")
        if not encoders or folder is None or os.path.isfile(folder):
            return original(self, *args, **kwargs)
        if given.get("distributed_checkpoint"):
            raise ValueError(
                "distributed_checkpoint must be False for a patched model: such a checkpoint "
                "would hold the plugins' keys"
            )
        write = _writer(self, given.get("state_dict"))
        if not given.get("is_main_process", True):
            write = _nothing
        with _plugins_apart(self, write):
            result = original(self, *args, **kwargs)
        write(folder)
        return result

    return save_pretrained


def _writer(model: nn.Module, state_dict: Mapping[str, Tensor] | None) -> Callable[[Any], None]:
    """Writes the plugins, as they are now, into a folder."""
    sharding.reshard(model)  # all of it: the encoder alone may be no unit that is sharded
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}

    def value(parameter: Tensor) -> Tensor:
        # FSDP's state dict is whole, and perhaps of this process alone: nothing can be gathered.
        found = None if state_dict is None else state_dict.get(names[id(parameter)])
        return sharding.whole(parameter if found is None else found)

    gathered = {
        place: checkpoint.gather(encoder, value) for encoder, place in checkpoint.folders(model, "")
    }

    def write(folder: Any) -> None:
        for place, content in gathered.items():
            checkpoint.write(*content, Path(folder) / place)

    return write


def _nothing(folder: Any) -> None:
    pass


@contextmanager
def _plugins_apart(model: Any, write: Callable[[Any], None]) -> Iterator[None]:
    """In the block ``model`` saves and misses no plugin keys, and uploads what ``write`` writes."""
    own, upload = vars(model), getattr(model, "_upload_modified_files", None)

    def uploading(folder: Any, *args: Any, **kwargs: Any) -> Any:
        write(folder)
        return upload(folder, *args, **kwargs)  # type: ignore[misc]

    changed: dict[str, Any] = {} if upload is None else {"_upload_modified_files": uploading}
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    changed["_keys_to_ignore_on_save"] = ignored | attached_keys(model)
    before = {name: own[name] for name in changed if name in own}
    own.update(changed)
    try:
        yield
    finally:
        for name in changed:
            own.pop(name, None)
        own.update(before)


def _loading(original: Any) -> Any:
    signature = inspect.signature(original)

    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_projected(self.model):
            raise ValueError(
                "a projected model cannot go on from a checkpoint of transformers' own Trainer, "
                "which holds the merged weights, not P and A: train with "
                "variator_kernels.train.ProjectionTrainer"
            )
        given = list(signature.bind(self, *args, **kwargs).arguments.values())
        folder = given[1] if len(given) > 1 else self.state.best_model_checkpoint
        encoders = classes.patched_encoders(self.model)
        places = checkpoint.folders(self.model, folder) if encoders and folder is not None else ()
        if not places or not all((place / checkpoint.TENSORS).is_file() for _, place in places):
            return original(self, *args, **kwargs)
        sharding.reshard(self.model)
        checkpoint.load_plugins(self.model, folder)  # first: nothing has changed if it raises
        with loading.plugins_are_loaded(), _plugins_apart(self.model, _nothing):
            return original(self, *args, **kwargs)

    return load


def _pushing(original: Any) -> Any:
    """The Trainer pushes its output folder, and copies there files that it knows by name."""

    def push(self: Any, checkpoint_folder: Any, *args: Any, **kwargs: Any) -> Any:
        begin = Path(checkpoint_folder)
        encoders = classes.patched_encoders(self.model) if self.is_world_process_zero() else ()
        for _, place in checkpoint.folders(self.model, begin) if encoders else ():
            files = [place / name for name in checkpoint.FILES]
            if all(file.is_file() for file in files):
                to = Path(self.args.output_dir) / place.relative_to(begin)
                to.mkdir(parents=True, exist_ok=True)
                for file in files:
                    shutil.copy(file, to)
        return original(self, checkpoint_folder, *args, **kwargs)

    return push


def register() -> None:
    """Have :func:`install` called whenever a model is patched or unpickled."""
    classes.when_patched.append(install)
