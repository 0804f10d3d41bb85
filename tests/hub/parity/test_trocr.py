"""TrOCR in mmx against transformers: the same logits in float64, the same generated tokens, for all published kinds."""

import pytest
import torch
from parity_cases import (
    PUBLISHED_SIZE_TOLERANCE,
    assert_diverse,
    assert_logits,
    byte_tokenizer,
    encode_inputs,
    generate_tokens,
    load_double,
    load_error,
    random_pixels,
    randomized,
    relative_difference,
    rewrite_tensors,
    save_all,
    strip_generated,
    without,
)
from transformers import (
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from mmx.hub import load_hf_model

SIDE = 32
VOCAB_SIZE = 90
BOS, PAD, EOS = range(3)
PREFIX = "decoder.model.decoder."
UNUSED_BUFFER = f"{PREFIX}embed_positions._float_tensor"
HEAD = "decoder.output_projection.weight"
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
    "handwritten, with a bridge": {"d_model": 24},
    "small": {**HANDWRITTEN, "activation_function": "relu", "scale_embedding": True},
    "printed": {**PRINTED, "tie_word_embeddings": False},
    "printed, tied": PRINTED,
}
DEFAULT_RUN = ("handwritten", "printed")
PARAMS = [pytest.param(name, marks=[] if name in DEFAULT_RUN else pytest.mark.slow) for name in VARIANTS]


def build(seed=0, vision=None, **decoder):
    """A tiny reference; its vision encoder has no biases in queries, keys and values, as the published ones."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    vision_config = ViTConfig(**{**small, "image_size": SIDE, "patch_size": 8, **(vision or {})}, qkv_bias=False)
    tiny = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 40, "vocab_size": VOCAB_SIZE}
    text = TrOCRConfig(**{**tiny, "max_position_embeddings": 40, **decoder}, is_decoder=True, add_cross_attention=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision_config, text)
    config.decoder_start_token_id = EOS
    config.pad_token_id = PAD
    config.eos_token_id = EOS
    reference = VisionEncoderDecoderModel(config)
    return reference if seed is None else randomized(reference, seed)


def save(folder, reference, side=SIDE):
    tokenizer = byte_tokenizer(
        reference.config.decoder.vocab_size, bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    )
    return save_all(folder, reference, tokenizer, ViTImageProcessor(size={"height": side, "width": side}))


@pytest.fixture(scope="module", params=PARAMS)
def models(request, tmp_path_factory):
    """(the reference, the model that mmx loads from its folder), in float64."""
    reference = build(**VARIANTS[request.param])
    folder = save(tmp_path_factory.mktemp("checkpoint"), reference)
    return reference.double(), load_double(folder)


def random_tokens(batch, length, vocab_size=VOCAB_SIZE):
    """Tokens [B, T] without padding, for which transformers counts no positions."""
    return torch.randint(EOS, vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_equal_at_every_position(models, batch):
    reference, model = models
    pixels = random_pixels(batch, SIDE)
    tokens = random_tokens(batch, 40)  # the maximum number of positions
    with torch.no_grad():
        expected = reference(pixel_values=pixels, decoder_input_ids=tokens).logits
        assert_logits(model, encode_inputs(model, "image", {"pixels": pixels}), tokens, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "early_stopping": True}], ids=str)
def test_generated_tokens_equal(models, options):
    reference, model = models
    pixels = random_pixels(3, SIDE)
    options = {**options, "max_new_tokens": 16, "suppress_tokens": [PAD]}
    with torch.no_grad():
        theirs = reference.generate(pixels, **options)
        memory = encode_inputs(model, "image", {"pixels": pixels})
        ours = generate_tokens(model, memory, [[[EOS]]] * 3, **options)
    expected = strip_generated(theirs, 1, EOS)
    assert [row[0] for row in ours] == expected
    assert_diverse(expected)


def test_unused_buffer_of_older_files_is_dropped_only_with_sinusoidal_positions(tmp_path):
    def add_buffer(tensors):
        return tensors | {UNUSED_BUFFER: torch.ones(1)}

    rewrite_tensors(save(tmp_path / "printed", build(**PRINTED)), add_buffer)
    load_hf_model(str(tmp_path / "printed"))
    rewrite_tensors(save(tmp_path / "learned", build(**HANDWRITTEN)), add_buffer)
    error = load_error(tmp_path / "learned")
    assert (error.code, error.details["tensors"]) == ("hub.unexpected_tensors", [UNUSED_BUFFER])


@pytest.fixture(scope="module")
def bridged(tmp_path_factory):
    """A folder with a bridge, and its tensors."""
    folder = save(tmp_path_factory.mktemp("bridged"), build(d_model=24))
    return folder, rewrite_tensors(folder, dict)


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
def test_missing_or_misshapen_tensor_is_named(bridged, name):
    folder, tensors = bridged
    rewrite_tensors(folder, lambda _: without(name)(tensors))
    missing = load_error(folder)
    assert missing.code == "hub.missing_tensors"
    assert name in missing.details["tensors"]
    rewrite_tensors(folder, lambda _: tensors | {name: torch.zeros(3, 5)})
    misshapen = load_error(folder)
    assert misshapen.code == "hub.tensor_shape"
    assert name in str(misshapen)


@pytest.mark.parametrize("name", [f"{PREFIX}layers.2.fc1.weight", f"{PREFIX}layer_norm.weight", "final_logits_bias"])
def test_unexpected_tensor_is_named(tmp_path, name):
    folder = save(tmp_path, build(**PRINTED))
    rewrite_tensors(folder, lambda tensors: tensors | {name: torch.zeros(3)})
    error = load_error(folder)
    assert (error.code, error.details["tensors"]) == ("hub.unexpected_tensors", [name])


def test_missing_untied_head_is_named(tmp_path):
    folder = save(tmp_path, build(**VARIANTS["printed"]))
    rewrite_tensors(folder, without(HEAD))
    assert load_error(folder).details["tensors"] == [HEAD]


@pytest.mark.slow
def test_logits_equal_at_the_published_size(tmp_path):
    """As microsoft/trocr-base-handwritten: a ViT-B/16 of 384 pixels, a decoder of size 1024."""
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    large = {"d_model": 1024, "decoder_layers": 12, "decoder_attention_heads": 16, "decoder_ffn_dim": 4096}
    torch.manual_seed(0)
    reference = build(
        None,
        vision={**base, "image_size": 384, "patch_size": 16},
        **{**large, "cross_attention_hidden_size": 768, "max_position_embeddings": 512, "vocab_size": 50265},
    ).eval()
    model = load_hf_model(save(tmp_path, reference, 384)).model
    pixels = random_pixels(1, 384, torch.float32)
    tokens = random_tokens(1, 20, 50265)
    with torch.no_grad():
        expected = reference(pixel_values=pixels, decoder_input_ids=tokens).logits
        found = model.decoder(tokens[:, None], encode_inputs(model, "image", {"pixels": pixels}))[:, 0]
    assert relative_difference(found, expected) < PUBLISHED_SIZE_TOLERANCE
