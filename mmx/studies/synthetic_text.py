"""Text to text tasks, made from a seed: what must be copied, and what only its place tells.

Every function is pure: the same numbers in, the same pairs out. No text comes twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import factorial, prod
from random import Random
from typing import NamedTuple

from mmx.errors import MmxError

COLOURS = ("red", "green", "blue", "white", "black", "gold")
SHORTEST, LONGEST = 5, 8
MONTHS = ("january", "march", "april", "june", "august", "october")
ONSETS, VOWELS, CODAS = ("b", "d", "k", "l", "m", "n", "r", "s", "t", "v"), "aeiou", ("", "l", "n", "r", "s")
NAMES, PLACES = 20_000, 5_000  # how many invented names and places there are; most of them come seldom or never
ATTEMPTS = 100


class TextExample(NamedTuple):
    """A text to be read, and the one that should be said."""

    source: str
    target: str


def ordering(count: int, seed: int) -> list[TextExample]:
    """Lists of 5 to 8 colours that are to be told in their order; most hold some colour several times, so that only
    its place says where it comes again."""
    return _distinct(count, Random(f"{seed}-ordering"), _colours)


def copying(count: int, seed: int) -> list[TextExample]:
    """Meetings with two names, a date and a place, to be written down in one form.

    Names and places are invented, and drawn with the frequencies of words (Zipf 1949): few come often, many once.
    """
    return _distinct(count, Random(f"{seed}-copying"), _meeting)


def arrangements(text: str) -> int:
    """In how many different orders the words of a text can stand: n! over the product of its words' counts' factorials.

    Who knows the words and not their places guesses the order with one over this probability, and no better.
    """
    words = text.split()
    return factorial(len(words)) // prod(factorial(n) for n in Counter(words).values())


def invented(rank: int, kind: str) -> str:
    """The invented word of a rank: two or three syllables, the same in every run."""
    draw = Random(f"{kind}-{rank}")
    syllables = [draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(draw.choice((2, 2, 3)))]
    return "".join(syllables) + draw.choice(CODAS)


def split_held_out(pairs: Sequence[TextExample], held: int) -> tuple[list[TextExample], list[TextExample]]:
    """All pairs but the last `held`, and those. Raises MmxError where nothing would be left to train on."""
    if not 0 < held < len(pairs):
        raise MmxError(f"{held} of {len(pairs)} texts are held out; expected at least one, and fewer than all.")
    return list(pairs[:-held]), list(pairs[-held:])


def _distinct(count: int, draw: Random, make: Callable[[Random], TextExample]) -> list[TextExample]:
    """`count` pairs, no source twice. Raises MmxError where there are not so many."""
    found: dict[str, TextExample] = {}
    for _ in range(count * ATTEMPTS + 1):
        if len(found) >= count:
            return list(found.values())
        pair = make(draw)
        found.setdefault(pair.source, pair)
    raise MmxError(f"{count} different texts were asked for, and {len(found)} were found; ask for fewer.")


def _colours(draw: Random) -> TextExample:
    text = " ".join(draw.choice(COLOURS) for _ in range(draw.randint(SHORTEST, LONGEST)))
    return TextExample(text, text)


def _meeting(draw: Random) -> TextExample:
    first, last = (invented(_rank(draw, NAMES), "name") for _ in range(2))
    place = invented(_rank(draw, PLACES), "place")
    date = f"{draw.randint(1, 28)} {draw.choice(MONTHS)} {draw.randint(1800, 1899)}"
    forms = (f"meet {first} {last} on {date} in {place}", f"in {place} on {date} you meet {first} {last}")
    return TextExample(draw.choice(forms), f"{first} {last}, {date}, {place}")


def _rank(draw: Random, count: int) -> int:
    """A rank of 1 to `count`; for an exponent of one, the inverse of the distribution is a power of the number."""
    return min(int((count + 1) ** draw.random()), count)
