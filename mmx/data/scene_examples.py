"""Generated scenes as a data set. Example i is a pure function of (seed, i) and is rendered when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import get_args, overload

from mmx.config.schema import DataConfig
from mmx.data.examples import Example, TextTask
from mmx.data.scene_texts import SceneQuestionType, captions, pointed_questions, questions
from mmx.data.scenes import MAX_OBJECTS, generate_scene, render_scene
from mmx.data.selection import is_selected
from mmx.data.texts import format_task
from mmx.errors import DataError, suggest

SCENE_QUESTION_TYPES: tuple[str, ...] = get_args(SceneQuestionType)
MULTI_OBJECT_QUESTION_TYPES = {"relation", "pointed"}
IMAGE_SIZE = 128


class SceneExamples(Sequence[Example]):
    """The scenes that a DataConfig selects. Raises DataError for question types that scenes do not have."""

    def __init__(self, config: DataConfig) -> None:
        _check_question_types(config)
        self.config = config
        first, last = (round(edge * config.num_examples) for edge in config.fraction)
        self.indices = range(first, last)[: config.max_examples]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        # A scene without a selected task is replaced by one that no other index uses.
        candidates = (self._example(number) for number in count(self.indices[index], self.config.num_examples))
        return next(example for example in candidates if example is not None)

    def _example(self, number: int) -> Example | None:
        """Return the example of one scene, or None if it has too many objects or no selected task."""
        config = self.config
        scene = generate_scene(config.seed, number, IMAGE_SIZE)
        if len(scene.objects) > (config.max_objects or MAX_OBJECTS):
            return None
        tasks = [TextTask(captions(scene))]
        for q in (*questions(scene), *pointed_questions(scene)):
            tasks.append(TextTask((q.answer,), q.question, q.question_type, q.box, q.evidence))
        selected = tuple(format_task(task, config) for task in tasks if is_selected(task, config))
        if not selected:
            return None
        name = f"scene-{config.seed}-{number}"
        return Example(name, {"image": render_scene(scene, IMAGE_SIZE)}, selected, name)


def _check_question_types(config: DataConfig) -> None:
    types = config.question_types
    for name in types:
        if name not in SCENE_QUESTION_TYPES:
            raise DataError(
                f"scenes have no questions of type {name!r}; {suggest(name, list(SCENE_QUESTION_TYPES))}",
                code="data.question_type",
                question_type=name,
            )
    needs_two = bool(types) and set(types) <= MULTI_OBJECT_QUESTION_TYPES and "caption" not in config.tasks
    if config.max_objects == 1 and needs_two:
        names = " or ".join(repr(name) for name in types)
        raise DataError(
            f"scenes of one object have no questions of type {names}; set max_objects to 2 or more.",
            code="data.max_objects",
            question_type=types[0],
        )
