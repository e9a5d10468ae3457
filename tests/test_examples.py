"""The plugins and the scripts that come with the repository."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import variator_kernels as vk

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDER = EXAMPLES / "minilm"


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


@pytest.fixture
def chatting(tmp_path):
    """A folder with a tiny LLaMA and a tokenizer of single characters, and the model."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    letters = {chr(number): number for number in range(128)}
    words = tokenizers.Tokenizer(tokenizers.models.BPE(letters, [], unk_token="?"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 128}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, **size
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model, tokenizer


@pytest.mark.parametrize("trained", [False, True])
def test_summarise(chatting, tmp_path, monkeypatch, capsys, trained):
    """It prints what the patched model generates, with the plugins it was given."""
    folder, model, tokenizer = chatting
    text = "The river rises in the hills north of the town. " * 6
    (tmp_path / "text.txt").write_text(text)
    vk.patch(model, {"attention_kv": 2}, ratios=(2,))
    arguments = [str(folder), str(tmp_path / "text.txt")]
    if trained:
        with torch.no_grad():
            for parameter in vk.plugin_parameters(model):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
        vk.save_plugins(model, tmp_path / "plugins")
        arguments.append(str(tmp_path / "plugins"))
    ids = tokenizer(f"[{text}\n\nSummarise this text in one sentence.]", return_tensors="pt")
    wanted = model.generate(ids["input_ids"], max_new_tokens=60, do_sample=False)
    monkeypatch.setattr(sys, "argv", ["summarise.py", *arguments])
    runpy.run_path(str(EXAMPLES / "summarise.py"))
    shown = tokenizer.decode(wanted[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out.split() == shown.split() and shown.strip()


def test_plugins_of_smollm2():
    folder = EXAMPLES / "smollm2"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1 << 20
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=64, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    vk.load_plugins(model, folder)
    text = vk.describe(model)
    assert "ratios        2, 4" in text and "first 4, last 0" in text
    assert "trained, k=2  yes" in text and "trained, k=4  yes" in text


def test_smaller(chatting, tmp_path, monkeypatch, capsys):
    """It writes the small model, and says what this says with half of its keys."""
    folder, model, tokenizer = chatting
    text = "The river rises in the hills north of the town. " * 20
    (tmp_path / "text.txt").write_text(text)
    output = tmp_path / "small"
    arguments = [str(folder), str(tmp_path / "text.txt"), str(output), "0.7"]
    monkeypatch.setattr(sys, "argv", ["smaller.py", *arguments])
    runpy.run_path(str(EXAMPLES / "smaller.py"))
    transformers = pytest.importorskip("transformers")
    small = transformers.LlamaForCausalLM.from_pretrained(output)
    count = sum(p.numel() for p in small.parameters())
    assert 0.6 < count / sum(p.numel() for p in model.parameters()) <= 0.7
    vk.patch(small, {"attention_kv": 2}, ratios=(2,))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :200]
    wanted = small.generate(input_ids=ids, max_new_tokens=40, do_sample=False)[0, 200:]
    report, _, said = capsys.readouterr().out.partition("\n")
    assert f"{count:,} parameters" in report
    assert said.split() == tokenizer.decode(wanted, skip_special_tokens=True).split()
