"""Decoders with plugins: the levels that are compared, their caches, and the check."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import variator_kernels as vk

from .. import internals
from ..harness import checks
from ..tools import smollm2
from . import models

TEXT = Path("wikitext2") / "test.txt"
STEPS = 9
"""Tokens that the check decodes one by one: whole groups of the ratios measured, and one more."""


class Level(NamedTuple):
    """What is compressed: ``where`` in words, as ``attention_kv+ffn/2``; nothing is dense.

    ``ffn/2`` is the upper half of the layers, ``ffn/3`` the upper third.
    """

    where: str = ""
    k: int = 1
    window: int | None = None
    """Of plain keys; None where there is no ``attention_kv``."""

    def __str__(self) -> str:
        parts = [self.where or "hf-sdpa", f"k={self.k}" if self.where else ""]
        return " ".join(filter(None, [*parts, f"w={self.window}" if self.window else ""]))

    def ratio(self, layers: int) -> Any:
        """As ``vk.set_ratio`` takes it."""
        made: dict[str, dict[int, int]] = {}
        for part in self.where.split("+"):
            place, _, share = part.partition("/")
            made[place] = dict.fromkeys(range(layers - layers // int(share or 1), layers), self.k)
        return made

    def behind_prompt(self, layers: int) -> Any:
        """The same without FFNs, whose groups see the tokens behind them."""
        kept = {place: of for place, of in self.ratio(layers).items() if place != "ffn"}
        return kept or 1


def levels(places: Iterable[str], ratios: Iterable[int], windows: Iterable[int]) -> list[Level]:
    """The dense one, then all combinations; windows only where they matter."""
    made = [Level()]
    for k in ratios:
        for where in places:
            own = windows if "attention_kv" in where else (None,)
            made += [Level(where, k, window) for window in own]
    return made


def check_places(places: Iterable[str], layers: int) -> None:
    """``ValueError`` for words that name no places of a model."""
    for where in places:
        for part in where.split("+"):
            place, slash, share = part.partition("/")
            whole = place == "attention_kv" and not slash
            some = place == "ffn" and (not slash or (share.isdigit() and 0 < int(share) <= layers))
            if not whole and not some:
                raise ValueError(
                    f"places must be attention_kv, ffn or ffn/N (the upper Nth of {layers} "
                    f"layers), joined by +, got {where!r}"
                )


def architecture(name: str) -> models.Architecture:
    """``smollm2``, or a folder with config.json, perhaps weights and a tokenizer."""
    folder = smollm2.folder() if name == "smollm2" else Path(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model must be smollm2 or a folder with config.json, got {name!r}")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    stored = any(any(folder.glob(pattern)) for pattern in models.WEIGHT_FILES)
    own = folder if (folder / "tokenizer_config.json").is_file() else None
    named = name if name == "smollm2" else folder.resolve().name
    return models.Architecture(named, config, folder if stored else None, own)


def load(model: models.Architecture, dtype: torch.dtype) -> Any:
    """The model with its head; random weights are the same in every call."""
    how: Any = {"attn_implementation": "sdpa"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if model.folder:
            how |= {"local_files_only": True, "dtype": torch.float32}
            built = AutoModelForCausalLM.from_pretrained(model.folder, **how)
        else:
            built = AutoModelForCausalLM.from_config(model.config, **how)
    return models.cast(built, dtype)


def text(model: models.Architecture, data: Path, count: int) -> Tensor:
    """So many tokens of wikitext2's test text, ``[count]``; random ones without a tokenizer.

    Raises:
        ValueError: there are fewer. FileNotFoundError: there is no such text.
    """
    if model.tokenizer is None:
        return models.tokens(1, count, model.config.vocab_size)[0]
    if not (data / TEXT).is_file():
        raise FileNotFoundError(f"data must be a folder with {TEXT}, got {data}")
    tokenize: Any = AutoTokenizer.from_pretrained(model.tokenizer, local_files_only=True)
    found = tokenize((data / TEXT).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    if found.shape[1] < count:
        raise ValueError(f"data must hold {count} tokens, {data / TEXT} has {found.shape[1]}")
    return found[0, :count]


def patched(dense: Any, ratios: Iterable[int], window: int, backend: str = "auto") -> Any:
    """A twin on the same weights with plugins at their initial values, dense until told."""
    twin = models.sharing(dense, "sdpa")
    places = ("ffn", "attention_kv")
    vk.patch(twin, 1, tuple(ratios), placements=places, window=window, backend=backend)
    return twin.requires_grad_(False)


def with_plugins(dense: Any, folder: Path, window: int) -> Any:
    """A twin with trained plugins, under another window than theirs if asked."""
    twin = models.sharing(dense, "sdpa")
    vk.load_plugins(twin, folder)
    internals.set_window(twin, window)
    return twin.requires_grad_(False)


class Check:
    """Each level on a short prompt: against the reference in float64, and what its cache holds.

    The plugins are others than those that are measured: no parameter is 0.
    """

    def __init__(self, dense: Any, ratios: Iterable[int], length: int) -> None:
        self.dense, self.ratios = dense, tuple(ratios)
        self.ids = models.tokens(1, length, dense.config.vocab_size)
        self.double = models.sharing(dense, "eager").double()
        self.twins: dict[int | None, tuple[Any, Any]] = {}

    @torch.no_grad()
    def __call__(self, level: Level) -> checks.Verdict:
        """The verdict; ``ValueError`` where the cache holds something else than specified."""
        if not level.where:
            plain = self._logits(models.sharing(self.dense, "eager"))
            measure = checks.truth((self._logits(self.double),), (plain,))
            return checks.judge((self._logits(self.dense),), measure, checks.BASELINE_FACTOR)
        if level.window not in self.twins:
            pairs = ((self.dense, "auto"), (self.double, "reference"))
            ours, double = (self._twin(model, level.window or 0, name) for model, name in pairs)
            self.twins[level.window] = ours, double
        for model in self.twins[level.window]:
            vk.set_ratio(model, level.ratio(model.config.num_hidden_layers))
        ours, double = self.twins[level.window]
        with internals.using_backend(ours, "reference"):
            measure = checks.truth((self._logits(double),), (self._logits(ours),))
        return checks.judge((self._logits(ours, level),), measure)

    def _twin(self, dense: Any, window: int, backend: str) -> Any:
        twin, source = patched(dense, self.ratios, window, backend), models.generator(5)
        for parameter in vk.plugin_parameters(twin):
            value = torch.randn(parameter.shape, generator=source) * 0.02
            parameter.copy_(value.to(self.dense.dtype))
        return twin

    def _logits(self, model: Any, level: Level | None = None) -> Tensor:
        """Of all tokens: a prompt's, then those of ``STEPS`` single ones."""
        parts, cache, begin = [], None, 0
        for end in range(self.ids.shape[1] - STEPS, self.ids.shape[1] + 1):
            ids = self.ids[:, begin:end]
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            parts.append(out.logits)
            cache, begin = out.past_key_values, end
            if level and level.window is not None:
                wanted = entries(end, level.k, level.window, internals.kept(model)[0])
                found = set(internals.cache_entries(cache))
                if found != {wanted}:
                    raise ValueError(f"cache: {found} entries behind {end} tokens, not {wanted}")
        return torch.cat(parts, 1)


def entries(tokens: int, k: int, window: int, kept: int) -> int:
    """What a query behind so many tokens finds (and its own key is one of), by specification."""
    s = tokens - 1 - kept
    if s < 0:
        return tokens
    groups = min(max(0, s + 1 - window) // k, s // k)
    return kept + groups + s + 1 - k * groups


def nbytes(cache: Any) -> int:
    """Of all the tensors that a cache holds, whatever its class."""
    found: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for part in value.values():
                walk(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                walk(part)
        elif type(value).__module__.startswith(("transformers.cache", "variator_kernels")):
            walk(vars(value))

    walk(cache)
    return sum(found.values())
