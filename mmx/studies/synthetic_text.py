"""Synthetic text-to-text tasks: reproduce the order of words, and copy invented names.

Every function is deterministic: the same arguments give the same texts. No source text occurs twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import factorial, prod
from random import Random
from typing import NamedTuple

from mmx.errors import MmxError

COLORS = ("red", "green", "blue", "white", "black", "gold")
MIN_LENGTH, MAX_LENGTH = 5, 8  # words of a list
MONTHS = ("january", "march", "april", "june", "august", "october")
ONSETS, VOWELS, CODAS = ("b", "d", "k", "l", "m", "n", "r", "s", "t", "v"), "aeiou", ("", "l", "n", "r", "s")
NUM_NAMES, NUM_PLACES = 20_000, 5_000  # most of them are rare or do not occur
MAX_ATTEMPTS = 100  # for each text


class TextExample(NamedTuple):
    """A source text and the text to generate."""

    source: str
    target: str


def ordering(count: int, seed: int) -> list[TextExample]:
    """Lists of 5 to 8 colors, to be reproduced in order.

    Most lists have a color several times, so that only positions distinguish its occurrences.
    """
    return _distinct(count, Random(f"{seed}-ordering"), _color_list)


def copying(count: int, seed: int) -> list[TextExample]:
    """Sentences with two names, a date and a place, to be written in one form.

    Names and places are invented, with frequencies like those of words (Zipf 1949): few are frequent, many occur once.
    """
    return _distinct(count, Random(f"{seed}-copying"), _meeting)


def num_permutations(text: str) -> int:
    """The number of distinct orders of the words of a text: n! over the product of the factorials of their counts."""
    words = text.split()
    return factorial(len(words)) // prod(factorial(n) for n in Counter(words).values())


def invented_word(rank: int, kind: str) -> str:
    """The invented word of a rank, of two or three syllables, always the same."""
    rng = Random(f"{kind}-{rank}")
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 2, 3)))]
    return "".join(syllables) + rng.choice(CODAS)


def split_held_out(texts: Sequence[TextExample], held_out: int) -> tuple[list[TextExample], list[TextExample]]:
    """All texts but the last `held_out`, and those. Raises MmxError if either is empty."""
    if not 0 < held_out < len(texts):
        raise MmxError(
            f"{held_out} of {len(texts)} texts are held out; expected at least one, and fewer than all.",
            code="study.held_out",
            held_out=held_out,
            texts=len(texts),
        )
    return list(texts[:-held_out]), list(texts[-held_out:])


def _distinct(count: int, rng: Random, make: Callable[[Random], TextExample]) -> list[TextExample]:
    """`count` texts with distinct sources. Raises MmxError if there are not enough."""
    found: dict[str, TextExample] = {}
    for _ in range(count * MAX_ATTEMPTS + 1):
        if len(found) >= count:
            return list(found.values())
        text = make(rng)
        found.setdefault(text.source, text)
    raise MmxError(
        f"{count} distinct texts were requested, but only {len(found)} were found; request fewer.",
        code="study.too_few_texts",
        requested=count,
        found=len(found),
    )


def _color_list(rng: Random) -> TextExample:
    text = " ".join(rng.choice(COLORS) for _ in range(rng.randint(MIN_LENGTH, MAX_LENGTH)))
    return TextExample(text, text)


def _meeting(rng: Random) -> TextExample:
    first = invented_word(_zipf_rank(rng, NUM_NAMES), "name")
    last = invented_word(_zipf_rank(rng, NUM_NAMES), "name")
    place = invented_word(_zipf_rank(rng, NUM_PLACES), "place")
    date = f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1800, 1899)}"
    forms = (f"meet {first} {last} on {date} in {place}", f"in {place} on {date} you meet {first} {last}")
    return TextExample(rng.choice(forms), f"{first} {last}, {date}, {place}")


def _zipf_rank(rng: Random, count: int) -> int:
    """A rank in 1..count with probability proportional to 1 / rank, by the inverse of the distribution function."""
    return min(int((count + 1) ** rng.random()), count)
