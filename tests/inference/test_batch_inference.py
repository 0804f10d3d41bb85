"""Bulk work by a fake speaker: batches halve, twins are said once, questions keep to a budget, order is kept."""

from unittest.mock import patch

import pytest
import torch
from batch_cases import NO_MEMORY, FakeSpeaker, write_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmx.errors import EncoderError, ImageError, MmxError
from mmx.inference.batch_inference import GeneratedText, answering
from mmx.inference.batch_inference.dedup import ResultCache, content_key
from mmx.inference.batch_inference.out_of_memory import PATIENCE, AdaptiveBatchSize, is_out_of_memory

OUT_OF_MEMORY = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "cpu": lambda: RuntimeError(NO_MEMORY),
    "python": MemoryError,
}


def texts(found):
    return [said.text if isinstance(said, GeneratedText) else type(said) for said in found]


# ---- memory that runs out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_a_batch_that_is_too_large_halves_and_nothing_is_lost(kind, tmp_path):
    paths = write_texts(tmp_path, {f"{n}.jpg": f"text {n}" for n in range(20)})
    speaker = FakeSpeaker(room=3, out_of_memory=OUT_OF_MEMORY[kind])
    found = list(speaker.captions(paths, batch_size=16))
    assert [path for path, _ in found] == paths
    assert texts(said for _, said in found) == [f"text {n}" for n in range(20)]
    assert max(rows for rows, _ in speaker.said) == 2, "16, 8, 4, 2: the first that fits"
    assert len(speaker.encoded) == 3 + 10, "three times too much, then what fits is kept for the next batch"


def test_what_is_too_much_alone_is_an_error_of_its_own(tmp_path):
    contents = {f"{n}.jpg": "huge" if n in (0, 5) else f"text {n}" for n in range(9)}
    speaker = FakeSpeaker()
    said = [said for _, said in speaker.captions(write_texts(tmp_path, contents), batch_size=4)]
    expected = ["text 1", "text 2", "text 3", "text 4"]
    assert texts(said) == [MmxError, *expected, MmxError, "text 6", "text 7", "text 8"]
    assert "memory ran out on this input alone" in str(said[0])


def failing(*bad):
    """Work that cannot be done on some rows: it tells nothing of the others beside them."""

    def work(rows):
        if found := [row for row in rows if row in bad]:
            raise EncoderError(f"row {found[0]} is not finite")
        return [f"done {row}" for row in rows]

    return work


def test_one_bad_row_is_an_error_of_its_own_and_the_others_are_done():
    halving, work = AdaptiveBatchSize(), failing(2, 7)
    found = [*halving.run([1, 2, 3], work), *halving.run([7], work), *halving.run([8, 9], work)]
    assert [str(one) for one in found] == [
        "done 1", "row 2 is not finite", "done 3", "row 7 is not finite", "done 8", "done 9",
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [[1], [1, 2]])
def test_what_fails_for_every_row_is_the_end(rows):
    with pytest.raises(EncoderError, match="row 1"):
        AdaptiveBatchSize().run(rows, failing(1, 2))


@pytest.mark.parametrize(
    "told",
    ["CUDA error: out of memory", "MPS backend out of memory (MPS allocated: 9 GB)", "CUDNN_STATUS_ALLOC_FAILED"],
)
def test_every_way_of_saying_it_is_known(told):
    assert is_out_of_memory(RuntimeError(told))


def test_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError, match="shapes"):
        AdaptiveBatchSize().run([1, 2], lambda rows: (_ for _ in ()).throw(RuntimeError("shapes")))
    assert not is_out_of_memory(None)


def test_an_allocator_that_fails_inside_an_encoder_is_known_by_its_cause():
    error = EncoderError("encoder failed in forward")
    assert not is_out_of_memory(error)
    error.__cause__ = RuntimeError(NO_MEMORY)
    assert is_out_of_memory(error)


def test_after_a_while_larger_batches_are_tried_again():
    halving, sizes, room = AdaptiveBatchSize(), [], [2]

    def work(rows):
        if len(rows) > room[0]:
            raise MemoryError
        sizes.append(len(rows))
        return rows

    assert halving.run(list(range(8)), work) == list(range(8))
    room[0] = 8
    assert halving.run(list(range(4 * PATIENCE)), work) == list(range(4 * PATIENCE))
    assert sizes[:PATIENCE] == [2] * PATIENCE
    assert sizes[PATIENCE] == 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 12))
def test_whatever_fits_is_done_once_in_order(weights, room):
    def work(rows):
        if sum(weight for _, weight in rows) > room:
            raise MemoryError
        return [number for number, _ in rows]

    with patch("gc.collect"):  # 60 ms each in a process that holds torch
        found = AdaptiveBatchSize().run(list(enumerate(weights)), work)
    assert [n if isinstance(n, int) else None for n in found] == [
        number if weight <= room else None for number, weight in enumerate(weights)
    ]


def test_questions_halve_as_well(tmp_path):
    (path,) = write_texts(tmp_path, {"a.jpg": "a"})
    speaker = FakeSpeaker(room=3)
    said = list(speaker.answers([(path, f"q{n}?") for n in range(10)]))
    assert texts(said) == [f"a q{n}?" for n in range(10)]
    assert speaker.encoded == [1], "the picture is not encoded again"


# ---- the same bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from("abcdef!"), max_size=40), st.integers(1, 5))
def test_the_same_bytes_are_encoded_once_in_order(device, tmp_path, letters, size):
    """Also where the next batch is read in threads before this one is spoken of; '!' cannot be read."""
    paths = write_texts(tmp_path, {f"{n}.jpg": f"bad {n}" if x == "!" else x for n, x in enumerate(letters)})
    speaker = FakeSpeaker(device=device)
    found = list(speaker.captions(iter(paths), batch_size=size))
    assert [path for path, _ in found] == paths
    assert [said.text if isinstance(said, GeneratedText) else "!" for _, said in found] == letters
    assert sum(speaker.encoded) == len(set(letters) - {"!"})


def test_a_damaged_twin_is_told_under_its_own_name(tmp_path):
    paths = write_texts(tmp_path, dict.fromkeys(("a.jpg", "b.jpg", "c.jpg"), "bad"))
    speaker = FakeSpeaker()
    assert [error.source for _, error in speaker.captions(paths)] == paths
    said = list(speaker.answers([(path, "q?") for path in paths]))
    assert [error.source for error in said] == paths


def test_questions_about_the_same_bytes_share_an_encoding(tmp_path):
    paths = write_texts(tmp_path, {"a.jpg": "one", "b.jpg": "two", "c.jpg": "one", "d.jpg": "three"})
    speaker = FakeSpeaker()
    said = speaker.answers([(path, q) for q in ("x?", "y?") for path in paths], batch_size=1)
    assert texts(said) == [f"{t} {q}" for q in ("x?", "y?") for t in ("one", "two", "one", "three")]
    assert speaker.encoded == [1, 1, 1]


def test_only_the_latest_texts_are_kept(tmp_path):
    twins = ResultCache(most=2)
    assert [twins.meet(key) for key in ("a", "b", "a", "c", "b", None, None)] == [
        True, True, False, True, True, True, True,
    ]  # fmt: skip
    twins.remember("c", GeneratedText("c", 0.0, ()))
    twins.remember("b", MmxError("no"))
    assert (twins.output("c").text, twins.output("b"), len(twins.known)) == ("c", None, 2)


def test_a_text_is_itself_and_not_the_file_of_that_name(tmp_path):
    speaker = FakeSpeaker()
    a, b = write_texts(tmp_path, {"a.jpg": "same", "b.jpg": "same"})
    assert content_key(speaker, a) == content_key(speaker, {"image": b}) != content_key(speaker, {"text": a})
    assert content_key(speaker, {"text": a}) != content_key(speaker, {"text": b})
    assert content_key(speaker, object()) is content_key(speaker, str(tmp_path)) is None


def test_errors_come_through_and_pictures_are_taken_as_they_are_due(tmp_path):
    taken, error = [], MmxError("no input")

    def images():
        for path in [error, *write_texts(tmp_path, {f"{n}.jpg": str(n) for n in range(100)})]:
            taken.append(path)
            yield path

    found = FakeSpeaker().captions(images(), batch_size=4)
    assert next(found) == (error, error)
    assert len(taken) <= 8
    found.close()


# ---- a budget for questions --------------------------------------------------------------------------------------


def test_a_thousand_questions_about_one_picture_are_asked_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "MOST_TOKENS", 400)
    paths = write_texts(tmp_path, {"a.jpg": "a", "b.jpg": "b", "c.jpg": "c"})
    asked = [(paths[0], f"q{n:03}?") for n in range(300)] + [(paths[1], "x?"), (paths[2], "y?")]
    speaker = FakeSpeaker()
    said = texts(speaker.answers(asked))
    assert said == [f"a q{n:03}?" for n in range(300)] + ["b x?", "c y?"]
    assert speaker.encoded == [3]
    assert max(rows * streams * (5 + 4) for rows, streams in speaker.said) <= 400
    assert len(speaker.said) == 8, "14 streams of the first picture beside the two others, then 44 at a time"


def test_a_question_that_is_too_long_and_a_box_that_is_none_leave_the_others_alone(tmp_path):
    a, b = write_texts(tmp_path, {"a.jpg": "a", "b.jpg": "bad"})
    asked = [(a, "x?"), (a, "x" * 99), (b, "x?"), (a, "x?", (0, 0, 2, 2)), (a, "y?", (0, 0, 0.5, 0.5))]
    assert texts(FakeSpeaker().answers(asked)) == ["a x?", MmxError, ImageError, MmxError, "a y?"]
