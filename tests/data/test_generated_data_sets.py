"""Generated data sets in every form: what is read and what is named make up what was given; scores are equal."""

import re
from pathlib import Path
from random import Random

import pytest
from data_disturbances import Refusal, WrittenData
from data_writers import WRITERS
from generated_data import generate_images, generated_texts, read_texts, scores

from mmx.data.examples import Example
from mmx.data.formats import read_examples
from mmx.errors import DataError

SAMPLE = range(20)  # seeds of each form: 120 data sets
MANY = range(20, 420)  # 2,400 data sets
SENTENCE = re.compile(r"(?P<path>.+): (?P<count>[\d,]+) records? (?P<effect>skipped|without answers), because .+: (.+)")


def check_data_set(form: str, seed: int, folder: Path) -> None:
    """Write a data set in a form and compare what is read with what was generated."""
    random = Random(f"{form} {seed}")
    images = generate_images(random, folder)
    written = WRITERS[form](random, folder, images)
    if written.refusal is not None:
        check_refusal(written, written.refusal)
        return
    sentences: list[str] = []
    examples = list(read_examples(written.config, sources=written.sources, on_skipped=sentences.append))
    expected = generated_texts(written.images)
    texts = read_texts(examples)
    assert texts == expected
    assert scores(texts) == pytest.approx(scores(expected))
    assert len({str(Path(str(example.sources["image"])).resolve()) for example in examples}) == len(examples)
    assert all(Path(str(example.sources["image"])).is_file() for example in examples)
    skipped = check_sentences(sentences, "skipped", written.skipped)
    check_sentences(sentences, "without answers", written.without_answers)
    assert num_rows(examples, form) + skipped == written.rows


def check_refusal(written: WrittenData, refusal: Refusal) -> None:
    """Spoiled data is refused as a whole, with the file, the line or record, and the byte of a wrong encoding."""
    with pytest.raises(DataError) as error:
        read_examples(written.config, sources=written.sources)
    details = error.value.details
    assert (error.value.code, details["path"]) == (refusal.code, str(refusal.path))
    assert (details.get("line"), details.get("record")) == (refusal.line, refusal.record)
    assert details.get("byte") == refusal.byte
    assert str(error.value).startswith(str(refusal.path))


def check_sentences(sentences: list[str], effect: str, records: list[str]) -> int:
    """The sentences about an effect count all of these records and name the first ones. Returns their number."""
    count = 0
    for sentence in sentences:
        match = SENTENCE.fullmatch(sentence)
        assert match is not None, sentence
        if match["effect"] == effect:
            count_of_reason = int(match["count"].replace(",", ""))
            count += count_of_reason
            named = re.findall(r"(?:image|question|annotation) \d+(?:, sentence \d+)?", match[4])
            assert len(named) == min(3, count_of_reason) and set(named) <= set(records)
    assert count == len(records)
    return count


def num_rows(examples: list[Example], form: str) -> int:
    """The captions and questions that were read. In lists, a question has a line for each answer."""
    rows = 0
    for example in examples:
        for task in example.tasks:
            is_one = form == "vqa" or not task.targets
            rows += 1 if is_one else len(task.targets)
    return rows


@pytest.mark.parametrize("form", WRITERS)
def test_generated_data_sets(tmp_path, form):
    for seed in SAMPLE:
        check_data_set(form, seed, tmp_path / str(seed))


@pytest.mark.slow
@pytest.mark.parametrize("form", WRITERS)
def test_many_generated_data_sets(tmp_path, form):
    for seed in MANY:
        check_data_set(form, seed, tmp_path / str(seed))
