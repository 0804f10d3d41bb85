"""The texts of the studies: the same from the same seed, and truly without an answer for who does not know places."""

from collections import Counter
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.errors import MmxError
from mmx.studies.synthetic_text import (
    COLOURS,
    LONGEST,
    SHORTEST,
    arrangements,
    copying,
    invented,
    ordering,
    split_held_out,
)

GENERATORS = pytest.mark.parametrize("make", [ordering, copying])


@GENERATORS
@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 60), seed=st.integers(0, 10**6))
def test_equal_numbers_make_equal_texts_and_none_comes_twice(make, count, seed):
    pairs = make(count, seed)
    assert pairs == make(count, seed)
    assert len({pair.source for pair in pairs}) == len(pairs) == count
    assert make(count // 2, seed) == pairs[: count // 2], "more texts are further texts"


@GENERATORS
def test_another_seed_makes_other_texts(make):
    assert not {pair.source for pair in make(20, 0)} & {pair.source for pair in make(20, 1)}


def test_lists_are_of_the_stated_lengths_and_colours():
    pairs = ordering(500, 0)
    assert {len(pair.source.split()) for pair in pairs} == set(range(SHORTEST, LONGEST + 1))
    assert {word for pair in pairs for word in pair.source.split()} == set(COLOURS)
    assert all(pair.target == pair.source for pair in pairs)
    repeated = sum(max(Counter(pair.source.split()).values()) > 1 for pair in pairs)
    assert repeated / len(pairs) > 0.9, "equal words that only their place tells apart"


@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.sampled_from("abc"), min_size=1, max_size=6))
def test_arrangements_are_counted_by_trying_them_all(words):
    assert arrangements(" ".join(words)) == len(set(permutations(words)))


def test_the_same_words_in_another_order_want_another_target():
    """Of every list with two colours or more: each order of its words is a task of its own, with another answer."""
    by_words = {}
    for pair in ordering(4000, 0):
        by_words.setdefault(tuple(sorted(pair.source.split())), set()).add(pair.target)
    several = [targets for targets in by_words.values() if len(targets) > 1]
    assert len(several) > 500, "what a bag of words cannot tell apart is really asked"
    for pair in ordering(200, 1):
        words = pair.source.split()
        backwards = " ".join(reversed(words))
        assert sorted(backwards.split()) == sorted(words)
        assert (backwards == pair.target) == (words == words[::-1]), "only a palindrome is its own reverse"


def test_a_meeting_is_written_down_in_one_form():
    for source, target in copying(200, 0):
        names, date, place = target.split(", ")
        first, last = names.split()
        assert source in (
            f"meet {first} {last} on {date} in {place}",
            f"in {place} on {date} you meet {first} {last}",
        )
        day, month, year = date.split()
        assert 1 <= int(day) <= 28 and 1800 <= int(year) <= 1899 and month.isalpha()


def test_names_have_a_long_tail():
    learned, held = split_held_out(copying(3000, 0), 200)
    seen = Counter(word for pair in learned for word in pair.target.replace(",", "").split())
    names = [seen[word] for pair in held for word in pair.target.split(",")[0].split()]
    assert sum(n == 0 for n in names) / len(names) > 0.1, "some are new"
    assert sum(0 < n <= 2 for n in names) / len(names) > 0.05, "some are rare"
    assert sum(n > 20 for n in names) / len(names) > 0.2, "some are common"


def test_invented_words_are_the_same_in_every_run():
    assert invented(1, "name") == invented(1, "name") != invented(1, "place")
    assert len({invented(rank, "name") for rank in range(1, 200)}) > 180


def test_texts_that_do_not_exist_are_refused(monkeypatch):
    monkeypatch.setattr("mmx.studies.synthetic_text.COLOURS", ("red",))
    with pytest.raises(MmxError, match="9 different texts were asked for, and 4 were found; ask for fewer"):
        ordering(9, 0)


@pytest.mark.parametrize("held", [0, 5, 6])
def test_something_is_left_to_train_on_and_to_measure(held):
    with pytest.raises(MmxError, match=f"{held} of 5 texts are held out; expected at least one, and fewer than all"):
        split_held_out(ordering(5, 0), held)
    learned, rest = split_held_out(ordering(5, 0), 2)
    assert learned + rest == ordering(5, 0) and len(rest) == 2
