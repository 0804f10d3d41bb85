"""Weight tying: all attention uses the key and value weights of the first source, which are saved once."""

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

HIDDEN_SIZE = 16
NUM_HEADS = 2
NUM_LAYERS = 2
TEXTS = ["a red cat", "two dogs"]
TOKENS = torch.tensor([[[1, 3, 70, 90]], [[1, 3, 80, 60]]])
SIZES = {
    "hidden_size": HIDDEN_SIZE,
    "num_heads": NUM_HEADS,
    "num_layers": NUM_LAYERS,
    "max_position_embeddings": 48,
}


def text_source(projection=None, **options):
    return {"encoder": "text", "options": {**SIZES, **options}, "projection": projection or {}}


def build_model(sources=None, tie="all", **decoder):
    values = {"sources": sources or {"text": text_source(), "other": text_source()}, "tie_key_value": tie}
    config = ModelConfig.model_validate({**values, "decoder": {**SIZES, **decoder}})
    return randomize_parameters(Model(config, toy_tokenizer())).eval()


def memory_of(model, names=("text", "other")):
    return model.encode({name: model.collate(name, TEXTS) for name in names}, len(TEXTS))


@torch.no_grad()
def logits(model, names=("text", "other")):
    return model.decoder(TOKENS, memory_of(model, names))


def self_attentions(module):
    return [submodule for submodule in module.modules() if isinstance(submodule, SelfAttention)]


def untied(model):
    """The reference: every tied layer has a copy of the weights."""
    reference = copy.deepcopy(model)
    for name, module in list(reference.named_modules()):
        if isinstance(module, TiedLinear):
            reference.set_submodule(name, copy.deepcopy(module._owner[0]))
    return reference


def test_all_attention_uses_the_owners_key_weight():
    """A change of it changes the keys of the other source, of the decoder and of both text encoders, and no more."""
    model = build_model()
    key = model.sources["text"].projection.key.weight
    x = torch.randn(1, 3, HIDDEN_SIZE)
    features = torch.randn(2, 4, HIDDEN_SIZE)
    modules = self_attentions(model)
    assert len(modules) == 3 * NUM_LAYERS, "the decoder's and those of two encoders"
    before = [module.qkv(x) for module in modules]
    other = model.sources["other"].projection.key(features)
    with torch.no_grad():
        key.add_(1.0)
    expected = x.sum(-1, keepdim=True).expand(-1, -1, HIDDEN_SIZE)
    for module, old in zip(modules, before, strict=True):
        queries, keys, values = (module.qkv(x) - old).chunk(3, -1)
        torch.testing.assert_close(keys, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(queries, torch.zeros_like(expected)), "queries have weights of their own"
        assert torch.equal(values, torch.zeros_like(expected)), "values have another weight"
    change = model.sources["other"].projection.key(features) - other
    torch.testing.assert_close(change, features.sum(-1, keepdim=True).expand_as(change), atol=1e-5, rtol=1e-5)


def test_all_attention_uses_the_owners_value_weight():
    model = build_model()
    with torch.no_grad():
        model.sources["text"].projection.value.weight.zero_()
        model.sources["text"].projection.value.bias.zero_()
        assert memory_of(model).values.abs().max() == 0
        for module in self_attentions(model):
            assert module.qkv(torch.randn(1, 3, HIDDEN_SIZE))[..., 2 * HIDDEN_SIZE :].abs().max() == 0


def test_parameters_are_counted_and_saved_once():
    tied = build_model()
    untied_model = build_model(tie="layers")
    key_and_value = 2 * (HIDDEN_SIZE * HIDDEN_SIZE + HIDDEN_SIZE)
    saved = key_and_value * (3 * NUM_LAYERS + 1)  # in every self-attention, and in the second source
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (tied, untied_model)]
    assert counts[1] - counts[0] == saved
    assert sum(tensor.numel() for tensor in tied.state_dict().values()) == counts[0]
    assert unique_tensors(tied.state_dict()).keys() == tied.state_dict().keys()
    assert not [name for name in tied.state_dict() if name.startswith("sources.other.projection.key")]


def test_a_saved_model_loads_identical_and_tied(tmp_path):
    model = build_model()
    loaded = load_model(save_model(tmp_path / "tied", model))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.tie_key_value == "all"
    key = loaded.sources["text"].projection.key.weight
    assert all(module.qkv.key.weight is key for module in self_attentions(loaded))


def test_tied_weights_equal_copies_of_them():
    model = build_model()
    torch.testing.assert_close(logits(model), logits(untied(model)), atol=0, rtol=0)


def test_a_deep_copy_is_tied_to_its_own_weights():
    model = build_model()
    before = logits(model)
    copied = copy.deepcopy(model)
    key = copied.sources["text"].projection.key.weight
    assert all(module.qkv.key.weight is key for module in self_attentions(copied))
    with torch.no_grad():
        key.add_(1.0)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(copied), before)


def test_gradients_are_summed_over_all_uses():
    model = build_model()
    reference = untied(model)
    for each in (model, reference):
        each.decoder(TOKENS, memory_of(each)).square().sum().backward()
    users = [source.projection for source in reference.sources.values()]
    users += [module.qkv for module in self_attentions(reference)]
    assert len(users) == 3 * NUM_LAYERS + 2
    for name in ("key", "value"):
        gradients = [getattr(user, name).weight.grad for user in users]
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        found = getattr(model.sources["text"].projection, name).weight.grad
        torch.testing.assert_close(found, torch.stack(gradients).sum(0), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
@torch.no_grad()
def test_generation_equals_that_of_untied_weights(num_beams):
    model = build_model()
    memory = memory_of(model)
    reference = untied(model)
    prompts = PromptBatch(TOKENS[:, :, :2], torch.ones(2, 1, 2, dtype=torch.bool))
    options = GenerationConfig(max_new_tokens=8, num_beams=num_beams, num_return_sequences=num_beams)
    steps = [
        CachedDecodeStep(model.decoder, memory, 8),
        CachedDecodeStep(model.decoder, memory, 8, fast=False),
        UncachedDecodeStep(reference.decoder, memory_of(reference)),
    ]
    assert steps[0].fast and not steps[1].fast
    generated = []
    for step in steps:
        outputs = generate(step, prompts, options, model.tokenizer.eos_token_id)
        generated.append([output.tokens for row in outputs for stream in row for output in stream])
    assert generated[0] == generated[1] == generated[2]
    assert len({tuple(tokens) for tokens in generated[0]}) > 1, "different texts are compared"


@torch.no_grad()
def test_a_mounted_source_is_tied():
    model = build_model({"text": text_source()})
    before = logits(model, ("text",))
    extended = mount(model, {"later": SourceConfig.model_validate(text_source())})
    assert torch.equal(logits(extended, ("text",)), before)
    key = model.sources["text"].projection.key.weight
    assert extended.sources["later"].projection.key.weight is key
    assert all(module.qkv.key.weight is key for module in self_attentions(extended.sources["later"]))
    assert all(isinstance(module.qkv, TiedQKVProjection) for module in self_attentions(extended))
    key.add_(1.0)
    assert not torch.equal(logits(extended, ("text",)), before)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("int8", 0.05)])
@torch.no_grad()
def test_a_prepacked_decoder_stays_tied(dtype, tolerance):
    sizes = {"hidden_size": 256, "num_heads": 4}
    model = build_model({"text": text_source(**sizes)}, **sizes)
    expected = logits(model, ("text",))
    model.prepare_for_inference(dtype)
    assert model.decoder.is_prepacked
    assert type(model.decoder.layers[0].self_attention.qkv.key) is not PrepackedLinear
    difference = (logits(model, ("text",)) - expected).abs().max() / expected.abs().max()
    assert difference < tolerance


@torch.no_grad()
def test_a_bfloat16_decoder_is_tied_to_a_float32_source():
    model = build_model()
    expected = logits(model)
    model.decoder.to(torch.bfloat16)
    memory = memory_of(model).to(dtype=torch.bfloat16)
    found = model.decoder(TOKENS, memory)
    assert found.dtype == torch.bfloat16
    assert model.sources["text"].projection.key.weight.dtype == torch.float32
    assert (found.float() - expected).abs().max() / expected.abs().max() < 0.05


def test_weights_without_bias_are_tied():
    model = build_model({"text": text_source({"bias": False}, bias=False)}, bias=False)
    assert all(module.qkv.query.bias is None for module in self_attentions(model))
    torch.testing.assert_close(logits(model, ("text",)), logits(untied(model), ("text",)), atol=0, rtol=0)


def test_the_query_is_the_first_rows_of_the_fused_projection():
    torch.manual_seed(3)
    plain = TextEncoder(TextEncoder.Options(**SIZES), toy_tokenizer())
    fused = plain.layers[0].self_attention.qkv
    torch.manual_seed(3)
    values = {"sources": {"text": text_source()}, "decoder": SIZES, "tie_key_value": "all"}
    tied = Model(ModelConfig.model_validate(values), toy_tokenizer())
    query = tied.encoders["text"].layers[0].self_attention.qkv.query
    assert isinstance(fused, nn.Linear)
    assert torch.equal(query.weight, fused.weight[:HIDDEN_SIZE])


# ---- layers only -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tie", "layers"), [("none", NUM_LAYERS), ("layers", 1), ("all", 1)])
def test_layers_of_a_memory(tie, layers):
    model = build_model(tie=tie)
    assert len(memory_of(model).keys) == layers
    has_tied_weights = any(isinstance(module, TiedLinear) for module in model.modules())
    assert has_tied_weights == (tie == "all")


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "module", "given", "expected"),
    [
        ({"text": text_source(hidden_size=32)}, "text", [32, 32], [16, 32]),
        ({"text": text_source({"hidden_size": 24})}, "text", [16, 16], [16, 24]),
        ({"text": text_source({"hidden_size": 16}, hidden_size=32, num_heads=4)}, "text", [32, 32], [16, 16]),
        ({"text": text_source(), "other": text_source(hidden_size=32)}, "source other", [16, 32], [16, 16]),
    ],
)
def test_other_shapes_are_refused(sources, module, given, expected):
    with pytest.raises(ConfigError) as error:
        build_model(sources)
    assert error.value.code == "tie_key_value.shape"
    assert error.value.details == {"module": module, "shape": given, "expected": expected}
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("options", "heads"), [({"num_heads": 4}, [4, 4]), ({"num_kv_heads": 1}, [2, 1])])
def test_other_numbers_of_heads_are_refused(options, heads):
    with pytest.raises(ConfigError) as error:
        build_model({"text": text_source(**options)})
    assert error.value.code == "tie_key_value.shape"
    assert error.value.details == {"module": "text", "heads": heads, "expected": 2}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sources": {"text": text_source({"bias": False})}}, "bias: true .* of text"),
        ({"decoder": DecoderConfig(**SIZES, bias=False)}, "bias: false .* of text"),
        ({"decoder": DecoderConfig(**SIZES, num_kv_heads=1)}, "num_kv_heads"),
        ({"question_encoder": SIZES, "question_input": "question_encoder"}, "question_encoder"),
    ],
)
def test_contradictions_are_refused_by_the_schema(changes, named):
    values = {"sources": {"text": text_source()}, "decoder": SIZES, "tie_key_value": "all"}
    with pytest.raises(ValueError, match=named):
        ModelConfig.model_validate({**values, **changes})
