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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Literal, get_args

from mmx.data.examples import Example, Turn
from mmx.data.lexicon import (
    ACTIONS,
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
)

DerivedKind = Literal["color", "count", "object", "action", "place", "exists"]
DERIVED_KINDS: tuple[str, ...] = get_args(DerivedKind)
Words = list[str]


def derive_questions(examples: Iterable[Example], seed: int = 0) -> list[Example]:
    """The examples with the questions that their captions answer added behind what was there.

    A pure function of the examples, in their order, and the seed (which pictures a thing is not in).
    """
    given = list(examples)
    captions = [[t for turn in example.turns if turn.question is None for t in turn.targets] for example in given]
    read = [[_words(caption) for caption in said] for said in captions]
    asked = [[*_colors(said), *_counts(said), *_objects(said), *_actions(said), *_places(said)] for said in read]
    for place, turn in _exists(read, Random(f"exists-{seed}")):
        asked[place].append(turn)
    return [replace(e, turns=(*e.turns, *turns)) for e, turns in zip(given, asked, strict=True)]


def _words(caption: str) -> Words:
    return re.findall(r"[a-z]+(?:-[a-z]+)*", caption.lower())


def _turn(kind: DerivedKind, question: str, answer: str) -> Turn:
    return Turn((answer,), question, kind)


def _agreed(votes: Sequence[str], least: int) -> str | None:
    """What most say, at least so many of them and more than half; None where they do not agree."""
    if not votes:
        return None
    answer, count = Counter(votes).most_common(1)[0]
    return answer if count >= least and 2 * count > len(votes) else None


# ---- what is asked -----------------------------------------------------------------------------------------------


def _colors(said: Sequence[Words]) -> Iterator[Turn]:
    """ "a black and white dog" -> what color is the dog? black and white"""
    votes: dict[str, list[str]] = defaultdict(list)
    for words in said:
        seen: dict[str, str] = {}
        for place, word in enumerate(words):
            if word in COLORED and (color := _color_before(words[:place])):
                seen.setdefault(COLORED[word], color)
        for thing, color in seen.items():
            votes[thing].append(color)
    for thing, colors in votes.items():
        if answer := _agreed(colors, least=min(2, len(colors))):
            verb = "are" if thing in ("shorts", "pants") else "is"
            yield _turn("color", f"what color {verb} the {thing}?", answer)


def _color_before(words: Words) -> str | None:
    """The color or two colors at the end of some words; None where there is none."""
    if not words or words[-1] not in COLORS:
        return None
    last = COLORS[words[-1]]
    earlier = words[-3] if len(words) > 2 and words[-2] == "and" else None
    return " and ".join(sorted({COLORS[earlier], last})) if earlier in COLORS else last


def _counts(said: Sequence[Words]) -> Iterator[Turn]:
    """ "two brown dogs", "a dog and another dog" -> how many dogs are there? two"""
    singular = {"dogs": DOG, "people": set(PEOPLE)}
    plural = {"dogs": DOGS, "people": set(CROWDS)}
    for things in ("dogs", "people"):
        votes = [_count(words, singular[things], plural[things]) for words in said]
        answer = _agreed([NAMES_OF_NUMBERS.get(v, "") for v in votes if v is not None], least=2)
        if answer:
            yield _turn("count", f"how many {things} are there?", answer)


def _count(words: Words, singular: set[str], plural: set[str]) -> int | None:
    """How many of a thing a caption tells of; 0 where it cannot be told, None where it tells of none."""
    if not any(word in singular or word in plural for word in words):
        return None
    if MANY & set(words):
        return 0
    total, number = 0, 0
    for word in words:
        if word in NUMBERS or word in FURTHER:
            number = NUMBERS.get(word, 1)
        elif word in plural:
            if number < 2:
                return 0
            total, number = total + number, 0
        elif word in singular:
            total, number = total + number, 0
        elif word in STOPS and word != "and":
            number = 0
    return total or 1  # "the dog", "dog runs": one, with no number to it


def _objects(said: Sequence[Words]) -> Iterator[Turn]:
    """ "a boy holds a red ball" -> what is the boy holding? ball"""
    votes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for words in said:
        subject = _subject(words)
        for place, word in enumerate(words):
            if subject and word in HANDLING and (thing := _object(words[place + 1 :])):
                votes[subject, HANDLING[word]].append(thing)
                break
    for (subject, deed), things in votes.items():
        if answer := _agreed(things, least=1):
            yield _turn("object", f"what is the {subject} {deed}?", answer)


def _object(words: Words) -> str | None:
    """What a noun phrase at the beginning of some words is about: its last known thing."""
    found = None
    for place, word in enumerate(words[:5]):
        if word in STOPS and not (word == "the" and place == 0):
            break
        found = OBJECTS.get(word, found)
    return found


def _actions(said: Sequence[Words]) -> Iterator[Turn]:
    """ "a dog runs", "a dog running" -> what is the dog doing? running"""
    votes: dict[str, list[str]] = defaultdict(list)
    for words in said:
        subject = _subject(words)
        deed = next((ACTIONS[word] for word in words if word in ACTIONS), None)
        if subject and deed:
            votes[subject].append(deed)
    for subject, deeds in votes.items():
        if answer := _agreed(deeds, least=2):
            yield _turn("action", f"what is the {subject} doing?", answer)


def _subject(words: Words) -> str | None:
    """Whom a caption is about, where that is one: the first dog or person in it, before any crowd."""
    for word in words:
        if word in DOGS or word in CROWDS or word in MANY:
            return None
        if word in DOG:
            return "dog"
        if word in PEOPLE:
            return PEOPLE[word]
    return None


def _places(said: Sequence[Words]) -> Iterator[Turn]:
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


def _exists(read: Sequence[Sequence[Words]], rng: Random) -> Iterator[tuple[int, Turn]]:
    """(place of the picture, question): each thing with yes as often as with no."""
    named = [_named(said) for said in read]
    spoken = [{word for words in said for word in words} for said in read]
    for thing in sorted(set(THINGS.values())):
        shown = [place for place, counts in enumerate(named) if counts[thing] >= 2]
        hides = HIDES.get(thing, set())
        absent = [p for p, counts in enumerate(named) if spoken[p] and not counts[thing] and not hides & spoken[p]]
        each = min(len(shown), len(absent))
        question = f"is there {'' if thing in MASSES else 'a '}{thing}?"
        for answer, places in (("yes", shown), ("no", absent)):
            for place in sorted(rng.sample(places, each)):
                yield place, _turn("exists", question, answer)


def _named(said: Sequence[Words]) -> Mapping[str, int]:
    """How many captions name each thing."""
    return Counter(thing for words in said for thing in {THINGS[word] for word in words if word in THINGS})
