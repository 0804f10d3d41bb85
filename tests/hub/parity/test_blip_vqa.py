"""BLIP answers in mmx against transformers: each question as transformers answers it alone, whatever else is asked;
and, where padding is shown, whole batches as transformers answers them."""

import re

import pytest
import torch
from blip_cases import (
    BOS,
    CLS,
    PAD,
    SEP,
    encoded,
    full_config,
    pictures,
    processor,
    some_tokens,
    tiny_config,
    tokenizer,
    worst,
)
from parity_cases import TOLERANCE, assert_diverse, assert_logits, read, saved, shaken, spoken, until_end
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BlipForQuestionAnswering

from mmx.config.schema import DataConfig, TrainingConfig
from mmx.data.batching import TrainingDataset
from mmx.data.examples import Example, TextTask
from mmx.errors import MmxError
from mmx.hub import load_hf_model
from mmx.inference.pipeline import Pipeline
from mmx.models.batching import IGNORE_INDEX
from mmx.models.checkpoint import load_model, save_model
from mmx.models.model import Model

OPTIONS = [{}, {"num_beams": 3}, {"num_beams": 4, "early_stopping": True}]
ASKED = ["is it red?", "what is on the mat?", "who?"]
ABOUT = ["a", "be", "dog", "table"]
SIXTEEN = [f"{first} {thing}?" for first in ("who", "where is", "is it", "what") for thing in ABOUT]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(the reference in float64, its folder)."""
    config = tiny_config(32, num_attention_heads=2)  # transformers projects questions as if as wide as the picture
    reference = shaken(BlipForQuestionAnswering(config), seed=1)
    folder = saved(tmp_path_factory.mktemp("blip"), reference, tokenizer(), processor())
    return reference.double(), folder


@pytest.fixture(scope="module")
def pair(published):
    """(the reference, what mmx made of its folder), in float64."""
    reference, folder = published
    return reference, read(folder)


@pytest.fixture(scope="module")
def shown(pair):
    """The same model with reader.shows_padding."""
    _, model = pair
    reader = model.config.question_encoder.model_copy(update={"attend_padding": True})
    twin = Model(model.config.model_copy(update={"question_encoder": reader}), model.tokenizer).double().eval()
    twin.load_state_dict(model.state_dict())
    return twin


def questions(texts):
    """What transformers' tokenizer makes of questions, padded: {"input_ids": [B, T], "attention_mask": [B, T]}."""
    return dict(tokenizer()(list(texts), padding=True, return_tensors="pt", return_token_type_ids=False))


def asked_about(model, pixels, texts, streams=1):
    """The memory of `pixels` [B, 3, side, side], and what B*K questions have become over it."""
    return model.read(encoded(model, pixels), model.collate("question_encoder", texts)._replace(streams=streams))


def logits(reference, pixels, texts, tokens):
    """[B, T, V]: what its decoder gives, which the whole keeps for itself where it has no labels."""
    seen = []
    hook = reference.text_decoder.register_forward_hook(lambda _, given, output: seen.append(output.logits))
    with hook, torch.no_grad():
        reference(pixel_values=pixels, decoder_input_ids=tokens, **questions(texts))
    return seen[0]


def answers(reference, pixels, texts, **options):
    theirs = reference.generate(pixel_values=pixels, max_new_tokens=12, **questions(texts), **options)
    return until_end(theirs, 1, SEP)


def said(model, memory, streams=1, **options):
    found = spoken(model, memory, [[[BOS]] * streams] * memory.batch_size, max_new_tokens=12, **options)
    return [text for row in found for text in row]


# ---- questions in a batch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_where_padding_is_shown_a_batch_has_the_same_logits(pair, shown, batch):
    reference, _ = pair
    pixels, tokens = pictures(batch), some_tokens(batch, 7)
    expected = logits(reference, pixels, ASKED[:batch], tokens)
    with torch.no_grad():
        assert_logits(shown, asked_about(shown, pixels, ASKED[:batch]), tokens, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_where_padding_is_shown_a_batch_has_the_same_answers(pair, shown, batch, options):
    reference, _ = pair
    expected = answers(reference, pictures(batch), ASKED[:batch], **options)
    with torch.no_grad():
        assert said(shown, asked_about(shown, pictures(batch), ASKED[:batch]), **options) == expected
    if batch > 1:
        assert_diverse(expected)


def test_transformers_answers_depend_on_the_batch(pair):
    """Else the tests of shown padding would show nothing: its logits move far more than any tolerance here."""
    reference, _ = pair
    pixels, tokens = pictures(3), some_tokens(3, 7)
    together = logits(reference, pixels, ASKED, tokens)
    for row, text in enumerate(ASKED):
        alone = logits(reference, pixels[row : row + 1], [text], tokens[row : row + 1])
        padded = len(questions([text])["input_ids"][0]) < questions(ASKED)["input_ids"].shape[1]
        difference = worst(together[row : row + 1], alone)
        assert difference > 1e-2 if padded else difference < TOLERANCE


@pytest.mark.parametrize("batch", [1, 3])
def test_each_question_of_a_batch_has_the_logits_that_it_has_alone(pair, batch):
    reference, model = pair
    pixels, tokens, rows = pictures(batch), some_tokens(batch, 7), range(batch)
    expected = [logits(reference, pixels[b : b + 1], [ASKED[b]], tokens[b : b + 1]) for b in rows]
    with torch.no_grad():
        assert_logits(model, asked_about(model, pixels, ASKED[:batch]), tokens, torch.cat(expected))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_question_of_a_batch_has_the_answer_that_it_has_alone(pair, options):
    reference, model = pair
    pixels = pictures(3)
    expected = [answers(reference, pixels[b : b + 1], [ASKED[b]], **options)[0] for b in range(3)]
    with torch.no_grad():
        assert said(model, asked_about(model, pixels, ASKED), **options) == expected
    assert_diverse(expected)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_sixteen_questions_over_one_encoded_picture_are_answered_as_one_by_one(pair, options):
    reference, model = pair
    pixels, tokens = pictures(1), some_tokens(16, 7)
    with torch.no_grad():
        memory = asked_about(model, pixels, SIXTEEN, streams=16)
        found = model.decoder(tokens[None], memory)[0]
    expected = torch.cat([logits(reference, pixels, [text], tokens[k : k + 1]) for k, text in enumerate(SIXTEEN)])
    assert worst(found, expected) < TOLERANCE
    one_by_one = [answers(reference, pixels, [text], **options)[0] for text in SIXTEEN]
    assert said(model, memory, 16, **options) == one_by_one
    assert_diverse(one_by_one)


# ---- the folder --------------------------------------------------------------------------------------------------


def test_a_question_is_opened_and_closed_as_by_the_tokenizer(pair):
    _, model = pair
    assert (model.question_encoder.opening, model.question_encoder.closing) == ([CLS], [SEP])
    assert (model.tokenizer.pad_token_id, model.tokenizer.eos_token_id) == (PAD, SEP)
    assert model.tokenizer.encode_prompt(model.prompt("who?")) == [BOS]
    ours, theirs = (
        model.question_encoder.collate([model.question_encoder.prepare(text) for text in ASKED]),
        questions(ASKED),
    )
    assert torch.equal(ours["tokens"], theirs["input_ids"])
    assert torch.equal(ours["mask"], theirs["attention_mask"].bool())


def test_the_verbs_work_on_a_real_picture(published):
    reference, folder = published
    model, generation, origin = load_hf_model(folder)
    assert origin["family"] == "blip BlipForQuestionAnswering"
    pipeline, image = Pipeline(model.double(), generation), Image.effect_noise((50, 40), 90).convert("RGB")
    pixels = processor()(image, return_tensors="pt")["pixel_values"].double()
    words = tokenizer()
    expected, most = [], generation.max_new_tokens
    for text in SIXTEEN:
        theirs = reference.generate(pixel_values=pixels, max_new_tokens=most, **questions([text]))
        (theirs,) = until_end(theirs, 1, SEP)
        expected.append(words.tokenize(words.decode(theirs, skip_special_tokens=True)))
    memory = pipeline.encode(image=image)
    for given in (image, memory):
        assert [words.tokenize(answer) for answer in pipeline.ask(given, SIXTEEN)] == expected
    assert words.tokenize(pipeline.ask(image, SIXTEEN[3])) == expected[3]
    best, *_ = pipeline.rank(image, "who?", ["dog", "cat", "red"])
    assert best.answer in ("dog", "cat", "red")
    with pytest.raises(MmxError, match=r"^this model was made to answer questions, not to caption; [^.]*--model\.$"):
        pipeline.caption(image)
    with pytest.raises(MmxError, match=r"^the question has 51 tokens; this model reads up to 40, ask more shortly\.$"):
        pipeline.ask(image, "ab" * 24 + "?")


def test_it_is_the_same_from_a_checkpoint_of_ours(pair, tmp_path):
    _, model = pair
    single = Model(model.config, model.tokenizer).eval()
    single.load_state_dict(model.state_dict())
    save_model(tmp_path, single)
    again = load_model(tmp_path).double()
    assert again.config == model.config
    with torch.no_grad():
        found, expected = (said(m, asked_about(m, pictures(3), ASKED)) for m in (again, model))
    assert found == expected


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder.encoder.layer.0.crossattention.self.key.weight",
        "text_encoder.embeddings.word_embeddings.weight",
        "text_decoder.bert.encoder.layer.1.crossattention.self.key.weight",
    ],
)
def test_a_missing_tensor_is_named(published, tmp_path, name):
    theirs, folder = _copied(published, tmp_path)
    save_file({key: tensor for key, tensor in theirs.items() if key != name}, f"{folder}/model.safetensors")
    with pytest.raises(MmxError, match=rf"^[^\n]* lacks {re.escape(name)}; [^\n]*\.$"):
        load_hf_model(folder)


def test_an_extra_tensor_is_named(published, tmp_path):
    theirs, folder = _copied(published, tmp_path)
    save_file({**theirs, "text_encoder.pooler.dense.bias": torch.zeros(3)}, f"{folder}/model.safetensors")
    with pytest.raises(MmxError, match=r"^[^\n]* holds text_encoder\.pooler\.dense\.bias, which its family has not"):
        load_hf_model(folder)


def _copied(published, folder):
    saved(folder, published[0], tokenizer(), processor())
    return load_file(folder / "model.safetensors"), str(folder)


def test_it_can_be_trained(published):
    """A batch of questions about pictures gives every part that is used a gradient; captions are no task of it."""
    _, folder = published
    model, _, _ = load_hf_model(folder)
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    turns = (TextTask(("a dog",), "what is it?"), TextTask(("no",), "is it red?"))
    examples = [
        Example("two", {"image": image}, turns),
        Example("caption", {"image": image}, (TextTask(("a dog",)),)),
        Example("one", {"image": image}, turns[:1]),
    ]
    data = TrainingDataset(
        model, [(DataConfig(path="x"), examples)], TrainingConfig(texts_per_image=2, max_target_length=20)
    )
    prepared = [data[position] for position in range(3)]
    (sentence,) = [sentence for item in prepared for sentence in item.skipped]
    assert sentence.startswith("this model was made to answer questions, not to caption")
    batch = data.collate(prepared)
    found = model(batch.sources, batch.tokens, batch.mask, batch.label_positions)
    torch.nn.functional.cross_entropy(found, batch.labels, ignore_index=IGNORE_INDEX).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    moved = [name for name, parameter in model.question_encoder.named_parameters() if parameter.grad.abs().max() > 1e-7]
    assert {name for name, _ in model.question_encoder.named_parameters()} - set(moved) <= {"projection.key.bias"}


@pytest.mark.slow
def test_the_published_size(tmp_path):
    reference = shaken(BlipForQuestionAnswering(full_config()), size=0.05)
    model, _, _ = load_hf_model(saved(tmp_path, reference, tokenizer(), processor(384)))
    pixels, tokens = pictures(1, 384).float(), torch.randint(0, 30524, (2, 6))
    with torch.no_grad():
        memory = asked_about(model, pixels, ASKED[:2], streams=2)
        found = model.decoder(tokens[None], memory)[0]
        expected = [logits(reference, pixels, [ASKED[k]], tokens[k : k + 1]) for k in range(2)]
    assert worst(found, torch.cat(expected)) < 1e-4
