"""Texts of the studies: reproducible, distinct, and impossible to order without positions."""

from collections import Counter
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.errors import MmxError
from mmx.studies.synthetic_text import (
    COLORS,
    MAX_LENGTH,
    MIN_LENGTH,
    copying,
    invented_word,
    num_permutations,
    ordering,
    split_held_out,
)

GENERATORS = pytest.mark.parametrize("make", [ordering, copying])


@GENERATORS
@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 60), seed=st.integers(0, 10**6))
def test_texts_are_reproducible_and_distinct(make, count, seed):
    texts = make(count, seed)
    assert texts == make(count, seed)
    assert len({text.source for text in texts}) == len(texts) == count
    assert make(count // 2, seed) == texts[: count // 2], "a smaller count gives a prefix"


@GENERATORS
def test_another_seed_gives_other_texts(make):
    assert not {text.source for text in make(20, 0)} & {text.source for text in make(20, 1)}


def test_lists_have_all_lengths_and_colors():
    texts = ordering(500, 0)
    assert {len(text.source.split()) for text in texts} == set(range(MIN_LENGTH, MAX_LENGTH + 1))
    assert {word for text in texts for word in text.source.split()} == set(COLORS)
    assert all(text.target == text.source for text in texts)
    repeated = sum(max(Counter(text.source.split()).values()) > 1 for text in texts)
    assert repeated / len(texts) > 0.9, "most lists have a color several times"


@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.sampled_from("abc"), min_size=1, max_size=6))
def test_num_permutations_equals_enumeration(words):
    assert num_permutations(" ".join(words)) == len(set(permutations(words)))


def test_equal_words_in_another_order_have_another_target():
    by_words = {}
    for text in ordering(4000, 0):
        by_words.setdefault(tuple(sorted(text.source.split())), set()).add(text.target)
    several = [targets for targets in by_words.values() if len(targets) > 1]
    assert len(several) > 500, "a bag of words does not determine the target"
    for text in ordering(200, 1):
        words = text.source.split()
        reverse = " ".join(reversed(words))
        assert (reverse == text.target) == (words == words[::-1])


def test_the_target_of_a_meeting_has_one_form():
    for source, target in copying(200, 0):
        names, date, place = target.split(", ")
        first, last = names.split()
        assert source in (
            f"meet {first} {last} on {date} in {place}",
            f"in {place} on {date} you meet {first} {last}",
        )
        day, month, year = date.split()
        assert 1 <= int(day) <= 28
        assert 1800 <= int(year) <= 1899
        assert month.isalpha()


def test_names_are_common_rare_and_unseen():
    train_texts, held_out = split_held_out(copying(3000, 0), 200)
    frequencies = Counter()
    for text in train_texts:
        frequencies.update(text.target.replace(",", "").split())
    names = []
    for text in held_out:
        names += [frequencies[word] for word in text.target.split(",")[0].split()]
    assert sum(n == 0 for n in names) / len(names) > 0.1
    assert sum(0 < n <= 2 for n in names) / len(names) > 0.05
    assert sum(n > 20 for n in names) / len(names) > 0.2


def test_invented_words_are_reproducible_and_mostly_distinct():
    assert invented_word(1, "name") == invented_word(1, "name") != invented_word(1, "place")
    assert len({invented_word(rank, "name") for rank in range(1, 200)}) > 180


def test_too_few_distinct_texts_are_an_error(monkeypatch):
    monkeypatch.setattr("mmx.studies.synthetic_text.COLORS", ("red",))
    with pytest.raises(MmxError) as error:
        ordering(9, 0)
    assert error.value.code == "study.too_few_texts"
    assert error.value.details == {"requested": 9, "found": 4}


def test_a_split_has_all_texts():
    train_texts, held_out = split_held_out(ordering(5, 0), 2)
    assert train_texts + held_out == ordering(5, 0)
    assert len(held_out) == 2


@pytest.mark.parametrize("held_out", [0, 5, 6])
def test_an_empty_part_of_a_split_is_an_error(held_out):
    with pytest.raises(MmxError) as error:
        split_held_out(ordering(5, 0), held_out)
    assert error.value.code == "study.held_out"
    assert error.value.details == {"held_out": held_out, "texts": 5}
