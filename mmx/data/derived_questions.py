"""Questions about images, derived by rules from their captions.

Six types: `color`, `count`, `object`, `action`, `place`, `exists`. An answer needs a majority of the captions that
mention the matter, and at least two captions where a single one may be wrong. "Is there a ...?" is asked of each thing
with as many answers "yes" as "no" over all images that are read together, so the question alone predicts nothing.
"No" is the answer for an image whose captions neither name the thing nor use a word that may include it (a "player"
may be a man).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import chain
from random import Random
from typing import Literal, NamedTuple, get_args

from mmx.data.examples import Example, TextTask
from mmx.data.lexicon import (
    ACTIONS,
    ADDITION_WORDS,
    AMBIGUOUS_WORDS,
    BEINGS,
    COLORED_THINGS,
    COLORS,
    CROWD_WORDS,
    DOG_PLURAL,
    DOG_SINGULAR,
    MASS_NOUNS,
    NUMBER_NAMES,
    NUMBERS,
    OBJECTS,
    PEOPLE,
    PHRASE_ENDS,
    PLACES,
    PLURAL_PEOPLE,
    THINGS,
    TRANSITIVE_VERBS,
    WEARABLE,
)

DerivedQuestionType = Literal["color", "count", "object", "action", "place", "exists"]
DERIVED_QUESTION_TYPES: tuple[str, ...] = get_args(DerivedQuestionType)
Words = list[str]
PLURAL_CLOTHES = ("shorts", "pants")
PLACE_PREPOSITIONS = ("in", "on", "at", "through", "along", "across", "into", "down", "near")


class Subject(NamedTuple):
    """The subject of a caption ("" if unknown), and the words from it to the next being."""

    name: str
    words: Words


class ExistenceQuestion(NamedTuple):
    """A question of existence, and the index of the image that it is about."""

    image: int
    task: TextTask


def derive_questions(examples: Iterable[Example], seed: int = 0) -> list[Example]:
    """Return the examples with the questions that their captions answer added after their tasks.

    A pure function of the examples, in their order, and the seed, which selects the images of existence questions.
    """
    examples = list(examples)
    words_by_image: list[list[Words]] = []
    derived: list[list[TextTask]] = []
    for example in examples:
        texts = [target for task in example.tasks if task.question is None for target in task.targets]
        captions = [_split_words(text) for text in texts]
        words_by_image.append(captions)
        derived.append(
            [
                *_color_questions(captions),
                *_count_questions(captions),
                *_object_questions(captions),
                *_action_questions(captions),
                *_place_questions(captions),
            ]
        )
    for question in _existence_questions(words_by_image, Random(f"exists-{seed}")):
        derived[question.image].append(question.task)
    return [replace(example, tasks=(*example.tasks, *tasks)) for example, tasks in zip(examples, derived, strict=True)]


def _split_words(caption: str) -> Words:
    """Return the words in lower case. "hot dog" and "ice cream" become one word, as they are no dog and no ice."""
    joined = re.sub(r"\b(hot|corn|chili) (?=dog)|\b(ice) (?=cream)", r"\1\2-", caption.lower())
    return re.findall(r"[a-z]+(?:-[a-z]+)*", joined)


def _task(question_type: DerivedQuestionType, question: str, answer: str) -> TextTask:
    return TextTask((answer,), question, question_type)


def _majority(votes: Sequence[str], min_votes: int) -> str | None:
    """Return the vote of more than half, if there are at least `min_votes` of it."""
    if not votes:
        return None
    answer, count = Counter(votes).most_common(1)[0]
    return answer if count >= min_votes and 2 * count > len(votes) else None


# ---- colors ------------------------------------------------------------------------------------------------------


def _color_questions(captions: Sequence[Words]) -> Iterator[TextTask]:
    """ "a black and white dog" -> what color is the dog? black and white"""
    votes: dict[str, list[str]] = defaultdict(list)
    for words in captions:
        for thing, colors in _colors_of_things(words).items():
            votes[thing].append(colors.pop() if len(colors) == 1 else "several")
    if any(_mentions_several_dogs(words) for words in captions):
        votes.pop("dog", None)  # the question would not say which dog
    for thing, colors_of_thing in votes.items():
        answer = _majority(colors_of_thing, min_votes=min(2, len(colors_of_thing)))
        if "several" not in colors_of_thing and answer:
            verb = "are" if thing in PLURAL_CLOTHES else "is"
            yield _task("color", f"what color {verb} the {thing}?", answer)


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


def _count_questions(captions: Sequence[Words]) -> Iterator[TextTask]:
    """ "two brown dogs", "a dog and another dog" -> how many dogs are there? two

    "one" is an answer only if no caption has more, because captions often leave out people.
    """
    nouns = {"dogs": (DOG_SINGULAR, DOG_PLURAL), "people": (frozenset(PEOPLE), frozenset(PLURAL_PEOPLE))}
    for things, (singular, plural) in nouns.items():
        counts = [_count_mentioned(words, singular, plural) for words in captions]
        votes = [NUMBER_NAMES.get(count, "") for count in counts if count is not None]
        answer = _majority(votes, min_votes=2)
        if answer and (answer != "one" or set(votes) == {"one"}):
            yield _task("count", f"how many {things} are there?", answer)


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


def _object_questions(captions: Sequence[Words]) -> Iterator[TextTask]:
    """ "a boy holds a red ball" -> what is the boy holding? ball"""
    votes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for caption in captions:
        subject = _find_subject(caption)
        for position, word in enumerate(subject.words):
            if word not in TRANSITIVE_VERBS:
                continue
            verb = TRANSITIVE_VERBS[word]
            thing = _find_object(verb, subject.words[position + 1 :])
            if thing:
                votes[subject.name, verb].append(thing)
                break
    for (name, verb), things in votes.items():
        answer = _majority(things, min_votes=1)
        if answer:
            yield _task("object", f"what is the {name} {verb}?", answer)


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


def _action_questions(captions: Sequence[Words]) -> Iterator[TextTask]:
    """ "a dog runs", "a dog running" -> what is the dog doing? running"""
    votes: dict[str, list[str]] = defaultdict(list)
    for caption in captions:
        subject = _find_subject(caption)
        action = next((ACTIONS[word] for word in subject.words if word in ACTIONS), None)
        if action:
            votes[subject.name].append(action)
    for name, actions in votes.items():
        answer = _majority(actions, min_votes=2)
        if answer:
            yield _task("action", f"what is the {name} doing?", answer)


def _find_subject(words: Words) -> Subject:
    """Return the first dog or person of a caption; unknown if a group comes first."""
    positions = [position for position, word in enumerate(words) if word in BEINGS or word in CROWD_WORDS]
    if not positions or words[positions[0]] not in PEOPLE.keys() | DOG_SINGULAR:
        return Subject("", [])
    first = positions[0]
    following = positions[1] if len(positions) > 1 else len(words)
    return Subject(PEOPLE.get(words[first], "dog"), words[first + 1 : following])


# ---- places and existence ----------------------------------------------------------------------------------------


def _place_questions(captions: Sequence[Words]) -> Iterator[TextTask]:
    """ "in the snow" -> where is this? snow"""
    votes: list[str] = []
    for words in captions:
        places = {
            PLACES[word] for position, word in enumerate(words) if word in PLACES and _names_place(words[:position])
        }
        votes += sorted(places)
    counts = Counter(votes).most_common(2)
    if counts and counts[0][1] >= 2 and (len(counts) == 1 or counts[0][1] > counts[1][1]):
        yield _task("place", "where is this?", counts[0][0])


def _names_place(words_before: Words) -> bool:
    return any(word in PLACE_PREPOSITIONS for word in words_before[-4:])


def _existence_questions(words_by_image: Sequence[Sequence[Words]], rng: Random) -> Iterator[ExistenceQuestion]:
    """Yield as many questions answered "yes" as "no" about each thing."""
    mentions = [_count_captions_naming(captions) for captions in words_by_image]
    vocabularies = [set(chain.from_iterable(captions)) for captions in words_by_image]
    for thing in sorted(set(THINGS.values())):
        ambiguous = AMBIGUOUS_WORDS.get(thing, frozenset())
        present = [index for index, counts in enumerate(mentions) if counts[thing] >= 2]
        absent = []
        for index, (counts, words) in enumerate(zip(mentions, vocabularies, strict=True)):
            if words and not counts[thing] and not ambiguous & words:
                absent.append(index)
        count = min(len(present), len(absent))
        question = f"is there {'' if thing in MASS_NOUNS else 'a '}{thing}?"
        for answer, indices in (("yes", present), ("no", absent)):
            for index in sorted(rng.sample(indices, count)):
                yield ExistenceQuestion(index, _task("exists", question, answer))


def _count_captions_naming(captions: Sequence[Words]) -> Mapping[str, int]:
    """Return how many captions name each thing."""
    counts: Counter[str] = Counter()
    for words in captions:
        counts.update({THINGS[word] for word in words if word in THINGS})
    return counts
