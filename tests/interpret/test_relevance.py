"""Relevance against its definition, attention weights times their gradient, made explicitly; in float64, to 1e-10."""

import pytest
import torch
from decoder_cases import random_decoder, random_memory, random_tokens
from torch import nn

from mmx.errors import MmxError
from mmx.inference.pipeline import Pipeline, load
from mmx.interpret import QueryRecorder
from mmx.interpret.relevance import relevance, relevance_maps
from mmx.memory import NO_BOX, Memory, cat
from mmx.models.checkpoint import save_model
from mmx.nn.attention import attention_weights, fold_streams, unfold_streams
from mmx.nn.layers import merge_heads, split_heads
from mmx.testing import tiny_model

DOUBLE = {"dtype": torch.float64}


class Explicit(nn.Module):
    """A cross-attention that makes its weights, and keeps them for autograd."""

    def __init__(self, look, memory, mask):
        super().__init__()
        self.look, self.memory, self.mask, self.weights = look, memory, mask, None

    def forward(self, x, *_):
        queries = fold_streams(split_heads(self.look.query(x), self.look.heads), self.memory.batch_size)
        keys, values = self.memory.layer(self.look.index)
        self.weights = attention_weights(queries, keys, self.mask).requires_grad_()
        return self.look.out(merge_heads(unfold_streams(self.weights @ values, len(x) // self.memory.batch_size)))


def by_definition(decoder, memory, tokens, targets, mask=None):
    """sum over t of A * dlogp/dA for every target of every stream, one after the other: [B, K, T, L, H, S]."""
    batch, streams, length = tokens.shape
    looks = []
    for block in (block for block in decoder.layers if block.cross_attention is not None):
        block.cross_attention = Explicit(block.cross_attention, memory, memory.cross_attention_mask(streams, length))
        looks.append(block.cross_attention)
    logprobs = decoder(tokens, memory, mask).log_softmax(-1)
    found = torch.zeros(batch, streams, length, len(looks), 2, memory.num_slots, **DOUBLE)
    for b in range(batch):
        for k in range(streams):
            for t in range(length):
                if targets[b, k, t] >= 0:
                    score = logprobs[b, k, t, targets[b, k, t]]
                    grads = torch.autograd.grad(score, [look.weights for look in looks], retain_graph=True)
                    for layer, (look, grad) in enumerate(zip(looks, grads, strict=True)):
                        found[b, k, t, layer] = (look.weights * grad).sum(2)[b]
    return found.detach()


def memories():
    """Plain; padded; shared by the layers; boxes of streams on a grid; texts side by side, one a stream."""
    picture = random_memory(slots=5, grid=(2, 2), **DOUBLE)
    questions = random_memory(batch=4, slots=3, source="question", masked=1, **DOUBLE).fold_streams(2)
    boxes = torch.tensor([[(0.0, 0.0, 0.4, 0.4), NO_BOX], [NO_BOX, (0.0, 0.0, 1.0, 0.4)]])
    return {
        "plain": random_memory(**DOUBLE),
        "padded": random_memory(masked=2, **DOUBLE).mask_out(torch.tensor([[True], [False]]) & (torch.arange(5) == 0)),
        "shared": random_memory(layers=1, masked=1, **DOUBLE),
        "boxes": picture.focus(boxes),
        "questions": cat(picture, questions),
        "blind": random_memory(**DOUBLE).mask_out(torch.tensor([[True], [False]])),
    }


@pytest.mark.parametrize(
    "facts", [{}, {"num_layers": 4, "cross_attention_every_n_layers": 2, "norm_placement": "post"}], ids=["each", "2nd"]
)
@pytest.mark.parametrize("kind", ["plain", "padded", "shared", "boxes", "questions", "blind"])
def test_it_is_attention_times_its_gradient(kind, facts):
    decoder, memory, tokens = random_decoder(**facts).double(), memories()[kind], random_tokens(2, 2, 4)
    targets = torch.roll(tokens, -1, -1)
    targets[:, :, -1] = -100
    parts = relevance(decoder, memory, tokens, targets)
    expected = by_definition(decoder, memory, tokens, targets)[:, :, :3]
    assert parts.shape == (2, 2, 3, 2, 2, memory.num_slots)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(parts, expected, atol=1e-10, rtol=0)
    seen = memory.cross_attention_mask(2, 1)
    unseen = torch.zeros(2, 2, memory.num_slots, dtype=torch.bool) if seen is None else ~seen.expand(2, 1, -1, -1)[:, 0]
    unseen = unseen.expand(2, 2, -1)
    assert (parts.permute(0, 1, 5, 2, 3, 4)[unseen] == 0).all(), "exactly"


def test_pieces_of_a_word_are_summed_and_padding_of_texts_changes_nothing():
    decoder, memory, tokens = random_decoder().double(), random_memory(**DOUBLE), random_tokens(2, 2, 6)
    targets = torch.roll(tokens, -1, -1)
    targets[:, :, -1] = -1
    single = relevance(decoder, memory, tokens, targets)
    words = torch.tensor([0, 0, 2, -1, 2, 1]).expand(2, 2, -1)
    joined = relevance(decoder, memory, tokens, targets, words)
    assert joined.shape[2] == 3
    torch.testing.assert_close(joined[:, :, 0], single[:, :, 0] + single[:, :, 1], atol=1e-12, rtol=0)
    torch.testing.assert_close(joined[:, :, 2], single[:, :, 2] + single[:, :, 4], atol=1e-12, rtol=0)
    assert (joined[:, :, 1] == 0).all(), "its only piece has no target"
    longer = [torch.nn.functional.pad(part, (0, 2), value=value) for part, value in ((tokens, 0), (targets, -1))]
    mask = torch.nn.functional.pad(torch.ones_like(tokens, dtype=torch.bool), (0, 2))
    torch.testing.assert_close(relevance(decoder, memory, *longer, mask=mask), single, atol=1e-12, rtol=0)


def test_visibility_is_honoured_and_the_recorder_handed_on():
    decoder, memory, tokens, recorder = random_decoder(), random_memory(), random_tokens(2, 1, 4), QueryRecorder()
    visibility = torch.arange(5).expand(4, -1) < 3
    parts = relevance(decoder, memory, tokens, tokens, visibility=visibility, recorder=recorder)
    assert (parts[..., 3:] == 0).all() and (parts[..., :3] != 0).all()
    assert recorder.layers == [0, 1]


def test_nothing_to_see_and_nothing_asked_about():
    decoder, tokens = random_decoder(), random_tokens(2, 2, 3)
    assert relevance(decoder, Memory.empty(2, 2, 2, 8), tokens, tokens).shape == (2, 2, 3, 2, 2, 0)
    assert relevance(decoder, random_memory(), tokens, torch.full_like(tokens, -100)).shape == (2, 2, 0, 2, 2, 5)


def test_it_leaves_no_trace_and_works_without_gradients_around_it():
    decoder, tokens = random_decoder().requires_grad_(True), random_tokens(2, 1, 3)
    with torch.inference_mode():
        memory = random_memory(masked=1)
        inside = relevance(decoder, memory, tokens.clone(), tokens.clone())
    outside = relevance(decoder, memory, tokens, tokens)
    assert torch.equal(inside, outside) and not outside.requires_grad
    assert all(parameter.grad is None for parameter in decoder.parameters())
    assert not memory.values.requires_grad


def test_what_does_not_fit_is_refused():
    with pytest.raises(MmxError, match=r"targets are \[2, 1, 3\]; expected \[B, K, T\] = \[2, 1, 4\], as the tokens"):
        relevance(random_decoder(), random_memory(), random_tokens(2, 1, 4), random_tokens(2, 1, 3))
    with pytest.raises(MmxError, match=r"words are \[2, 4\]"):
        relevance(random_decoder(), random_memory(), random_tokens(2, 1, 4), random_tokens(2, 1, 4), random_tokens(2, 1, 4)[:, 0])


def test_heads_are_summed_before_layers_keep_what_speaks_for_the_word():
    parts = torch.tensor([[[3.0, -1.0], [-1.0, -2.0]], [[0.5, 1.0], [0.25, 1.0]]])  # [L, H, S]
    assert relevance_maps(parts).tolist() == [2.75, 2.0]


@pytest.mark.parametrize("dtype, close", [("float32", 1e-5), ("int8", 0.03)])
def test_a_loaded_model_whose_decoder_is_packed_tells_the_same(tmp_path, dtype, close):
    model = tiny_model(width=256)
    folder, tokens = save_model(tmp_path / "wide", model), torch.tensor([[[1, 3, 7, 9]]])
    packed, memory = load(folder, dtype=dtype), Pipeline(model).encode(numbers=[[0.3, -0.5, 0.9]])
    assert packed.model.decoder.is_prepacked or dtype == "float32"
    plain, other = (relevance(m.decoder, memory, tokens, tokens) for m in (model, packed.model))
    assert (other - plain).abs().max() <= close * plain.abs().max()
