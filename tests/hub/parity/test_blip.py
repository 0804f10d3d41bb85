"""BLIP captions in mmx against transformers: the same logits in float64, the same tokens."""

import re

import pytest
import torch
from blip_cases import (
    BOS,
    PAD,
    SEP,
    SIDE,
    encoded,
    full_config,
    pictures,
    processor,
    some_tokens,
    tiny_config,
    tokenizer,
    worst,
)
from parity_cases import assert_diverse, assert_logits, read, saved, shaken, spoken, until_end
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BlipForConditionalGeneration

from mmx.errors import CheckpointError, MmxError
from mmx.hub import load_hf_model
from mmx.inference.pipeline import Pipeline

HEAD = "text_decoder.cls.predictions"
OPTIONS = [{}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 3, "early_stopping": True}]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(the reference in float64, its folder)."""
    reference, folder = shaken(BlipForConditionalGeneration(tiny_config()), seed=2), tmp_path_factory.mktemp("blip")
    return reference, saved(folder, reference, tokenizer(), processor())


@pytest.fixture(scope="module")
def pair(published):
    """(the reference, what mmx made of its folder), in float64."""
    reference, folder = published
    return reference.double(), read(folder)


@pytest.fixture
def tensors(published, tmp_path):
    """(the tensors of the folder, what saves others in their stead and gives the new folder)."""
    reference, folder = published
    saved(tmp_path, reference, tokenizer(), processor())

    def written(changed):
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, tmp_path / "model.safetensors")
        return str(tmp_path)

    return load_file(f"{folder}/model.safetensors"), written


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_are_the_same_at_every_position(pair, batch):
    reference, model = pair
    tokens = some_tokens(batch, 9)
    with torch.no_grad():
        expected = reference(pixel_values=pictures(batch), input_ids=tokens).logits
        assert_logits(model, encoded(model, pictures(batch)), tokens, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_texts_are_the_same(pair, batch, options):
    reference, model = pair
    theirs = reference.generate(pictures(batch), max_new_tokens=16, **options)
    ours = spoken(model, encoded(model, pictures(batch)), [[[BOS]]] * batch, max_new_tokens=16, **options)
    expected = until_end(theirs, 1, SEP)
    assert [row[0] for row in ours] == expected
    if batch > 1:
        assert_diverse(expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_unequal_prompts_in_a_batch_are_each_continued_as_alone(pair, options):
    """transformers puts the beginning of a caption after the start token, where the tokenizer has put its [CLS]."""
    reference, model = pair
    prompts, words = ["a picture of", "it", "", "two dogs on a mat"], tokenizer()
    pixels, expected, ours = pictures(4), [], []
    for row, prompt in enumerate(prompts):
        ids = words(prompt, return_tensors="pt").input_ids  # its first and last token are [CLS] and [SEP]
        ours.append([[BOS, *ids[0, 1:-1].tolist()]])
        theirs = reference.generate(pixels[row : row + 1], input_ids=ids, max_new_tokens=12, **options)
        expected += until_end(theirs, ids.shape[1] - 1, SEP)
    together = spoken(model, encoded(model, pixels), ours, max_new_tokens=12, **options)
    assert [row[0] for row in together] == expected
    assert_diverse(expected)


def test_prompts_over_one_picture_are_each_continued_as_alone(pair):
    reference, model = pair
    prompts, pixels = [[BOS], [BOS, 30, 31, 32], [BOS, 40]], pictures(1)
    (together,) = spoken(model, encoded(model, pixels), [prompts], max_new_tokens=12)
    for prompt, found in zip(prompts, together, strict=True):
        ids = torch.tensor([[*prompt, SEP]])
        assert [found] == until_end(reference.generate(pixels, input_ids=ids, max_new_tokens=12), len(prompt), SEP)


def test_the_verbs_work_on_a_real_picture(published):
    """From the folder to the words, the picture's processor between."""
    reference, folder = published
    model, generation, _ = load_hf_model(folder)
    pipeline = Pipeline(model.double(), generation)
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    pixels = processor()(image, return_tensors="pt")["pixel_values"].double()
    with torch.no_grad():
        theirs = reference.double().generate(pixels, max_new_tokens=generation.max_new_tokens)
    (theirs,) = until_end(theirs, 1, SEP)
    words = tokenizer()
    assert words.tokenize(pipeline.caption(image)) == words.tokenize(words.decode(theirs, skip_special_tokens=True))
    with pytest.raises(MmxError, match=r"^this model was made to caption, not to answer questions; [^.]*--model\.$"):
        pipeline.ask(image, "who?")


def test_the_facts_come_from_the_config(pair):
    _, model = pair
    decoder = model.config.decoder
    assert (decoder.heads, decoder.norm_placement, decoder.norm_eps) == (3, "post", 1e-12)
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
def test_a_missing_tensor_is_named(tensors, name):
    theirs, written = tensors
    part = name.removeprefix("vision_model.")  # its encoder knows it by this name
    with pytest.raises(MmxError, match=rf"^[^\n]* lacks [^\n]*{re.escape(part)}[^\n]*\.$"):
        load_hf_model(written({key: tensor for key, tensor in theirs.items() if key != name}))


@pytest.mark.parametrize("name", ["text_decoder.bert.pooler.dense.weight", "itm_head.bias", "vision_model.more.weight"])
def test_an_extra_tensor_is_named(tensors, name):
    theirs, written = tensors
    with pytest.raises(MmxError, match=rf"^[^\n]* holds {re.escape(name.removeprefix('vision_model.'))}[^\n]*$"):
        load_hf_model(written({**theirs, name: torch.zeros(3)}))


def test_tied_tensors_and_buffers_may_be_stored_twice_or_under_the_other_name(pair, tensors):
    _, model = pair
    theirs, written = tensors
    embedding, bias = "text_decoder.bert.embeddings.word_embeddings.weight", f"{HEAD}.bias"
    tied = {f"{HEAD}.decoder.weight": theirs[embedding].clone(), f"{HEAD}.decoder.bias": theirs[bias].clone()}
    buffers = {f"{part}.embeddings.position_ids": torch.arange(40)[None] for part in ("text_decoder.bert",)}
    others = {name: tensor for name, tensor in theirs.items() if name not in (embedding, bias)}
    expected = model.state_dict()
    for changed in ({**theirs, **tied, **buffers}, {**others, **tied}):
        found = read(written(changed)).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_facts_that_would_change_the_numbers_are_refused(published, tmp_path):
    reference, _ = published
    reference.config.text_config.tie_word_embeddings = False
    try:
        folder = saved(tmp_path, reference, tokenizer(), processor())
    finally:
        reference.config.text_config.tie_word_embeddings = True
    with pytest.raises(CheckpointError, match="has tie_word_embeddings False; mmx reads its family with True alone"):
        load_hf_model(folder)


@pytest.mark.slow
def test_the_published_size(tmp_path):
    reference = shaken(BlipForConditionalGeneration(full_config()), size=0.05)
    model, _, _ = load_hf_model(saved(tmp_path, reference, tokenizer(), processor(384)))
    pixels, tokens = pictures(1, 384).float(), torch.randint(0, 30524, (1, 8))
    with torch.no_grad():
        expected = reference(pixel_values=pixels, input_ids=tokens).logits
        found = model.decoder(tokens[:, None], encoded(model, pixels))[:, 0]
    assert worst(found, expected) < 1e-4
