"""Joining predictions to the references of a data set: by ids, by the paths of inputs, and by questions.

Everything that a prediction names must lead to the same reference. What does not join is reported, never guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from mmx.data.examples import Example, TextTask
from mmx.data.json_fields import RecordLocation, absolute_path, id_field, is_url, resolve_path
from mmx.data.skipped import SkippedRecords
from mmx.errors import DataError
from mmx.evaluation.predictions import Prediction

NOT_SCORED = "not scored"
TEXT_SOURCE = "text"  # the value of this source is the text itself, not a path


@dataclass(frozen=True)
class ScoredText:
    """A generated text with its references.

    Args:
        reference: index of its references among all of the data.
        example: index of the example: the texts of one image are resampled together.
        id: of the example.
        question: None for a caption.
        prediction: the generated text.
        targets: reference captions or answers.
        sources: the inputs by source name.
    """

    reference: int
    example: int
    id: str
    question: str | None
    prediction: str
    targets: tuple[str, ...]
    sources: Mapping[str, object]


@dataclass(frozen=True)
class JoinedPredictions:
    """Predictions with their references, in the order of the data.

    Args:
        texts: what joined.
        problems: sentences about what did not, on either side.
        num_predictions: that did not join.
        num_references: without a prediction.
        num_by_name: predictions that were joined by the name of their file alone, because their path is another one.
    """

    texts: list[ScoredText]
    problems: list[str] = field(default_factory=list)
    num_predictions: int = 0
    num_references: int = 0
    num_by_name: int = 0


class _Reference(NamedTuple):
    """The references of one text, and the index of its example."""

    example_index: int
    example: Example
    task: TextTask


class References:
    """The reference texts of a data set, by what predictions may name them with. Texts without references are left out.

    Args:
        path: of the data.
        examples: as read by `read_examples`.
    """

    def __init__(self, path: str, examples: Sequence[Example]) -> None:
        self._path = path
        self._folder = Path(path) if Path(path).is_dir() else Path(path).parent
        self._references: list[_Reference] = []
        self._by_key: dict[tuple[str, object], set[int]] = {}
        for index, example in enumerate(examples):
            for task in example.tasks:
                if task.targets:
                    self._add(_Reference(index, example, task))
        if not self._references:
            message = f"{path} holds no reference texts; add captions or answers (for VQA: annotations=FILE)."
            raise DataError(message, code="score.no_references", path=path)

    def join(self, predictions: Sequence[Prediction]) -> JoinedPredictions:
        """Return the predictions with their references. Raises DataError if none joins."""
        skipped = SkippedRecords()
        found: dict[int, Prediction] = {}
        by_name = 0
        for prediction in predictions:
            match = self._find(prediction)
            if prediction.text is None:
                skipped.add(prediction.location, "an error stands in place of a text", NOT_SCORED)
            elif match.problem:
                skipped.add(prediction.location, match.problem, NOT_SCORED)
            elif match.reference in found:
                skipped.add(prediction.location, "an earlier row is for the same reference", NOT_SCORED)
            else:
                found[match.reference] = prediction
                by_name += match.by_name
        if not found:
            raise self._nothing_joined(predictions[0], skipped)
        missing = self._missing(found, {prediction.is_answer for prediction in predictions})
        reason = f"no prediction of {predictions[0].location.path} is for these references"
        for reference in missing:
            skipped.add(RecordLocation(self._path, record=_display_name(reference)), reason, NOT_SCORED)
        texts = [self._text(index, found[index]) for index in sorted(found)]
        return JoinedPredictions(texts, skipped.sentences(), len(predictions) - len(found), len(missing), by_name)

    # ---- the index -----------------------------------------------------------------------------------------------

    def _add(self, reference: _Reference) -> None:
        number = len(self._references)
        self._references.append(reference)
        for key in _reference_keys(reference):
            self._by_key.setdefault(key, set()).add(number)

    def _with_key(self, name: str, value: object) -> AbstractSet[int]:
        """Return the references with a key. The set may hold most of the data and is not copied."""
        return self._by_key.get((name, value), frozenset())

    def _with_any(self, keys: Iterable[tuple[str, object]]) -> set[int]:
        return set().union(*(self._with_key(*key) for key in keys))

    def _find(self, prediction: Prediction) -> _Match:
        """Find the one reference that everything in a prediction fits."""
        kind = "answer" if prediction.is_answer else "caption"
        inputs = self._with_any(_input_keys(prediction, self._folder))
        named = set() if inputs else self._with_any(_name_keys(prediction))
        if len({self._references[number].example_index for number in named}) > 1:
            named = set()  # several images have this name
        ids = [self._with_key(f"{kind} {name}", key) for name, key in prediction.ids.items()]
        groups = [group for group in (inputs, named, *ids) if group]
        if not groups:
            return _Match(problem="no reference has its id or its path")
        remaining = set(groups[0]).intersection(*groups[1:]) & self._with_key("kind", kind)
        if prediction.question is not None:
            remaining &= self._with_key("question", _normalize(prediction.question))
        with_box = remaining & self._with_key("box", prediction.box)
        if with_box or prediction.box is not None:  # without a box, a question is about the whole image if it can be
            remaining = with_box
        if not remaining:
            return _Match(problem="its id, path and question are of different references, or there are none for it")
        if len(remaining) > 1:
            return _Match(problem="several references fit it")
        number = remaining.pop()
        if not inputs and not _names_agree(prediction, self._references[number].example):
            return _Match(problem="the reference of its id is of another file")
        return _Match(number, by_name=bool(named) and not any(ids))

    # ---- results -------------------------------------------------------------------------------------------------

    def _text(self, number: int, prediction: Prediction) -> ScoredText:
        reference = self._references[number]
        return ScoredText(
            reference=number,
            example=reference.example_index,
            id=reference.example.id,
            question=reference.task.question,
            prediction=prediction.text or "",
            targets=reference.task.targets,
            sources=reference.example.sources,
        )

    def _missing(self, found: Collection[int], kinds: Collection[bool]) -> list[_Reference]:
        """Return the references without a prediction; questions only if there are answers, and so captions."""
        missing = []
        for number, reference in enumerate(self._references):
            if number not in found and (reference.task.question is not None) in kinds:
                missing.append(reference)
        return missing

    def _nothing_joined(self, first: Prediction, skipped: SkippedRecords) -> DataError:
        message = (
            f"no prediction joins a reference of {self._path}: {skipped.sentences()[0]}; expected the ids or the paths "
            "of that data."
        )
        return DataError(message, code="score.nothing_joined", path=self._path, prediction=str(first.location))


class CaptionedImages:
    """In place of references: the images of captions, each with one number in all of the results that are joined."""

    def __init__(self) -> None:
        self._images: dict[str, int] = {}
        self._texts: dict[tuple[str, int], int] = {}  # by image, and how many earlier captions of a file have it

    def join(self, predictions: Sequence[Prediction]) -> JoinedPredictions:
        """Return captions with their images and no references; a path starts from the current folder or the file's.

        Raises DataError if there is no caption with an image.
        """
        skipped = SkippedRecords()
        texts: list[ScoredText] = []
        counts: Counter[str] = Counter()
        for prediction in predictions:
            image = _find_image(prediction)
            if prediction.text is None:
                skipped.add(prediction.location, "an error stands in place of a text", NOT_SCORED)
            elif prediction.is_answer or image is None:
                skipped.add(prediction.location, "it is not a caption with the path of an image", NOT_SCORED)
            else:
                texts.append(self._text(image, counts, prediction.text))
        if not texts:
            message = "and all others are not captions with an image; expected both, or --data PATH."
            raise predictions[0].location.error("no_image", message)
        return JoinedPredictions(texts, skipped.sentences(), len(predictions) - len(texts))

    def _text(self, image: str, counts: Counter[str], text: str) -> ScoredText:
        path = absolute_path(image)
        key = (path, counts[path])
        counts[path] += 1
        number = self._texts.setdefault(key, len(self._texts))
        example = self._images.setdefault(path, len(self._images))
        return ScoredText(number, example, image, None, text, (), {"image": image})


def _find_image(prediction: Prediction) -> str | None:
    written = prediction.inputs.get("image")
    if written is None:
        return None
    here = resolve_path(written, Path())
    next_to_file = resolve_path(written, Path(prediction.location.path).parent)
    return next_to_file if Path(next_to_file).is_file() and not Path(here).is_file() else here


class _Match(NamedTuple):
    """The index of the reference of a prediction, or why there is none."""

    reference: int = -1
    problem: str = ""
    by_name: bool = False


# ---- keys ------------------------------------------------------------------------------------------------------


def _reference_keys(reference: _Reference) -> Iterator[tuple[str, object]]:
    """Yield what a prediction may name these references with."""
    task = reference.task
    example_id = id_field({"id": reference.example.id}, "id", RecordLocation(reference.example.origin))
    kind = "caption" if task.question is None else "answer"
    yield "kind", kind
    yield f"{kind} id", task.id
    yield f"{kind} id", example_id
    yield f"{kind} image_id", example_id
    if task.question is None:
        yield "caption image_id", task.id
    else:
        yield "answer question_id", task.id
        yield "question", _normalize(task.question)
        yield "box", task.box
    for name, value in reference.example.sources.items():
        if name == TEXT_SOURCE:
            yield name, value
        elif isinstance(value, str):
            yield name, value if is_url(value) else absolute_path(value)
            yield f"name of {name}", _file_name(value)


def _input_keys(prediction: Prediction, folder: Path) -> Iterator[tuple[str, object]]:
    """Yield the inputs of a prediction; a path may start from the current folder, or that of the file or the data."""
    for name, value in prediction.inputs.items():
        if name == TEXT_SOURCE:
            yield name, value
            continue
        for base in (Path(), Path(prediction.location.path).parent, folder):
            path = resolve_path(value, base)
            yield name, path if is_url(path) else absolute_path(path)


def _name_keys(prediction: Prediction) -> Iterator[tuple[str, object]]:
    for name, value in prediction.inputs.items():
        yield f"name of {name}", _file_name(value)


def _names_agree(prediction: Prediction, example: Example) -> bool:
    """Whether the image of a prediction may be that of an example: 9.jpg and COCO_val_9.jpg, not 9.jpg and 19.jpg."""
    ours = prediction.inputs.get("image")
    theirs = example.sources.get("image")
    if ours is None or not isinstance(theirs, str):
        return True
    shorter, longer = sorted((Path(_file_name(ours)).stem, Path(_file_name(theirs)).stem), key=len)
    return shorter == longer or (longer.endswith(shorter) and not longer[-len(shorter) - 1].isalnum())


def _file_name(path: str) -> str:
    return PureWindowsPath(path).name  # which separates at both kinds of slashes


def _normalize(question: str) -> str:
    return " ".join(question.casefold().split()).rstrip("? ")


def _display_name(reference: _Reference) -> str:
    name = reference.example.id
    return name if reference.task.question is None else f"{name} ({reference.task.question!r})"
