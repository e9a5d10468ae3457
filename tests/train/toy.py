"""A model folder, a tokenizer and data files, small enough to train in a test."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = [f"w{i}" for i in range(60)]
SENTINELS = [f"<extra_id_{i}>" for i in range(8)]


def tokenizer(template: str = "$A </s>", pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """A word is a token; ``</s>`` ends a text, where ``template`` is not another."""
    vocabulary = ["<pad>", "</s>", "<unk>", "good", "bad", *WORDS, *SENTINELS]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single=template, pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=pad,
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SENTINELS,
        model_input_names=["input_ids", "attention_mask"],
    )


def t5(folder: Path, dropout: float = 0.1) -> Path:
    """A random T5 with two layers, and its tokenizer."""
    torch.manual_seed(0)
    words = tokenizer()
    config = T5Config(
        vocab_size=len(words),
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=dropout,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def bert(folder: Path, spread: float = 0.02) -> Path:
    """A random BERT with two layers and a classifier, and its tokenizer.

    ``spread``: of its weights; where it is small, compression changes next to nothing.
    """
    torch.manual_seed(0)
    words = tokenizer()
    config = BertConfig(
        vocab_size=len(words),
        initializer_range=spread,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def llama(folder: Path, spread: float = 0.3, **settings: int) -> Path:
    """A random LLaMA with two layers, and its tokenizer: ``</s>`` begins a text, nothing pads."""
    torch.manual_seed(0)
    words = tokenizer("</s> $A", pad=None)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    config = LlamaConfig(
        vocab_size=len(words),
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=True,
        **sizes | settings,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def sentences(number: int, least: int = 4, most: int = 20, seed: int = 0) -> list[str]:
    """Random words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(least, most))) for _ in range(number)]


def plain_text(path: Path, number: int = 60, **settings: int) -> Path:
    path.write_text("\n\n".join(sentences(number, 10, **settings)) + "\n")
    return path


def table(path: Path, number: int = 40, labels: tuple[str, ...] = ("0", "1")) -> Path:
    """A TSV with ``sentence`` and ``label``."""
    lines = [f"{text}\t{labels[i % len(labels)]}" for i, text in enumerate(sentences(number))]
    path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return path


def embedder(folder: Path, pooling: str) -> str:
    """:func:`bert` as a model of sentence-transformers, with another layer behind its pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(0)
    transformer = modules.Transformer(str(bert(folder, spread=0.4)))
    pool = modules.Pooling(16, pooling)
    made = SentenceTransformer(modules=[transformer, pool, modules.Dense(16, 12)], device="cpu")
    made.save(str(folder))
    return str(folder)
