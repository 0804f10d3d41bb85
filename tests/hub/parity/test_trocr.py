"""TrOCR in mmx against transformers: the same logits in float64, the same tokens, in all that was published of it."""

import pytest
import torch
from parity_cases import assert_diverse, assert_logits, change, letters, read, refused, saved, shaken, spoken, until_end
from transformers import (
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from mmx.hub import load_hf_model
from mmx.models.source import SourceBatch

SIDE, SIZE, BOS, PAD, EOS = 32, 90, 0, 1, 2
PREFIX = "decoder.model.decoder."
MARKER = f"{PREFIX}embed_positions._float_tensor"
HANDWRITTEN = {"d_model": 24, "cross_attention_hidden_size": 32}
PRINTED = {
    "d_model": 32,
    "use_learned_position_embeddings": False,
    "layernorm_embedding": False,
    "activation_function": "relu",
    "scale_embedding": True,
}
VARIANTS = {
    "handwritten": HANDWRITTEN,
    "handwritten, a map between": {"d_model": 24},
    "small": {**HANDWRITTEN, "activation_function": "relu", "scale_embedding": True},
    "printed": {**PRINTED, "tie_word_embeddings": False},
    "printed, tied": PRINTED,
}


def build(seed=0, vision=None, **decoder):
    """A tiny reference; its picture encoder has no biases in queries, keys and values, as the published ones."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    vision = ViTConfig(**{**small, "image_size": SIDE, "patch_size": 8, **(vision or {})}, qkv_bias=False)
    tiny = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 40, "vocab_size": SIZE}
    text = TrOCRConfig(**{**tiny, "max_position_embeddings": 40, **decoder}, is_decoder=True, add_cross_attention=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = EOS, PAD, EOS
    reference = VisionEncoderDecoderModel(config)
    return reference if seed is None else shaken(reference, seed)


def save(folder, reference, side=SIDE):
    tokenizer = letters(SIZE, bos_token="<s>", pad_token="<pad>", eos_token="</s>")
    return saved(folder, reference, tokenizer, ViTImageProcessor(size={"height": side, "width": side}))


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def pair(request, tmp_path_factory):
    """(the reference in float64, what mmx made of its folder)."""
    reference = build(**request.param)
    folder = save(tmp_path_factory.mktemp("published"), reference)
    return reference.double(), read(folder)


def pictures(count, side=SIDE, dtype=torch.float64):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(7), dtype=dtype)


def encoded(model, pixels):
    return model.encode({"image": SourceBatch({"pixels": pixels}, torch.arange(len(pixels)))}, len(pixels))


def words(batch, length, size=SIZE):
    """Tokens [B, T] without padding, whose positions transformers does not count."""
    return torch.randint(EOS, size, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_are_the_same_at_every_position(pair, batch):
    reference, model = pair
    tokens = words(batch, 40)  # as many as there are positions
    with torch.no_grad():
        expected = reference(pixel_values=pictures(batch), decoder_input_ids=tokens).logits
        assert_logits(model, encoded(model, pictures(batch)), tokens, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "early_stopping": True}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_texts_are_the_same(pair, batch, options):
    reference, model = pair
    options = {**options, "max_new_tokens": 16, "suppress_tokens": [PAD]}
    with torch.no_grad():
        theirs = reference.generate(pictures(batch), **options)
        ours = spoken(model, encoded(model, pictures(batch)), [[[EOS]]] * batch, **options)
    assert [row[0] for row in ours] == until_end(theirs, 1, EOS)
    if batch > 1:
        assert_diverse(until_end(theirs, 1, EOS))


def test_a_marker_of_older_files_is_dropped_where_positions_are_computed(tmp_path):
    change(save(tmp_path, build(**PRINTED)), lambda tensors: tensors | {MARKER: torch.ones(1)})
    load_hf_model(str(tmp_path))
    learned = tmp_path / "learned"
    change(save(learned, build(**HANDWRITTEN)), lambda tensors: tensors | {MARKER: torch.ones(1)})
    assert MARKER in refused(str(learned))


@pytest.mark.parametrize(
    "name",
    [
        f"{PREFIX}embed_tokens.weight",
        f"{PREFIX}embed_positions.weight",
        f"{PREFIX}layernorm_embedding.bias",
        f"{PREFIX}layers.1.self_attn.q_proj.bias",
        f"{PREFIX}layers.0.encoder_attn.v_proj.weight",
        f"{PREFIX}layers.1.final_layer_norm.weight",
        "enc_to_dec_proj.bias",
    ],
)
def test_a_tensor_that_lacks_or_has_another_shape_is_named(tmp_path, name):
    folder = save(tmp_path, build(d_model=24))
    whole = change(folder, lambda tensors: {key: tensors[key] for key in tensors if key != name})
    assert name in refused(folder)
    change(folder, lambda _: whole | {name: torch.zeros(3, 5)})
    assert name in refused(folder)


@pytest.mark.parametrize("name", [f"{PREFIX}layers.2.fc1.weight", f"{PREFIX}layer_norm.weight", "final_logits_bias"])
def test_a_tensor_too_many_is_named(tmp_path, name):
    folder = save(tmp_path, build(**PRINTED))
    change(folder, lambda tensors: tensors | {name: torch.zeros(3)})
    assert name in refused(folder)


def test_a_head_of_its_own_may_not_be_lacking(tmp_path):
    folder, head = save(tmp_path, build(**VARIANTS["printed"])), "decoder.output_projection.weight"
    change(folder, lambda tensors: {key: tensors[key] for key in tensors if key != head})
    assert head in refused(folder)


@pytest.mark.slow
def test_logits_are_the_same_at_the_published_size(tmp_path):
    """As microsoft/trocr-base-handwritten: a ViT-B/16 of 384 pixels, a decoder of 1024 that looks at its 768."""
    wide = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    deep = {"d_model": 1024, "decoder_layers": 12, "decoder_attention_heads": 16, "decoder_ffn_dim": 4096}
    torch.manual_seed(0)
    reference = build(
        None,
        vision={**wide, "image_size": 384, "patch_size": 16},
        **{**deep, "cross_attention_hidden_size": 768, "max_position_embeddings": 512, "vocab_size": 50265},
    ).eval()
    model = load_hf_model(save(tmp_path, reference, 384))[0]
    pixels, tokens = pictures(1, 384, torch.float32), words(1, 20, 50265)
    with torch.no_grad():
        expected = reference(pixel_values=pixels, decoder_input_ids=tokens).logits
        found = model.decoder(tokens[:, None], encoded(model, pixels))[:, 0]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
