"""The plugins that come with the repository."""

from pathlib import Path

import pytest
import torch

import variator_kernels as vk

FOLDER = Path(__file__).parents[1] / "examples" / "minilm"


def test_the_folder_is_small_and_whole():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1 << 20
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=384, intermediate_size=64, num_hidden_layers=6, num_attention_heads=12
    )
    model = transformers.BertModel(config).eval()
    vk.load_plugins(model, FOLDER)
    text = vk.describe(model)
    assert "ratios        2, 4" in text and "first 1, last 0" in text
    assert "trained, k=2  yes" in text and "trained, k=4  yes" in text


def test_closer_to_the_original_than_untrained_ones():
    """Where the model is installed: bench.quality_vs_k --task embeddings measures how close."""
    models = pytest.importorskip("bench.cases.models")
    try:
        folder = models.minilm()
    except ValueError as error:
        pytest.skip(str(error))
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [
        "The river rises in the hills north of the town and flows south to the sea.",
        "She finished the film in a single week, and critics praised the acting above all.",
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def embed():
        mask = batch["attention_mask"][..., None]
        pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1)

    original = embed()
    vk.load_plugins(model, FOLDER)
    for k, least in ((2, 0.93), (4, 0.87)):  # 5 % quantiles 0.95 and 0.90 on paragraphs
        vk.set_ratio(model, k)
        assert ((embed() * original).sum(-1) > least).all()
