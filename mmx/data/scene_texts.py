"""True captions and questions about generated scenes.

Texts avoid doubtful statements: a question names an object by words that fit no other object, a relation between two
objects is named only along the axis of their larger distance, and a position only well inside its region.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product
from random import Random
from typing import Literal, NamedTuple

from mmx.data.scenes import (
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    Box,
    Scene,
    SceneObject,
    offset,
    position_name,
    relation_holds,
)

SceneQuestionType = Literal["exists", "count", "color", "shape", "size", "relation", "position", "pointed"]
AttributeName = Literal["color", "shape", "size"]
Attributes = dict[str, str]  # attribute name to word, such as {"color": "red"}
AttributeNames = tuple[str, ...]  # the attributes that a phrase mentions, in the order of the phrase

NUMBERS = ("zero", "one", "two", "three", "four")
VALUES: dict[str, tuple[str, ...]] = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": SHAPES}
ALL_ATTRIBUTES: AttributeNames = ("size", "color", "shape")
NAMINGS: tuple[AttributeNames, ...] = tuple(names for n in (1, 2, 3) for names in combinations(ALL_ATTRIBUTES, n))
NAMINGS_BEYOND_SIZE = NAMINGS[1:]  # the first is size alone
CAPTION_NAMINGS: tuple[AttributeNames, ...] = (ALL_ATTRIBUTES, ("color", "shape"))
COUNT_NAMINGS: tuple[AttributeNames, ...] = ((), ("size",), ("color",), ("shape",), ("color", "shape"))
COUNT_WEIGHTS = (5, 4, 9, 12, 12)  # prefer rare counts where a scene has them, so that no answer is a safe guess
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MIN_QUESTIONS = 6
MAX_FULL_CAPTION_OBJECTS = 3


@dataclass(frozen=True)
class SceneQuestion:
    """A question with its one short answer.

    Args:
        evidence: box (0..1) of the object that the answer is about. Questions of existence and counts concern the
            whole image and have none: evidence that exists only for "yes" would give the answer away.
        box: region that the question is about, as a part of the prompt.
    """

    question: str
    answer: str
    question_type: SceneQuestionType
    evidence: Box | None = None
    box: Box | None = None


@dataclass(frozen=True)
class Mention:
    """A shape word of a caption, text[start : start + len(word)], and the box of the one object that it names."""

    word: str
    start: int
    box: Box


@dataclass(frozen=True)
class FullCaption:
    """A caption that names every object, with its mentions in the order of the text."""

    text: str
    mentions: tuple[Mention, ...]


class NamedObject(NamedTuple):
    """An object with a name that fits no other object of its scene."""

    item: SceneObject
    name: str


# ---- captions ----------------------------------------------------------------------------------------------------


def full_caption(scene: Scene) -> FullCaption | None:
    """Return the caption that names every object, the first of `captions`.

    Returns None for more than MAX_FULL_CAPTION_OBJECTS objects, and where two objects have the same description.
    """
    attributes = [_attributes(item) for item in scene.objects]
    phrases = [_phrase(each, ALL_ATTRIBUTES) for each in attributes]
    if len(phrases) > MAX_FULL_CAPTION_OBJECTS or len(set(phrases)) < len(phrases):
        return None
    text = _list_objects(attributes, ALL_ATTRIBUTES)
    mentions = []
    end = 0
    for item, phrase in zip(scene.objects, phrases, strict=True):
        end = text.index(phrase, end) + len(phrase)
        mentions.append(Mention(item.shape, end - len(item.shape), item.box))
    return FullCaption(text, tuple(mentions))


def captions(scene: Scene, seed: int = 0) -> tuple[str, ...]:
    """Return three to five different true captions in lower case. With up to three objects, the first names all."""
    rng = Random(f"captions-{seed}-{scene.objects!r}")
    attributes = [_attributes(item) for item in scene.objects]
    first = [_list_objects(attributes, ALL_ATTRIBUTES)] if len(attributes) <= MAX_FULL_CAPTION_OBJECTS else []
    others = [
        _list_objects(attributes, ("color", "shape")),
        _list_objects(attributes, ("shape",)),
        _count_caption(scene),
        *_position_captions(scene, rng),
        *_relation_captions(scene, rng),
    ]
    rng.shuffle(others)
    return tuple(dict.fromkeys(first + others))[: rng.randint(3, 5)]


def _list_objects(attributes: Sequence[Attributes], naming: AttributeNames) -> str:
    """List all objects, equal ones together: "two green stars, a red cross and a blue circle"."""
    groups = Counter(_phrase(each, naming) for each in attributes)
    items = [_with_article(phrase) if n == 1 else f"{NUMBERS[n]} {_plural(phrase)}" for phrase, n in groups.items()]
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _count_caption(scene: Scene) -> str:
    count = len(scene.objects)
    shapes = "one shape" if count == 1 else f"{NUMBERS[count]} shapes"
    return f"{shapes} on a {scene.background} background"


def _position_captions(scene: Scene, rng: Random) -> list[str]:
    """Return one caption such as "a red star in the top left", none if no object has a named position."""
    positions = [(item, position) for item in scene.objects if (position := position_name(item))]
    if not positions:
        return []
    item, position = rng.choice(positions)
    return [f"{_with_article(_phrase(_attributes(item), rng.choice(CAPTION_NAMINGS)))} in the {position}"]


def _relation_captions(scene: Scene, rng: Random) -> list[str]:
    """Return one caption such as "a large red circle left of a small blue square", none if no relation holds."""
    pairs = permutations(scene.objects, 2)
    related = [(a, b, relation) for a, b in pairs for relation in RELATIONS if relation_holds(a, b, relation)]
    if not related:
        return []
    naming = rng.choice(CAPTION_NAMINGS)
    a, b, relation = rng.choice(related)
    first = _with_article(_phrase(_attributes(a), naming))
    second = _with_article(_phrase(_attributes(b), naming))
    return [f"{first} {relation} {second}"]


# ---- questions ---------------------------------------------------------------------------------------------------


def questions(scene: Scene, seed: int = 0) -> tuple[SceneQuestion, ...]:
    """Return six to ten different questions with one right answer each.

    "Is there" is answered yes as often as no.
    """
    rng = Random(f"questions-{seed}-{scene.objects!r}")
    found = [
        *_existence_questions(scene, rng),
        *_count_questions(scene, rng),
        *_attribute_questions(scene, rng),
        *_relation_questions(scene, rng),
        *_neighbor_questions(scene, rng),
        *_position_questions(scene, rng),
    ]
    while len(found) < MIN_QUESTIONS:  # objects that look alike cannot be named one by one
        found = list(dict.fromkeys([*_existence_questions(scene, rng), *found]))
    return tuple(found)


def pointed_questions(scene: Scene) -> tuple[SceneQuestion, ...]:
    """Return a question about the region of each object, answered by its color and shape.

    Returns none for a scene of one object, whose question could be answered without the region.
    """
    if len(scene.objects) == 1:
        return ()
    found = []
    for item in scene.objects:
        answer = _phrase(_attributes(item), ("color", "shape"))
        found.append(SceneQuestion("what is this?", answer, "pointed", item.box, item.box))
    return tuple(found)


def _existence_questions(scene: Scene, rng: Random) -> list[SceneQuestion]:
    """Return one question answered yes and one answered no, so that the wording does not give the answer away."""
    present = _present_phrase(scene, rng)
    absent = _absent_phrase(scene, rng)
    return [
        SceneQuestion(f"is there {_with_article(present)}?", "yes", "exists"),
        SceneQuestion(f"is there {_with_article(absent)}?", "no", "exists"),
    ]


def _present_phrase(scene: Scene, rng: Random) -> str:
    return _phrase(_attributes(rng.choice(scene.objects)), rng.choice(NAMINGS_BEYOND_SIZE))


def _absent_phrase(scene: Scene, rng: Random) -> str:
    """Describe an object of the scene with one attribute changed, such that no object fits."""
    naming = rng.choice(NAMINGS_BEYOND_SIZE)  # a size alone is absent too rarely for as many "no" as "yes"
    while True:  # terminates: there are more colors, and more shapes, than objects
        attributes = _attributes(rng.choice(scene.objects))
        changed = rng.choice(naming)
        # Prefer words of other objects: "red star" is a harder question if there are also a red circle and a blue star.
        words_of_others = [_attributes(other)[changed] for other in scene.objects]
        attributes[changed] = rng.choice((*VALUES[changed], *words_of_others))
        if not _matching_objects(scene, attributes, naming):
            return _phrase(attributes, naming)


def _count_questions(scene: Scene, rng: Random) -> list[SceneQuestion]:
    """Return two questions with different wordings; the count is chosen before the phrase that has it."""
    found = []
    for naming in rng.sample(COUNT_NAMINGS, 2):
        phrases = _phrases_by_count(scene, naming)
        counts = sorted(phrases)
        count = rng.choices(counts, [COUNT_WEIGHTS[n] for n in counts])[0]
        phrase = _plural(rng.choice(phrases[count]))
        found.append(SceneQuestion(f"how many {phrase} are there?", str(count), "count"))
    return found


def _phrases_by_count(scene: Scene, naming: AttributeNames) -> dict[int, list[str]]:
    """Return every phrase with these attributes, by the number of objects that it fits."""
    combined: list[Attributes] = [{}]
    for name in naming:
        combined = [{**attributes, name: value} for attributes in combined for value in VALUES[name]]
    phrases: dict[int, list[str]] = {}
    for attributes in combined:
        count = len(_matching_objects(scene, attributes, naming))
        phrases.setdefault(count, []).append(_phrase(attributes, naming))
    return phrases


def _attribute_questions(scene: Scene, rng: Random) -> Iterator[SceneQuestion]:
    """Yield a question about a color, a shape and a size, each of an object that is named by its other attributes."""
    names: tuple[AttributeName, ...] = ("color", "shape", "size")
    for name in names:
        named = _named_objects(scene, rng, hidden=name)
        if named:
            item = named[0].item
            yield SceneQuestion(f"what {name} is {named[0].name}?", _attributes(item)[name], name, item.box)


def _relation_questions(scene: Scene, rng: Random) -> list[SceneQuestion]:
    """Ask whether one object is left of, right of, above or below another; "yes" has a probability of one half."""
    pairs = []
    for first, second in permutations(_named_objects(scene, rng), 2):
        for relation in RELATIONS:
            if relation_holds(first.item, second.item, relation):
                pairs.append((first, second, relation))
    if not pairs:
        return []
    first, second, relation = rng.choice(pairs)
    is_true = rng.random() < 0.5
    asked_relation = relation if is_true else OPPOSITES[relation]
    question = f"is {first.name} {asked_relation} {second.name}?"
    return [SceneQuestion(question, "yes" if is_true else "no", "relation", first.item.box)]


def _neighbor_questions(scene: Scene, rng: Random) -> list[SceneQuestion]:
    """Ask what is on one side of an object, where exactly one object is there and the relation is clear."""
    found = []
    for (item, name), relation in product(_named_objects(scene, rng), RELATIONS):
        neighbors = [other for other in scene.objects if offset(other, item, relation) > 0]
        if len(neighbors) == 1 and relation_holds(neighbors[0], item, relation):
            answer = _phrase(_attributes(neighbors[0]), ("color", "shape"))
            found.append(SceneQuestion(f"what is {relation} {name}?", answer, "relation", neighbors[0].box))
    return [rng.choice(found)] if found else []


def _position_questions(scene: Scene, rng: Random) -> list[SceneQuestion]:
    """Ask where an object is, if one is well inside a region."""
    by_position: dict[str, NamedObject] = {}
    for named in _named_objects(scene, rng):
        position = position_name(named.item)
        if position is not None:
            by_position[position] = named
    if not by_position:
        return []
    position = rng.choice(sorted(by_position))  # the position first, so that the center is as frequent as a corner
    item, name = by_position[position]
    return [SceneQuestion(f"where is {name}?", position, "position", item.box)]


# ---- phrases -----------------------------------------------------------------------------------------------------


def _attributes(item: SceneObject) -> Attributes:
    return {"size": item.size, "color": item.color, "shape": item.shape}


def _phrase(attributes: Attributes, naming: AttributeNames, noun: str = "shape") -> str:
    """Return a phrase: ("color", "shape") gives "red star"; without the shape, `noun` takes its place."""
    words = [attributes[name] for name in naming]
    if "shape" not in naming:
        words.append(noun)
    return " ".join(words)


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase.startswith("orange") else f"a {phrase}"


def _plural(phrase: str) -> str:
    return f"{phrase}es" if phrase.endswith("s") else f"{phrase}s"


def _matching_objects(scene: Scene, attributes: Attributes, naming: AttributeNames) -> list[SceneObject]:
    """Return the objects that a phrase fits."""
    described = [attributes[name] for name in naming]
    return [item for item in scene.objects if [getattr(item, name) for name in naming] == described]


def _named_objects(scene: Scene, rng: Random, hidden: str = "") -> list[NamedObject]:
    """Return the objects that have a name, in random order. No name mentions the attribute `hidden`."""
    named = []
    for item in scene.objects:
        attributes = _attributes(item)
        candidates = [naming for naming in NAMINGS if hidden not in naming]
        fitting = [naming for naming in candidates if len(_matching_objects(scene, attributes, naming)) == 1]
        if fitting:
            named.append(NamedObject(item, f"the {_phrase(attributes, rng.choice(fitting), 'thing')}"))
    rng.shuffle(named)
    return named
