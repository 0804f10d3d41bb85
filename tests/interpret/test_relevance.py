"""Relevance equals its definition, explicit attention weights times their gradient, in float64 to 1e-10."""

import pytest
import torch
from decoder_cases import random_decoder, random_memory, random_tokens
from torch import nn

from mmx.boxes import NO_BOX
from mmx.errors import MmxError
from mmx.inference.pipeline import Pipeline, load
from mmx.interpret import QueryRecorder, TextBatch
from mmx.interpret.attention_stats import cross_attention_layers
from mmx.interpret.relevance import relevance, relevance_maps
from mmx.memory import Memory, cat
from mmx.models.checkpoint import save_model
from mmx.nn.attention import attention_weights, fold_streams, unfold_streams
from mmx.nn.layers import merge_heads, split_heads
from mmx.testing import tiny_model

DOUBLE = {"dtype": torch.float64}


class ExplicitCrossAttention(nn.Module):
    """Cross-attention that computes its weights and keeps them for autograd."""

    def __init__(self, original, memory, mask):
        super().__init__()
        self.original = original
        self.memory = memory
        self.mask = mask
        self.weights = None

    def forward(self, x, *_):
        batch = self.memory.batch_size
        queries = fold_streams(split_heads(self.original.query(x), self.original.num_heads), batch)
        keys, values = self.memory.layer(self.original.index)
        self.weights = attention_weights(queries, keys, self.mask).requires_grad_()
        return self.original.out(merge_heads(unfold_streams(self.weights @ values, len(x) // batch)))


def relevance_by_definition(decoder, memory, tokens, targets):
    """Sum over t of A * dlogp/dA for one target after the other: [B, K, T, L, H, S]."""
    batch, streams, length = tokens.shape
    mask = memory.cross_attention_mask(streams, length)
    layers = cross_attention_layers(decoder)
    for layer in layers:
        layer.cross_attention = ExplicitCrossAttention(layer.cross_attention, memory, mask)
    logprobs = decoder(tokens, memory).log_softmax(-1)
    result = torch.zeros(batch, streams, length, len(layers), 2, memory.num_slots, **DOUBLE)
    for b, k, t in (targets >= 0).nonzero().tolist():
        weights = [layer.cross_attention.weights for layer in layers]
        gradients = torch.autograd.grad(logprobs[b, k, t, targets[b, k, t]], weights, retain_graph=True)
        for index, gradient in enumerate(gradients):
            result[b, k, t, index] = (weights[index] * gradient).sum(2)[b]
    return result.detach()


def build_memory(kind):
    if kind == "plain":
        return random_memory(**DOUBLE)
    if kind == "padded":
        first_slot = torch.arange(5) == 0
        return random_memory(masked=2, **DOUBLE).mask_out(torch.tensor([[True], [False]]) & first_slot)
    if kind == "one layer":
        return random_memory(layers=1, masked=1, **DOUBLE)
    if kind == "masked row":
        return random_memory(**DOUBLE).mask_out(torch.tensor([[True], [False]]))
    image = random_memory(slots=5, grid=(2, 2), **DOUBLE)
    if kind == "boxes":
        boxes = [[(0.0, 0.0, 0.4, 0.4), NO_BOX], [NO_BOX, (0.0, 0.0, 1.0, 0.4)]]
        return image.focus(torch.tensor(boxes))
    questions = random_memory(batch=4, slots=3, source="question", masked=1, **DOUBLE).fold_streams(2)
    return cat(image, questions)


def next_tokens(tokens):
    """Targets of all positions but the last."""
    targets = torch.roll(tokens, -1, -1)
    targets[:, :, -1] = -100
    return targets


@pytest.mark.parametrize(
    "config",
    [{}, {"num_layers": 4, "cross_attention_every_n_layers": 2, "norm_placement": "post"}],
    ids=["every layer", "every 2nd layer"],
)
@pytest.mark.parametrize("kind", ["plain", "padded", "one layer", "boxes", "questions", "masked row"])
def test_relevance_is_attention_times_its_gradient(kind, config):
    decoder = random_decoder(**config).double()
    memory = build_memory(kind)
    tokens = random_tokens(2, 2, 4)
    targets = next_tokens(tokens)
    found = relevance(decoder, memory, TextBatch(tokens, targets))
    expected = relevance_by_definition(decoder, memory, tokens, targets)[:, :, :3]
    assert found.shape == (2, 2, 3, 2, 2, memory.num_slots)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    visible = memory.cross_attention_mask(2, 1)
    if visible is not None:
        masked = ~visible.expand(2, 1, -1, -1)[:, 0].expand(2, 2, -1)
        assert (found.permute(0, 1, 5, 2, 3, 4)[masked] == 0).all(), "masked slots are exactly zero"


def test_tokens_of_a_word_are_summed_and_padding_changes_nothing():
    decoder = random_decoder().double()
    memory = random_memory(**DOUBLE)
    tokens = random_tokens(2, 2, 6)
    targets = next_tokens(tokens)
    single = relevance(decoder, memory, TextBatch(tokens, targets))
    word_ids = torch.tensor([0, 0, 2, -1, 2, 1]).expand(2, 2, -1)
    joined = relevance(decoder, memory, TextBatch(tokens, targets), word_ids)
    assert joined.shape[2] == 3
    torch.testing.assert_close(joined[:, :, 0], single[:, :, 0] + single[:, :, 1], atol=1e-12, rtol=0)
    torch.testing.assert_close(joined[:, :, 2], single[:, :, 2] + single[:, :, 4], atol=1e-12, rtol=0)
    assert (joined[:, :, 1] == 0).all(), "its only token has no target"
    pad = torch.nn.functional.pad
    mask = pad(torch.ones_like(tokens, dtype=torch.bool), (0, 2))
    padded = TextBatch(pad(tokens, (0, 2)), pad(targets, (0, 2), value=-1), mask)
    torch.testing.assert_close(relevance(decoder, memory, padded), single, atol=1e-12, rtol=0)


def test_visibility_and_recorder_reach_the_decoder():
    tokens = random_tokens(2, 1, 4)
    recorder = QueryRecorder()
    text = TextBatch(tokens, tokens, visibility=torch.arange(5).expand(4, -1) < 3)
    found = relevance(random_decoder(), random_memory(), text, recorder=recorder)
    assert (found[..., 3:] == 0).all()
    assert (found[..., :3] != 0).all()
    assert recorder.layers == [0, 1]


def test_an_empty_memory_and_no_targets():
    decoder = random_decoder()
    tokens = random_tokens(2, 2, 3)
    no_targets = torch.full_like(tokens, -100)
    assert relevance(decoder, Memory.empty(2, 2, 2, 8), TextBatch(tokens, tokens)).shape == (2, 2, 3, 2, 2, 0)
    assert relevance(decoder, random_memory(), TextBatch(tokens, no_targets)).shape == (2, 2, 0, 2, 2, 5)


def test_parameters_get_no_gradient_and_inference_mode_makes_no_difference():
    decoder = random_decoder().requires_grad_(True)
    tokens = random_tokens(2, 1, 3)
    with torch.inference_mode():
        memory = random_memory(masked=1)
        inside = relevance(decoder, memory, TextBatch(tokens.clone(), tokens.clone()))
    outside = relevance(decoder, memory, TextBatch(tokens, tokens))
    assert torch.equal(inside, outside)
    assert not outside.requires_grad
    assert all(parameter.grad is None for parameter in decoder.parameters())
    assert not memory.values.requires_grad


def test_wrong_shapes():
    tokens = random_tokens(2, 1, 4)
    with pytest.raises(MmxError) as error:
        TextBatch(tokens, random_tokens(2, 1, 3))
    assert error.value.code == "interpret.shape"
    assert error.value.details == {"name": "targets", "given": [2, 1, 3], "expected": [2, 1, 4]}
    with pytest.raises(MmxError) as error:
        relevance(random_decoder(), random_memory(), TextBatch(tokens, tokens), tokens[:, 0])
    assert (error.value.code, error.value.details["name"]) == ("interpret.shape", "word_ids")


def test_heads_are_summed_before_negative_values_of_a_layer_are_removed():
    by_head = torch.tensor([[[3.0, -1.0], [-1.0, -2.0]], [[0.5, 1.0], [0.25, 1.0]]])  # [L, H, S]
    assert relevance_maps(by_head).tolist() == [2.75, 2.0]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("int8", 0.03)])
def test_prepacked_weights_give_the_same_relevance(tmp_path, dtype, tolerance):
    model = tiny_model(hidden_size=256)
    folder = save_model(tmp_path / "wide", model)
    tokens = torch.tensor([[[1, 3, 7, 9]]])
    prepacked = load(folder, dtype=dtype).model
    memory = Pipeline(model).encode(numbers=[[0.3, -0.5, 0.9]])
    assert prepacked.decoder.is_prepacked or dtype == "float32"
    expected = relevance(model.decoder, memory, TextBatch(tokens, tokens))
    found = relevance(prepacked.decoder, memory, TextBatch(tokens, tokens))
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
