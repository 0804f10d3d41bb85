"""Questions about pictures, derived by rules from the captions people wrote of them.

Six kinds: `color`, `count`, `object`, `action`, `place`, `exists`. What captions say together is taken for true: an
answer needs the voice of most captions that speak of the matter, and of two at least where one caption may err. "Is
there a ...?" is asked of each thing with yes as often as with no, over all pictures that are read together, so that
nothing is to be learned from the question alone; no is said of a picture none of whose captions names the thing, or
anything that the thing might hide behind (a "player" may be a man).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from random import Random
from typing import Literal, get_args

from mmx.data.examples import Example, TextTask
from mmx.data.lexicon import (
    ACTIONS,
    BEINGS,
    COLORED,
    COLORS,
    CROWDS,
    DOG,
    DOGS,
    FURTHER,
    HANDLING,
    HIDES,
    MANY,
    MASSES,
    NAMES_OF_NUMBERS,
    NUMBERS,
    OBJECTS,
    PEOPLE,
    PLACES,
    STOPS,
    THINGS,
    WORN,
)

DerivedQuestionType = Literal["color", "count", "object", "action", "place", "exists"]
DERIVED_QUESTION_TYPES: tuple[str, ...] = get_args(DerivedQuestionType)
Words = list[str]


def derive_questions(examples: Iterable[Example], seed: int = 0) -> list[Example]:
    """The examples with the questions that their captions answer added behind what was there.

    A pure function of the examples, in their order, and the seed (which pictures a thing is not in).
    """
    given = list(examples)
    captions = [[t for turn in example.tasks if turn.question is None for t in turn.targets] for example in given]
    read = [[_words(caption) for caption in said] for said in captions]
    asked = [[*_colors(said), *_counts(said), *_objects(said), *_actions(said), *_places(said)] for said in read]
    for place, turn in _exists(read, Random(f"exists-{seed}")):
        asked[place].append(turn)
    return [replace(e, tasks=(*e.tasks, *turns)) for e, turns in zip(given, asked, strict=True)]


def _words(caption: str) -> Words:
    """The words of a caption in lower case; what only looks like a dog or like ice is joined into a word of its own."""
    joined = re.sub(r"\b(hot|corn|chili) (?=dog)|\b(ice) (?=cream)", r"\1\2-", caption.lower())
    return re.findall(r"[a-z]+(?:-[a-z]+)*", joined)


def _turn(kind: DerivedQuestionType, question: str, answer: str) -> TextTask:
    return TextTask((answer,), question, kind)


def _agreed(votes: Sequence[str], least: int) -> str | None:
    """What most say, at least so many of them and more than half; None where they do not agree."""
    if not votes:
        return None
    answer, count = Counter(votes).most_common(1)[0]
    return answer if count >= least and 2 * count > len(votes) else None


# ---- what is asked -----------------------------------------------------------------------------------------------


def _colors(said: Sequence[Words]) -> Iterator[TextTask]:
    """ "a black and white dog" -> what color is the dog? black and white"""
    votes: dict[str, list[str]] = defaultdict(list)
    for words in said:
        for thing, colors in _colored(words).items():
            votes[thing].append(colors.pop() if len(colors) == 1 else "several")
    if any(DOGS & set(words) or (_count(words, DOG, DOGS) or 0) > 1 for words in said):
        votes.pop("dog", None)  # which of them?
    for thing, told in votes.items():
        if "several" not in told and (answer := _agreed(told, least=min(2, len(told)))):
            verb = "are" if thing in ("shorts", "pants") else "is"
            yield _turn("color", f"what color {verb} the {thing}?", answer)


def _colored(words: Words) -> dict[str, set[str]]:
    """The colors that a caption gives each thing."""
    found: dict[str, set[str]] = defaultdict(set)
    for place, word in enumerate(words):
        if word in COLORED and (color := _color_before(words[:place])):
            found[COLORED[word]].add(color)
    return found


def _color_before(words: Words) -> str | None:
    """The color or two colors at the end of some words; None where there is none, or three."""
    if not words or words[-1] not in COLORS:
        return None
    last = COLORS[words[-1]]
    earlier = words[-3] if len(words) > 2 and words[-2] == "and" else None
    if earlier not in COLORS:
        return last
    return None if len(words) > 3 and words[-4] in COLORS else " and ".join(sorted({COLORS[earlier], last}))


def _counts(said: Sequence[Words]) -> Iterator[TextTask]:
    """ "two brown dogs", "a dog and another dog" -> how many dogs are there? two

    One is answered only where no caption has more: of people, who are easily left out, most captions may name one.
    """
    for things, singular, plural in (("dogs", DOG, DOGS), ("people", frozenset(PEOPLE), frozenset(CROWDS))):
        counts = [_count(words, singular, plural) for words in said]
        votes = [NAMES_OF_NUMBERS.get(count, "") for count in counts if count is not None]
        answer = _agreed(votes, least=2)
        if answer and (answer != "one" or {"one"} == set(votes)):
            yield _turn("count", f"how many {things} are there?", answer)


def _count(words: Words, singular: Set[str], plural: Set[str]) -> int | None:
    """How many of a thing a caption tells of; 0 where it cannot be told, None where it tells of none."""
    crowd = bool(MANY & set(words))
    if not any(word in singular or word in plural for word in words):
        return 0 if crowd and "person" in singular else None
    if crowd:
        return 0
    total, number, further = 0, 0, False
    for word in words:
        if word in NUMBERS or word in FURTHER:
            number, further = NUMBERS.get(word, 1), word in FURTHER
        elif word in plural:
            if number < 2:
                return 0
            total, number, further = total + number, 0, False
        elif word in singular:
            if total and not number:
                return 0  # "a man and woman", or "a man ... the man"
            total, number, further = total + (number or 1), 0, False
        elif word in STOPS and word != "and" and not further:
            number = 0
    return 0 if further else total  # "one dog chases another"


def _objects(said: Sequence[Words]) -> Iterator[TextTask]:
    """ "a boy holds a red ball" -> what is the boy holding? ball"""
    votes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for words in said:
        subject, told = _subject(words)
        for place, word in enumerate(told):
            if word in HANDLING and (thing := _object(HANDLING[word], told[place + 1 :])):
                votes[subject, HANDLING[word]].append(thing)
                break
    for (subject, deed), things in votes.items():
        if answer := _agreed(things, least=1):
            yield _turn("object", f"what is the {subject} {deed}?", answer)


def _object(deed: str, words: Words) -> str | None:
    """What a noun phrase at the beginning of some words is about: its last known thing."""
    found = None
    for place, word in enumerate(words[:5]):
        if (word in STOPS and not (word == "the" and place == 0)) or word in HANDLING or word in ACTIONS:
            break
        found = OBJECTS.get(word, found)
    return found if deed != "wearing" or found in WORN else None


def _actions(said: Sequence[Words]) -> Iterator[TextTask]:
    """ "a dog runs", "a dog running" -> what is the dog doing? running"""
    votes: dict[str, list[str]] = defaultdict(list)
    for words in said:
        subject, told = _subject(words)
        if deed := next((ACTIONS[word] for word in told if word in ACTIONS), None):
            votes[subject].append(deed)
    for subject, deeds in votes.items():
        if answer := _agreed(deeds, least=2):
            yield _turn("action", f"what is the {subject} doing?", answer)


def _subject(words: Words) -> tuple[str, Words]:
    """Whom a caption is about, where that is one, and what is told before the next: the first dog or person in it,
    before any crowd. ("", []) where it is about nobody known."""
    beings = [place for place, word in enumerate(words) if word in BEINGS or word in MANY]
    if not beings or words[beings[0]] not in PEOPLE.keys() | DOG:
        return "", []
    first, following = beings[0], [*beings[1:], len(words)][0]
    return PEOPLE.get(words[first], "dog"), words[first + 1 : following]


def _places(said: Sequence[Words]) -> Iterator[TextTask]:
    """ "in the snow" -> where is this? snow"""
    votes = []
    for words in said:
        here = {PLACES[word] for place, word in enumerate(words) if word in PLACES and _is_place(words[:place])}
        votes += sorted(here)
    counts = Counter(votes).most_common(2)
    if counts and counts[0][1] >= 2 and (len(counts) == 1 or counts[0][1] > counts[1][1]):
        yield _turn("place", "where is this?", counts[0][0])


def _is_place(before: Words) -> bool:
    return any(word in ("in", "on", "at", "through", "along", "across", "into", "down", "near") for word in before[-4:])


def _exists(read: Sequence[Sequence[Words]], rng: Random) -> Iterator[tuple[int, TextTask]]:
    """(place of the picture, question): each thing with yes as often as with no."""
    named = [_named(said) for said in read]
    spoken = [{word for words in said for word in words} for said in read]
    for thing in sorted(set(THINGS.values())):
        shown = [place for place, counts in enumerate(named) if counts[thing] >= 2]
        hides = HIDES.get(thing, frozenset())
        absent = [p for p, counts in enumerate(named) if spoken[p] and not counts[thing] and not hides & spoken[p]]
        each = min(len(shown), len(absent))
        question = f"is there {'' if thing in MASSES else 'a '}{thing}?"
        for answer, places in (("yes", shown), ("no", absent)):
            for place in sorted(rng.sample(places, each)):
                yield place, _turn("exists", question, answer)


def _named(said: Sequence[Words]) -> Mapping[str, int]:
    """How many captions name each thing."""
    return Counter(thing for words in said for thing in {THINGS[word] for word in words if word in THINGS})
