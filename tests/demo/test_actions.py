"""What the demo does, without a page: sessions, words, heat, parts, and the sentences of what is refused."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from cli_cases import draw
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmx.config.schema import GenerationConfig, SourceConfig
from mmx.demo import actions
from mmx.demo.region import LONGEST, SHORTEST, box_between, box_of, framed, to_draw_on
from mmx.encoders.registry import EncoderDescription, EncoderEntry
from mmx.errors import ConfigError, MmxError
from mmx.inference.pipeline import Pipeline
from mmx.interpret.attention_stats import relative_entropy
from mmx.interpret.render import overlay_heatmap
from mmx.memory import check_box
from mmx.testing import tiny_model

SIDES = st.floats(0, 1, allow_nan=False)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    source = SourceConfig(encoder="image", options={"backbone": "resnet10t", "size": 32, "stage": 2})
    return Pipeline(tiny_model({"image": source}), GenerationConfig(max_new_tokens=6, min_new_tokens=3))


@pytest.fixture
def photo(tmp_path) -> str:
    return str(draw(tmp_path / "a.png", 3))


@pytest.fixture
def session(pipeline, photo) -> actions.Session:
    return actions.open_image(pipeline, None, photo)


def last(growing):
    return list(growing)[-1]


# ---- a picture comes -------------------------------------------------------------------------------------------


def test_a_picture_is_encoded_once_until_another_comes(pipeline, session, photo, tmp_path) -> None:
    assert actions.open_image(pipeline, session, photo) is session
    assert torch.equal(session.memory.keys, pipeline.encode(image=photo).keys)
    other = actions.open_image(pipeline, session, str(draw(tmp_path / "b.png", 7)))
    assert other.memory is not session.memory and other.turns == () and other.current is None
    assert session.seconds > 0


def test_what_is_drawn_on_is_neither_tiny_nor_huge_and_keeps_its_proportions() -> None:
    for size in ((24, 20), (600, 500), (4000, 1000), (1, 5000)):
        drawn = to_draw_on(Image.new("RGB", size))
        assert SHORTEST <= max(drawn.size) <= LONGEST
        assert min(drawn.size) == max(1, round(min(size) * max(drawn.size) / max(size)))


@pytest.mark.parametrize("path", [None, "", 7, {"url": "x"}])
def test_no_picture_is_told(pipeline, path) -> None:
    with pytest.raises(MmxError, match="no picture was given; drop one"):
        actions.open_image(pipeline, None, path)


def test_a_bad_or_missing_file_is_told_without_a_path(pipeline, tmp_path) -> None:
    bad = tmp_path / "secret-place" / "notes.png"
    bad.parent.mkdir()
    bad.write_text("no picture at all")
    for path, told in ((bad, "a picture of 17 bytes: no picture"), (bad.with_name("gone.png"), "no longer on the")):
        with pytest.raises(MmxError) as raised:
            actions.open_image(pipeline, None, str(path))
        assert told in str(raised.value) and "secret-place" not in str(raised.value)


# ---- captions --------------------------------------------------------------------------------------------------


def test_a_caption_grows_and_is_remembered(pipeline, session, photo) -> None:
    steps = list(actions.caption(pipeline, session))
    texts = [texts[0] for _, texts in steps]
    assert texts == list(pipeline.stream(photo)) and len(texts) >= 3
    assert texts[-1] == pipeline.caption(photo)
    assert steps[-1][0].current == actions.DemoText(texts[-1])
    assert session.spoken is None, "a session is a value"


def test_beams_and_samples_come_whole_best_first(pipeline, session, photo) -> None:
    [(after, texts)] = actions.caption(pipeline, session, beams=3, samples=2)
    assert texts == pipeline.caption(photo, num_beams=3, num_return_sequences=2)
    assert after.current == actions.DemoText(texts[0], alternatives=(texts[1],))
    [(_, drawn)] = actions.caption(pipeline, session, samples=3, temperature=0.7)
    assert drawn == pipeline.caption(photo, do_sample=True, temperature=0.7, num_return_sequences=3)


def test_guidance_and_length_reach_the_model(pipeline, session, photo) -> None:
    _, [text] = last(actions.caption(pipeline, session, guidance=3.0, tokens=4))
    assert text == pipeline.caption(photo, guidance_scale=3.0, max_new_tokens=4)
    assert len(list(actions.caption(pipeline, session, tokens=4))) <= 4


@pytest.mark.parametrize(
    "chosen, told",
    [
        ({"samples": 2, "temperature": 0}, "2 captions were asked for; set a temperature above 0 with 1 beam"),
        ({"samples": 3, "beams": 2}, "3 captions were asked for"),
        ({"beams": 10**9}, "beams is '1000000000'; expected a whole number in 1..10"),
        ({"beams": "many"}, "beams is 'many'"),
        ({"samples": True}, "samples is 'True'"),
        ({"samples": float("nan")}, "samples is 'nan'"),
        ({"guidance": float("inf")}, "guidance is 'inf'; expected a number"),
        ({"guidance": None}, "guidance is 'None'"),
        ({"tokens": 10**5}, "longest caption is '100000'; expected a whole number in 1..256"),
        ({"temperature": {"path": "/etc"}}, "temperature is"),
    ],
)
def test_options_out_of_range_are_told(pipeline, session, chosen, told) -> None:
    with pytest.raises(MmxError) as raised:
        list(actions.caption(pipeline, session, **chosen))
    assert str(raised.value).startswith(told)


def test_what_the_model_refuses_is_an_error_of_ours(pipeline, session) -> None:
    with pytest.raises(ConfigError, match="min_new_tokens 3 is more"):
        list(actions.caption(pipeline, session, tokens=1))


# ---- questions -------------------------------------------------------------------------------------------------


def test_a_conversation_is_about_one_encoding(pipeline, session, photo) -> None:
    after = actions.ask(pipeline, session, " what is this? ")
    after = actions.ask(pipeline, after, "and here?", (0.0, 0.0, 0.5, 0.5))
    assert [turn.answer.question for turn in after.turns] == ["what is this?", "and here?"]
    assert after.turns[0].answer.text == pipeline.ask(photo, "what is this?")
    assert after.turns[1].answer.text == pipeline.ask(photo, "and here?", (0.0, 0.0, 0.5, 0.5))
    assert after.current == after.turns[1].answer and after.memory is session.memory
    assert all(turn.seconds > 0 for turn in after.turns)
    assert actions.clear_chat(after).turns == () and actions.clear_chat(after).current == after.current


def test_a_long_conversation_is_cut(pipeline, session) -> None:
    turn = actions.ChatTurn(actions.DemoText("yes", "old?"), 0.1)
    many = actions.replace(session, turns=(turn,) * actions.MOST_TURNS)
    after = actions.ask(pipeline, many, "new?")
    assert len(after.turns) == actions.MOST_TURNS and after.turns[-1].answer.question == "new?"


def test_offered_answers_are_ranked(pipeline, session, photo) -> None:
    found = actions.rank(pipeline, session, "is it?", "yes, no,, yes , maybe")
    assert found == pipeline.rank(photo, "is it?", ["yes", "no", "maybe"])
    assert sum(one.probability for one in found) == pytest.approx(1)


@pytest.mark.parametrize("text", ["", "   ", None, 3, ["a"]])
def test_no_question_and_no_answers_are_told(pipeline, session, text) -> None:
    with pytest.raises(MmxError, match="nothing was typed; expected a question"):
        actions.ask(pipeline, session, text)
    with pytest.raises(MmxError, match="nothing was typed; expected answers"):
        actions.rank(pipeline, session, "is it?", text)


def test_too_many_answers_and_too_long_texts_are_told(pipeline, session) -> None:
    with pytest.raises(MmxError, match="33 answers were offered"):
        actions.rank(pipeline, session, "is it?", ",".join(map(str, range(33))))
    with pytest.raises(MmxError, match="1,001 characters were typed"):
        actions.ask(pipeline, session, "x" * 1001)


# ---- looking ---------------------------------------------------------------------------------------------------


def test_the_last_text_is_looked_into_once_for_each_kind(pipeline, session, photo) -> None:
    said, _ = last(actions.caption(pipeline, session))
    after = actions.look(pipeline, said)
    assert actions.look(pipeline, after) is after
    assert after.look.text == said.current.text.lower()  # the tokenizer writes everything small
    other = actions.look(pipeline, after, "both")
    assert other.look.method == "both" and other.look.relevance is not None
    assert actions.ask(pipeline, other, "what?").look is None, "another text was said"


def test_the_words_of_a_caption_stay_its_own_whatever_is_asked_then(pipeline, session) -> None:
    said, _ = last(actions.caption(pipeline, session))
    then = actions.ask(pipeline, said, "what is this?")
    assert then.current.question == "what is this?"
    own = actions.look(pipeline, actions.select_caption(then))
    assert own.current is said.current
    assert [word.text for word in own.look.words] == [word.text for word in actions.look(pipeline, said).look.words]
    assert actions.select_caption(said) is said
    again, _ = last(actions.caption(pipeline, then))
    assert actions.select_caption(again).current is again.current


def test_the_source_of_pictures_may_bear_any_name() -> None:
    photo = SourceConfig(encoder="image", options={"backbone": "resnet10t", "size": 32, "stage": 2})
    text = SourceConfig(encoder="text", options={"width": 16, "layers": 1, "heads": 2})
    pipe = Pipeline(tiny_model({"photo": photo, "said": text}, question_to="said"), GenerationConfig(max_new_tokens=4))
    with TemporaryDirectory() as folder:
        session = actions.open_image(pipe, None, str(draw(Path(folder) / "a.png", 1)))
    told = actions.ask(pipe, session, "what is it?")
    assert actions.look(pipe, told).look.words is not None


def test_the_heat_is_that_of_the_look_over_the_picture(pipeline, session) -> None:
    said = actions.replace(session, current=actions.DemoText("a dog runs"))
    after = actions.look(pipeline, said)
    shown, sentence = actions.word_heatmap(after, 1, layer=0, head=2)
    assert shown.size == session.picture.size and sentence.startswith("dog: looking ")
    assert np.array_equal(np.asarray(shown), np.asarray(actions.word_heatmap(after, "dog", 0, 2)[0]))
    assert not np.array_equal(np.asarray(shown), np.asarray(actions.word_heatmap(after, 1, -1, None)[0]))
    heat = after.look.heatmap(1, shown.height, shown.width, 0, 2)
    assert np.array_equal(np.asarray(shown), np.asarray(overlay_heatmap(session.picture, heat)))


def test_the_table_says_what_the_look_says(pipeline, session) -> None:
    after = actions.look(pipeline, actions.replace(session, current=actions.DemoText("a dog", "what is it?")))
    headers, rows = actions.word_table(after)
    assert headers == ["word", "probability", "bits saved", "spread 0", "spread 1"]
    assert [row[0] for row in rows] == ["a", "dog"]
    for index, row in enumerate(rows):
        word, wide = after.look.words[index], relative_entropy(after.look.attention[index], after.look.visible[index])
        expected = [np.exp(word.logprob), word.gain, float(wide[0].mean()), float(wide[1].mean())]
        assert row[1:] == pytest.approx(expected, abs=6e-4)


def test_nothing_said_and_unknown_words_and_maps_are_told(pipeline, session) -> None:
    with pytest.raises(MmxError, match="nothing was said of this picture yet"):
        actions.look(pipeline, session)
    with pytest.raises(MmxError, match="nothing was looked at yet"):
        actions.word_heatmap(session, 0)
    after = actions.look(pipeline, actions.replace(session, current=actions.DemoText("a dog")))
    with pytest.raises(MmxError, match="expected one of weighted, attention"):
        actions.look(pipeline, after, {"path": "/etc/passwd"})
    for word, told in (
        (9, "has no word 9"),
        ("cat", "has no word 'cat'"),
        (None, "expected a whole number"),
        (-1, "place is"),
        (0.5, "place is"),
        ([], "place"),
    ):
        with pytest.raises(MmxError, match=told):
            actions.word_heatmap(after, word)
    with pytest.raises(MmxError, match="layer 7 is not there"):
        actions.word_heatmap(after, 0, layer=7)


# ---- parts and encoders ----------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES))
def test_two_corners_in_any_order_are_a_box(first, second) -> None:
    box = box_between(first, second)
    check_box(box)
    assert box == box_between(second, first) == box_between((first[0], second[1]), (second[0], first[1]))
    if all(abs(a - b) > 0.01 and max(a, b) <= 1 and min(a, b) < 0.99 for a, b in zip(first, second)):
        assert set(box) == {*first, *second}


def test_four_numbers_are_a_box() -> None:
    assert box_of(0, 0.25, 1, 0.75) == (0.0, 0.25, 1.0, 0.75)
    assert box_of(0, 0, 1, 1) is None and box_of(None, None, None, None) is None
    for numbers, told in (
        ((0, 0, None, 1), "fill in all, or none"),
        ((0, 0, 2, 1), "left before right"),
        (("0", 0, 1, 1), "four"),
    ):
        with pytest.raises(MmxError, match=told):
            box_of(*numbers)


def test_a_box_is_drawn_where_it_is() -> None:
    plain = Image.new("RGB", (400, 200), (9, 9, 9))
    changed = np.asarray(framed(plain, (0.25, 0.5, 0.75, 1.0))) != 9
    rows, columns = (np.flatnonzero(changed.any((2, axis))) for axis in (1, 0))
    assert (columns[0], columns[-1], rows[0], rows[-1]) == (100, 300, 100, 199)
    assert not changed[110:190, 110:290].any()
    dot = np.argwhere((np.asarray(framed(plain, None, (0.5, 0.25))) != 9).any(-1)).mean(0)
    assert tuple(dot) == pytest.approx((50, 200), abs=0.5)
    assert np.all(np.asarray(plain) == 9), "the picture itself is left as it was"


def test_an_encoder_is_a_row_of_lines() -> None:
    entry = EncoderEntry("toy", "toys:Toy", "toy-box", "1.2")
    [good, bad] = actions.encoder_rows(
        [EncoderDescription(entry, "text", {"size": 3, "deep": None}), EncoderDescription(entry, problem="a\nb")]
    )
    assert good == {
        "name": "toy", "modality": "text", "package": "toy-box 1.2", "address": "toys:Toy",
        "options": "size=3, deep=None", "problem": "",
    }  # fmt: skip
    assert (bad["modality"], bad["problem"]) == ("", "a b")


def test_no_page_is_needed() -> None:
    assert "gradio" not in Path(actions.__file__).read_text(encoding="utf-8")
