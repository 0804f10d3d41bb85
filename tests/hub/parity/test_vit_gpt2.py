"""ViT-GPT2 in mmx against transformers: the same logits in float64, the same tokens."""

import pytest
import torch
from parity_cases import assert_diverse, assert_logits, letters, read, saved, shaken, spoken, until_end
from transformers import (
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from mmx.hub import load_hf_model
from mmx.models.source import SourceBatch

SIDE, SIZE, EOS = 32, 90, 0


def build(width, seed=0, **decoder):
    """A tiny reference; the encoder is 32 wide, so that another `width` needs a map between."""
    vision = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=SIDE, patch_size=8
    )
    facts = {"n_embd": width, "n_layer": 2, "n_head": 4, "vocab_size": SIZE, "n_positions": 40, **decoder}
    text = GPT2Config(**facts, add_cross_attention=True, is_decoder=True, bos_token_id=EOS, eos_token_id=EOS)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = EOS, EOS, EOS
    return shaken(VisionEncoderDecoderModel(config), seed)


@pytest.fixture(scope="module", params=[32, 24], ids=["widths equal", "a map between"])
def pair(request, tmp_path_factory):
    """(the reference in float64, what mmx made of its folder)."""
    reference = build(request.param)
    folder = tmp_path_factory.mktemp("published")
    tokenizer = letters(SIZE, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    saved(folder, reference, tokenizer, ViTImageProcessor(size={"height": SIDE, "width": SIDE}))
    return reference.double(), read(str(folder))


def pictures(count):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def encoded(model, pixels):
    return model.encode({"image": SourceBatch({"pixels": pixels}, torch.arange(len(pixels)))}, len(pixels))


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_are_the_same_at_every_position(pair, batch):
    reference, model = pair
    tokens = torch.randint(1, SIZE, (batch, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(pixel_values=pictures(batch), decoder_input_ids=tokens).logits
        assert_logits(model, encoded(model, pictures(batch)), tokens, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "early_stopping": True}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_texts_are_the_same(pair, batch, options):
    reference, model = pair
    with torch.no_grad():
        theirs = reference.generate(pictures(batch), max_new_tokens=16, **options)
        ours = spoken(model, encoded(model, pictures(batch)), [[[EOS]]] * batch, max_new_tokens=16, **options)
    expected = until_end(theirs, 1, EOS)
    assert [row[0] for row in ours] == expected
    if batch > 1:
        assert_diverse(expected)


@pytest.mark.slow
def test_logits_are_the_same_at_the_published_size(tmp_path):
    """As nlpconnect/vit-gpt2-image-captioning: a ViT-B/16 of 224 pixels and a GPT-2 of 12 layers."""
    torch.manual_seed(0)
    text = GPT2Config(add_cross_attention=True, is_decoder=True, bos_token_id=EOS, eos_token_id=EOS)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(), text)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = EOS, EOS, EOS
    reference = VisionEncoderDecoderModel(config).eval()
    tokenizer = letters(SIZE, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    model = load_hf_model(saved(tmp_path, reference, tokenizer, ViTImageProcessor()))[0]
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(7))
    tokens = torch.randint(1, text.vocab_size, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(pixel_values=pixels, decoder_input_ids=tokens).logits
        found = model.decoder(tokens[:, None], encoded(model, pixels))[:, 0]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
