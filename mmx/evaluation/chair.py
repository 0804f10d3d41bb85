"""CHAIR: which objects captions name that the image does not have (Rohrbach et al., "Object Hallucination", 2018).

The objects of an image are those that its references name and, if given, those of its COCO instances. A file lists the
words of each object. The published script finds plurals with a library and has a list of special phrases; here plurals
are formed from the words of the file, and the longest phrase applies: "hot dog" is no dog if the file has both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmx.data.json_fields import RecordLocation, id_field, list_field, load_json, numbered_lines, text_field
from mmx.data.skipped import SkippedRecords
from mmx.errors import DataError
from mmx.evaluation.joining import NOT_SCORED, ScoredText
from mmx.evaluation.metrics.ptb_tokenizer import ptb_tokens
from mmx.evaluation.scores import MetricStatistics, ratio_of

CHAIR_I = "CHAIRi"
CHAIR_S = "CHAIRs"
_EXPECTED = "expected COCO instances: images, annotations and categories."


@dataclass(frozen=True)
class ChairScores:
    """CHAIRi and CHAIRs, and sentences about captions that were not scored."""

    metrics: list[MetricStatistics]
    problems: list[str]


class ObjectWords:
    """Finds the objects that a text names.

    Args:
        words: the words and phrases of each object, by its name, which is one of them.
    """

    def __init__(self, words: Mapping[str, Sequence[str]]) -> None:
        self.names = frozenset(words)
        self._objects: dict[tuple[str, ...], str] = {}
        for name, phrases in words.items():
            for phrase in phrases:
                *first, last = phrase.lower().split()
                for form in (last, *_plurals(last)):
                    self._objects.setdefault((*first, form), name)
        self._longest = max(map(len, self._objects))

    def find(self, text: str) -> list[str]:
        """Return the object of each mention, in order. Of phrases that start at one word, the longest applies."""
        tokens = ptb_tokens(text)
        found = []
        position = 0
        while position < len(tokens):
            length = self._match(tokens, position)
            if length:
                found.append(self._objects[tuple(tokens[position : position + length])])
            position += max(length, 1)
        return found

    def _match(self, tokens: Sequence[str], position: int) -> int:
        """Return the number of words of the longest phrase at a position, 0 if there is none."""
        for length in range(self._longest, 0, -1):
            if tuple(tokens[position : position + length]) in self._objects:
                return length
        return 0


class Instances:
    """The objects of images by image id, and image ids by the name of the file."""

    def __init__(self, objects: Mapping[str, frozenset[str]], ids: Mapping[str, str]) -> None:
        self._objects = objects
        self._ids = ids

    def of(self, text: ScoredText) -> frozenset[str] | None:
        """Return the objects of the image of a text; None for an unknown image."""
        image = str(text.sources.get("image", ""))
        key = self._ids.get(Path(image).name, text.id)
        return self._objects.get(key)


def chair(texts: Sequence[ScoredText], words: ObjectWords, instances: Instances | None = None) -> ChairScores:
    """Score the captions among texts.

    CHAIRi is the fraction of the mentions of objects that are not in the image, CHAIRs that of captions with one.
    """
    skipped = SkippedRecords()
    scored = []
    mentions = []
    sentences = []
    for text in texts:
        known = frozenset() if instances is None else instances.of(text)
        if text.question is not None:
            continue
        if known is None:
            skipped.add(RecordLocation("CHAIR", record=text.id), "the instances have no such image", NOT_SCORED)
            continue
        objects = known.union(*(words.find(target) for target in text.targets))
        named = words.find(text.prediction)
        wrong = sum(name not in objects for name in named)
        scored.append(text)
        mentions.append((wrong, len(named)))
        sentences.append((wrong > 0, 1))
    if not scored:
        raise DataError("no caption has an image with known objects; check --instances.", code="chair.no_caption")
    metrics = [ratio_of(CHAIR_I, scored, mentions), ratio_of(CHAIR_S, scored, sentences)]
    return ChairScores(metrics, skipped.sentences())


def read_objects(path: Path) -> ObjectWords:
    """Read a file with one object a line: its name, and other words for it, with commas between them."""
    if not path.is_file():
        message = f"there is no file {path}; expected lines of words such as: person, man, woman."
        raise DataError(message, code="data.missing", path=str(path))
    words = {}
    for number, line in numbered_lines(path):
        location = RecordLocation(str(path), number)
        phrases = [phrase.strip() for phrase in line.split(",")]
        if not all(phrases):
            raise location.error("objects", "has an empty word; expected words with commas between them.")
        if phrases[0] in words:
            raise location.error("objects", f"has the object {phrases[0]!r} again; write its words in one line.")
        words[phrases[0]] = phrases
    if not words:
        message = f"{path} holds no words; expected lines such as: person, man, woman."
        raise DataError(message, code="data.objects", path=str(path))
    return ObjectWords(words)


def read_instances(path: Path, words: ObjectWords) -> Instances:
    """Read COCO instances. Raises DataError for a category that is no object of `words`."""
    document = load_json(path, _EXPECTED)
    names = {}
    for number, category in enumerate(list_field(document, "categories", RecordLocation(str(path)))):
        location = RecordLocation(str(path), record=f"category {number}")
        name = text_field(category, "name", location)
        if name not in words.names:
            message = f"is {name!r}, which is no object of --objects; add a line that starts with it."
            raise location.error("category", message, name=name)
        names[id_field(category, "id", location)] = name
    ids = {}
    objects: dict[str, set[str]] = {}
    for number, image in enumerate(list_field(document, "images", RecordLocation(str(path)))):
        location = RecordLocation(str(path), record=f"image {number}")
        key = str(id_field(image, "id", location))
        ids[Path(text_field(image, "file_name", location)).name] = key
        objects[key] = set()
    for number, annotation in enumerate(list_field(document, "annotations", RecordLocation(str(path)))):
        location = RecordLocation(str(path), record=f"annotation {number}")
        category_id = id_field(annotation, "category_id", location)
        if category_id not in names:
            raise location.error("category", f"has the category {category_id}, which does not exist; {_EXPECTED}")
        objects.setdefault(str(id_field(annotation, "image_id", location)), set()).add(names[category_id])
    return Instances({key: frozenset(found) for key, found in objects.items()}, ids)


def _plurals(word: str) -> list[str]:
    """Return the plurals of an English noun by its ending; others, such as people, belong into the file."""
    if word.endswith("man"):
        return [f"{word[:-3]}men"]
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return [f"{word[:-1]}ies"]
    plurals = [f"{word}s"]
    if word.endswith(("s", "x", "z", "ch", "sh", "o")):
        plurals.append(f"{word}es")
    if word.endswith("fe"):
        plurals.append(f"{word[:-2]}ves")
    elif word.endswith("f"):
        plurals.append(f"{word[:-1]}ves")
    return plurals
