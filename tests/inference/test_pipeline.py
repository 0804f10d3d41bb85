"""The verbs: pictures in, texts out, in order, each picture encoded once, whatever is broken among them."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmx.config.schema import GenerationConfig, SourceConfig
from mmx.errors import ConfigError, ImageError, MmxError
from mmx.generation import DecoderStep
from mmx.inference.batch_inference import GeneratedText
from mmx.inference.batch_inference.prefetch import one_ahead
from mmx.inference.pipeline import Pipeline
from mmx.testing import tiny_model

IMAGE = SourceConfig(encoder="image", options={"backbone": "resnet10t", "size": 32, "stage": 2})
TEXT = SourceConfig(encoder="text", options={"hidden_size": 16, "num_layers": 1, "num_heads": 2})
QUESTIONS = ["what is this?", "why", "how many red dogs are there on the left?"]


def build(sources, **facts):
    """A pipeline that spells in letters, and whose weights are large enough to say different things."""
    model = tiny_model(sources, head_bias=True, tied_embeddings=False, **facts)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and not any(part in name for part in ("backbone", "positions", "image.projection")):
                weight.mul_(50.0 if name == "decoder.embedding.weight" else 6.0)
        letters = [model.tokenizer.encode(letter)[-1] for letter in "abcdefghijklmnopqrstuvwxyz"]
        model.decoder.lm_head.bias.fill_(-99.0)[[*letters, model.tokenizer.eos]] = 0.0
    return Pipeline(model, GenerationConfig(max_new_tokens=6))


@pytest.fixture(scope="module")
def pipeline():
    return build({"image": IMAGE})


@pytest.fixture(scope="module")
def asking():
    """Questions go to a text encoder instead of the prompt."""
    return build({"image": IMAGE, "question": TEXT}, question_to="question")


def picture(seed):
    """One colour, and another in a corner."""
    colours = torch.randint(0, 256, (2, 3), generator=torch.Generator().manual_seed(seed)).tolist()
    image = Image.new("RGB", (40, 24), tuple(colours[0]))
    image.paste(tuple(colours[1]), (0, 0, 20, 12))
    return image


@pytest.fixture(scope="module")
def pictures():
    return [picture(seed) for seed in range(7)]


@pytest.fixture
def encoded(pipeline):
    """How many pictures each call of the encoder was given."""
    sizes = []
    handle = pipeline.model.encoder("image").register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0]["pixels"]))
    )
    yield sizes
    handle.remove()


# ---- caption, ask, rank, stream ----------------------------------------------------------------------------------


def test_a_picture_or_its_file_or_its_bytes_or_its_memory_has_one_caption(pipeline, pictures, tmp_path):
    path = tmp_path / "a.png"
    pictures[0].save(path)
    given = [pictures[0], path, str(path), path.read_bytes(), pipeline.encode(image=pictures[0])]
    captions = [pipeline.caption(one) for one in given]
    assert len(set(captions)) == 1
    assert isinstance(captions[0], str)


def test_several_pictures_have_a_list_of_captions_as_if_alone(pipeline, pictures):
    captions = pipeline.caption(pictures)
    assert captions == [pipeline.caption(one) for one in pictures] == pipeline.caption(pipeline.encode(image=pictures))
    assert len(set(captions)) > 1
    assert pipeline.caption(pictures[:1]) == captions[:1]
    assert pipeline.caption([]) == []


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "seed": 3}])
def test_several_texts_of_one_picture(pipeline, pictures, options):
    texts = pipeline.caption(pictures[0], num_return_sequences=3, **options)
    assert len(texts) == 3
    assert pipeline.caption(pictures[0], num_return_sequences=3, **options) == texts
    if "num_beams" in options:
        assert texts[0] == pipeline.caption(pictures[0], num_beams=3)


def test_questions_together_are_answered_as_alone(pipeline, pictures, encoded):
    memory = pipeline.encode(image=pictures[1])
    together = pipeline.ask(memory, QUESTIONS)
    assert together == [pipeline.ask(memory, question) for question in QUESTIONS]
    assert len(set(together)) > 1
    assert encoded == [1], "one encoding for everything that is asked"
    assert pipeline.ask(memory, []) == []


@pytest.mark.parametrize("beams", [1, 3])
def test_questions_read_by_an_encoder_are_answered_as_alone(asking, pictures, beams):
    memory = asking.encode(image=pictures[1])
    together = asking.ask(memory, QUESTIONS, num_beams=beams)
    assert together == [asking.ask(memory, question, num_beams=beams) for question in QUESTIONS]
    assert together == asking.ask(memory, QUESTIONS[::-1], num_beams=beams)[::-1]
    assert len(set(together)) > 1, "the question must matter"


@pytest.mark.parametrize("name", ["pipeline", "asking"])
def test_ranked_answers_are_shares_of_one_and_do_not_depend_on_their_order(name, pictures, request):
    pipeline = request.getfixturevalue(name)
    candidates = ["dog", "a much longer answer", "", "cat"]
    memory = pipeline.encode(image=pictures[2])
    ranked = pipeline.rank(memory, QUESTIONS[0], candidates)
    assert sum(one.probability for one in ranked) == pytest.approx(1.0, abs=1e-9)
    assert [one.logprob for one in ranked] == sorted((one.logprob for one in ranked), reverse=True)
    assert {one.answer for one in ranked} == set(candidates)
    total = math.fsum(math.exp(one.logprob - ranked[0].logprob) for one in ranked)
    again = {one.answer: one for one in pipeline.rank(memory, QUESTIONS[0], candidates[::-1])}
    for one in ranked:
        assert one.probability == pytest.approx(math.exp(one.logprob - ranked[0].logprob) / total, abs=1e-6)
        assert again[one.answer].logprob == pytest.approx(one.logprob, abs=1e-4)
        alone = pipeline.rank(memory, QUESTIONS[0], [one.answer])[0]
        assert alone.logprob == pytest.approx(one.logprob, abs=1e-4)
        assert alone.probability == 1.0


def test_streaming_ends_with_the_caption_and_leaves_the_caller_alone(pipeline, pictures):
    texts = []
    for text in pipeline.stream(pictures[0]):
        texts.append(text)
        assert not torch.is_inference_mode_enabled(), "between two words the caller's code is not ours"
    assert len(texts) == 6
    assert texts[-1] == pipeline.caption(pictures[0])
    asked = list(pipeline.stream(pictures[0], QUESTIONS[0], max_new_tokens=3))
    assert asked[-1] == pipeline.ask(pictures[0], QUESTIONS[0], max_new_tokens=3)


def test_a_pipeline_that_searches_can_stream(pictures, pipeline):
    searching = Pipeline(pipeline.model, GenerationConfig(num_beams=4, num_return_sequences=2, max_new_tokens=4))
    assert list(searching.stream(pictures[0]))[-1] == pipeline.caption(pictures[0], max_new_tokens=4)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_stop_string_ends_the_text_and_is_cut_off(pipeline, pictures, beams):
    whole = pipeline.caption(pictures[0], max_new_tokens=20)
    stop = whole[1:3]
    memory = pipeline.encode(image=pictures[0])
    options = pipeline.options({"max_new_tokens": 20, "stop_strings": [stop], "num_beams": beams})
    said = pipeline.generate(memory, [[None]], options)[0][0][0]
    assert stop not in said.text
    if beams == 1:
        assert said.text == whole[:1].strip()
        assert len(said.tokens) < 20


# ---- guidance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pipeline", "asking"])
@pytest.mark.parametrize("beams", [1, 3])
def test_guidance_goes_from_what_is_said_blindly_to_what_is_seen_and_beyond(name, beams, pictures, request):
    pipeline = request.getfixturevalue(name)
    memory, blind = pipeline.encode(image=pictures), pipeline.encode(image=[None])
    plain = pipeline.caption(memory, num_beams=beams)
    assert pipeline.caption(memory, num_beams=beams, guidance_scale=1.0) == plain
    assert (
        pipeline.caption(memory, num_beams=beams, guidance_scale=0.0) == [pipeline.caption(blind, num_beams=beams)] * 7
    )
    beyond = pipeline.caption(memory, num_beams=beams, guidance_scale=3.0)
    assert beyond != plain
    assert beyond == [pipeline.caption(one, num_beams=beams, guidance_scale=3.0) for one in pictures]
    for scale, seen in ((0.0, blind), (1.0, memory.select([2]))):
        asked = pipeline.ask(memory.select([2]), QUESTIONS, num_beams=beams, guidance_scale=scale)
        assert asked == pipeline.ask(seen, QUESTIONS, num_beams=beams), "the blind half has the question all the same"


def test_without_guidance_there_is_no_second_step(pipeline, pictures):
    memory = pipeline.encode(image=pictures[0])
    plain, *_ = pipeline._start(memory, [[None]], pipeline.options({"guidance_scale": 1.0}))
    assert isinstance(plain, DecoderStep)
    step, *_ = pipeline._start(memory, [[None]], pipeline.options({"guidance_scale": 1.5}))
    assert (step.scale, step.seeing.memory.num_slots, step.blind.memory.num_slots) == (1.5, memory.num_slots, 0)


def test_a_guided_stream_ends_with_the_guided_answer_and_a_box_still_points(pipeline, pictures):
    options = {"guidance_scale": 2.5, "box": (0.0, 0.0, 0.5, 0.5)}
    answer = pipeline.ask(pictures[0], QUESTIONS[0], **options)
    assert list(pipeline.stream(pictures[0], QUESTIONS[0], **options))[-1] == answer
    focused = pipeline.encode(image=pictures[0]).focus(options.pop("box"))
    assert answer == pipeline.ask(focused, QUESTIONS[0], **options)


def test_what_is_said_carries_its_tokens_and_their_scores(pipeline, pictures):
    said = pipeline.generate(pipeline.encode(image=pictures[0]), [[None]], pipeline.generation)[0][0][0]
    assert len(said.tokens) == 6
    assert said.score == pytest.approx(sum(logprob for _, logprob in said.tokens) / 6, abs=1e-6)


def test_a_box_narrows_a_memory_without_encoding_again(pipeline, pictures, encoded):
    memory = pipeline.encode(image=pictures[3])
    box = (0.0, 0.0, 0.5, 0.5)
    assert memory.layout[0].grid == (2, 2) or memory.num_slots > 1
    for question in QUESTIONS:
        assert pipeline.ask(memory, question, box=box) == pipeline.ask(memory.focus(box), question)
    assert pipeline.ask(memory, QUESTIONS, box=(0.0, 0.0, 1.0, 1.0)) == pipeline.ask(memory, QUESTIONS)
    whole, part = (pipeline.rank(memory, "what?", ["dog", "cat"], box=b) for b in (None, box))
    assert {one.answer: one.logprob for one in whole} != {one.answer: one.logprob for one in part}
    assert encoded == [1]
    with pytest.raises(MmxError, match="is no region"):
        pipeline.ask(memory, "what?", box=(0.5, 0.0, 0.1, 1.0))


# ---- many --------------------------------------------------------------------------------------------------------


def test_bad_pictures_give_their_error_and_the_others_their_caption_in_order(pipeline, pictures, encoded):
    bad = {1: b"no picture", 2: Path("nowhere.png"), 6: b""}
    given = [bad.get(place, picture(place)) for place in range(8)]
    found = list(pipeline.captions(iter(given), batch_size=4))
    assert [one is image for (one, _), image in zip(found, given, strict=True)] == [True] * 8
    for place, (image, said) in enumerate(found):
        if place in bad:
            assert isinstance(said, ImageError)
        else:
            assert isinstance(said, GeneratedText)
            assert said.text == pipeline.caption(image)
    assert encoded[:2] == [2, 3]


def test_a_batch_of_bad_pictures_alone(pipeline):
    assert [type(said) for _, said in pipeline.captions([b"", b"x"], batch_size=1)] == [ImageError, ImageError]
    assert list(pipeline.captions([])) == list(pipeline.answers([])) == []


def test_questions_are_grouped_by_picture_and_each_is_encoded_once(pipeline, pictures, encoded, tmp_path):
    for place, one in enumerate(pictures[:3]):
        one.save(tmp_path / f"{place}.png")
    order = [0, 1, 0, 2, 1, 0, 2, 2]
    asked = [(str(tmp_path / f"{p}.png"), QUESTIONS[i % 3]) for i, p in enumerate(order)]
    said = list(pipeline.answers(asked, batch_size=2))
    assert encoded == [2, 1]
    assert [one.text for one in said] == [pipeline.ask(image, question) for image, question in asked]


def test_open_pictures_may_be_asked_about_as_well(pipeline, pictures, encoded):
    asked = [(pictures[i % 2], question) for i, question in enumerate(QUESTIONS)]
    said = list(pipeline.answers(asked))
    assert encoded == [2]
    assert [one.text for one in said] == [pipeline.ask(image, question) for image, question in asked]


def test_a_bad_picture_and_an_endless_question_leave_the_others_alone(pipeline, pictures):
    asked = [
        (pictures[0], "what?"),
        (b"no picture", "what?"),
        (pictures[0], "why " * 99),
        (pictures[1], "what?"),
        (b"no picture", "why?"),
    ]
    said = list(pipeline.answers(asked, batch_size=1))
    assert [type(one) for one in said] == [GeneratedText, ImageError, MmxError, GeneratedText, ImageError]
    assert [said[0].text, said[3].text] == [pipeline.ask(pictures[0], "what?"), pipeline.ask(pictures[1], "what?")]


# ---- edges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pipeline", "asking"])
def test_an_empty_question_is_a_question(name, pictures, request):
    assert isinstance(request.getfixturevalue(name).ask(pictures[0], ""), str)


def test_a_question_too_long_is_one_sentence(pipeline, pictures):
    with pytest.raises(MmxError, match=r"^the question has \d+ tokens; this model reads up to 64, ask more shortly.$"):
        pipeline.ask(pictures[0], "why " * 99)


def test_a_question_too_long_for_its_encoder_is_cut(asking, pictures):
    assert isinstance(asking.ask(pictures[0], "why " * 99), str)


def test_a_candidate_too_long_is_one_sentence(pipeline, pictures):
    with pytest.raises(MmxError, match=r"^prompt and candidate have \d+ tokens; this model reads up to 128, give"):
        pipeline.rank(pictures[0], "what?", ["dog", "dog " * 99])
    with pytest.raises(MmxError, match="rank was given no candidates"):
        pipeline.rank(pictures[0], "what?", [])


@pytest.mark.parametrize("beams", [1, 2])
def test_texts_end_where_the_learned_positions_do(pictures, beams):
    small = build({"image": IMAGE}, max_positions=16)
    options = small.generation_config({"max_new_tokens": 99, "min_new_tokens": 99, "num_beams": beams})
    memory = small.encode(image=pictures[:2])
    captions = small.generate(memory, [[None], [None]], options)
    assert [len(row[0][0].tokens) for row in captions] == [15, 15]  # the last token is said, not read
    answers = small.generate(memory, [["a?"], ["ab?"]], options)
    assert [len(row[0][0].tokens) for row in answers] == [9, 9], "half is for the question, however short"


def test_without_learned_positions_texts_are_as_long_as_asked(pictures):
    rotating = build({"image": IMAGE}, max_positions=16, positions="rope")
    options = rotating.generation_config({"max_new_tokens": 40, "min_new_tokens": 40})
    assert len(rotating.generate(rotating.encode(image=pictures[0]), [[None]], options)[0][0][0].tokens) == 40


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_beam": 3}, "num_beam is not a known key; did you mean 'num_beams'?"),
        ({"num_beams": 0}, "num_beams"),
        ({"do_sample": True, "num_beams": 2}, "contradict each other; choose sampling or beams"),
        ({"num_return_sequences": 2}, "num_return_sequences 2 needs do_sample: true or as many num_beams"),
        ({"top_p": 1.5}, "top_p"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"stop_strings": "x"}, "stop_strings"),
    ],
)
def test_wrong_options_are_one_sentence(pipeline, pictures, options, sentence):
    for verb in (
        lambda: pipeline.caption(pictures[0], **options),
        lambda: pipeline.ask(pictures[0], "what?", **options),
        lambda: list(pipeline.captions([pictures[0]], **options)),
        lambda: list(pipeline.answers([(pictures[0], "what?")], **options)),
    ):
        with pytest.raises(ConfigError) as caught:
            verb()
        assert sentence in str(caught.value)
        assert "generation options" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_wrong_inputs_are_one_sentence(pipeline, pictures):
    with pytest.raises(MmxError, match="the model has no source 'picture'"):
        pipeline.encode(picture=pictures[0])
    with pytest.raises(MmxError, match="as many inputs for every source"):
        pipeline.encode()
    with pytest.raises(MmxError, match="a question is about one picture, 2 were given"):
        pipeline.ask(pictures[:2], "what?")
    with pytest.raises(ImageError):
        pipeline.caption(b"no picture")


def test_an_absent_picture_is_nothing_to_see(pipeline, pictures):
    memory = pipeline.encode(image=[pictures[0], None])
    assert memory.mask.any(-1).tolist() == [True, False]
    blind = pipeline.encode(image=[None])
    assert (blind.batch, blind.slots) == (1, 0)
    assert pipeline.caption(memory) == [pipeline.caption(pictures[0]), pipeline.caption(blind)]


def test_the_next_batch_is_started_before_this_one_is_given_and_no_other():
    started = []

    def batches():
        for name in "abcd":
            started.append(name)
            yield [name], iter([name.upper()])

    given = one_ahead(batches())
    assert next(given) == (["a"], ["A"]) and started == ["a", "b"]
    assert next(given) == (["b"], ["B"]) and started == ["a", "b", "c"]
    assert list(given) == [(["c"], ["C"]), (["d"], ["D"])]
    assert list(one_ahead([])) == []
