"""Plugins for a sentence-embedding model: variants that are made here, each in a folder, once."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import set_seed

import variator_kernels as vk
from variator_kernels.train import Job, config_for
from variator_kernels.train import run as train
from variator_kernels.train.embeddings import is_embedder

from .. import internals
from . import text
from .recipe import label

RATIOS = (2, 4)
VARIANTS = ("untrained", "calibrated", "calibrated on more text", "trained")
TARGETS = {
    ("paragraphs", 2): {"cosine": 0.98, "spearman": 0.98, "neighbours": 0.92},
    ("sst2", 2): {"spearman": 0.95},
}
"""What MiniLM's trained plugins that keep the first token must reach."""


@dataclass(frozen=True)
class Recipe:
    """How the variants are made, from paragraphs that are not measured on."""

    few: int = 64
    many: int = 500
    """Paragraphs to calibrate on."""
    steps: int = 6000
    warmup: int = 50
    batch: int = 16
    rate: float = 1.5e-3
    """It falls to zero linearly."""
    length: int = 128
    """Tokens of a piece, at most: pieces are of all lengths."""
    splice: float = 0.5
    layer_weight: float = 3.0
    embedding_weight: float = 10.0
    bf16: bool = False
    attention: str = "eager"


class Made(NamedTuple):
    """Plugins to measure."""

    variant: str
    folder: Path
    seed: int = 0


def load(folder: str | Path) -> Any:
    """A ``SentenceTransformer`` on the CPU, in fp32.

    Raises:
        ValueError: ``folder`` is none. ImportError: the package is not installed.
    """
    if not is_embedder(folder):
        raise ValueError(
            f"model must be minilm or a folder of sentence-transformers (with modules.json) for "
            f"task embeddings, got {folder}"
        )
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            "task embeddings needs sentence-transformers: pip install sentence-transformers"
        ) from error
    made = SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"}
    )
    return made.eval()


def encode(model: Any, texts: list[str]) -> Any:
    """Embeddings ``[texts, e]``, as users make them."""
    return model.encode(texts, show_progress_bar=False)


def given(words: list[str]) -> list[Made]:
    """Plugins that somebody made: ``label=folder``, or a folder, whose name is the label then.

    Folders of one label are its seeds.

    Raises:
        ValueError: a folder holds no plugins.
    """
    found: list[Made] = []
    for word in words:
        label, _, name = word.rpartition("=")
        folder = Path(name)
        if not (folder / "plugins.json").is_file():
            raise ValueError(f"plugins must be a folder, or label=folder, got {word!r}")
        label = label or folder.resolve().name
        found.append(Made(label, folder, sum(made.variant == label for made in found)))
    return found


def make(
    base: str, data: Path, work: Path, recipe: Recipe, variant: str, ratios: tuple[int, ...],
    placements: tuple[str, ...], keep_first: int, seed: int,
) -> Made:  # fmt: skip
    """The plugins of a variant, in a folder of ``work``. A run that was killed goes on."""
    name = f"{variant.replace(' ', '-')}-keep{keep_first}-seed{seed}"
    name = "-".join(filter(None, (label(placements), name)))
    made = Made(variant, work / name, seed)
    if (made.folder / "plugins.json").is_file():
        return made
    if variant == "trained":
        _train(base, data, work, recipe, ratios, placements, keep_first, made)
        return made
    set_seed(seed)
    model = load(base)
    vk.patch(model, ratios[0], ratios, placements=placements, keep_first=keep_first)
    if variant != "untrained":
        _calibrate(model, data, recipe.few if variant == "calibrated" else recipe.many)
    vk.save_plugins(model, made.folder)
    return made


def _calibrate(model: Any, data: Path, count: int) -> None:
    """On paragraphs from all over the text, whole, or as long as the model reads."""
    texts = [line for line in text.training(data) if len(line.split()) >= text.LEAST_WORDS]
    texts = [texts[i * len(texts) // count] for i in range(min(count, len(texts)))]
    batches = text.tokenized(texts, model.tokenizer, model.max_seq_length, 32)
    vk.calibrate(model[0].auto_model, batches)


def _train(
    base: str, data: Path, work: Path, recipe: Recipe, ratios: tuple[int, ...],
    placements: tuple[str, ...], keep_first: int, made: Made,
) -> None:  # fmt: skip
    """By ``python -m variator_kernels.train pretrain``, whose arguments these are."""
    source = work / "train.txt"
    text.write(source, text.training(data))
    job = Job(
        "pretrain", base, str(source), str(made.folder), ratios, placements,
        calibrate=recipe.many,
        noise="none", vary_lengths=True, splice=recipe.splice, max_length=recipe.length,
        attention=recipe.attention, keep_first=keep_first,
    )  # fmt: skip
    config = config_for(
        "pretrain", output_dir=job.output, seed=made.seed, use_cpu=True, report_to="none",
        max_steps=recipe.steps, warmup_steps=recipe.warmup, learning_rate=recipe.rate,
        per_device_train_batch_size=recipe.batch, ratios_per_step=len(ratios), max_grad_norm=1.0,
        layer_weight=recipe.layer_weight, embedding_weight=recipe.embedding_weight,
        bf16=recipe.bf16, save_steps=200, logging_steps=100, disable_tqdm=True,
    )  # fmt: skip
    train(job, config)


def kept(model: Any) -> tuple[str, int, tuple[str, ...]]:
    """Which tokens a patched model keeps whole, in words, its plugins' bottleneck, and where they
    are."""
    first, last, ids, bottleneck = internals.kept(model)
    words = [f"first {first}"] if first else []
    words += [f"last {last}"] if last else []
    words += [f"ids {', '.join(map(str, ids))}"] if ids else []
    placements = internals.state(model).method.config.placements
    return "; ".join(words) or "none", bottleneck, tuple(placements)


def settings(recipe: Recipe) -> dict[str, Any]:
    """For the result file, and to know a folder's stages by."""
    return asdict(recipe)
