"""BLIP captions in mmx against transformers: the same logits in float64, the same generated tokens."""

import pytest
import torch
from blip_cases import BOS, PAD, SEP, SIDE, full_config, processor, random_tokens, tiny_config, tokenizer
from parity_cases import (
    PUBLISHED_SIZE_TOLERANCE,
    assert_diverse,
    assert_logits,
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
from PIL import Image
from transformers import BlipForConditionalGeneration

from mmx.errors import MmxError
from mmx.hub import load_hf_model
from mmx.inference.pipeline import Pipeline

HEAD = "text_decoder.cls.predictions"
OPTIONS = [{}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 3, "early_stopping": True}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(the reference, its folder)."""
    reference = randomized(BlipForConditionalGeneration(tiny_config()), seed=2)
    return reference, save_all(tmp_path_factory.mktemp("blip"), reference, tokenizer(), processor())


@pytest.fixture(scope="module")
def models(checkpoint):
    """(the reference, the model that mmx loads from its folder), in float64."""
    reference, folder = checkpoint
    return reference.double(), load_double(folder)


@pytest.fixture(scope="module")
def copy(checkpoint, tmp_path_factory):
    """(another folder of the same model, its tensors), for changes."""
    reference, _ = checkpoint
    folder = save_all(tmp_path_factory.mktemp("copy"), reference, tokenizer(), processor())
    return folder, rewrite_tensors(folder, dict)


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_equal_at_every_position(models, batch):
    reference, model = models
    pixels = random_pixels(batch, SIDE)
    tokens = random_tokens(batch, 9)
    with torch.no_grad():
        expected = reference(pixel_values=pixels, input_ids=tokens).logits
        assert_logits(model, encode_inputs(model, "image", {"pixels": pixels}), tokens, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_generated_tokens_equal(models, options):
    reference, model = models
    pixels = random_pixels(3, SIDE)
    theirs = reference.generate(pixels, max_new_tokens=16, **options)
    memory = encode_inputs(model, "image", {"pixels": pixels})
    ours = generate_tokens(model, memory, [[[BOS]]] * 3, max_new_tokens=16, **options)
    expected = strip_generated(theirs, 1, SEP)
    assert [row[0] for row in ours] == expected
    assert_diverse(expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_prompts_of_unequal_length_in_a_batch_are_continued_as_alone(models, options):
    """transformers puts the caption prefix after the start token, in place of the [CLS] of the tokenizer."""
    reference, model = models
    prefixes = ["a picture of", "it", "", "two dogs on a mat"]
    pixels = random_pixels(4, SIDE)
    prompts = []
    expected = []
    for row, prefix in enumerate(prefixes):
        ids = tokenizer()(prefix, return_tensors="pt").input_ids  # [CLS] ... [SEP]
        prompts.append([[BOS, *ids[0, 1:-1].tolist()]])
        theirs = reference.generate(pixels[row : row + 1], input_ids=ids, max_new_tokens=12, **options)
        expected += strip_generated(theirs, ids.shape[1] - 1, SEP)
    memory = encode_inputs(model, "image", {"pixels": pixels})
    ours = generate_tokens(model, memory, prompts, max_new_tokens=12, **options)
    assert [row[0] for row in ours] == expected
    assert_diverse(expected)


def test_prompts_over_one_image_are_continued_as_alone(models):
    reference, model = models
    prompts = [[BOS], [BOS, 30, 31, 32], [BOS, 40]]
    pixels = random_pixels(1, SIDE)
    memory = encode_inputs(model, "image", {"pixels": pixels})
    (ours,) = generate_tokens(model, memory, [prompts], max_new_tokens=12)
    for prompt, generated in zip(prompts, ours, strict=True):
        theirs = reference.generate(pixels, input_ids=torch.tensor([[*prompt, SEP]]), max_new_tokens=12)
        assert [generated] == strip_generated(theirs, len(prompt), SEP)


def test_pipeline_captions_an_image_as_transformers(checkpoint):
    reference, folder = checkpoint
    model, generation, _ = load_hf_model(folder)
    pipeline = Pipeline(model.double(), generation)
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    pixels = processor()(image, return_tensors="pt")["pixel_values"].double()
    with torch.no_grad():
        theirs = reference.double().generate(pixels, max_new_tokens=generation.max_new_tokens)
    (tokens,) = strip_generated(theirs, 1, SEP)
    words = tokenizer()
    expected = words.tokenize(words.decode(tokens, skip_special_tokens=True))
    assert words.tokenize(pipeline.caption(image)) == expected
    with pytest.raises(MmxError, match="not to answer questions"):
        pipeline.ask(image, "who?")


def test_configuration_comes_from_the_checkpoint(models):
    _, model = models
    decoder = model.config.decoder
    assert (decoder.num_heads, decoder.norm_placement, decoder.norm_eps) == (3, "post", 1e-12)
    assert (model.tokenizer.pad_token_id, model.tokenizer.eos_token_id) == (PAD, SEP)
    assert model.tokenizer.encode_prompt(model.prompt()) == [BOS]
    assert model.config.sources["image"].options["architecture"]["image_size"] == SIDE


@pytest.mark.parametrize(
    "name",
    [
        "text_decoder.bert.encoder.layer.1.crossattention.self.value.bias",
        "text_decoder.bert.embeddings.word_embeddings.weight",
        f"{HEAD}.bias",
        "vision_model.encoder.layers.1.mlp.fc1.weight",
    ],
)
def test_missing_tensor_is_named(copy, name):
    folder, tensors = copy
    rewrite_tensors(folder, lambda _: without(name)(tensors))
    error = load_error(folder)
    assert error.code in ("hub.missing_tensors", "encoder.missing_tensors")
    assert name.removeprefix("vision_model.") in error.details["tensors"]


@pytest.mark.parametrize("name", ["text_decoder.bert.pooler.dense.weight", "itm_head.bias", "vision_model.more.weight"])
def test_unexpected_tensor_is_named(copy, name):
    folder, tensors = copy
    rewrite_tensors(folder, lambda _: {**tensors, name: torch.zeros(3)})
    error = load_error(folder)
    assert error.code in ("hub.unexpected_tensors", "encoder.unexpected_tensors")
    assert error.details["tensors"] == [name.removeprefix("vision_model.")]


def test_tied_tensors_and_buffers_may_be_stored_twice_or_by_the_other_name(models, copy):
    _, model = models
    folder, tensors = copy
    embedding = "text_decoder.bert.embeddings.word_embeddings.weight"
    bias = f"{HEAD}.bias"
    tied = {f"{HEAD}.decoder.weight": tensors[embedding].clone(), f"{HEAD}.decoder.bias": tensors[bias].clone()}
    buffers = {"text_decoder.bert.embeddings.position_ids": torch.arange(40)[None]}
    untied = {name: tensor for name, tensor in tensors.items() if name not in (embedding, bias)}
    expected = model.state_dict()
    for changed in ({**tensors, **tied, **buffers}, {**untied, **tied}):
        rewrite_tensors(folder, lambda _, changed=changed: changed)
        found = load_double(folder).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_unsupported_configuration_is_an_error(checkpoint, tmp_path):
    reference, _ = checkpoint
    reference.config.text_config.tie_word_embeddings = False
    try:
        folder = save_all(tmp_path, reference, tokenizer(), processor())
    finally:
        reference.config.text_config.tie_word_embeddings = True
    error = load_error(folder)
    assert (error.code, error.details["key"]) == ("hub.unsupported_config", "tie_word_embeddings")
    assert (error.details["given"], error.details["expected"]) == (False, True)


@pytest.mark.slow
def test_logits_equal_at_the_published_size(tmp_path):
    reference = randomized(BlipForConditionalGeneration(full_config()), size=0.05)
    model = load_hf_model(save_all(tmp_path, reference, tokenizer(30522), processor(384))).model
    pixels = random_pixels(1, 384, torch.float32)
    tokens = torch.randint(0, 30524, (1, 8))
    with torch.no_grad():
        expected = reference(pixel_values=pixels, input_ids=tokens).logits
        found = model.decoder(tokens[:, None], encode_inputs(model, "image", {"pixels": pixels}))[:, 0]
    assert relative_difference(found, expected) < PUBLISHED_SIZE_TOLERANCE
