"""ViT-GPT2 in mmx against transformers: the same logits in float64, the same generated tokens."""

import pytest
import torch
from parity_cases import (
    PUBLISHED_SIZE_TOLERANCE,
    assert_diverse,
    assert_logits,
    build_vit_gpt2,
    byte_tokenizer,
    encode_inputs,
    generate_tokens,
    load_double,
    random_pixels,
    relative_difference,
    save_all,
    save_vit_gpt2,
    strip_generated,
)
from transformers import (
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from mmx.hub import load_hf_model

SIDE = 32
VOCAB_SIZE = 90
EOS = 0


@pytest.fixture(
    scope="module", params=[32, pytest.param(24, marks=pytest.mark.slow)], ids=["equal sizes", "with a bridge"]
)
def models(request, tmp_path_factory):
    """(the reference, the model that mmx loads from its folder), in float64."""
    reference = build_vit_gpt2(request.param)
    folder = save_vit_gpt2(tmp_path_factory.mktemp("checkpoint"), reference)
    return reference.double(), load_double(folder)


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_equal_at_every_position(models, batch):
    reference, model = models
    pixels = random_pixels(batch, SIDE)
    tokens = torch.randint(1, VOCAB_SIZE, (batch, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(pixel_values=pixels, decoder_input_ids=tokens).logits
        assert_logits(model, encode_inputs(model, "image", {"pixels": pixels}), tokens, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "early_stopping": True}], ids=str)
def test_generated_tokens_equal(models, options):
    reference, model = models
    pixels = random_pixels(3, SIDE)
    with torch.no_grad():
        theirs = reference.generate(pixels, max_new_tokens=16, **options)
        memory = encode_inputs(model, "image", {"pixels": pixels})
        ours = generate_tokens(model, memory, [[[EOS]]] * 3, max_new_tokens=16, **options)
    expected = strip_generated(theirs, 1, EOS)
    assert [row[0] for row in ours] == expected
    assert_diverse(expected)


@pytest.mark.slow
def test_logits_equal_at_the_published_size(tmp_path):
    """As nlpconnect/vit-gpt2-image-captioning: a ViT-B/16 of 224 pixels and a GPT-2 of 12 layers."""
    torch.manual_seed(0)
    text = GPT2Config(add_cross_attention=True, is_decoder=True, bos_token_id=EOS, eos_token_id=EOS)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(), text)
    config.decoder_start_token_id = EOS
    config.pad_token_id = EOS
    config.eos_token_id = EOS
    reference = VisionEncoderDecoderModel(config).eval()
    tokenizer = byte_tokenizer(text.vocab_size, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    model = load_hf_model(save_all(tmp_path, reference, tokenizer, ViTImageProcessor())).model
    pixels = random_pixels(1, 224, torch.float32)
    tokens = torch.randint(1, text.vocab_size, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(pixel_values=pixels, decoder_input_ids=tokens).logits
        found = model.decoder(tokens[:, None], encode_inputs(model, "image", {"pixels": pixels}))[:, 0]
    assert relative_difference(found, expected) < PUBLISHED_SIZE_TOLERANCE
