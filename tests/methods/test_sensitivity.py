"""What matters behind a site: against brute force, and for each kind of model."""

import pytest
import torch
import transformers
from torch import nn

import variator_kernels as vk
from tests.methods.test_calibration import batches, few_steps  # noqa: F401
from tests.sites import tiny
from variator_kernels.methods.variator.calibration import inputs, sensitivity

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:plugins are untrained")
NAMES = ("input_ids", "attention_mask")


def classifier():
    base = tiny.model("bert", "gelu")
    made = transformers.BertForSequenceClassification(base.config).eval()
    made.bert.load_state_dict(base.state_dict(), strict=False)
    return made


def found(made, given, layers=None, keep_first=0):
    encoder = made if layers is None else made.base_model
    output = sensitivity.output_of(made, encoder)
    merged = [chunk.mask & (torch.arange(chunk.mask.shape[1]) >= keep_first) for chunk in given]
    layers = tiny.layers(encoder)
    return sensitivity.sensitivities(layers, output, given, [merged] * len(layers))


def test_lengths_of_gradients_are_those_of_small_changes():
    """Moving one token behind a layer moves the output as far as the weights say."""
    made = tiny.model("bert", "gelu")
    given = inputs.chunks(batches(3), NAMES)
    layers, moved = tiny.layers(made), torch.zeros(3, 8)
    (chunk, *_), d = given, made.config.hidden_size
    generator = torch.Generator().manual_seed(0)

    def last(layer, row, place, step):
        def add(module, args, out):
            x = (out[0] if isinstance(out, tuple) else out).clone()
            x[row, place] += step
            return (x, *out[1:]) if isinstance(out, tuple) else x

        hook = layer.register_forward_hook(add)
        try:
            with torch.no_grad():
                return made(**chunk.inputs).last_hidden_state[chunk.mask]
        finally:
            hook.remove()

    weights = torch.zeros(3, 8)
    for _ in range(40):  # each backward pass has one random direction
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(1 << 30, (1,), generator=generator)))
            (first, *_) = _measured(made, chunk)
        weights += first[:3, :8]
    for row in range(3):
        for place in range(8):
            step = 1e-2 * torch.randn(16, d, generator=generator)
            for s in step:
                change = last(layers[0], row, place, s) - last(layers[0], row, place, 0 * s)
                moved[row, place] += change.square().sum()
    real = chunk.mask[:3, :8]
    ratio = (weights / moved)[real]
    assert real.sum() > 12 and float(ratio.max() / ratio.min()) < 3
    assert float(moved[real].max() / moved[real].min()) > 1.2


def _measured(made, chunk):
    """Squared lengths of one random direction's gradients behind each layer, ``[B, n]`` each."""
    with torch.enable_grad(), sensitivity._probed(tiny.layers(made)) as probes:
        given = made(**chunk.inputs).last_hidden_state
        direction = torch.randn(given.shape) * chunk.mask[..., None]
        return [g.square().sum(-1) for g in torch.autograd.grad(given, probes, direction)]


def test_a_classifier_reads_nothing_behind_the_last_layer_but_its_first_token():
    made = classifier()
    given = inputs.chunks(batches(6), NAMES)
    last = found(made, given, "bert")[-1]
    for weights, chunk in zip(last.weights, given, strict=True):
        first = weights[:, 0]
        assert (first > 1 / sensitivity.RANGE).all() and first.max() > 2
        assert (weights[:, 1:][chunk.mask[:, 1:]] == 1 / sensitivity.RANGE).all()
    inner = found(made, given, "bert", keep_first=1)[0]
    real = torch.cat([w[:, 1:][c.mask[:, 1:]] for w, c in zip(inner.weights, given, strict=True)])
    assert real.mean() == pytest.approx(1, rel=0.05) and real.max() > 2 * real.min()
    for site in found(made, given, "bert", keep_first=1)[-1:]:  # nothing else is read there
        assert torch.equal(site.root, torch.eye(len(site.root)))


def test_what_nothing_reads_weighs_the_same_everywhere():
    made = classifier()
    nn.init.zeros_(made.classifier.weight)
    given = inputs.chunks(batches(6), NAMES)
    for site in found(made, given, "bert"):
        assert torch.equal(site.root, torch.eye(len(site.root)))
        assert all((w == 1).all() for w in site.weights)


def test_padding_weighs_nothing_on_either_side():
    """With the same directions for the same tokens, their gradients are the same."""
    made, found = tiny.encoder(tiny.model("t5", "relu")), []
    for left in (False, True):
        ids, mask = tiny.batch(5, 9, 7)
        if left:
            shifts = [9 - int(real.sum()) for real in mask]
            ids, mask = (
                torch.stack([row.roll(n) for row, n in zip(x, shifts, strict=True)])
                for x in (ids, mask)
            )
        directions = torch.randn(int(mask.sum()), 64, generator=torch.Generator().manual_seed(0))
        with torch.enable_grad(), sensitivity._probed(tiny.layers(made)) as probes:
            out = made(input_ids=ids, attention_mask=mask).last_hidden_state
            given = directions[:, : out.shape[-1]]
            spread = torch.zeros_like(out).masked_scatter(mask[..., None] != 0, given)
            gradients = torch.autograd.grad(out, probes, spread)
        found.append([g[mask != 0] for g in gradients])
        assert all((g[mask == 0] == 0).all() for g in gradients)
    for right, other in zip(*found, strict=True):
        torch.testing.assert_close(right, other, rtol=1e-3, atol=1e-5)


def test_outputs_of_each_kind_of_model():
    ids, mask = tiny.batch(5, 9, 7)
    given = {"input_ids": ids, "attention_mask": mask}
    made = classifier()
    logits = sensitivity.output_of(made, made.bert)(given)
    assert logits.shape == (3, 2) and logits.sum(-1).abs().max() < 1e-5
    assert sensitivity.output_of(made.bert, made.bert)(given).shape[:2] == ids.shape
    base = tiny.model("bert", "gelu")
    words = transformers.BertForMaskedLM(base.config).eval()  # a vocabulary a token: too much
    assert sensitivity.output_of(words, words.bert)(given).shape[-1] == base.config.hidden_size
    around = torch.nn.ModuleDict({"encoder": base})  # a SentenceTransformer, for one
    assert sensitivity.output_of(around, base)(given).shape == (*ids.shape, base.config.hidden_size)
    seq2seq = transformers.T5ForConditionalGeneration(tiny.model("t5", "relu").config).eval()
    hidden = sensitivity.output_of(seq2seq, seq2seq.encoder)(given)
    assert hidden.shape[:2] == ids.shape


def test_hooks_go_also_after_an_error():
    made = tiny.model("bert", "gelu")

    def fails(given):
        made(**given)
        raise KeyError

    with pytest.raises(KeyError):
        given = inputs.chunks(batches(3), NAMES)
        layers = tiny.layers(made)
        tokens = [[c.mask for c in given]] * len(layers)
        sensitivity.sensitivities(layers, fails, given, tokens)
    assert not any(layer._forward_hooks for layer in tiny.layers(made))


def test_a_classifiers_answers_come_closer():
    """Than those of plugins that were fitted to hidden states alone."""
    given = batches(30)
    apart = []
    for objective in ("logits", "hidden"):
        made = vk.patch(classifier(), 2, (2,), bottleneck=4, keep_first=1)
        vk.calibrate(made if objective == "logits" else made.bert, given)
        error = 0.0
        for batch in batches(40)[30:]:
            with torch.no_grad():
                with vk.use_ratio(made, 1):
                    dense = made(**batch).logits
                error += float((made(**batch).logits - dense).square().sum())
        apart.append(error)
    assert apart[0] < apart[1]


class Wrapper(nn.Module):
    """Takes what it likes."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, ids, mask):
        return self.encoder(input_ids=ids, attention_mask=mask)


def test_a_wrapper_with_a_forward_of_its_own_is_calibrated(few_steps):  # noqa: F811
    made = vk.patch(Wrapper(tiny.model("bert", "gelu")), 2, (2,), bottleneck=4)
    table = vk.calibrate(made, batches())
    assert table.rows[-1].after < table.rows[-1].before


def test_a_single_logit_has_a_direction():
    base = tiny.model("bert", "gelu")
    base.config.num_labels = 1
    made = transformers.BertForSequenceClassification(base.config).eval()
    given = inputs.chunks(batches(6), NAMES)
    site = found(made, given, "bert", keep_first=1)[0]
    assert not torch.equal(site.root, torch.eye(len(site.root)))


def test_where_no_gradient_passes_a_warning_says_so(monkeypatch):
    def refuses(*given):
        raise RuntimeError("derivative is not implemented")

    monkeypatch.setattr(torch.autograd, "grad", refuses)
    made = vk.patch(tiny.model("bert", "gelu"), 2, (2,), bottleneck=4)
    with (
        pytest.warns(UserWarning, match="no gradient passes the model"),
        pytest.raises(RuntimeError),
    ):
        vk.calibrate(made, batches())  # the descent needs one too


def test_inside_inference_mode(few_steps):  # noqa: F811
    made = vk.patch(tiny.model("bert", "gelu"), 2, (2,), bottleneck=4)
    with torch.inference_mode():
        table = vk.calibrate(made, batches())
    assert table.rows[-1].after < table.rows[-1].before
    assert not any(p.is_inference() for p in vk.plugin_parameters(made))
