"""One W_K and one W_V: all attention reads by it, it is kept once, and what is fast still equals what is slow."""

import copy

import pytest
import torch
from decoder_cases import randomize_parameters
from torch import nn

from mmx.config.schema import DecoderConfig, GenerationConfig, ModelConfig, SourceConfig
from mmx.encoders.text import TextEncoder
from mmx.errors import ConfigError
from mmx.generation import CachedDecodeStep, PromptBatch, generate
from mmx.generation.decode_step import UncachedDecodeStep
from mmx.models.checkpoint import load_model, save_model, unique_tensors
from mmx.models.model import Model, mount
from mmx.nn.layers import SelfAttention, TiedLinear, TiedQKVProjection
from mmx.nn.prepack import PrepackedLinear
from mmx.testing.toys import toy_tokenizer

WIDTH, HEADS, LAYERS = 16, 2, 2
TEXTS = ["a red cat", "two dogs"]
TOKENS = torch.tensor([[[1, 3, 70, 90]], [[1, 3, 80, 60]]])
FACTS = {"hidden_size": WIDTH, "num_heads": HEADS, "num_layers": LAYERS, "max_position_embeddings": 48}


def text_source(projection=None, **options):
    return {
        "encoder": "text",
        "options": {**FACTS, **options},
        "projection": {"share_layers": True} | (projection or {}),
    }


def some_model(sources=None, share=True, **decoder):
    document = {"sources": sources or {"text": text_source(), "other": text_source()}, "share_attention": share}
    config = ModelConfig.model_validate({**document, "decoder": {**FACTS, **decoder}})
    return randomize_parameters(Model(config, toy_tokenizer())).eval()


def memory_of(model, names=("text", "other")):
    return model.encode({name: model.collate(name, TEXTS) for name in names}, len(TEXTS))


@torch.no_grad()
def logits(model, names=("text", "other")):
    return model.decoder(TOKENS, memory_of(model, names))


def attentions(module):
    return [part for part in module.modules() if isinstance(part, SelfAttention)]


def untied(model):
    """The slow twin: every borrower has a copy of its own."""
    twin = copy.deepcopy(model)
    for name, part in list(twin.named_modules()):
        if isinstance(part, TiedLinear):
            twin.set_submodule(name, copy.deepcopy(part._owned[0]))
    return twin


def test_all_attention_reads_by_the_owners_weights():
    """A change of the owner's moves the keys of the other source, of the decoder to itself, of both text encoders."""
    model = some_model()
    key = model.sources["text"].projection.key.weight
    x, features = torch.randn(1, 3, WIDTH), torch.randn(2, 4, WIDTH)
    of_keys = slice(WIDTH, 2 * WIDTH)
    parts = attentions(model)
    assert len(parts) == 3 * LAYERS, "the decoder's and those of two encoders"
    before = [part.qkv(x) for part in parts]
    other = model.sources["other"].projection.key(features)
    with torch.no_grad():
        key.add_(1.0)
    for part, old in zip(parts, before, strict=True):
        moved = part.qkv(x) - old
        expected = x.sum(-1, keepdim=True).expand(-1, -1, WIDTH)
        torch.testing.assert_close(moved[..., of_keys], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(moved[..., :WIDTH], torch.zeros_like(expected)), "queries are their own"
        assert torch.equal(moved[..., 2 * WIDTH :], torch.zeros_like(expected)), "values have a map of their own"
    moved = model.sources["other"].projection.key(features) - other
    torch.testing.assert_close(moved, features.sum(-1, keepdim=True).expand_as(moved), atol=1e-5, rtol=1e-5)


def test_the_values_are_the_owners_too():
    model = some_model()
    with torch.no_grad():
        model.sources["text"].projection.value.weight.zero_()
        model.sources["text"].projection.value.bias.zero_()
        assert memory_of(model).values.abs().max() == 0
        assert all(part.qkv(torch.randn(1, 3, WIDTH))[..., 2 * WIDTH :].abs().max() == 0 for part in attentions(model))


def test_parameters_are_counted_and_saved_once():
    tied, free = some_model(), some_model(share=False)
    maps = 2 * (WIDTH * WIDTH + WIDTH)  # one W_K and one W_V, with their biases
    spared = maps * (3 * LAYERS + 1)  # in every self-attention, and in the second source
    count = [sum(p.numel() for p in model.parameters()) for model in (tied, free)]
    assert count[1] - count[0] == spared
    assert sum(t.numel() for t in tied.state_dict().values()) == count[0]
    assert unique_tensors(tied.state_dict()).keys() == tied.state_dict().keys()
    assert not [name for name in tied.state_dict() if name.startswith("sources.other.projection.key")]


def test_a_saved_model_says_the_same_to_the_bit(tmp_path):
    model = some_model()
    again = load_model(save_model(tmp_path / "tied", model))
    assert torch.equal(logits(again), logits(model))
    assert again.decoder.layers[1].self_attention.qkv.key._owned[0] is again.sources["text"].projection.key


def test_it_computes_what_copies_of_the_maps_compute():
    model = some_model()
    torch.testing.assert_close(logits(model), logits(untied(model)), atol=0, rtol=0)


def test_a_copy_is_tied_within_itself():
    model = some_model()
    before, twin = logits(model), copy.deepcopy(model)
    own = twin.sources["text"].projection.key
    assert all(part.qkv.key._owned[0] is own for part in attentions(twin))
    with torch.no_grad():
        own.weight.add_(1.0)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


def test_gradients_are_the_sum_over_all_places():
    model = some_model()
    twin = untied(model)
    for each in (model, twin):
        each.decoder(TOKENS, memory_of(each)).square().sum().backward()
    for name in ("key", "value"):
        places = [source.projection for source in twin.sources.values()] + [part.qkv for part in attentions(twin)]
        parts = [getattr(place, name).weight.grad for place in places]
        assert len(parts) == 3 * LAYERS + 2
        assert all(part.abs().max() > 0 for part in parts)
        found = getattr(model.sources["text"].projection, name).weight.grad
        torch.testing.assert_close(found, torch.stack(parts).sum(0), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_what_is_said_is_what_the_slow_twin_says(beams):
    model = some_model()
    memory, eos = memory_of(model), model.tokenizer.eos_token_id
    slow = memory_of(untied(model))
    prompt, mask = TOKENS[:, :, :2], torch.ones(2, 1, 2, dtype=torch.bool)
    options = GenerationConfig(max_new_tokens=8, num_beams=beams, num_return_sequences=beams)
    steps = [
        CachedDecodeStep(model.decoder, memory, 8),
        CachedDecodeStep(model.decoder, memory, 8, fast=False),
        UncachedDecodeStep(untied(model).decoder, slow),
    ]
    assert steps[0].fast and not steps[1].fast
    found = [generate(step, PromptBatch(prompt, mask), options, eos) for step in steps]
    said = [[text.tokens for row in texts for stream in row for text in stream] for texts in found]
    assert said[0] == said[1] == said[2]
    assert len({tuple(text) for text in said[0]}) > 1, "or the comparison would show nothing"


@torch.no_grad()
def test_what_is_mounted_borrows_too():
    model = some_model({"text": text_source()})
    before = logits(model, ("text",))
    grown = mount(model, {"later": SourceConfig.model_validate(text_source())})
    assert torch.equal(logits(grown, ("text",)), before)
    owner = model.sources["text"].projection
    assert grown.sources["later"].projection.key._owned[0] is owner.key
    assert all(part.qkv.key._owned[0] is owner.key for part in attentions(grown.sources["later"]))
    assert all(part.qkv.value._owned[0] is owner.value for part in attentions(grown.decoder))
    assert not any(isinstance(part.qkv.query, TiedQKVProjection) for part in attentions(grown))
    owner.key.weight.add_(1.0)
    assert not torch.equal(logits(grown, ("text",)), before)


@pytest.mark.parametrize(("kind", "allowed"), [("float32", 1e-5), ("int8", 0.05)])
@torch.no_grad()
def test_a_decoder_laid_out_for_speaking_still_borrows(kind, allowed):
    facts = {"hidden_size": 256, "num_heads": 4}
    model = some_model({"text": text_source(**facts)}, **facts)
    expected = logits(model, ("text",))
    model.prepare_for_inference(kind)
    assert any(isinstance(part, PrepackedLinear) for part in model.decoder.modules())
    assert type(model.decoder.layers[0].self_attention.qkv.key) is not PrepackedLinear
    error = (logits(model, ("text",)) - expected).abs().max() / expected.abs().max()
    assert error < allowed


@torch.no_grad()
def test_a_decoder_in_another_type_borrows_from_a_source_in_float32():
    model = some_model()
    expected = logits(model)
    model.decoder.to(torch.bfloat16)
    memory = memory_of(model).to(dtype=torch.bfloat16)
    found = model.decoder(TOKENS, memory)
    assert found.dtype == torch.bfloat16
    assert model.sources["text"].projection.key.weight.dtype == torch.float32
    assert (found.float() - expected).abs().max() / expected.abs().max() < 0.05


def test_no_biases_are_shared_as_none():
    model = some_model({"text": text_source({"bias": False}, biases=False)}, biases=False)
    parts = attentions(model)
    assert all(part.qkv.query.bias is None for part in parts)
    torch.testing.assert_close(logits(model, ("text",)), logits(untied(model), ("text",)), atol=0, rtol=0)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "decoder", "sentence"),
    [
        ({"text": text_source(width=32)}, {}, r"share_attention: text maps 32 to 32, source text 32 to 16; give them"),
        ({"text": text_source({"hidden_size": 24})}, {}, r"text maps 16 to 16, source text 24 to 16"),
        (
            {"text": text_source({"hidden_size": 16}, width=32, heads=4)},
            {},
            r"text maps 32 to 32, source text 16 to 16",
        ),
        ({"text": text_source(), "other": text_source(width=32)}, {}, r"source other maps 32 to 16, source text 16 to"),
        ({"text": text_source(heads=4)}, {}, r"text has 4 heads of queries and 4 of keys, source text 2 of both"),
        ({"text": text_source(kv_heads=1)}, {}, r"text has 2 heads of queries and 1 of keys, source text 2 of both"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_one_sentence(sources, decoder, sentence):
    with pytest.raises(ConfigError, match=sentence) as refused:
        some_model(sources, **decoder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"sources": {"text": text_source({"share_layers": False})}},
            "needs share_layers: true and bias: true .* text",
        ),
        ({"sources": {"text": text_source({"bias": False})}}, "needs share_layers: true and bias: true"),
        ({"decoder": DecoderConfig(**FACTS, bias=False)}, "bias: false .the decoder's biases. .* of text"),
        ({"decoder": DecoderConfig(**FACTS, num_kv_heads=1)}, "goes with neither a reader nor kv_heads"),
        ({"question_encoder": FACTS, "question_input": "question_encoder"}, "goes with neither a reader nor kv_heads"),
    ],
)
def test_contradictions_are_refused_before_anything_is_built(changes, sentence):
    given = {"sources": {"text": text_source()}, "decoder": FACTS, "share_attention": True}
    with pytest.raises(ValueError, match=sentence):
        ModelConfig.model_validate({**given, **changes})


def test_the_first_rows_of_a_fused_map_become_the_queries():
    torch.manual_seed(3)
    plain = TextEncoder(TextEncoder.Options(**FACTS), toy_tokenizer())
    fused = plain.layers[0].self_attention.qkv
    torch.manual_seed(3)
    shared = Model(
        ModelConfig.model_validate({"sources": {"text": text_source()}, "decoder": FACTS, "share_attention": True}),
        toy_tokenizer(),
    )
    query = shared.encoders["text"].layers[0].self_attention.qkv.query
    assert isinstance(fused, nn.Linear)
    assert torch.equal(query.weight, fused.weight[:WIDTH])
