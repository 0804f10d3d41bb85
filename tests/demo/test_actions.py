"""The actions of the demo: sessions, captions, questions, attention maps, regions, and refused values."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import draw
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmx.boxes import check_box
from mmx.config.schema import GenerationConfig, SourceConfig
from mmx.demo import actions
from mmx.demo.region import MAX_SIDE, MIN_SIDE, box_from_corners, box_from_numbers, display_copy, draw_region
from mmx.encoders.registry import EncoderDescription, EncoderEntry
from mmx.errors import ConfigError, MmxError
from mmx.inference.pipeline import Pipeline
from mmx.interpret.attention_stats import normalized_entropy
from mmx.interpret.render import overlay_heatmap
from mmx.testing import tiny_model

SIDES = st.floats(0, 1, allow_nan=False)


@pytest.fixture
def image(tmp_path) -> str:
    return str(draw(tmp_path / "a.png", 3))


@pytest.fixture
def session(tiny, image) -> actions.Session:
    return actions.open_image(tiny, None, image)


def caption(pipeline, session, **options):
    return actions.caption(pipeline, session, actions.CaptionOptions(**options))


@contextmanager
def refused(code):
    with pytest.raises(MmxError) as caught:
        yield
    assert caught.value.code == code


def last(updates):
    return list(updates)[-1]


# ---- images -----------------------------------------------------------------------------------------------------


def test_an_image_is_encoded_once(tiny, session, image, tmp_path) -> None:
    assert actions.open_image(tiny, session, image) is session
    assert torch.equal(session.memory.keys, tiny.encode(image=image).keys)
    other = actions.open_image(tiny, session, str(draw(tmp_path / "b.png", 7)))
    assert other.memory is not session.memory and other.turns == () and other.current is None
    assert session.seconds > 0


def test_the_display_copy_has_limited_size_and_the_same_proportions() -> None:
    for size in ((24, 20), (600, 500), (4000, 1000), (1, 5000)):
        copy = display_copy(Image.new("RGB", size))
        assert MIN_SIDE <= max(copy.size) <= MAX_SIDE
        assert min(copy.size) == max(1, round(min(size) * max(copy.size) / max(size)))


@pytest.mark.parametrize("path", [None, "", 7, {"url": "x"}])
def test_a_missing_image_is_refused(tiny, path) -> None:
    with refused("demo.no_image"):
        actions.open_image(tiny, None, path)


def test_errors_of_uploads_do_not_name_their_path(tiny, tmp_path) -> None:
    bad = tmp_path / "secret-place" / "notes.png"
    bad.parent.mkdir()
    bad.write_text("not an image file")
    for path, code in ((bad, "image.format"), (bad.with_name("gone.png"), "demo.upload_gone")):
        with pytest.raises(MmxError) as raised:
            actions.open_image(tiny, None, str(path))
        assert raised.value.code == code
        assert "secret-place" not in f"{raised.value} {raised.value.details}"


# ---- captions --------------------------------------------------------------------------------------------------


def test_a_single_caption_is_yielded_after_each_token(tiny, session, image) -> None:
    updates = list(caption(tiny, session))
    texts = [update.captions[0] for update in updates]
    assert texts == list(tiny.stream(image)) and len(texts) >= 3
    assert texts[-1] == tiny.caption(image)
    assert updates[-1].session.current == actions.DemoText(texts[-1])
    assert session.current is None, "a session is a value"


def test_beams_and_samples_are_yielded_once_best_first(tiny, session, image) -> None:
    [(after, texts)] = caption(tiny, session, num_beams=3, num_captions=2)
    assert texts == [text.text for text in tiny.generate(image, num_beams=3, num_return_sequences=2)]
    assert after.current == actions.DemoText(texts[0], alternatives=(texts[1],))
    [(_, samples)] = caption(tiny, session, num_captions=3, temperature=0.7)
    expected = tiny.generate(image, do_sample=True, temperature=0.7, num_return_sequences=3)
    assert samples == [text.text for text in expected]


def test_guidance_and_length_are_applied(tiny, session, image) -> None:
    _, [text] = last(caption(tiny, session, guidance_scale=3.0, max_new_tokens=4))
    assert text == tiny.caption(image, guidance_scale=3.0, max_new_tokens=4)
    assert len(list(caption(tiny, session, max_new_tokens=4))) <= 4


@pytest.mark.parametrize(
    ("options", "code", "option"),
    [
        ({"num_captions": 2, "temperature": 0}, "demo.num_captions", None),
        ({"num_captions": 3, "num_beams": 2}, "demo.num_captions", None),
        ({"num_beams": 10**9}, "demo.number", "beams"),
        ({"num_beams": "many"}, "demo.number", "beams"),
        ({"num_captions": True}, "demo.number", "captions"),
        ({"num_captions": float("nan")}, "demo.number", "captions"),
        ({"num_captions": 1.5}, "demo.number", "captions"),
        ({"guidance_scale": float("inf")}, "demo.number", "guidance scale"),
        ({"guidance_scale": None}, "demo.number", "guidance scale"),
        ({"max_new_tokens": 10**5}, "demo.number", "length"),
        ({"temperature": {"path": "/etc"}}, "demo.number", "temperature"),
    ],
)
def test_options_out_of_range_are_refused(tiny, session, options, code, option) -> None:
    with pytest.raises(MmxError) as caught:
        list(caption(tiny, session, **options))
    assert (caught.value.code, caught.value.details.get("option")) == (code, option)


def test_options_that_the_model_refuses_are_config_errors(tiny, session) -> None:
    with pytest.raises(ConfigError):
        list(caption(tiny, session, max_new_tokens=1))


# ---- questions -------------------------------------------------------------------------------------------------


def test_a_conversation_uses_one_encoding(tiny, session, image) -> None:
    after = actions.ask(tiny, session, " what is this? ")
    after = actions.ask(tiny, after, "and here?", (0.0, 0.0, 0.5, 0.5))
    assert [turn.answer.question for turn in after.turns] == ["what is this?", "and here?"]
    assert after.turns[0].answer.text == tiny.ask(image, "what is this?")
    assert after.turns[0].answer.probability == tiny.generate(image, "what is this?")[0].probability
    assert after.turns[1].answer.text == tiny.ask(image, "and here?", (0.0, 0.0, 0.5, 0.5))
    assert after.current == after.turns[1].answer and after.memory is session.memory
    assert all(turn.seconds > 0 for turn in after.turns)
    assert actions.clear_chat(after).turns == () and actions.clear_chat(after).current == after.current


def test_a_long_conversation_is_shortened(tiny, session) -> None:
    turn = actions.ChatTurn(actions.DemoText("yes", "old?"), 0.1)
    many = actions.replace(session, turns=(turn,) * actions.MAX_TURNS)
    after = actions.ask(tiny, many, "new?")
    assert len(after.turns) == actions.MAX_TURNS and after.turns[-1].answer.question == "new?"


def test_candidate_answers_are_ranked(tiny, session, image) -> None:
    found = actions.rank(tiny, session, "is it?", "yes, no,, yes , maybe")
    assert found == tiny.rank(image, "is it?", ["yes", "no", "maybe"])
    assert sum(answer.probability for answer in found) == pytest.approx(1)


@pytest.mark.parametrize("text", ["", "   ", None, 3, ["a"]])
def test_missing_questions_and_answers_are_refused(tiny, session, text) -> None:
    with refused("input.empty_question"):
        actions.ask(tiny, session, text)
    with refused("input.empty_question"):
        actions.rank(tiny, session, text, "yes, no")
    with refused("demo.no_text"):
        actions.rank(tiny, session, "is it?", text)


def test_too_many_answers_and_too_long_texts_are_refused(tiny, session) -> None:
    with refused("demo.num_candidates"):
        actions.rank(tiny, session, "is it?", ",".join(map(str, range(33))))
    with refused("demo.text_too_long"):
        actions.ask(tiny, session, "x" * 1001)


# ---- attention maps --------------------------------------------------------------------------------------------


def test_maps_of_the_current_text_are_computed_once_for_each_method(tiny, session, image) -> None:
    captioned, _ = last(caption(tiny, session))
    after = actions.look(tiny, captioned)
    assert actions.look(tiny, after) is after
    assert after.look.text == captioned.current.text
    other = actions.look(tiny, after, "weighted")
    assert after.look.method == "both" and other.look.method == "weighted"
    assert actions.ask(tiny, other, "what?").look is None, "another text is current"


def test_the_words_of_a_caption_do_not_change_with_a_question(tiny, session) -> None:
    captioned, _ = last(caption(tiny, session))
    asked = actions.ask(tiny, captioned, "what is this?")
    assert asked.current.question == "what is this?"
    own = actions.look(tiny, actions.select_caption(asked))
    assert own.current is captioned.current
    assert [word.text for word in own.look.words] == [word.text for word in actions.look(tiny, captioned).look.words]
    assert actions.select_caption(captioned) is captioned
    again, _ = last(caption(tiny, asked))
    assert actions.select_caption(again).current is again.current


def test_the_image_source_may_have_any_name(tmp_path) -> None:
    image = SourceConfig(encoder="image", options={"backbone": "resnet10t", "size": 32, "stage": 2})
    text = SourceConfig(encoder="text", options={"hidden_size": 16, "num_layers": 1, "num_heads": 2})
    model = tiny_model({"photo": image, "question": text}, question_input="question")
    pipeline = Pipeline(model, GenerationConfig(max_new_tokens=4))
    session = actions.open_image(pipeline, None, str(draw(tmp_path / "a.png", 1)))
    answered = actions.ask(pipeline, session, "what is it?")
    assert actions.look(pipeline, answered).look.words is not None


def test_the_heatmap_of_a_word_is_drawn_over_the_image(tiny, session) -> None:
    with_text = actions.replace(session, current=actions.DemoText("a dog runs"))
    after = actions.look(tiny, with_text)
    shown, sentence = actions.word_heatmap(after, 1, layer=0, head=2)
    assert shown.size == session.image.size and sentence.startswith("dog: information gain ")
    assert np.array_equal(np.asarray(shown), np.asarray(actions.word_heatmap(after, "dog", 0, 2)[0]))
    assert not np.array_equal(np.asarray(shown), np.asarray(actions.word_heatmap(after, 1, -1, None)[0]))
    heatmap = after.look.heatmap(1, shown.height, shown.width, 0, 2)
    assert np.array_equal(np.asarray(shown), np.asarray(overlay_heatmap(session.image, heatmap)))


def test_the_table_has_the_numbers_of_the_maps(tiny, session) -> None:
    after = actions.look(tiny, actions.replace(session, current=actions.DemoText("a dog", "what is it?")))
    headers, rows = actions.word_table(after)
    assert headers == ["word", "probability", "gain (bits)", "entropy 0", "entropy 1"]
    assert [row[0] for row in rows] == ["a", "dog"]
    for index, row in enumerate(rows):
        word = after.look.words[index]
        entropy = normalized_entropy(after.look.attention[index], after.look.visible[index])
        expected = [np.exp(word.logprob), word.gain, float(entropy[0].mean()), float(entropy[1].mean())]
        assert row[1:] == pytest.approx(expected, abs=6e-4)


def test_missing_texts_and_maps_and_unknown_words_are_refused(tiny, session) -> None:
    with refused("demo.no_text_yet"):
        actions.look(tiny, session)
    with refused("demo.no_maps_yet"):
        actions.word_heatmap(session, 0)
    after = actions.look(tiny, actions.replace(session, current=actions.DemoText("a dog")))
    with refused("demo.method"):
        actions.look(tiny, after, {"path": "/etc/passwd"})
    for word, code in ((9, "look.word"), ("cat", "look.word"), (None, "demo.number"), (-1, "demo.number"),
                       (0.5, "demo.number"), ([], "demo.number")):  # fmt: skip
        with refused(code):
            actions.word_heatmap(after, word)
    with refused("look.layer"):
        actions.word_heatmap(after, 0, layer=7)


# ---- regions and encoders ---------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES))
def test_two_corners_in_any_order_give_a_box(first, second) -> None:
    box = box_from_corners(first, second)
    check_box(box)
    assert box == box_from_corners(second, first) == box_from_corners((first[0], second[1]), (second[0], first[1]))
    if all(abs(a - b) > 0.01 and max(a, b) <= 1 and min(a, b) < 0.99 for a, b in zip(first, second)):
        assert set(box) == {*first, *second}


def test_four_numbers_give_a_box() -> None:
    assert box_from_numbers(0, 0.25, 1, 0.75) == (0.0, 0.25, 1.0, 0.75)
    assert box_from_numbers(0, 0, 1, 1) is None and box_from_numbers(None, None, None, None) is None
    for numbers, code in (
        ((0, 0, None, 1), "demo.region_numbers"),
        ((0, 0, 2, 1), "demo.region"),
        (("0", 0, 1, 1), "demo.region_numbers"),
    ):
        with refused(code):
            box_from_numbers(*numbers)


def test_a_box_is_drawn_at_its_position() -> None:
    plain = Image.new("RGB", (400, 200), (9, 9, 9))
    changed = np.asarray(draw_region(plain, (0.25, 0.5, 0.75, 1.0))) != 9
    rows, columns = (np.flatnonzero(changed.any((2, axis))) for axis in (1, 0))
    assert (columns[0], columns[-1], rows[0], rows[-1]) == (100, 300, 100, 199)
    assert not changed[110:190, 110:290].any()
    corner = np.argwhere((np.asarray(draw_region(plain, None, (0.5, 0.25))) != 9).any(-1)).mean(0)
    assert tuple(corner) == pytest.approx((50, 200), abs=0.5)
    assert np.all(np.asarray(plain) == 9), "the image itself is not changed"


def test_encoder_rows() -> None:
    entry = EncoderEntry("toy", "toys:Toy", "toy-box", "1.2")
    [good, bad] = actions.encoder_rows(
        [EncoderDescription(entry, "text", {"size": 3, "deep": None}), EncoderDescription(entry, problem="a\nb")]
    )
    assert good == {
        "name": "toy", "modality": "text", "package": "toy-box 1.2", "address": "toys:Toy",
        "options": "size=3, deep=None", "problem": "",
    }  # fmt: skip
    assert (bad["modality"], bad["problem"]) == ("", "a b")


def test_actions_do_not_import_gradio() -> None:
    assert "gradio" not in Path(actions.__file__).read_text(encoding="utf-8")
