"""What captions say, word by word: shared by the rules of the derived questions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from mmx.data.lexicon import BEINGS, CROWD_WORDS, DOG_SINGULAR, PEOPLE

Words = list[str]


@dataclass(frozen=True)
class DerivedQuestion:
    """A question before it is worded.

    Args:
        question_type: groups questions in reports.
        form: key of the table of wordings, see `mmx.data.question_wordings`.
        answer: its only answer.
        slots: what the wordings mention, by slot.
    """

    question_type: str
    form: str
    answer: str
    slots: Mapping[str, str] = field(default_factory=dict)


class Subject(NamedTuple):
    """The subject of a caption ("" if unknown), and the words from it to the next being."""

    name: str
    words: Words


def split_words(caption: str) -> Words:
    """Return the words in lower case. "hot dog" and "ice cream" become one word, as they are no dog and no ice."""
    joined = re.sub(r"\b(hot|corn|chili) (?=dog)|\b(ice) (?=cream)|\b(monkey) (?=bar)", r"\1\2\3-", caption.lower())
    return re.findall(r"[a-z]+(?:-[a-z]+)*", joined)


def all_words(captions: Sequence[Words]) -> set[str]:
    """Return the words that any of the captions has."""
    return set(chain.from_iterable(captions))


def majority(votes: Sequence[str], min_votes: int) -> str | None:
    """Return the vote of more than half, if there are at least `min_votes` of it."""
    if not votes:
        return None
    answer, count = Counter(votes).most_common(1)[0]
    return answer if count >= min_votes and 2 * count > len(votes) else None


def find_subject(words: Words) -> Subject:
    """Return the first dog or person of a caption; unknown if a group comes first."""
    positions = [position for position, word in enumerate(words) if word in BEINGS or word in CROWD_WORDS]
    if not positions or words[positions[0]] not in PEOPLE.keys() | DOG_SINGULAR:
        return Subject("", [])
    first = positions[0]
    following = positions[1] if len(positions) > 1 else len(words)
    return Subject(PEOPLE.get(words[first], "dog"), words[first + 1 : following])
