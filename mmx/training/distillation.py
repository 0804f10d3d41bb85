"""Knowledge distillation: a student learns from the probabilities of one or several teachers (Hinton et al. 2015).

n label positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmx.config.schema import DistillationConfig
from mmx.data.batching import Batch, DataSets
from mmx.errors import ConfigError, MmxError
from mmx.models.checkpoint import load_model
from mmx.models.model import Model
from mmx.models.source import prepare_inputs

MAX_READ_ATTEMPTS = 10


class Teachers:
    """Frozen models whose probabilities are averaged.

    Args:
        config: folders of the teachers and the temperature.
        student: model that is trained. Teachers must have its tokenizer, its sources and its preparation of inputs.
        sets: data sets; their first readable example is used to compare the preparation of inputs.
        device: device of the teachers.

    Raises:
        ConfigError: a teacher does not fit the student.
        CheckpointError: a teacher cannot be loaded.
    """

    def __init__(self, config: DistillationConfig, student: Model, sets: DataSets, device: torch.device) -> None:
        self.temperature = config.temperature
        self.models = []
        for folder in config.teachers:
            teacher = load_model(folder, device).eval().requires_grad_(False)
            _check_teacher(teacher, student, folder)
            _check_preparation(teacher, student, sets, folder)
            self.models.append(teacher)

    @torch.no_grad()
    def probabilities(self, batch: Batch) -> Tensor:
        """Return the mean of the teachers' probabilities at the label positions, [n, V]."""
        found = []
        for teacher in self.models:
            logits = teacher(batch.sources, batch.tokens, batch.mask, batch.label_positions, batch.boxes)
            found.append((logits.float() / self.temperature).softmax(-1))
        return torch.stack(found).mean(0)


def _check_teacher(teacher: Model, student: Model, folder: str) -> None:
    if teacher.tokenizer.to_json() != student.tokenizer.to_json() or teacher.prompt() != student.prompt():
        raise _mismatch(folder, "tokenizer", "has another tokenizer; train the student with init: on a teacher")
    if teacher.config.question_input != student.config.question_input:
        raise _mismatch(folder, "question_input", f"has question_input {teacher.config.question_input!r}")
    missing = sorted(student.config.sources.keys() - teacher.config.sources.keys())
    if missing:
        raise _mismatch(folder, f"sources.{missing[0]}", f"has no source {missing[0]!r}")


def _check_preparation(teacher: Model, student: Model, sets: DataSets, folder: str) -> None:
    """Compare how both models prepare an example: one batch serves them both."""
    sources = _first_readable_sources(student, sets)
    expected = prepare_inputs(student.encoders, sources)
    given = prepare_inputs(teacher.encoders, {name: sources[name] for name in expected})
    for name, tensors in expected.items():
        same_names = tensors.keys() == given[name].keys()
        if not same_names or not all(torch.equal(tensor, given[name][key]) for key, tensor in tensors.items()):
            message = f"prepares source {name!r} differently; give both the same size, mean, std and interpolation"
            raise _mismatch(folder, f"sources.{name}", message)


def _first_readable_sources(student: Model, sets: DataSets) -> dict[str, object]:
    for _, examples in sets:
        for index in range(min(len(examples), MAX_READ_ATTEMPTS)):
            try:
                sources = examples[index].sources
                prepare_inputs(student.encoders, sources)
            except MmxError:
                continue
            return dict(sources)
    return {}


def _mismatch(folder: str, key: str, problem: str) -> ConfigError:
    return ConfigError(f"teacher {folder} {problem}.", code="training.teacher_mismatch", path=folder, key=key)
