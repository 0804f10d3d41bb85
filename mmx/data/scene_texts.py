"""What can truly be said and asked about a scene, and a folder of scenes with their texts.

Nothing doubtful is said: a question names an object by words that fit no other object, two objects are only
related along the axis that keeps them furthest apart, and a place is only named well inside its region.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, permutations, product
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, Literal

from mmx.data.scenes import (
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    Box,
    Scene,
    SceneObject,
    corner_name,
    generate_scene,
    offset,
    relation_holds,
    render_scene,
)
from mmx.errors import DataError

SceneQuestionType = Literal["exists", "count", "color", "shape", "size", "relation", "position", "pointed"]
Attributes = dict[str, str]  # the words for size, color and shape
Words = tuple[str, ...]  # which of the three are spoken, in the order of speech

NUMBERS = ("zero", "one", "two", "three", "four")
VALUES: dict[str, Words] = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": SHAPES}
ALL: Words = ("size", "color", "shape")
NAMES: tuple[Words, ...] = tuple(words for n in (1, 2, 3) for words in combinations(ALL, n))  # size alone comes first
CAPTIONED: tuple[Words, ...] = (ALL, ("color", "shape"))
COUNTED: tuple[Words, ...] = ((), ("size",), ("color",), ("shape",), ("color", "shape"))
COUNT_WEIGHTS = (5, 4, 9, 12, 12)  # rare counts first where a scene offers them, so that no answer is a safe guess
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
FEWEST = 6  # questions a scene
MOST_TOLD = 3  # objects that a full caption tells of


@dataclass(frozen=True)
class SceneQuestion:
    """A question and its one short answer. evidence: the box (shares of the picture) of the object the answer is
    about; box: where the question points, as a part of it.

    Existence and counts are about the whole picture and have no evidence: one given only for "yes" would be the answer.
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
    """A caption that names every object, and where it does so; mentions in the order of the text."""

    text: str
    mentions: tuple[Mention, ...]


def full_caption(scene: Scene) -> FullCaption | None:
    """The caption that tells everything, as `captions` begins with it; None where it has none (of four objects), or
    where two objects look alike, so that one word stands for both."""
    looks = [_look(thing) for thing in scene.objects]
    phrases = [_phrase(look, ALL) for look in looks]
    if len(phrases) > MOST_TOLD or len(set(phrases)) < len(phrases):
        return None
    text, mentions, end = _listing(looks, ALL), [], 0
    for thing, phrase in zip(scene.objects, phrases, strict=True):
        end = text.index(phrase, end) + len(phrase)
        mentions.append(Mention(thing.shape, end - len(thing.shape), thing.box))
    return FullCaption(text, tuple(mentions))


def captions(scene: Scene, seed: int = 0) -> tuple[str, ...]:
    """Three to five different true captions, in lower case; up to three objects, the first one tells everything."""
    rng = Random(f"captions-{seed}-{scene.objects!r}")
    looks = [_look(thing) for thing in scene.objects]
    full = [_listing(looks, ALL)] if len(looks) <= MOST_TOLD else []
    rest = [_listing(looks, ("color", "shape")), _listing(looks, ("shape",)), _counted(scene)]
    rest += _placed(scene, rng) + _related_pair(scene, rng)
    rng.shuffle(rest)
    return tuple(dict.fromkeys(full + rest))[: rng.randint(3, 5)]


def questions(scene: Scene, seed: int = 0) -> tuple[SceneQuestion, ...]:
    """Six to ten different questions, each with one right answer; "is there" is answered yes as often as no."""
    rng = Random(f"questions-{seed}-{scene.objects!r}")
    asked = [*_exists(scene, rng), *_counts(scene, rng), *_attributes(scene, rng)]
    asked += [*_relation(scene, rng), *_neighbour(scene, rng), *_position(scene, rng)]
    while len(asked) < FEWEST:  # only twins in the picture: no single one can be named
        asked = list(dict.fromkeys([*_exists(scene, rng), *asked]))
    return tuple(asked)


def pointed_questions(scene: Scene) -> tuple[SceneQuestion, ...]:
    """For each object the question of a pointing finger: its answer is colour and shape, its box is the finger. None
    where there is a single object, for nothing would have to be pointed at."""
    return tuple(
        SceneQuestion("what is this?", _phrase(_look(thing), ("color", "shape")), "pointed", thing.box, thing.box)
        for thing in scene.objects
        if len(scene.objects) > 1
    )


def write_scenes(folder: Path, count: int, seed: int = 0, size: int = 128) -> Path:
    """Writes `count` scenes of `size` pixels a side with captions, questions and truth; all of it or nothing."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{str(folder)!r} already exists, and scenes are only written to a new or empty folder: "
            f"give another one, for example {str(folder) + '-2'!r}."
        )
    if count < 1 or size < 32:
        raise DataError(
            f"count={count} and size={size} were given; give a count of 1 or more and a size from 32 pixels."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as workshop:
        finished = _write_all(
            Path(workshop) / folder.name, [generate_scene(seed, index, size) for index in range(count)]
        )
        if folder.exists():
            folder.rmdir()  # empty, as checked above; a rename onto a folder is not possible everywhere
        finished.rename(folder)
    return folder


def _write_all(folder: Path, scenes: Sequence[Scene]) -> Path:
    (folder / "images").mkdir(parents=True)
    names = [f"images/{index:06d}.png" for index in range(len(scenes))]
    pairs = list(zip(names, scenes, strict=True))
    for name, scene in pairs:
        render_scene(scene).save(folder / name)
    _write_lines(folder / "captions.jsonl", ({"image": name, "captions": captions(scene)} for name, scene in pairs))
    _write_lines(folder / "questions.jsonl", (row for name, scene in pairs for row in _question_rows(name, scene)))
    _write_lines(folder / "scenes.jsonl", ({"image": name, **asdict(scene)} for name, scene in pairs))
    return folder


def _question_rows(name: str, scene: Scene) -> Iterator[dict[str, Any]]:
    for asked in (*questions(scene), *pointed_questions(scene)):
        yield {"image": name, **{key: value for key, value in asdict(asked).items() if value is not None}}


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _look(thing: SceneObject) -> Attributes:
    return {"size": thing.size, "color": thing.color, "shape": thing.shape}


def _phrase(look: Attributes, words: Words, noun: str = "shape") -> str:
    """("color", "shape") gives "red star"; where the shape is not spoken, `noun` stands for it."""
    return " ".join([look[word] for word in words] + ([] if "shape" in words else [noun]))


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase.startswith("orange") else f"a {phrase}"


def _plural(phrase: str) -> str:
    return f"{phrase}es" if phrase.endswith("s") else f"{phrase}s"


def _listing(looks: list[Attributes], words: Words) -> str:
    """All objects, like ones together: "two green stars, a red cross and a blue circle"."""
    groups = Counter(_phrase(look, words) for look in looks)
    parts = [_article(each) if n == 1 else f"{NUMBERS[n]} {_plural(each)}" for each, n in groups.items()]
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _counted(scene: Scene) -> str:
    count = len(scene.objects)
    shapes = "one shape" if count == 1 else f"{NUMBERS[count]} shapes"
    return f"{shapes} on a {scene.background} background"


def _matches(scene: Scene, look: Attributes, words: Words) -> list[SceneObject]:
    """The objects that a phrase fits."""
    return [thing for thing in scene.objects if all(getattr(thing, word) == look[word] for word in words)]


def _name(scene: Scene, thing: SceneObject, rng: Random, hidden: str = "") -> str | None:
    """A name no other object answers to and that keeps the `hidden` word to itself, or None where there is none."""
    look = _look(thing)
    fitting = [words for words in NAMES if hidden not in words and len(_matches(scene, look, words)) == 1]
    return f"the {_phrase(look, rng.choice(fitting), 'thing')}" if fitting else None


def _named(scene: Scene, rng: Random, hidden: str = "") -> list[tuple[SceneObject, str]]:
    """The objects that can be named, in random order, each with its name."""
    names = [(thing, name) for thing in scene.objects if (name := _name(scene, thing, rng, hidden))]
    rng.shuffle(names)
    return names


def _placed(scene: Scene, rng: Random) -> list[str]:
    """One caption such as "a red star in the top left"; none where all lie between the regions."""
    placed = [(thing, place) for thing in scene.objects if (place := corner_name(thing))]
    if not placed:
        return []
    thing, place = rng.choice(placed)
    return [f"{_article(_phrase(_look(thing), rng.choice(CAPTIONED)))} in the {place}"]


def _related_pair(scene: Scene, rng: Random) -> list[str]:
    """One caption such as "a large red circle left of a small blue square"; none for a single object."""
    related = [(a, b, r) for a, b in permutations(scene.objects, 2) for r in RELATIONS if relation_holds(a, b, r)]
    if not related:
        return []
    words = rng.choice(CAPTIONED)
    a, b, relation = rng.choice(related)
    return [f"{_article(_phrase(_look(a), words))} {relation} {_article(_phrase(_look(b), words))}"]


def _exists(scene: Scene, rng: Random) -> list[SceneQuestion]:
    """One question answered yes and one answered no, so that the words alone say nothing."""
    present, absent = _present(scene, rng), _absent(scene, rng)
    return [
        SceneQuestion(f"is there {_article(present)}?", "yes", "exists"),
        SceneQuestion(f"is there {_article(absent)}?", "no", "exists"),
    ]


def _present(scene: Scene, rng: Random) -> str:
    return _phrase(_look(rng.choice(scene.objects)), rng.choice(NAMES[1:]))


def _absent(scene: Scene, rng: Random) -> str:
    """An object of the scene with one word changed, such that nothing fits any more."""
    words = rng.choice(NAMES[1:])  # size alone is left out: it is absent too seldom to be as often no as yes
    while True:  # ends: there are more colours, and more shapes, than objects
        look, changed = _look(rng.choice(scene.objects)), rng.choice(words)
        # Words from elsewhere in the scene come up more often: "red star" beside a red circle and a blue star.
        look[changed] = rng.choice((*VALUES[changed], *(_look(other)[changed] for other in scene.objects)))
        if not _matches(scene, look, words):
            return _phrase(look, words)


def _counts(scene: Scene, rng: Random) -> list[SceneQuestion]:
    """Two questions with different wordings: first what is counted is chosen, then how many there shall be of it."""
    asked = []
    for words in rng.sample(COUNTED, 2):
        answers = _phrases_by_count(scene, words)
        counts = sorted(answers)
        count = rng.choices(counts, [COUNT_WEIGHTS[n] for n in counts])[0]
        phrase = _plural(rng.choice(answers[count]))
        asked.append(SceneQuestion(f"how many {phrase} are there?", str(count), "count"))
    return asked


def _phrases_by_count(scene: Scene, words: Words) -> dict[int, list[str]]:
    """Every phrase made of `words`, filed under the number of objects it fits."""
    looks: list[Attributes] = [{}]
    for word in words:
        looks = [{**look, word: value} for look in looks for value in VALUES[word]]
    answers: dict[int, list[str]] = {}
    for look in looks:
        answers.setdefault(len(_matches(scene, look, words)), []).append(_phrase(look, words))
    return answers


def _attributes(scene: Scene, rng: Random) -> Iterator[SceneQuestion]:
    """One question each about colour, shape and size, about an object named by its other words."""
    kinds: tuple[Literal["color", "shape", "size"], ...] = ("color", "shape", "size")
    for kind in kinds:
        if named := _named(scene, rng, hidden=kind):
            thing, name = named[0]
            yield SceneQuestion(f"what {kind} is {name}?", _look(thing)[kind], kind, thing.box)


def _relation(scene: Scene, rng: Random) -> list[SceneQuestion]:
    """Whether one object lies left of, right of, above or below another; a fair coin says yes or no."""
    pairs = [
        (a, f"is {name} {{}} {other}?", relation)
        for (a, name), (b, other) in permutations(_named(scene, rng), 2)
        for relation in RELATIONS
        if relation_holds(a, b, relation)
    ]
    if not pairs:
        return []
    a, asked, relation = rng.choice(pairs)
    if rng.random() < 0.5:
        return [SceneQuestion(asked.format(relation), "yes", "relation", a.box)]
    return [SceneQuestion(asked.format(OPPOSITES[relation]), "no", "relation", a.box)]


def _neighbour(scene: Scene, rng: Random) -> list[SceneQuestion]:
    """What lies on one side of an object, asked where a single object lies there, and clearly."""
    found = []
    for (b, name), relation in product(_named(scene, rng), RELATIONS):
        there = [a for a in scene.objects if offset(a, b, relation) > 0]
        if len(there) == 1 and relation_holds(there[0], b, relation):
            answer = _phrase(_look(there[0]), ("color", "shape"))
            found.append(SceneQuestion(f"what is {relation} {name}?", answer, "relation", there[0].box))
    return [rng.choice(found)] if found else []


def _position(scene: Scene, rng: Random) -> list[SceneQuestion]:
    """Where an object is, asked where it lies well inside a region."""
    places = {place: (thing, name) for thing, name in _named(scene, rng) if (place := corner_name(thing))}
    if not places:
        return []
    place = rng.choice(sorted(places))  # regions first, so that the center comes up as often as a corner
    thing, name = places[place]
    return [SceneQuestion(f"where is {name}?", place, "position", thing.box)]
