"""Questions about images, derived by rules from their captions.

Open questions: `color`, `count`, `object`, `action`, `place`, `animal`, `subject`. An answer needs a majority of the
captions that mention the matter, and at least two captions where a single one may be wrong. Questions answered "yes" or
"no": `exists` and `verify`, see `mmx.data.yes_no_questions`. `unanswerable` questions are asked of images that do not
show what they are about, see `mmx.data.unanswerable_questions`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace
from random import Random
from typing import Literal, get_args

from mmx.data.caption_words import DerivedQuestion, Words, all_words, find_subject, majority, split_words
from mmx.data.examples import Example, TextTask
from mmx.data.lexicon import (
    ACTIONS,
    ADDITION_WORDS,
    ANIMAL_WORDS,
    ANIMALS,
    COLORED_THINGS,
    COLORS,
    CROWD_WORDS,
    DOG_PLURAL,
    DOG_SINGULAR,
    HUMAN_WORDS,
    NOT_LIVING_WORDS,
    NUMBER_NAMES,
    NUMBERS,
    OBJECTS,
    PEOPLE,
    PHRASE_ENDS,
    PLACES,
    PLURAL_PEOPLE,
    TRANSITIVE_VERBS,
    WEARABLE,
)
from mmx.data.question_wordings import Wordings, word_question
from mmx.data.unanswerable_questions import unanswerable_questions
from mmx.data.yes_no_questions import existence_questions, verify_questions

DerivedQuestionType = Literal[
    "color", "count", "object", "action", "place", "animal", "subject", "exists", "verify", "unanswerable"
]
DERIVED_QUESTION_TYPES: tuple[str, ...] = get_args(DerivedQuestionType)
PLURAL_CLOTHES = ("shorts", "pants")
PLACE_PREPOSITIONS = ("in", "on", "at", "through", "along", "across", "into", "down", "near")
MIN_SUBJECT_CAPTIONS = 3


def derive_questions(
    examples: Iterable[Example], seed: int = 0, wordings: Wordings = "first", unanswerable: float = 0.0
) -> list[Example]:
    """Return the examples with the questions that their captions answer added after their tasks.

    A pure function of the arguments. The seed selects the images of questions answered "yes" or "no" and the wordings.

    Args:
        wordings: the wordings to draw from, see `mmx.data.question_wordings`.
        unanswerable: fraction of the questions that are answered "can't tell".
    """
    examples = list(examples)
    words_by_image: list[list[Words]] = []
    for example in examples:
        texts = [target for task in example.tasks if task.question is None for target in task.targets]
        words_by_image.append([split_words(text) for text in texts])
    derived = [list(_open_questions(captions)) for captions in words_by_image]
    selected = [
        *existence_questions(words_by_image, Random(f"exists-{seed}")),
        *verify_questions(derived, words_by_image, Random(f"verify-{seed}")),
    ]
    answered = len(selected) + sum(map(len, derived))
    count = round(answered * unanswerable / (1 - unanswerable))
    selected += unanswerable_questions(derived, words_by_image, count, Random(f"unanswerable-{seed}"))
    for item in selected:
        derived[item.image].append(item.question)
    found = []
    for example, questions in zip(examples, derived, strict=True):
        tasks = [_task(question, wordings, f"{seed}-{example.id}") for question in questions]
        found.append(replace(example, tasks=(*example.tasks, *tasks)))
    return found


def _open_questions(captions: Sequence[Words]) -> Iterator[DerivedQuestion]:
    yield from _color_questions(captions)
    yield from _count_questions(captions)
    yield from _object_questions(captions)
    yield from _action_questions(captions)
    yield from _place_questions(captions)
    yield from _animal_questions(captions)
    yield from _subject_questions(captions)


def _task(question: DerivedQuestion, wordings: Wordings, key: str) -> TextTask:
    """Word a question. Equal questions about one image have equal wordings."""
    key = f"{key}-{question.form}-{sorted(question.slots.items())}"
    text = word_question(question.form, question.slots, wordings, key)
    return TextTask((question.answer,), text, question.question_type)


# ---- colors ------------------------------------------------------------------------------------------------------


def _color_questions(captions: Sequence[Words]) -> Iterator[DerivedQuestion]:
    """ "a black and white dog" -> what color is the dog? black and white"""
    votes: dict[str, list[str]] = defaultdict(list)
    for words in captions:
        for thing, colors in _colors_of_things(words).items():
            votes[thing].append(colors.pop() if len(colors) == 1 else "several")
    if any(_mentions_several_dogs(words) for words in captions):
        votes.pop("dog", None)  # the question would not say which dog
    for thing, colors_of_thing in votes.items():
        answer = majority(colors_of_thing, min_votes=min(2, len(colors_of_thing)))
        if "several" not in colors_of_thing and answer:
            is_plural = thing in PLURAL_CLOTHES
            slots = {"thing": thing, "be": "are" if is_plural else "is", "do": "do" if is_plural else "does"}
            yield DerivedQuestion("color", "color", answer, slots)


def _mentions_several_dogs(words: Words) -> bool:
    return bool(DOG_PLURAL & set(words)) or (_count_mentioned(words, DOG_SINGULAR, DOG_PLURAL) or 0) > 1


def _colors_of_things(words: Words) -> dict[str, set[str]]:
    """Return the colors that a caption gives to each thing."""
    found: dict[str, set[str]] = defaultdict(set)
    for position, word in enumerate(words):
        if word in COLORED_THINGS and (color := _color_at_end(words[:position])):
            found[COLORED_THINGS[word]].add(color)
    return found


def _color_at_end(words: Words) -> str | None:
    """Return the color, or the pair of colors, that ends some words; None if there is none, or more than two."""
    if not words or words[-1] not in COLORS:
        return None
    last = COLORS[words[-1]]
    earlier = words[-3] if len(words) > 2 and words[-2] == "and" else None
    if earlier not in COLORS:
        return last
    if len(words) > 3 and words[-4] in COLORS:
        return None
    return " and ".join(sorted({COLORS[earlier], last}))


# ---- counts ------------------------------------------------------------------------------------------------------


def _count_questions(captions: Sequence[Words]) -> Iterator[DerivedQuestion]:
    """ "two brown dogs", "a dog and another dog" -> how many dogs are there? two

    "one" is an answer only if no caption has more, because captions often leave out people.
    """
    nouns = {"dogs": (DOG_SINGULAR, DOG_PLURAL), "people": (frozenset(PEOPLE), frozenset(PLURAL_PEOPLE))}
    for things, (singular, plural) in nouns.items():
        counts = [_count_mentioned(words, singular, plural) for words in captions]
        votes = [NUMBER_NAMES.get(count, "") for count in counts if count is not None]
        answer = majority(votes, min_votes=2)
        if answer and (answer != "one" or set(votes) == {"one"}):
            yield DerivedQuestion("count", "count", answer, {"things": things})


def _count_mentioned(words: Words, singular: Set[str], plural: Set[str]) -> int | None:
    """Return how many of a thing a caption mentions: 0 if the number is not clear, None if it does not mention it."""
    has_crowd = bool(CROWD_WORDS & set(words))
    if not any(word in singular or word in plural for word in words):
        return 0 if has_crowd and "person" in singular else None
    if has_crowd:
        return 0
    total = 0
    number = 0
    expects_noun = False  # after "another", whose noun may be left out: "one dog chases another"
    for word in words:
        if word in NUMBERS or word in ADDITION_WORDS:
            number = NUMBERS.get(word, 1)
            expects_noun = word in ADDITION_WORDS
        elif word in plural:
            if number < 2:
                return 0
            total += number
            number = 0
            expects_noun = False
        elif word in singular:
            if total and not number:
                return 0  # "a man and woman", or "a man ... the man"
            total += number or 1
            number = 0
            expects_noun = False
        elif word in PHRASE_ENDS and word != "and" and not expects_noun:
            number = 0
    return 0 if expects_noun else total


# ---- objects and actions -----------------------------------------------------------------------------------------


def _object_questions(captions: Sequence[Words]) -> Iterator[DerivedQuestion]:
    """ "a boy holds a red ball" -> what is the boy holding? ball"""
    votes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for caption in captions:
        subject = find_subject(caption)
        for position, word in enumerate(subject.words):
            if word not in TRANSITIVE_VERBS:
                continue
            verb = TRANSITIVE_VERBS[word]
            thing = _find_object(verb, subject.words[position + 1 :])
            if thing:
                votes[subject.name, verb].append(thing)
                break
    for (name, verb), things in votes.items():
        answer = majority(things, min_votes=1)
        if answer:
            yield DerivedQuestion("object", "object", answer, {"subject": name, "verb": verb})


def _find_object(verb: str, words: Words) -> str | None:
    """Return the last known thing of the noun phrase that begins some words."""
    found = None
    for position, word in enumerate(words[:5]):
        is_first_article = word == "the" and position == 0
        ends_phrase = word in PHRASE_ENDS and not is_first_article
        if ends_phrase or word in TRANSITIVE_VERBS or word in ACTIONS:
            break
        found = OBJECTS.get(word, found)
    return found if verb != "wearing" or found in WEARABLE else None


def _action_questions(captions: Sequence[Words]) -> Iterator[DerivedQuestion]:
    """ "a dog runs", "a dog running" -> what is the dog doing? running"""
    votes: dict[str, list[str]] = defaultdict(list)
    for caption in captions:
        subject = find_subject(caption)
        action = next((ACTIONS[word] for word in subject.words if word in ACTIONS), None)
        if action:
            votes[subject.name].append(action)
    for name, actions in votes.items():
        answer = majority(actions, min_votes=2)
        if answer:
            yield DerivedQuestion("action", "action", answer, {"subject": name})


# ---- places, animals and subjects ---------------------------------------------------------------------------------


def _place_questions(captions: Sequence[Words]) -> Iterator[DerivedQuestion]:
    """ "in the snow" -> where is this? snow"""
    votes: list[str] = []
    for words in captions:
        places = {
            PLACES[word] for position, word in enumerate(words) if word in PLACES and _names_place(words[:position])
        }
        votes += sorted(places)
    counts = Counter(votes).most_common(2)
    if counts and counts[0][1] >= 2 and (len(counts) == 1 or counts[0][1] > counts[1][1]):
        subject = majority([find_subject(words).name for words in captions], min_votes=2)
        has_group = subject == "" and all(set(words) & PLURAL_PEOPLE.keys() for words in captions)
        if subject:
            yield DerivedQuestion("place", "place_subject", counts[0][0], {"subject": subject})
        elif has_group:
            yield DerivedQuestion("place", "place_group", counts[0][0], {"subject": "people"})
        else:
            yield DerivedQuestion("place", "place", counts[0][0])


def _names_place(words_before: Words) -> bool:
    return any(word in PLACE_PREPOSITIONS for word in words_before[-4:])


def _animal_questions(captions: Sequence[Words]) -> Iterator[DerivedQuestion]:
    """ "a dog runs", "a puppy" -> what animal is this? dog"""
    animals = [{ANIMALS[word] for word in words if word in ANIMALS} for words in captions]
    kinds = set().union(*animals)
    if len(kinds) == 1 and sum(map(bool, animals)) >= 2 and not NOT_LIVING_WORDS & all_words(captions):
        yield DerivedQuestion("animal", "animal", kinds.pop())


def _subject_questions(captions: Sequence[Words]) -> Iterator[DerivedQuestion]:
    """ "a man runs", "a man on a street", "a man" -> who is this? man

    Only where no caption has a second being.
    """
    words = all_words(captions)
    if words & (NOT_LIVING_WORDS | CROWD_WORDS | PLURAL_PEOPLE.keys() | DOG_PLURAL):
        return
    if words & HUMAN_WORDS and words & ANIMAL_WORDS:
        return
    people = [{PEOPLE[word] for word in caption if word in PEOPLE} - {"person"} for caption in captions]
    if any(len(names) > 1 for names in people):
        return
    name = majority([find_subject(caption).name for caption in captions], MIN_SUBJECT_CAPTIONS)
    if name == "person" and any(people):
        return
    if name:
        form = "subject_animal" if name == "dog" else "subject_person"
        yield DerivedQuestion("subject", form, name)
