"""Questions that have nothing to do with the image: "what color is the car?" where there is no car.

They are questions of other images of the same data, so the question alone does not show whether there is an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from mmx.data.caption_words import DerivedQuestion, Words, all_words
from mmx.data.lexicon import (
    AMBIGUOUS_WORDS,
    ANIMAL_WORDS,
    COLORED_THINGS,
    HUMAN_WORDS,
    WORN_THINGS,
)
from mmx.data.yes_no_questions import QuestionOfImage

CANNOT_TELL = "can't tell"
MAX_ATTEMPTS = 20


def unanswerable_questions(
    derived: Sequence[Sequence[DerivedQuestion]], words_by_image: Sequence[Sequence[Words]], count: int, rng: Random
) -> Iterator[QuestionOfImage]:
    """Yield `count` questions answered "can't tell", or fewer where few questions do not fit an image.

    Args:
        derived: the open questions of each image.
        words_by_image: the captions of each image.
    """
    pool = [question for questions in derived for question in questions if _subject_words(question)]
    images = [image for image, captions in enumerate(words_by_image) if any(captions)]
    if not pool or not images:
        return
    asked = set()
    for _ in range(count):
        for _ in range(MAX_ATTEMPTS):
            image = rng.choice(images)
            question = rng.choice(pool)
            key = (image, question.form, *sorted(question.slots.items()))
            if key not in asked and not _subject_words(question) & all_words(words_by_image[image]):
                asked.add(key)
                yield QuestionOfImage(
                    image, DerivedQuestion("unanswerable", question.form, CANNOT_TELL, question.slots)
                )
                break


def _subject_words(question: DerivedQuestion) -> frozenset[str]:
    """Return the words of captions with which the question may have an answer; none if it always has one."""
    if question.question_type == "animal":
        return ANIMAL_WORDS
    if question.question_type in ("action", "object"):
        return ANIMAL_WORDS if question.slots["subject"] == "dog" else HUMAN_WORDS
    if question.question_type != "color":
        return frozenset()
    thing = question.slots["thing"]
    if thing in WORN_THINGS:
        return HUMAN_WORDS
    if thing in ("dog", "collar", "horse", "bird"):
        return ANIMAL_WORDS
    names = frozenset(word for word, name in COLORED_THINGS.items() if name == thing)
    return names | AMBIGUOUS_WORDS.get(thing, frozenset())
