"""The loss: real tokens alone, however they are padded and cut into batches."""

from types import SimpleNamespace

import pytest
import torch

from variator_kernels.train import losses


def outputs(encoder, decoder=None):
    if decoder is None:
        return SimpleNamespace(hidden_states=encoder)
    return SimpleNamespace(encoder_hidden_states=encoder, decoder_hidden_states=decoder)


def random(*shape, layers=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, 6, generator=generator) for _ in range(layers))


def test_is_the_mean_over_real_tokens_of_both_stacks():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    labels = torch.tensor([[4, -100], [4, 5]])
    batch = {"attention_mask": mask, "decoder_input_ids": labels, "labels": labels}
    student = outputs(random(2, 3), random(2, 2, seed=1))
    teacher = outputs(random(2, 3, seed=2), random(2, 2, seed=3))
    expected = 0.0
    for stack, real in (("encoder", mask != 0), ("decoder", labels != -100)):
        a, b = (getattr(o, f"{stack}_hidden_states")[-1] for o in (student, teacher))
        expected += torch.nn.functional.mse_loss(a[real], b[real])
    total = losses.counts(batch)
    assert total.tolist() == [3, 3, 3, 2]
    torch.testing.assert_close(losses.distillation(student, teacher, batch, total), expected)


@pytest.mark.parametrize("layer_weight", [0.0, 0.5])
def test_neither_padding_nor_what_it_holds_counts(layer_weight):
    def loss(width, left, fill):
        mask = torch.zeros(2, width)
        states = [torch.full((2, width, 6), fill) for _ in range(8)]
        for row, size in enumerate((4, 2)):
            real = slice(width - size, width) if left else slice(0, size)
            mask[row, real] = 1
            for i, source in enumerate((*random(2, 4), *random(2, 4, seed=1))):
                states[i][row, real] = source[row, :size]
        batch = {"attention_mask": mask}
        found = outputs(states[:4]), outputs(states[4:])
        return losses.distillation(*found, batch, losses.counts(batch), layer_weight)

    plain = loss(4, False, 0.0)
    for case in ((9, False, 1e3), (9, True, float("nan")), (5, True, -1.0)):
        torch.testing.assert_close(loss(*case), plain)


def test_parts_of_a_batch_add_up_to_it():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    labels = torch.tensor([0, 1, 1])
    states = random(3, 3), random(3, 3, seed=1)
    logits = torch.randn(3, 2), torch.randn(3, 2)

    def loss(rows, total):
        batch = {"attention_mask": mask[rows], "labels": labels[rows]}
        student, teacher = (
            SimpleNamespace(
                hidden_states=[layer[rows] for layer in s],
                logits=z[rows],
                loss=torch.nn.functional.cross_entropy(z[rows], labels[rows]),
            )
            for s, z in zip(states, logits, strict=True)
        )
        return (
            losses.distillation(student, teacher, batch, total, 0.3)
            + losses.task(student, batch, total)
            + losses.logits(student, teacher, batch, total)
        )

    total = losses.counts({"attention_mask": mask, "labels": labels})
    parts = loss(slice(0, 1), total) + loss(slice(1, 3), total)
    torch.testing.assert_close(parts, loss(slice(0, 3), total))


def test_refuses_batches_that_do_not_tell_real_tokens():
    with pytest.raises(ValueError, match="must hold attention_mask"):
        losses.masks({"input_ids": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match="must hold decoder_attention_mask or labels"):
        ones = torch.ones(1, 2)
        losses.masks({"attention_mask": ones, "decoder_input_ids": ones})
