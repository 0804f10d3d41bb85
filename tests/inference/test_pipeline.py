"""Pipeline: captions, answers, ranking and streaming; batches equal single calls; each input is encoded once."""

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from mmx.config.schema import GenerationConfig, Precision, SourceConfig
from mmx.errors import ConfigError, ImageError, MmxError
from mmx.generation.guidance import GuidedDecodeStep
from mmx.inference.outputs import GeneratedText, Question
from mmx.inference.pipeline import Pipeline, load
from mmx.memory import Memory
from mmx.models.checkpoint import load_model, save_model
from mmx.models.fingerprint import model_fingerprint
from mmx.testing import tiny_model

IMAGE = SourceConfig(encoder="image", options={"backbone": "resnet10t", "size": 32, "stage": 2})
TEXT = SourceConfig(encoder="text", options={"hidden_size": 16, "num_layers": 1, "num_heads": 2})
QUESTIONS = ["what is this?", "why", "how many red dogs are there on the left?"]


def build(sources, **config):
    """A pipeline whose tokens are letters, with weights large enough that texts differ between inputs."""
    model = tiny_model(sources, lm_head_bias=True, tie_word_embeddings=False, **config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and not any(part in name for part in ("backbone", "positions", "image.projection")):
                weight.mul_(50.0 if name == "decoder.embedding.weight" else 6.0)
        letters = [model.tokenizer.encode(letter)[-1] for letter in "abcdefghijklmnopqrstuvwxyz"]
        model.decoder.lm_head.bias.fill_(-99.0)[[*letters, model.tokenizer.eos_token_id]] = 0.0
    return Pipeline(model, GenerationConfig(max_new_tokens=6))


@pytest.fixture(scope="module")
def pipeline():
    return build({"image": IMAGE})


@pytest.fixture(scope="module")
def text_encoder_pipeline():
    """Questions are read by a text encoder instead of the prompt."""
    return build({"image": IMAGE, "question": TEXT}, question_input="question")


@pytest.fixture(scope="module")
def two_sources():
    """Rows have an image, a text, or both."""
    return build({"image": IMAGE, "caption": TEXT})


def make_image(seed):
    """One color, and another in a corner."""
    colors = torch.randint(0, 256, (2, 3), generator=torch.Generator().manual_seed(seed)).tolist()
    image = Image.new("RGB", (40, 24), tuple(colors[0]))
    image.paste(tuple(colors[1]), (0, 0, 20, 12))
    return image


@pytest.fixture(scope="module")
def images():
    return [make_image(seed) for seed in range(7)]


@pytest.fixture
def encoded(pipeline):
    """Number of images in each call of the encoder."""
    sizes = []
    handle = pipeline.model.encoder("image").register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0]["pixels"]))
    )
    yield sizes
    handle.remove()


# ---- memories of another model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_pipeline(pipeline):
    """A model of the same shapes: only its projection differs."""
    other = build({"image": IMAGE})
    other.model.load_state_dict(pipeline.model.state_dict())
    with torch.no_grad():
        other.model.sources["image"].projection.value.weight.neg_()
    return other


def test_a_memory_of_another_model_is_refused(pipeline, other_pipeline, images, tmp_path):
    pipeline.encode(image=images[0]).save(tmp_path / "memory")
    memory = Memory.load(tmp_path / "memory")
    assert memory.fingerprint == pipeline.fingerprint
    assert pipeline.caption(memory) == pipeline.caption(images[0])
    options = other_pipeline.generation_config({})
    calls = [
        lambda: other_pipeline.caption(memory),
        lambda: other_pipeline.ask(memory, QUESTIONS),
        lambda: other_pipeline.generate(memory),
        lambda: other_pipeline.rank(memory, None, ["a", "b"]),
        lambda: list(other_pipeline.stream(memory)),
        lambda: other_pipeline.look(memory, original=images[0]),
        lambda: other_pipeline.generate_batch(memory, [[None]], options),
        lambda: other_pipeline.decoder_memory(memory, [[None]]),
    ]
    for call in calls:
        with pytest.raises(MmxError) as error:
            call()
        assert error.value.code == "memory.other_model"
        assert error.value.details == {"fingerprint": pipeline.fingerprint, "expected": other_pipeline.fingerprint}
    by_hand = replace(memory, fingerprint=None)
    assert isinstance(other_pipeline.caption(by_hand), str)


def test_the_fingerprint_of_a_model_is_stable(pipeline, tmp_path):
    folder = save_model(tmp_path / "model", pipeline.model)
    for dtype in get_args(Precision):
        assert load(folder, dtype=dtype).fingerprint == pipeline.fingerprint, dtype
    model = load_model("bundled")
    assert model_fingerprint(model) == "8b09388166cbe9cb", "the same in every process"
    with torch.no_grad():
        model.decoder.norm.bias[3] += 0.1
    assert model_fingerprint(model) != "8b09388166cbe9cb"


# ---- caption, ask, generate, rank, stream --------------------------------------------------------------------------


def captions_of(pipeline, memory, **options):
    """The best caption of each row of a memory."""
    questions = [[None]] * memory.batch_size
    return [row[0][0].text for row in pipeline.generate_batch(memory, questions, pipeline.generation_config(options))]


def test_all_forms_of_an_input_have_the_same_caption(pipeline, images, tmp_path):
    path = tmp_path / "a.png"
    images[0].save(path)
    inputs = [images[0], path, str(path), path.read_bytes(), {"image": path}, pipeline.encode(image=images[0])]
    captions = [pipeline.caption(item) for item in inputs]
    assert len(set(captions)) == 1
    assert isinstance(captions[0], str)


def test_batched_captions_equal_single_ones(pipeline, images):
    captions = [text.text for _, text in pipeline.captions(images, batch_size=7)]
    assert captions == [pipeline.caption(image) for image in images]
    assert captions == captions_of(pipeline, pipeline.encode(image=images))
    assert len(set(captions)) > 1
    assert list(pipeline.captions([])) == []


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "seed": 3}])
def test_generate_returns_several_texts(pipeline, images, options):
    texts = pipeline.generate(images[0], num_return_sequences=3, **options)
    assert len(texts) == 3
    assert pipeline.generate(images[0], num_return_sequences=3, **options) == texts
    assert texts[0].score == max(text.score for text in texts) or "do_sample" in options
    if "num_beams" in options:
        assert texts[0].text == pipeline.caption(images[0], num_beams=3)
    assert len(pipeline.generate(images[0], QUESTIONS[0], num_return_sequences=2, **options)) == 2


def test_questions_asked_together_are_answered_as_alone(pipeline, images, encoded):
    memory = pipeline.encode(image=images[1])
    together = pipeline.ask(memory, QUESTIONS)
    assert together == [pipeline.ask(memory, question) for question in QUESTIONS]
    assert len(set(together)) > 1
    assert encoded == [1], "one encoding for all questions"
    assert pipeline.ask(memory, []) == []


@pytest.mark.parametrize("beams", [1, 3])
def test_questions_read_by_an_encoder_are_answered_as_alone(text_encoder_pipeline, images, beams):
    pipeline = text_encoder_pipeline
    memory = pipeline.encode(image=images[1])
    together = pipeline.ask(memory, QUESTIONS, num_beams=beams)
    assert together == [pipeline.ask(memory, question, num_beams=beams) for question in QUESTIONS]
    assert together == pipeline.ask(memory, QUESTIONS[::-1], num_beams=beams)[::-1]
    assert len(set(together)) > 1, "the answer must depend on the question"


@pytest.mark.parametrize("name", ["pipeline", "text_encoder_pipeline"])
def test_ranking_is_a_distribution_and_independent_of_the_order(name, images, request):
    pipeline = request.getfixturevalue(name)
    candidates = ["dog", "a much longer answer", "", "cat"]
    memory = pipeline.encode(image=images[2])
    ranked = pipeline.rank(memory, QUESTIONS[0], candidates)
    assert sum(item.probability for item in ranked) == pytest.approx(1.0, abs=1e-9)
    assert [item.logprob for item in ranked] == sorted((item.logprob for item in ranked), reverse=True)
    assert {item.answer for item in ranked} == set(candidates)
    total = math.fsum(math.exp(item.logprob - ranked[0].logprob) for item in ranked)
    reversed_order = {item.answer: item for item in pipeline.rank(memory, QUESTIONS[0], candidates[::-1])}
    for item in ranked:
        assert item.probability == pytest.approx(math.exp(item.logprob - ranked[0].logprob) / total, abs=1e-6)
        assert reversed_order[item.answer].logprob == pytest.approx(item.logprob, abs=1e-4)
        alone = pipeline.rank(memory, QUESTIONS[0], [item.answer])[0]
        assert alone.logprob == pytest.approx(item.logprob, abs=1e-4)
        assert alone.probability == 1.0


def test_stream_ends_with_the_caption_and_leaves_inference_mode_off(pipeline, images):
    texts = []
    for text in pipeline.stream(images[0]):
        texts.append(text)
        assert not torch.is_inference_mode_enabled()
    assert len(texts) == 6
    assert texts[-1] == pipeline.caption(images[0])
    answers = list(pipeline.stream(images[0], QUESTIONS[0], max_new_tokens=3))
    assert answers[-1] == pipeline.ask(images[0], QUESTIONS[0], max_new_tokens=3)


def test_stream_of_a_pipeline_with_beams_is_greedy(images, pipeline):
    with_beams = Pipeline(pipeline.model, GenerationConfig(num_beams=4, num_return_sequences=2, max_new_tokens=4))
    assert list(with_beams.stream(images[0]))[-1] == pipeline.caption(images[0], max_new_tokens=4)
    assert isinstance(with_beams.caption(images[0]), str)


@pytest.mark.parametrize("beams", [1, 3])
def test_stop_string_ends_the_text_and_is_removed(pipeline, images, beams):
    whole = pipeline.caption(images[0], max_new_tokens=20)
    stop = whole[1:3]
    text = pipeline.generate(images[0], max_new_tokens=20, stop_strings=[stop], num_beams=beams)[0]
    assert stop not in text.text
    if beams == 1:
        assert text.text == whole[:1].strip()
        assert len(text.tokens) < 20


# ---- classifier-free guidance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pipeline", "text_encoder_pipeline"])
@pytest.mark.parametrize("beams", [1, 3])
def test_guidance_interpolates_and_extrapolates(name, beams, images, request):
    pipeline = request.getfixturevalue(name)
    memory = pipeline.encode(image=images)
    unconditional = pipeline.unconditional_memory()
    plain = captions_of(pipeline, memory, num_beams=beams)
    assert captions_of(pipeline, memory, num_beams=beams, guidance_scale=1.0) == plain
    without_memory = captions_of(pipeline, unconditional, num_beams=beams)
    assert captions_of(pipeline, memory, num_beams=beams, guidance_scale=0.0) == without_memory * 7
    guided = captions_of(pipeline, memory, num_beams=beams, guidance_scale=3.0)
    assert guided != plain
    assert guided == [pipeline.caption(image, num_beams=beams, guidance_scale=3.0) for image in images]
    for scale, equivalent in ((0.0, unconditional), (1.0, memory.select([2]))):
        answers = pipeline.ask(memory.select([2]), QUESTIONS, num_beams=beams, guidance_scale=scale)
        assert answers == pipeline.ask(equivalent, QUESTIONS, num_beams=beams), "both passes read the question"


def test_second_decoding_step_exists_only_with_guidance(pipeline, images):
    memory = pipeline.encode(image=images[0])
    plain = pipeline.decoding_inputs(memory, [[None]], pipeline.generation_config({"guidance_scale": 1.0}))
    assert not isinstance(plain.step, GuidedDecodeStep)
    guided = pipeline.decoding_inputs(memory, [[None]], pipeline.generation_config({"guidance_scale": 1.5}))
    assert isinstance(guided.step, GuidedDecodeStep)
    assert guided.step.scale == 1.5


def test_guided_stream_with_a_box_ends_with_the_answer(pipeline, images):
    box = (0.0, 0.0, 0.5, 0.5)
    answer = pipeline.ask(images[0], QUESTIONS[0], box, guidance_scale=2.5)
    assert list(pipeline.stream(images[0], QUESTIONS[0], box, guidance_scale=2.5))[-1] == answer
    focused = pipeline.encode(image=images[0]).focus(box)
    assert answer == pipeline.ask(focused, QUESTIONS[0], guidance_scale=2.5)


def test_generated_text_has_tokens_and_their_logprobs(pipeline, images):
    text = pipeline.generate(images[0])[0]
    assert len(text.tokens) == 6
    assert text.score == pytest.approx(sum(logprob for _, logprob in text.tokens) / 6, abs=1e-6)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_probability_of_an_answer(pipeline, images, num_beams):
    options = {"num_beams": num_beams, "max_new_tokens": 3}
    text = pipeline.generate(images[0], QUESTIONS[0], **options)[0]
    assert text.probability == pytest.approx(math.exp(text.logprob))
    assert text.logprob <= sum(logprob for _, logprob in text.tokens) + 1e-6
    warm = pipeline.generate(images[0], QUESTIONS[0], answer_temperature=2.0, **options)[0]
    assert (warm.text, warm.logprob) == (text.text, text.logprob)
    assert warm.probability == pytest.approx(math.sqrt(text.probability))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_logprob_of_an_answer_includes_its_end(pipeline, images, num_beams):
    eos = pipeline.model.tokenizer.eos_token_id
    options = {"forced_eos_token_id": eos, "max_new_tokens": 4, "num_beams": num_beams, "length_penalty": 0.0}
    text = pipeline.generate(images[0], QUESTIONS[0], **options)[0]
    assert len(text.tokens) == 3
    assert text.logprob < sum(logprob for _, logprob in text.tokens) - 0.01
    plain = pipeline.generate(images[0], QUESTIONS[0], max_new_tokens=3, num_beams=num_beams, length_penalty=0.0)[0]
    assert plain.logprob == pytest.approx(plain.score, abs=1e-5), "without length penalty they are the same"


def test_box_restricts_a_memory_without_encoding_again(pipeline, images, encoded):
    memory = pipeline.encode(image=images[3])
    box = (0.0, 0.0, 0.5, 0.5)
    for question in QUESTIONS:
        assert pipeline.ask(memory, question, box=box) == pipeline.ask(memory.focus(box), question)
    assert pipeline.ask(memory, QUESTIONS, box=(0.0, 0.0, 1.0, 1.0)) == pipeline.ask(memory, QUESTIONS)
    whole = pipeline.rank(memory, "what?", ["dog", "cat"])
    region = pipeline.rank(memory, "what?", ["dog", "cat"], box=box)
    assert {item.answer: item.logprob for item in whole} != {item.answer: item.logprob for item in region}
    assert encoded == [1]
    with pytest.raises(MmxError) as error:
        pipeline.ask(memory, "what?", box=(0.5, 0.0, 0.1, 1.0))
    assert error.value.code.startswith("box") or error.value.code.startswith("memory.box")


# ---- many inputs ---------------------------------------------------------------------------------------------------


def test_unreadable_images_yield_errors_in_order(pipeline, encoded):
    bad = {1: b"no image", 2: Path("nowhere.png"), 6: b""}
    inputs = [bad.get(place, make_image(place)) for place in range(8)]
    results = list(pipeline.captions(iter(inputs), batch_size=4))
    assert all(item is expected for (item, _), expected in zip(results, inputs, strict=True))
    for place, (image, result) in enumerate(results):
        if place in bad:
            assert isinstance(result, ImageError)
        else:
            assert isinstance(result, GeneratedText)
            assert result.text == pipeline.caption(image)
    assert encoded[:2] == [2, 3]


def test_batches_of_unreadable_images_only(pipeline):
    assert [type(result) for _, result in pipeline.captions([b"", b"x"], batch_size=1)] == [ImageError, ImageError]
    assert list(pipeline.answers([])) == []


def test_questions_are_grouped_by_image_and_each_is_encoded_once(pipeline, images, encoded, tmp_path):
    for place, image in enumerate(images[:3]):
        image.save(tmp_path / f"{place}.png")
    order = [0, 1, 0, 2, 1, 0, 2, 2]
    questions = [(str(tmp_path / f"{place}.png"), QUESTIONS[number % 3]) for number, place in enumerate(order)]
    answers = list(pipeline.answers(questions, batch_size=2))
    assert encoded == [2, 1]
    assert [answer.text for answer in answers] == [pipeline.ask(image, question) for image, question in questions]


def test_questions_about_opened_images(pipeline, images, encoded):
    questions = [Question(images[number % 2], question) for number, question in enumerate(QUESTIONS)]
    answers = list(pipeline.answers(questions))
    assert encoded == [2]
    assert [answer.text for answer in answers] == [pipeline.ask(item.image, item.question) for item in questions]


def test_bad_questions_do_not_affect_the_others(pipeline, images):
    questions = [
        (images[0], "what?"),
        (b"no image", "what?"),
        (images[0], "why " * 99),
        (images[1], "what?"),
        (b"no image", "why?"),
    ]
    answers = list(pipeline.answers(questions, batch_size=1))
    assert [type(answer) for answer in answers] == [GeneratedText, ImageError, MmxError, GeneratedText, ImageError]
    assert answers[0].text == pipeline.ask(images[0], "what?")
    assert answers[3].text == pipeline.ask(images[1], "what?")


# ---- edge cases ----------------------------------------------------------------------------------------------------


def code_of(function, *args, **kwargs):
    with pytest.raises(MmxError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return error.value.code


@pytest.mark.parametrize("name", ["pipeline", "text_encoder_pipeline"])
@pytest.mark.parametrize("question", ["", " \n", "??", "؟"])
def test_empty_question_is_refused_everywhere(name, question, images, request):
    pipeline = request.getfixturevalue(name)
    image = images[0]
    assert code_of(pipeline.ask, image, question) == "input.empty_question"
    assert code_of(pipeline.ask, image, ["what?", question]) == "input.empty_question"
    assert code_of(pipeline.generate, image, question) == "input.empty_question"
    assert code_of(pipeline.rank, image, question, ["yes", "no"]) == "input.empty_question"
    assert code_of(pipeline.look, image, question) == "input.empty_question"
    assert code_of(lambda: list(pipeline.stream(image, question))) == "input.empty_question"
    answers = list(pipeline.answers([(image, question), (image, "what?")]))
    assert answers[0].code == "input.empty_question"
    assert answers[1].text == pipeline.ask(image, "what?")


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_a_text_that_ends_inside_a_character_leaves_it_out(pipeline, images, options):
    tokenizer = pipeline.model.tokenizer
    first_byte = tokenizer.encode("a日")[2]
    suppressed = [token for token in range(len(tokenizer)) if token != first_byte]
    limits = {"max_new_tokens": 1, "suppress_tokens": suppressed, **options}
    assert pipeline.caption(images[0], **limits) == ""
    assert list(pipeline.stream(images[0], **limits)) == [""]
    assert pipeline.generate(images[0], **limits)[0].text == ""


def test_question_longer_than_half_of_the_positions_is_refused(pipeline, images):
    with pytest.raises(MmxError) as error:
        pipeline.ask(images[0], "why " * 99)
    assert error.value.code == "question.too_long"
    assert error.value.details["maximum"] == 64
    assert error.value.details["length"] > 64


def test_question_longer_than_its_encoder_reads_is_refused(text_encoder_pipeline, images):
    maximum = text_encoder_pipeline.model.encoder("question").options.max_position_embeddings
    with pytest.raises(MmxError) as error:
        text_encoder_pipeline.ask(images[0], "why " * 99)
    assert error.value.code == "text.too_long"
    assert error.value.details["maximum"] == maximum < error.value.details["length"]


def test_candidates_are_checked(pipeline, images):
    assert code_of(pipeline.rank, images[0], "what?", ["dog", "dog " * 99]) == "text.too_long"
    assert code_of(pipeline.rank, images[0], "what?", []) == "rank.no_candidates"


@pytest.mark.parametrize("beams", [1, 2])
def test_texts_end_with_the_learned_positions(images, beams):
    small = build({"image": IMAGE}, max_position_embeddings=16)
    options = small.generation_config({"max_new_tokens": 99, "min_new_tokens": 99, "num_beams": beams})
    memory = small.encode(image=images[:2])
    captions = small.generate_batch(memory, [[None], [None]], options)
    assert [len(row[0][0].tokens) for row in captions] == [15, 15]  # the last token is not read
    answers = small.generate_batch(memory, [["a?"], ["ab?"]], options)
    assert [len(row[0][0].tokens) for row in answers] == [9, 9], "half is for the question, however short it is"


def test_texts_of_rotary_positions_are_not_limited(images):
    rotary = build({"image": IMAGE}, max_position_embeddings=16, positions="rope")
    assert len(rotary.generate(images[0], max_new_tokens=40, min_new_tokens=40)[0].tokens) == 40


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_beam": 3}, "num_beam"),
        ({"num_beams": 0}, "num_beams"),
        ({"do_sample": True, "num_beams": 2}, "do_sample"),
        ({"top_p": 1.5}, "top_p"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"stop_strings": "x"}, "stop_strings"),
    ],
)
def test_wrong_options_are_refused(pipeline, images, options, key):
    calls = (
        lambda: pipeline.caption(images[0], **options),
        lambda: pipeline.ask(images[0], "what?", **options),
        lambda: pipeline.generate(images[0], **options),
        lambda: list(pipeline.captions([images[0]], **options)),
        lambda: list(pipeline.answers([(images[0], "what?")], **options)),
    )
    for call in calls:
        with pytest.raises(ConfigError) as error:
            call()
        assert key in str(error.value)
        assert "\n" not in str(error.value)


BEAMS = {"num_beams": 3}
SAMPLES = {"do_sample": True, "temperature": 0.5}


@pytest.mark.parametrize(
    ("defaults", "options", "expected"),
    [
        (BEAMS, {"do_sample": True}, {"do_sample": True, "num_beams": 1}),
        (BEAMS, {"temperature": 0.7}, {"do_sample": True, "num_beams": 1, "temperature": 0.7}),
        (BEAMS, {"top_k": 5}, {"do_sample": True, "num_beams": 1, "top_k": 5}),
        (BEAMS, {"top_p": 0.9}, {"do_sample": True, "num_beams": 1, "top_p": 0.9}),
        (BEAMS, {"top_p": 0.9, "num_beams": 1}, {"do_sample": True, "num_beams": 1, "top_p": 0.9}),
        (BEAMS, {"top_p": 0.9, "do_sample": None, "num_beams": None}, {"do_sample": True, "num_beams": 1}),
        (BEAMS, {"do_sample": False}, {"do_sample": False, "num_beams": 3}),
        (BEAMS, {"do_sample": False, "temperature": 1.0, "top_k": 0}, {"do_sample": False, "num_beams": 3}),
        (BEAMS, {"seed": 5}, {"do_sample": False, "num_beams": 3, "seed": 5}),
        (SAMPLES, {"num_beams": 2}, {"do_sample": False, "num_beams": 2}),
        (SAMPLES, {"num_beams": 1}, {"do_sample": True, "num_beams": 1, "temperature": 0.5}),
        (SAMPLES, {"top_k": 7}, {"do_sample": True, "top_k": 7, "temperature": 0.5}),
    ],
)
def test_defaults_give_way_to_the_options_of_a_call(pipeline, defaults, options, expected):
    config = Pipeline(pipeline.model, GenerationConfig(**defaults)).generation_config(options)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("options", [{"top_p": 0.5}, {"temperature": 0.7}, {"top_k": 5}, {"do_sample": True}])
def test_contradictions_within_a_call_are_refused(pipeline, images, options):
    for contradiction in ({"num_beams": 2}, {"num_beams": 2, "do_sample": True}):
        with pytest.raises(ConfigError) as error:
            pipeline.caption(images[0], **{**options, **contradiction})
        assert "num_beams" in str(error.value)
    if "do_sample" not in options:
        with pytest.raises(ConfigError) as error:
            pipeline.caption(images[0], **options, do_sample=False)
        assert error.value.code == "generation.sampling_options"
        assert error.value.details["key"] in options


def test_sampling_options_sample_on_a_model_with_beams(pipeline, images):
    with_beams = Pipeline(pipeline.model, GenerationConfig(num_beams=3, max_new_tokens=6))
    options = {"temperature": 20.0, "seed": 3}
    text = with_beams.caption(images[0], **options)
    assert text == pipeline.caption(images[0], do_sample=True, num_beams=1, **options)
    assert text != with_beams.caption(images[0])
    assert list(with_beams.stream(images[0], **options))[-1] == text


def test_calls_that_return_one_text_refuse_several(pipeline, images):
    assert code_of(pipeline.caption, images[0], num_return_sequences=2) == "generation.single_text"
    assert code_of(pipeline.ask, images[0], "what?", num_return_sequences=2) == "generation.single_text"
    assert code_of(pipeline.generate, images[0], num_return_sequences=2).startswith("config")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"length_penalty": 1000.0}, "config.value"),
        ({"length_penalty": -1000.0}, "config.value"),
        ({"length_penalty": math.nan}, "config.value"),
        ({"temperature": math.inf}, "config.value"),
        ({"temperature": math.nan}, "config.value"),
        ({"repetition_penalty": math.inf}, "config.value"),
        ({"seed": 2**70}, "config.value"),
        ({"seed": -1}, "config.value"),
        ({"max_new_tokens": 2**70}, "config.value"),
    ],
)
def test_options_that_overflow_are_config_errors(pipeline, images, options, code):
    assert code_of(pipeline.caption, images[0], **options) == code


@pytest.mark.parametrize("option", ["suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"])
def test_token_ids_are_in_the_vocabulary(pipeline, images, option):
    vocab_size = len(pipeline.model.tokenizer)
    for token in (vocab_size, -1, 2**70):
        value = token if option == "forced_eos_token_id" else [5, token]
        with pytest.raises(ConfigError) as error:
            pipeline.caption(images[0], **{option: value})
        assert error.value.code == "generation.token_id"
        assert error.value.details == {"key": option, "token": token, "vocab_size": vocab_size}
        given = GenerationConfig(**{option: value if isinstance(value, int) else tuple(value)})
        assert code_of(Pipeline(pipeline.model, given).caption, images[0]) == "generation.token_id"
        memory = pipeline.encode(image=images[0])
        assert code_of(pipeline.generate_batch, memory, [[None]], given) == "generation.token_id"
    last = vocab_size - 1
    assert pipeline.caption(images[0], **{option: last if option == "forced_eos_token_id" else [last]})


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_states_that_overflow_are_an_error(pipeline, images, options):
    memory = pipeline.encode(image=images[0])
    overflowed = replace(memory, values=memory.values * 1e30 * 1e30)
    large = replace(memory, values=torch.full_like(memory.values, 3e38))  # finite, but not what is computed from it
    for bad, code in ((overflowed, "memory.not_finite"), (large, "generation.not_finite")):
        assert code_of(pipeline.caption, bad, **options) == code
        assert code_of(pipeline.ask, bad, "what?", **options) == code
    assert code_of(pipeline.rank, overflowed, "what?", ["a", "b"]) == "generation.not_finite"


def test_states_that_overflow_in_bfloat16_are_an_error(images):
    pipeline = build({"image": IMAGE})
    pipeline.model.prepare_for_inference("bfloat16")
    memory = pipeline.encode(image=images[0])
    finite = torch.full_like(memory.values, torch.finfo(torch.float32).max)  # rounds to infinity in bfloat16
    with pytest.raises(MmxError) as error:
        pipeline.caption(Memory(memory.keys.float(), finite.float(), memory.mask, memory.layout), num_beams=3)
    assert error.value.code == "memory.not_finite"
    assert error.value.details["dtype"] == "bfloat16"


@pytest.mark.parametrize("question", [None, 5, b"a", {"a": 1}, ["a", 5], ["a", None], [["a"]]])
def test_questions_are_texts(pipeline, images, question):
    assert code_of(pipeline.ask, images[0], question) == "question.type"
    item = question[-1] if isinstance(question, list) else question
    results = list(pipeline.answers([(images[0], "what?"), (images[0], item)]))
    assert [getattr(result, "code", None) for result in results] == [None, "question.type"]


@pytest.mark.parametrize("candidates", ["black", b"black", 5, None, {"a": 1}, ["a", 5], ["a", None]])
def test_candidates_are_texts(pipeline, images, candidates):
    assert code_of(pipeline.rank, images[0], "what?", candidates) == "rank.candidates"


def test_candidates_are_any_collection_of_texts(pipeline, images):
    expected = pipeline.rank(images[0], "what?", ["a", "b"])
    assert pipeline.rank(images[0], "what?", ("a", "b")) == expected
    assert pipeline.rank(images[0], "what?", (text for text in "ab")) == expected


def test_one_input_in_place_of_many_is_refused(pipeline, images, tmp_path):
    path = tmp_path / "a.png"
    images[0].save(path)
    with path.open("rb") as file:
        memory = pipeline.encode(image=images[0])
        for single in (str(path), path, file, path.read_bytes(), {"image": path}, images[0], memory, None, 5):
            assert code_of(pipeline.captions, single) == "captions.type"
            assert code_of(pipeline.answers, single) == "answers.type"
    assert code_of(pipeline.captions, torch.zeros(3, 8, 8)) == "captions.type"
    assert len(list(pipeline.captions(torch.zeros(2, 3, 8, 8)))) == 2
    assert [result.text for _, result in pipeline.captions(np.array([str(path)]))] == [pipeline.caption(path)]


@pytest.mark.parametrize("item", ["ab", 5, None, ("a.jpg",), ("a.jpg", "what?", None, 5)])
def test_questions_about_inputs_are_pairs(pipeline, images, item):
    with pytest.raises(MmxError) as error:
        pipeline.answers([(images[0], "what?"), item])
    assert error.value.code == "answers.item"
    assert error.value.details["index"] == 1


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "a", None, True])
def test_batch_sizes_are_whole_numbers(pipeline, images, batch_size):
    assert code_of(pipeline.captions, images, batch_size) == "inference.batch_size"
    assert code_of(pipeline.answers, [(images[0], "what?")], batch_size) == "inference.batch_size"


def test_model_to_load_is_a_name_or_a_folder():
    assert code_of(load, 5) == "model.type"


def test_wrong_inputs_are_refused(pipeline, images):
    assert isinstance(code_of(pipeline.encode, picture=images[0]), str)
    assert code_of(pipeline.encode) == "encode.sizes"
    assert code_of(pipeline.ask, images[:2], "what?") == "input.list"
    assert code_of(pipeline.caption, pipeline.encode(image=images[:2])) == "memory.batch_size"
    with pytest.raises(ImageError):
        pipeline.caption(b"no image")


@pytest.mark.parametrize("image", [None, {}, {"image": None}, {"image": None, "caption": None}])
def test_an_input_without_a_source_is_refused(two_sources, image):
    pipeline = two_sources
    calls = (
        pipeline.caption,
        pipeline.generate,
        pipeline.look,
        pipeline.prepare,
        lambda image: pipeline.ask(image, "what?"),
        lambda image: pipeline.rank(image, "what?", ["a", "b"]),
        lambda image: list(pipeline.stream(image)),
    )
    for call in calls:
        with pytest.raises(MmxError) as error:
            call(image)
        assert error.value.code == "input.no_source"
        assert error.value.details["sources"] == ["image", "caption"]


def test_rows_without_a_source_are_errors_among_the_others(two_sources, images):
    pipeline = two_sources
    rows = [images[0], None, {"image": None}, {"image": None, "caption": "a dog"}, {}]
    captions = [result for _, result in pipeline.captions(rows, batch_size=5)]
    answers = list(pipeline.answers([(row, "what?") for row in rows]))
    for results in (captions, answers):
        refused = [getattr(result, "code", None) for result in results]
        assert refused == [None, "input.no_source", "input.no_source", None, "input.no_source"]
    assert captions[0].text == pipeline.caption(images[0])
    assert captions[3].text == pipeline.caption({"caption": "a dog"})


def test_a_row_to_encode_has_a_source(two_sources, images):
    pipeline = two_sources
    for sources in (
        {"image": [images[0], None]},
        {"image": [images[0], None], "caption": ["a dog", None]},
        {"image": None},
        {"image": [None]},
    ):
        with pytest.raises(MmxError) as error:
            pipeline.encode(**sources)
        assert error.value.code == "input.no_source"
        assert error.value.details["row"] == len(sources["image"] or [None]) - 1
    memory = pipeline.encode(image=[images[0], None], caption=[None, "a dog"])
    assert memory.mask.any(-1).tolist() == [True, True]
    expected = [pipeline.caption(images[0]), pipeline.caption({"caption": "a dog"})]
    assert captions_of(pipeline, memory) == expected


def test_unconditional_memory_has_no_slot_to_attend(pipeline, images):
    unconditional = pipeline.unconditional_memory(2)
    assert unconditional.batch_size == 2
    assert unconditional.num_slots == 0
    without_slots = pipeline.encode(image=images[0]).mask_out(torch.ones(1, 1, dtype=torch.bool))
    expected = [pipeline.caption(without_slots)] * 2
    assert captions_of(pipeline, unconditional) == expected
