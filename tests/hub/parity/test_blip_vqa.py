"""BLIP for questions in mmx against transformers: each question is answered as transformers answers it alone.

With `question_encoder.attend_padding`, whole batches are answered as by transformers.
"""

import pytest
import torch
from blip_cases import BOS, CLS, PAD, SEP, SIDE, full_config, processor, random_tokens, tiny_config, tokenizer
from parity_cases import (
    PUBLISHED_SIZE_TOLERANCE,
    TOLERANCE,
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
QUESTIONS = ["is it red?", "what is on the mat?", "who?"]
NOUNS = ["a", "be", "dog", "table"]
SIXTEEN = [f"{first} {noun}?" for first in ("who", "where is", "is it", "what") for noun in NOUNS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(the reference in float64, its folder)."""
    config = tiny_config(32, num_attention_heads=2)  # transformers needs the text as wide as the image
    reference = randomized(BlipForQuestionAnswering(config), seed=1)
    folder = save_all(tmp_path_factory.mktemp("blip"), reference, tokenizer(), processor())
    return reference.double(), folder


@pytest.fixture(scope="module")
def models(checkpoint):
    """(the reference, the model that mmx loads from its folder), in float64."""
    reference, folder = checkpoint
    return reference, load_double(folder)


@pytest.fixture(scope="module")
def padding_model(models):
    """The same model with attend_padding."""
    _, model = models
    question_encoder = model.config.question_encoder.model_copy(update={"attend_padding": True})
    config = model.config.model_copy(update={"question_encoder": question_encoder})
    copy = Model(config, model.tokenizer).double().eval()
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.fixture(scope="module")
def copy(checkpoint, tmp_path_factory):
    """(another folder of the same model, its tensors), for changes."""
    folder = save_all(tmp_path_factory.mktemp("copy"), checkpoint[0], tokenizer(), processor())
    return folder, rewrite_tensors(folder, dict)


def tokenize(questions):
    """Padded questions as transformers' tokenizer returns them: {"input_ids": [B, T], "attention_mask": [B, T]}."""
    return dict(tokenizer()(list(questions), padding=True, return_tensors="pt", return_token_type_ids=False))


def encode_questions(model, pixels, questions, streams=1):
    """The memory of B*K questions about `pixels` [B, 3, side, side]."""
    memory = encode_inputs(model, "image", {"pixels": pixels})
    return model.with_questions(memory, model.collate("question_encoder", questions)._replace(streams=streams))


def reference_logits(reference, pixels, questions, tokens):
    """Logits [B, T, V] of the reference's decoder, which its forward does not return without labels."""
    outputs = []
    hook = reference.text_decoder.register_forward_hook(lambda _, given, output: outputs.append(output.logits))
    with hook, torch.no_grad():
        reference(pixel_values=pixels, decoder_input_ids=tokens, **tokenize(questions))
    return outputs[0]


def reference_answers(reference, pixels, questions, **options):
    output = reference.generate(pixel_values=pixels, max_new_tokens=12, **tokenize(questions), **options)
    return strip_generated(output, 1, SEP)


def answer_tokens(model, memory, streams=1, **options):
    prompts = [[[BOS]] * streams] * memory.batch_size
    generated = generate_tokens(model, memory, prompts, max_new_tokens=12, **options)
    return [text for row in generated for text in row]


# ---- questions in a batch


@pytest.mark.parametrize("batch", [1, 3])
def test_batch_has_the_logits_of_transformers_with_attend_padding(models, padding_model, batch):
    reference, _ = models
    pixels = random_pixels(batch, SIDE)
    tokens = random_tokens(batch, 7)
    expected = reference_logits(reference, pixels, QUESTIONS[:batch], tokens)
    with torch.no_grad():
        memory = encode_questions(padding_model, pixels, QUESTIONS[:batch])
        assert_logits(padding_model, memory, tokens, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_batch_has_the_answers_of_transformers_with_attend_padding(models, padding_model, options):
    reference, _ = models
    pixels = random_pixels(3, SIDE)
    expected = reference_answers(reference, pixels, QUESTIONS, **options)
    with torch.no_grad():
        memory = encode_questions(padding_model, pixels, QUESTIONS)
        assert answer_tokens(padding_model, memory, **options) == expected
    assert_diverse(expected)


def test_answers_of_transformers_depend_on_the_batch(models):
    """Otherwise the tests of attend_padding would show nothing: its logits differ far more than any tolerance."""
    reference, _ = models
    pixels = random_pixels(3, SIDE)
    tokens = random_tokens(3, 7)
    batched = reference_logits(reference, pixels, QUESTIONS, tokens)
    longest = tokenize(QUESTIONS)["input_ids"].shape[1]
    for row, question in enumerate(QUESTIONS):
        alone = reference_logits(reference, pixels[row : row + 1], [question], tokens[row : row + 1])
        is_padded = tokenize([question])["input_ids"].shape[1] < longest
        difference = relative_difference(batched[row : row + 1], alone)
        assert difference > 1e-2 if is_padded else difference < TOLERANCE


@pytest.mark.parametrize("batch", [1, 3])
def test_each_question_of_a_batch_has_its_own_logits(models, batch):
    reference, model = models
    pixels = random_pixels(batch, SIDE)
    tokens = random_tokens(batch, 7)
    expected = []
    for row in range(batch):
        one = slice(row, row + 1)
        expected.append(reference_logits(reference, pixels[one], QUESTIONS[one], tokens[one]))
    with torch.no_grad():
        assert_logits(model, encode_questions(model, pixels, QUESTIONS[:batch]), tokens, torch.cat(expected))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_question_of_a_batch_has_its_own_answer(models, options):
    reference, model = models
    pixels = random_pixels(3, SIDE)
    expected = []
    for row in range(3):
        expected += reference_answers(reference, pixels[row : row + 1], [QUESTIONS[row]], **options)
    with torch.no_grad():
        assert answer_tokens(model, encode_questions(model, pixels, QUESTIONS), **options) == expected
    assert_diverse(expected)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_sixteen_questions_over_one_image_are_answered_as_one_by_one(models, options):
    reference, model = models
    pixels = random_pixels(1, SIDE)
    tokens = random_tokens(16, 7)
    with torch.no_grad():
        memory = encode_questions(model, pixels, SIXTEEN, streams=16)
        found = model.decoder(tokens[None], memory)[0]
    expected_logits = []
    expected_answers = []
    for k, question in enumerate(SIXTEEN):
        expected_logits.append(reference_logits(reference, pixels, [question], tokens[k : k + 1]))
        expected_answers += reference_answers(reference, pixels, [question], **options)
    assert relative_difference(found, torch.cat(expected_logits)) < TOLERANCE
    assert answer_tokens(model, memory, 16, **options) == expected_answers
    assert_diverse(expected_answers)


# ---- the folder


def test_question_tokens_equal_those_of_the_tokenizer(models):
    _, model = models
    encoder = model.question_encoder
    assert (list(encoder.prefix_token_ids), list(encoder.suffix_token_ids)) == ([CLS], [SEP])
    assert (model.tokenizer.pad_token_id, model.tokenizer.eos_token_id) == (PAD, SEP)
    assert model.tokenizer.encode_prompt(model.prompt("who?")) == [BOS]
    ours = encoder.collate([encoder.prepare(question) for question in QUESTIONS])
    theirs = tokenize(QUESTIONS)
    assert torch.equal(ours["tokens"], theirs["input_ids"])
    assert torch.equal(ours["mask"], theirs["attention_mask"].bool())


def test_pipeline_answers_questions_about_an_image_as_transformers(checkpoint):
    reference, folder = checkpoint
    model, generation, provenance = load_hf_model(folder)
    assert provenance["family"] == "blip BlipForQuestionAnswering"
    pipeline = Pipeline(model.double(), generation)
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    pixels = processor()(image, return_tensors="pt")["pixel_values"].double()
    words = tokenizer()
    expected = []
    for question in SIXTEEN:
        output = reference.generate(
            pixel_values=pixels, max_new_tokens=generation.max_new_tokens, **tokenize([question])
        )
        (tokens,) = strip_generated(output, 1, SEP)
        expected.append(words.tokenize(words.decode(tokens, skip_special_tokens=True)))
    memory = pipeline.encode(image=image)
    for given in (image, memory):
        assert [words.tokenize(answer) for answer in pipeline.ask(given, SIXTEEN)] == expected
    best, *_ = pipeline.rank(image, "who?", ["dog", "cat", "red"])
    assert best.answer in ("dog", "cat", "red")
    with pytest.raises(MmxError) as no_caption:
        pipeline.caption(image)
    assert no_caption.value.code == "tokenizer.task"
    with pytest.raises(MmxError) as too_long:
        pipeline.ask(image, "ab" * 24 + "?")
    assert too_long.value.code == "question.too_long"
    assert "51" in str(too_long.value)
    assert "40" in str(too_long.value)


def test_saved_checkpoint_gives_the_same_answers(models, tmp_path):
    _, model = models
    single = Model(model.config, model.tokenizer).eval()
    single.load_state_dict(model.state_dict())
    save_model(tmp_path, single)
    reloaded = load_model(tmp_path).double()
    assert reloaded.config == model.config
    pixels = random_pixels(3, SIDE)
    with torch.no_grad():
        found = answer_tokens(reloaded, encode_questions(reloaded, pixels, QUESTIONS))
        expected = answer_tokens(model, encode_questions(model, pixels, QUESTIONS))
    assert found == expected


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder.encoder.layer.0.crossattention.self.key.weight",
        "text_encoder.embeddings.word_embeddings.weight",
        "text_decoder.bert.encoder.layer.1.crossattention.self.key.weight",
    ],
)
def test_missing_tensor_is_named(copy, name):
    folder, tensors = copy
    rewrite_tensors(folder, lambda _: without(name)(tensors))
    error = load_error(folder)
    assert (error.code, error.details["tensors"]) == ("hub.missing_tensors", [name])


def test_unexpected_tensor_is_named(copy):
    folder, tensors = copy
    name = "text_encoder.pooler.dense.bias"
    rewrite_tensors(folder, lambda _: {**tensors, name: torch.zeros(3)})
    error = load_error(folder)
    assert (error.code, error.details["tensors"]) == ("hub.unexpected_tensors", [name])


def test_training_gives_every_parameter_a_gradient_and_skips_captions(checkpoint):
    _, folder = checkpoint
    model = load_hf_model(folder).model
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    tasks = (TextTask(("a dog",), "what is it?"), TextTask(("no",), "is it red?"))
    examples = [
        Example("two", {"image": image}, tasks),
        Example("caption", {"image": image}, (TextTask(("a dog",)),)),
        Example("one", {"image": image}, tasks[:1]),
    ]
    options = TrainingConfig(seed=0, texts_per_image=2, max_target_length=20)
    dataset = TrainingDataset(model, [(DataConfig(path="x"), examples)], options)
    prepared = [dataset[position] for position in range(3)]
    (message,) = [message for item in prepared for message in item.skipped]
    assert "not to caption" in message
    batch = dataset.collate(prepared)
    logits = model(batch.sources, batch.tokens, batch.mask, batch.label_positions)
    torch.nn.functional.cross_entropy(logits, batch.labels, ignore_index=IGNORE_INDEX).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    # A bias of the keys shifts all scores equally, so that its gradient is zero.
    zero = {name for name, own in model.question_encoder.named_parameters() if own.grad.abs().max() <= 1e-7}
    assert zero <= {"projection.key.bias"}


@pytest.mark.slow
def test_logits_equal_at_the_published_size(tmp_path):
    reference = randomized(BlipForQuestionAnswering(full_config()), size=0.05)
    model = load_hf_model(save_all(tmp_path, reference, tokenizer(30522), processor(384))).model
    pixels = random_pixels(1, 384, torch.float32)
    tokens = torch.randint(0, 30524, (2, 6))
    with torch.no_grad():
        memory = encode_questions(model, pixels, QUESTIONS[:2], streams=2)
        found = model.decoder(tokens[None], memory)[0]
    expected = [reference_logits(reference, pixels, [QUESTIONS[k]], tokens[k : k + 1]) for k in range(2)]
    assert relative_difference(found, torch.cat(expected)) < PUBLISHED_SIZE_TOLERANCE
