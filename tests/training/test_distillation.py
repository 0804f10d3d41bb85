"""Distillation: a student learns from the mean probabilities of its teachers."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from toy_runs import RecordingTrainer, number_config, state_bytes, write_numbers

from mmx.config.loader import parse_config
from mmx.config.schema import RunConfig
from mmx.errors import CheckpointError, ConfigError, TrainingError
from mmx.models.batching import IGNORE_INDEX
from mmx.models.checkpoint import load_model, save_model
from mmx.models.model import Model
from mmx.training.loop import Trainer
from mmx.training.losses import token_loss


class TrainedTeachers(NamedTuple):
    """Data, and two teachers with one tokenizer that were trained on it with different seeds."""

    data: str
    folders: list[str]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> TrainedTeachers:
    folder = tmp_path_factory.mktemp("teachers")
    data = write_numbers(folder)
    folders = []
    for seed in (0, 1):
        options = {"max_steps": 20, "seed": seed, "learning_rate": 0.01, "ema_decay": 0.0}
        config = number_config(data, folder / f"teacher-{seed}", dropout=0.0, **options)
        folders.append(str(Trainer(config, resume=False, quiet=True).run()))
    return TrainedTeachers(data, folders)


def student_config(teachers: TrainedTeachers, folder: Path, weight: float = 1.0, **training: object) -> RunConfig:
    """Return a run of a new model that is distilled from both teachers."""
    options = {"max_steps": 20, "seed": 3, "learning_rate": 0.01, "ema_decay": 0.0, **training}
    distillation = {"teachers": teachers.folders, "weight": weight}
    return number_config(teachers.data, folder, dropout=0.0, distillation=distillation, **options)


def teacher_loss(model: Model, trainer: Trainer) -> float:
    """Return the cross-entropy of the mean of the teachers and a model on the first batch, in nats per token."""
    (batch,) = next(trainer._steps())
    is_label = batch.labels != IGNORE_INDEX
    assert trainer.objective.teachers is not None
    with torch.no_grad():
        probs = trainer.objective.teachers.probabilities(batch)[is_label]
        logits = model.eval()(batch.sources, batch.tokens, batch.mask, batch.label_positions, batch.boxes)[is_label]
    return float(-(probs * logits.log_softmax(-1)).sum(-1).mean())


def test_student_approaches_its_teachers(teachers, tmp_path):
    config = student_config(teachers, tmp_path / "student")
    trainer = RecordingTrainer(config)
    before = teacher_loss(trainer.model, trainer)
    best = trainer.run()
    trainer.progress.samples_seen = 0
    trainer.progress.step = 0
    after = teacher_loss(load_model(best), trainer)
    assert after < 0.75 * before


def test_probabilities_are_the_mean_over_teachers(teachers, tmp_path):
    trainer = Trainer(student_config(teachers, tmp_path / "student"), resume=False, quiet=True)
    (batch,) = next(trainer._steps())
    found = []
    for folder in teachers.folders:
        with torch.no_grad():
            logits = load_model(folder)(batch.sources, batch.tokens, batch.mask, batch.label_positions)
        found.append(logits.softmax(-1))
    assert trainer.objective.teachers is not None
    assert torch.allclose(trainer.objective.teachers.probabilities(batch), torch.stack(found).mean(0), atol=1e-6)
    assert not any(
        parameter.requires_grad for model in trainer.objective.teachers.models for parameter in model.parameters()
    )


def test_weight_mixes_both_losses(teachers, tmp_path):
    options = {"label_smoothing": 0.0, "max_steps": 1}
    losses = {}
    for weight in (0.25, 1.0):
        trainer = Trainer(student_config(teachers, tmp_path / str(weight), weight, **options), False, True)
        (batch,) = next(trainer._steps())
        with torch.no_grad():
            logits = trainer.model(batch.sources, batch.tokens, batch.mask, batch.label_positions, batch.boxes)
            losses[weight] = float(trainer.objective.loss(logits, batch))
        reference_loss = float(token_loss(logits, batch.labels, 0.0))
    assert losses[0.25] == pytest.approx(0.75 * reference_loss + 0.25 * losses[1.0], rel=1e-5)


def test_run_with_teachers_resumes_bit_equal(teachers, tmp_path):
    options = {"max_steps": 6, "target_noise": 0.2}
    whole = RecordingTrainer(student_config(teachers, tmp_path / "whole", 0.7, **options))
    whole.run()
    config = student_config(teachers, tmp_path / "resumed", 0.7, **options)
    first = RecordingTrainer(config)
    first.stop_in = 3
    with pytest.raises(TrainingError):
        first.run()
    second = RecordingTrainer(config, resume=True)
    second.run()
    assert first.recorded + second.recorded == whole.recorded
    assert state_bytes(tmp_path / "resumed") == state_bytes(tmp_path / "whole")


# ---- teachers that do not fit ------------------------------------------------------------------------------------


def refused_key(config: RunConfig) -> object:
    with pytest.raises(ConfigError) as error:
        Trainer(config, resume=False, quiet=True)
    assert error.value.code == "training.teacher_mismatch"
    return error.value.details["key"]


def test_teacher_with_another_tokenizer_is_refused(teachers, tmp_path):
    other_data = tmp_path / "other.jsonl"
    other_data.write_text('{"numbers": [1], "captions": ["quite another text", "a text that is quite another"]}\n')
    config = student_config(TrainedTeachers(str(other_data), teachers.folders), tmp_path / "student")
    assert refused_key(config) == "tokenizer"


def test_teacher_that_prepares_inputs_differently_is_refused(tmp_path):
    source = {"encoder": "image", "options": {"backbone": "resnet10t", "size": 32, "stage": 1}}
    document = {
        "model": {
            "sources": {"image": source},
            "decoder": {"hidden_size": 32, "num_layers": 1, "num_heads": 4},
            "vocab_size": 300,
        },
        "train": [{"path": "scenes", "num_examples": 4}],
        "training": {"max_steps": 1, "per_device_batch_size": 2},
    }
    teacher_config = RunConfig.model_validate({**document, "output_dir": str(tmp_path / "teacher")})
    teacher = Trainer(teacher_config, resume=False, quiet=True)
    folder = save_model(tmp_path / "checkpoint", teacher.model)
    document["training"]["distillation"] = {"teachers": [str(folder)]}
    source["options"]["mean"] = [0.1, 0.1, 0.1]
    assert refused_key(RunConfig.model_validate({**document, "output_dir": str(tmp_path / "a")})) == "sources.image"
    document["model"]["sources"] = {"photo": source}
    assert refused_key(RunConfig.model_validate({**document, "output_dir": str(tmp_path / "b")})) == "sources.photo"


def test_missing_teacher_is_an_error(teachers, tmp_path):
    config = student_config(TrainedTeachers(teachers.data, [str(tmp_path / "missing")]), tmp_path / "student")
    with pytest.raises(CheckpointError):
        Trainer(config, resume=False, quiet=True)


def test_distillation_and_reward_exclude_each_other():
    document = {
        "init": "a",
        "train": [{"path": "x", "reward": "cider"}],
        "training": {"distillation": {"teachers": ["b"]}},
    }
    with pytest.raises(ConfigError, match="distillation and reward"):
        parse_config(document, RunConfig, where="test")
