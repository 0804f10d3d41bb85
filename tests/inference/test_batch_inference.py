"""Batch inference with a fake generator: batches shrink, duplicates are encoded once, order and budgets are kept."""

from unittest.mock import patch

import pytest
import torch
from batch_cases import NO_MEMORY, FakeGenerator, write_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmx.errors import EncoderError, ImageError, MmxError
from mmx.inference.batch_inference import answers
from mmx.inference.batch_inference.dedup import ResultCache, content_key
from mmx.inference.batch_inference.out_of_memory import RETRY_LARGER_AFTER, AdaptiveBatchSize, is_out_of_memory
from mmx.inference.batch_inference.prefetch import one_ahead
from mmx.inference.outputs import GeneratedText

OUT_OF_MEMORY = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "cpu": lambda: RuntimeError(NO_MEMORY),
    "python": MemoryError,
}


def texts(results):
    return [result.text if isinstance(result, GeneratedText) else result.code for result in results]


# ---- out of memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_batch_is_halved_until_it_fits_and_nothing_is_lost(kind, tmp_path):
    paths = write_texts(tmp_path, {f"{n}.jpg": f"text {n}" for n in range(20)})
    generator = FakeGenerator(room=3, out_of_memory=OUT_OF_MEMORY[kind])
    results = list(generator.captions(paths, batch_size=16))
    assert [path for path, _ in results] == paths
    assert texts(result for _, result in results) == [f"text {n}" for n in range(20)]
    assert max(rows for rows, _ in generator.decoded) == 2, "16, 8, 4, 2: the first that fits"
    assert len(generator.encoded) == 3 + 10, "three attempts fail, then the size that fits is kept"


def test_input_that_does_not_fit_alone_is_an_error(tmp_path):
    contents = {f"{n}.jpg": "huge" if n in (0, 5) else f"text {n}" for n in range(9)}
    generator = FakeGenerator()
    results = [result for _, result in generator.captions(write_texts(tmp_path, contents), batch_size=4)]
    error = "inference.out_of_memory"
    expected = [error, "text 1", "text 2", "text 3", "text 4", error, "text 6", "text 7", "text 8"]
    assert texts(results) == expected


def failing(*bad):
    """A function that fails for a whole batch if it contains one of these rows."""

    def function(rows):
        found = [row for row in rows if row in bad]
        if found:
            raise EncoderError(f"row {found[0]}", code="encoder.not_finite", row=found[0])
        return [f"done {row}" for row in rows]

    return function


def outcome(result):
    return result.details["row"] if isinstance(result, EncoderError) else result


def test_one_bad_row_is_an_error_and_the_others_are_done():
    batches = AdaptiveBatchSize()
    function = failing(2, 7)
    results = [*batches.run([1, 2, 3], function), *batches.run([7], function), *batches.run([8, 9], function)]
    assert [outcome(result) for result in results] == ["done 1", 2, "done 3", 7, "done 8", "done 9"]


@pytest.mark.parametrize("rows", [[1], [1, 2]])
def test_error_of_every_row_is_raised(rows):
    with pytest.raises(EncoderError) as error:
        AdaptiveBatchSize().run(rows, failing(1, 2))
    assert error.value.details["row"] == 1


@pytest.mark.parametrize(
    "message",
    ["CUDA error: out of memory", "MPS backend out of memory (MPS allocated: 9 GB)", "CUDNN_STATUS_ALLOC_FAILED"],
)
def test_out_of_memory_messages_are_recognized(message):
    assert is_out_of_memory(RuntimeError(message))


def test_other_errors_are_raised():
    def function(rows):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        AdaptiveBatchSize().run([1, 2], function)
    assert not is_out_of_memory(None)


def test_cause_of_an_error_is_checked():
    error = EncoderError("encoder failed in forward")
    assert not is_out_of_memory(error)
    error.__cause__ = RuntimeError(NO_MEMORY)
    assert is_out_of_memory(error)


def test_larger_batches_are_retried():
    batches = AdaptiveBatchSize()
    sizes = []
    room = 2

    def function(rows):
        if len(rows) > room:
            raise MemoryError
        sizes.append(len(rows))
        return rows

    assert batches.run(list(range(8)), function) == list(range(8))
    room = 8
    count = 4 * RETRY_LARGER_AFTER
    assert batches.run(list(range(count)), function) == list(range(count))
    assert sizes[:RETRY_LARGER_AFTER] == [2] * RETRY_LARGER_AFTER
    assert sizes[RETRY_LARGER_AFTER] == 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 12))
def test_every_row_that_fits_is_done_once_in_order(weights, room):
    def function(rows):
        if sum(weight for _, weight in rows) > room:
            raise MemoryError
        return [number for number, _ in rows]

    with patch("gc.collect"):  # 60 ms each in a process that holds torch
        results = AdaptiveBatchSize().run(list(enumerate(weights)), function)
    numbers = [result if isinstance(result, int) else None for result in results]
    assert numbers == [number if weight <= room else None for number, weight in enumerate(weights)]


def test_batch_of_questions_is_halved(tmp_path):
    (path,) = write_texts(tmp_path, {"a.jpg": "a"})
    generator = FakeGenerator(room=3)
    results = list(generator.answers([(path, f"q{n}?") for n in range(10)]))
    assert texts(results) == [f"a q{n}?" for n in range(10)]
    assert generator.encoded == [1], "the image is not encoded again"


# ---- deduplication -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from("abcdef!"), max_size=40), st.integers(1, 5))
def test_same_bytes_are_encoded_once_in_order(device, tmp_path, letters, size):
    """With and without prefetching in threads; '!' cannot be read."""
    contents = {f"{n}.jpg": f"bad {n}" if letter == "!" else letter for n, letter in enumerate(letters)}
    paths = write_texts(tmp_path, contents)
    generator = FakeGenerator(device=device)
    results = list(generator.captions(iter(paths), batch_size=size))
    assert [path for path, _ in results] == paths
    assert [result.text if isinstance(result, GeneratedText) else "!" for _, result in results] == letters
    assert sum(generator.encoded) == len(set(letters) - {"!"})


def test_unreadable_duplicates_are_named_each(tmp_path):
    paths = write_texts(tmp_path, dict.fromkeys(("a.jpg", "b.jpg", "c.jpg"), "bad"))
    generator = FakeGenerator()
    assert [error.details["source"] for _, error in generator.captions(paths)] == paths
    assert [error.details["source"] for error in generator.answers([(path, "q?") for path in paths])] == paths


def test_questions_about_the_same_bytes_share_an_encoding(tmp_path):
    paths = write_texts(tmp_path, {"a.jpg": "one", "b.jpg": "two", "c.jpg": "one", "d.jpg": "three"})
    generator = FakeGenerator()
    results = generator.answers([(path, question) for question in ("x?", "y?") for path in paths], batch_size=1)
    expected = [f"{text} {question}" for question in ("x?", "y?") for text in ("one", "two", "one", "three")]
    assert texts(results) == expected
    assert generator.encoded == [1, 1, 1]


def test_result_cache_keeps_the_latest():
    cache = ResultCache(max_size=2)
    keys = ["a", "b", "a", "c", "b", None, None]
    assert [cache.add(key) for key in keys] == [True, True, False, True, True, True, True]
    cache.store("c", GeneratedText("c", 0.0, ()))
    cache.store("b", MmxError("no"))
    assert cache.get("c").text == "c"
    assert cache.get("b") is None
    assert len(cache.results) == 2


def test_text_inputs_are_keyed_by_the_text_and_not_by_a_file_of_that_name(tmp_path):
    generator = FakeGenerator()
    a, b = write_texts(tmp_path, {"a.jpg": "same", "b.jpg": "same"})
    assert content_key(generator, a) == content_key(generator, {"image": b})
    assert content_key(generator, a) != content_key(generator, {"text": a})
    assert content_key(generator, {"text": a}) != content_key(generator, {"text": b})
    assert content_key(generator, object()) is None
    assert content_key(generator, str(tmp_path)) is None


def test_inputs_are_taken_as_needed_and_errors_pass_through(tmp_path):
    taken = []
    error = MmxError("no input")

    def images():
        for path in [error, *write_texts(tmp_path, {f"{n}.jpg": str(n) for n in range(100)})]:
            taken.append(path)
            yield path

    results = FakeGenerator().captions(images(), batch_size=4)
    assert next(results) == (error, error)
    assert len(taken) <= 8
    results.close()


def test_prefetching_starts_the_next_batch_and_no_other():
    started = []

    def batches():
        for name in "abcd":
            started.append(name)
            yield [name], iter([name.upper()])

    results = one_ahead(batches())
    assert next(results) == (["a"], ["A"])
    assert started == ["a", "b"]
    assert next(results) == (["b"], ["B"])
    assert started == ["a", "b", "c"]
    assert list(results) == [(["c"], ["C"]), (["d"], ["D"])]
    assert list(one_ahead([])) == []


# ---- budget of tokens ----------------------------------------------------------------------------------------------


def test_many_questions_about_one_image_keep_to_the_token_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "MAX_TOKENS", 400)
    paths = write_texts(tmp_path, {"a.jpg": "a", "b.jpg": "b", "c.jpg": "c"})
    questions = [(paths[0], f"q{n:03}?") for n in range(300)] + [(paths[1], "x?"), (paths[2], "y?")]
    generator = FakeGenerator()
    results = texts(generator.answers(questions))
    assert results == [f"a q{n:03}?" for n in range(300)] + ["b x?", "c y?"]
    assert generator.encoded == [3]
    assert max(rows * streams * (5 + 4) for rows, streams in generator.decoded) <= 400
    assert len(generator.decoded) == 8, "14 streams of the first image together with the two others, then 44 at a time"


def test_questions_that_cannot_be_asked_do_not_affect_the_others(tmp_path):
    a, b = write_texts(tmp_path, {"a.jpg": "a", "b.jpg": "bad"})
    questions = [(a, "x?"), (a, "x" * 99), (b, "x?"), (a, "x?", (0, 0, 2, 2)), (a, "y?", (0, 0, 0.5, 0.5))]
    results = list(FakeGenerator().answers(questions))
    assert [type(result) for result in results] == [GeneratedText, MmxError, ImageError, MmxError, GeneratedText]
    assert texts(results)[1:3] == ["question.too_long", "image.format"]
    assert texts(results)[4] == "a y?"
