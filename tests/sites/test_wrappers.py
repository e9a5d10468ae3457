"""Models inside other people's modules: patched whole, or refused before anything changes."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers

import variator_kernels as vk
from tests.sites import tiny
from tests.train import toy
from variator_kernels.sites import install

sentence_transformers = pytest.importorskip("sentence_transformers")


@pytest.fixture
def embedder(tmp_path):
    """A BERT and the mean pooling that sentence-transformers puts behind it."""
    folder = str(toy.bert(tmp_path / "bert"))
    return sentence_transformers.SentenceTransformer(folder, device="cpu").eval()


def test_a_sentence_transformer(embedder, tmp_path):
    texts = toy.sentences(6)
    before, keys = embedder.encode(texts), list(embedder.state_dict())
    vk.patch(embedder, ratio=2)
    tiny.train_plugins(embedder)
    compressed = embedder.encode(texts)
    assert abs(compressed - before).max() > 1e-3
    with vk.use_ratio(embedder, 1):
        assert (embedder.encode(texts) == before).all()
    vk.save_plugins(embedder, tmp_path / "plugins")
    embedder.save(str(tmp_path / "saved"))
    plain = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert list(plain.state_dict()) == keys
    vk.load_plugins(plain, tmp_path / "plugins")
    assert (plain.encode(texts) == compressed).all()
    vk.unpatch(embedder)
    assert (embedder.encode(texts) == before).all() and list(embedder.state_dict()) == keys
    assert not any("variator" in name for m in embedder.modules() for name in vars(m))


@pytest.mark.parametrize("broken", ["patched_class", "DescribedFeedForward"])
@pytest.mark.parametrize("head", ["EncoderModel", "ForConditionalGeneration"])
def test_a_failure_on_the_way_is_undone(broken, head, monkeypatch):
    model = tiny.model(head=head)
    before, real, calls = tiny.snapshot(model), getattr(install, broken), []

    def fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(install, broken, fails)
    with pytest.raises(MemoryError):
        vk.patch(model)
    assert tiny.snapshot(model) == before
    assert not any("variator" in name for m in model.modules() for name in vars(m))
    monkeypatch.undo()
    assert vk.unpatch(vk.patch(model)) is model and tiny.snapshot(model) == before


def test_dpr_and_encoder_decoders():
    bert = tiny.config("bert", "gelu")
    settings = {key: value for key, value in bert.to_dict().items() if key != "model_type"}
    dpr = transformers.DPRQuestionEncoder(transformers.DPRConfig(**settings))
    both = transformers.EncoderDecoderModel(
        transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
            bert, tiny.config("bert", "gelu")
        )
    )
    ids, mask = tiny.batch(9, 4)
    for model, inputs in (
        (dpr.eval(), {}),
        (both.eval(), {"decoder_input_ids": torch.ones(2, 3, dtype=torch.long)}),
    ):
        with torch.no_grad():
            before = model(input_ids=ids, attention_mask=mask, **inputs)[0]
            vk.patch(model, ratio=2)
            tiny.train_plugins(model)
            compressed = model(input_ids=ids, attention_mask=mask, **inputs)[0]
            assert not torch.allclose(before, compressed, atol=1e-4)
            vk.unpatch(model)
            assert torch.equal(before, model(input_ids=ids, attention_mask=mask, **inputs)[0])


WRAPPED = """
    import sys, torch
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel
    import variator_kernels as vk
    from tests.sites import tiny

    init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)

    def refused(model, name):
        before = [(n, type(m)) for n, m in model.named_modules()]
        try:
            vk.patch(model)
        except ValueError as error:
            assert f"it is in a {name}" in str(error), error
            assert "vk.patch(model), and wrap it again" in str(error), error
        else:
            raise AssertionError(name)
        assert before == [(n, type(m)) for n, m in model.named_modules()]

    parallel = DistributedDataParallel(tiny.model(head="EncoderModel"))
    refused(parallel, "DistributedDataParallel")
    refused(parallel.module, "DistributedDataParallel")
    refused(parallel.module.encoder, "DistributedDataParallel")
    sharded = tiny.model(head="EncoderModel")
    fully_shard(sharded)
    refused(sharded, "FSDPT5EncoderModel")
    del parallel
    vk.patch(tiny.model(head="EncoderModel"))
    destroy_process_group()
"""


def test_refuses_a_model_that_is_wrapped_already(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(WRAPPED), str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=120)
