"""Derived questions with as many answers "yes" as "no", so the question alone predicts nothing.

`exists`: "is there a ...?". "No" is the answer for an image whose captions neither name the thing nor use a word that
may include it (a "player" may be a man). `verify`: "is the dog brown?", "is the man running?", "is it indoors?",
"is it on the beach?". "No" is the answer where the captions agree on something that excludes what is asked.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from mmx.data.caption_words import DerivedQuestion, Words, all_words
from mmx.data.lexicon import (
    ACTIONS,
    AMBIGUOUS_WORDS,
    COLORS,
    EXCLUDED_ACTIONS,
    INDOOR_WORDS,
    MASS_NOUNS,
    OUTDOOR_WORDS,
    PLACE_PHRASES,
    PLACES,
    SIMILAR_COLORS,
    THINGS,
    WORDS_OF_PLACES,
)

MIN_OUTDOOR_CAPTIONS = 2


class QuestionOfImage(NamedTuple):
    """A derived question, and the index of the image that it is about."""

    image: int
    question: DerivedQuestion


@dataclass
class _Candidates:
    """Images for which a question is answered "yes", and "no"."""

    yes: list[int] = field(default_factory=list)
    no: list[int] = field(default_factory=list)


# Slots of a question, which name it: ("thing", "dog"), ("color", "brown").
Slots = tuple[tuple[str, str], ...]
Find = Callable[[Sequence[DerivedQuestion], Sequence[Words]], Iterable[tuple[Slots, str]]]


def existence_questions(words_by_image: Sequence[Sequence[Words]], rng: Random) -> Iterator[QuestionOfImage]:
    """Yield as many questions answered "yes" as "no" about each thing."""
    mentions = [_count_captions_naming(captions) for captions in words_by_image]
    vocabularies = [all_words(captions) for captions in words_by_image]
    for thing in sorted(set(THINGS.values())):
        ambiguous = AMBIGUOUS_WORDS.get(thing, frozenset())
        present = [index for index, counts in enumerate(mentions) if counts[thing] >= 2]
        absent = []
        for index, (counts, words) in enumerate(zip(mentions, vocabularies, strict=True)):
            if words and not counts[thing] and not ambiguous & words:
                absent.append(index)
        count = min(len(present), len(absent))
        slots = {"article": "" if thing in MASS_NOUNS else "a ", "thing": thing}
        for answer, indices in (("yes", present), ("no", absent)):
            for index in sorted(rng.sample(indices, count)):
                yield QuestionOfImage(index, DerivedQuestion("exists", "exists", answer, slots))


def verify_questions(
    derived: Sequence[Sequence[DerivedQuestion]], words_by_image: Sequence[Sequence[Words]], rng: Random
) -> Iterator[QuestionOfImage]:
    """Yield questions about what the open questions of the images already answer.

    Of the images of which a question can be asked, every second one is drawn.

    Args:
        derived: the open questions of each image.
        words_by_image: the captions of each image.
    """
    finders: dict[str, Find] = {
        "verify_color": _colors_to_verify,
        "verify_action": _actions_to_verify,
        "verify_setting": _settings_to_verify,
        "verify_place": _places_to_verify,
    }
    for form, find in finders.items():
        candidates: dict[Slots, _Candidates] = defaultdict(_Candidates)
        for image, (questions, captions) in enumerate(zip(derived, words_by_image, strict=True)):
            for slots, answer in find(questions, captions):
                found = candidates[slots]
                (found.yes if answer == "yes" else found.no).append(image)
        for slots in sorted(candidates):
            found = candidates[slots]
            count = (min(len(found.yes), len(found.no)) + 1) // 2
            for answer, images in (("yes", found.yes), ("no", found.no)):
                for image in sorted(rng.sample(images, count)):
                    yield QuestionOfImage(image, DerivedQuestion("verify", form, answer, dict(slots)))


def _count_captions_naming(captions: Sequence[Words]) -> Mapping[str, int]:
    """Return how many captions name each thing."""
    counts: Counter[str] = Counter()
    for words in captions:
        counts.update({THINGS[word] for word in words if word in THINGS})
    return counts


def _colors_to_verify(questions: Sequence[DerivedQuestion], captions: Sequence[Words]) -> Iterator[tuple[Slots, str]]:
    """ "what color is the dog? brown" -> is the dog brown? yes; is the dog white? no"""
    named = {COLORS[word] for word in all_words(captions) if word in COLORS}
    for question in questions:
        if question.question_type != "color" or question.answer not in SIMILAR_COLORS:
            continue
        for color in sorted(SIMILAR_COLORS):
            slots = (*sorted(question.slots.items()), ("color", color))
            if color == question.answer:
                yield slots, "yes"
            elif color not in named and color not in SIMILAR_COLORS[question.answer]:
                yield slots, "no"


def _actions_to_verify(questions: Sequence[DerivedQuestion], captions: Sequence[Words]) -> Iterator[tuple[Slots, str]]:
    """ "what is the dog doing? running" -> is the dog running? yes; is the dog sleeping? no"""
    named = {ACTIONS[word] for word in all_words(captions) if word in ACTIONS}
    for question in questions:
        if question.question_type != "action":
            continue
        subject = ("subject", question.slots["subject"])
        yield (subject, ("action", question.answer)), "yes"
        for action in sorted(EXCLUDED_ACTIONS.get(question.answer, frozenset()) - named):
            yield (subject, ("action", action)), "no"


def _settings_to_verify(questions: Sequence[DerivedQuestion], captions: Sequence[Words]) -> Iterator[tuple[Slots, str]]:
    """ "on the grass", "in the park" -> is it outdoors? yes; is it indoors? no"""
    indoor = sum(bool(INDOOR_WORDS & set(words)) for words in captions)
    outdoor = sum(bool(OUTDOOR_WORDS & set(words)) for words in captions)
    if indoor and outdoor:
        return
    if indoor or outdoor >= MIN_OUTDOOR_CAPTIONS:
        for setting in ("indoors", "outdoors"):
            is_true = (setting == "indoors") == bool(indoor)
            yield (("setting", setting),), "yes" if is_true else "no"


def _places_to_verify(questions: Sequence[DerivedQuestion], captions: Sequence[Words]) -> Iterator[tuple[Slots, str]]:
    """ "where is this? snow" -> is it in the snow? yes; is it on the beach? no"""
    places = [question.answer for question in questions if question.question_type == "place"]
    words = all_words(captions)
    named = {PLACES[word] for word in words if word in PLACES}
    for answer in places:
        for place, phrase in PLACE_PHRASES.items():
            if place == answer:
                yield (("place", phrase),), "yes"
            elif place not in named and not WORDS_OF_PLACES[place] & words:
                yield (("place", phrase),), "no"
