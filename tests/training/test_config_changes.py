"""What a resumed run may change in its configuration, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from toy_runs import RecordingTrainer, number_config, state_bytes, write_numbers

from mmx.config.loader import load_config
from mmx.config.schema import RunConfig
from mmx.errors import TrainingError
from mmx.models.checkpoint import load_provenance
from mmx.training.config_changes import ConfigChange, check_config_changes
from mmx.training.loop import train
from mmx.training.state import TrainingProgress

WITH_BEST = TrainingProgress(step=4, best=-1.0, best_step=4, num_processes=1)
WITHOUT_BEST = TrainingProgress(step=4, num_processes=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of four steps with a validation set, which has ended."""
    folder = tmp_path_factory.mktemp("finished")
    config = number_config(write_numbers(folder), folder / "run", validate=True, max_steps=4, eval_steps=2)
    RecordingTrainer(config).run()
    return config


def changed(config: RunConfig, **values: object) -> RunConfig:
    """Return a configuration with other values; `__` separates the keys."""
    document: Any = config.model_dump(mode="json")
    for name, value in values.items():
        *parents, last = name.split("__")
        node = document
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[last] = value
    return RunConfig.model_validate(document)


def refused_keys(config: RunConfig, progress: TrainingProgress = WITH_BEST, num_processes: int = 1) -> list[str]:
    """Return the keys that are refused; none if the run may be resumed."""
    try:
        check_config_changes(Path(config.output_dir), config, progress, num_processes)
    except TrainingError as error:
        return list(error.details["changes"])  # type: ignore[call-overload]
    return []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model__decoder__dropout", 0.2),
        ("model__vocab_size", 301),
        ("train__0__path", "other.jsonl"),
        ("train__0__fraction", [0.0, 0.5]),
        ("train__0__max_examples", 5),
        ("train__0__sampling_weight", 2.0),
        ("training__learning_rate", 1e-4),
        ("training__warmup_steps", 4),
        ("training__seed", 1),
        ("training__texts_per_image", 3),
        ("training__per_device_batch_size", 2),
        ("training__gradient_accumulation_steps", 2),
        ("training__ema_decay", 0.0),
        ("training__label_smoothing", 0.2),
        ("training__metric_for_best_model", "some.CIDEr"),
        ("training__max_steps", 3),
        ("validation__some__max_examples", 6),
        ("training__param_groups", {"decoder": {"freeze": True}}),
    ],
)
def test_change_that_makes_another_run_is_refused(finished, key, value):
    config = changed(finished, **{key: value})
    assert refused_keys(config)[0].startswith(key.replace("__", "."))
    before = state_bytes(Path(finished.output_dir))
    with pytest.raises(TrainingError) as error:
        train(config, resume=True, quiet=True)
    assert error.value.code == "training.other_config"
    assert "output_dir" in str(error.value)
    assert state_bytes(Path(finished.output_dir)) == before
    assert load_config(Path(finished.output_dir) / "config.yaml", RunConfig) == finished


def test_refused_changes_have_the_old_and_the_new_value(finished):
    with pytest.raises(TrainingError) as error:
        train(changed(finished, training__seed=7, training__texts_per_image=1), resume=True, quiet=True)
    assert error.value.details["changes"] == {"training.seed": (0, 7), "training.texts_per_image": (2, 1)}
    assert "training.seed: 0 -> 7" in str(error.value)


@pytest.mark.parametrize("key", ["train__0__path", "output_dir"])
def test_same_path_in_another_form_is_no_other_run(finished, key):
    value = finished.output_dir if key == "output_dir" else finished.train[0].path
    path = Path(value)
    assert refused_keys(changed(finished, **{key: str(path.parent / ".." / path.parent.name / path.name)})) == []


def test_another_data_set_is_refused(finished):
    document = finished.model_dump(mode="json")
    document["train"].append(document["train"][0])
    assert refused_keys(RunConfig.model_validate(document)) == ["train.1"]


def test_examples_of_a_step_stay_the_same(finished):
    split = changed(finished, training__per_device_batch_size=2, training__gradient_accumulation_steps=2)
    assert refused_keys(split) == []
    half = changed(finished, training__per_device_batch_size=2)
    assert refused_keys(half, num_processes=2) == []
    assert refused_keys(half) == ["training.per_device_batch_size"]
    assert refused_keys(finished, num_processes=2) == []


def test_values_of_different_metrics_are_not_compared(finished):
    metric = changed(finished, training__metric_for_best_model="some.CIDEr")
    held_out = changed(finished, validation__some__max_examples=6)
    decoding = changed(finished, generation__max_new_tokens=5)
    added = changed(finished, validation__more={"path": finished.train[0].path})
    assert [refused_keys(config, WITHOUT_BEST) for config in (metric, held_out, decoding, added)] == [[]] * 4
    assert refused_keys(metric) == ["training.metric_for_best_model"]
    assert refused_keys(held_out) == ["validation.some.max_examples"]
    assert refused_keys(added) == ["validation.more"]
    assert refused_keys(decoding) == [], "the loss does not depend on decoding"


def test_decoding_options_decide_other_metrics(tmp_path):
    data = write_numbers(tmp_path)
    options = {"max_steps": 2, "eval_steps": 2, "metric_for_best_model": "some.CIDEr"}
    config = number_config(data, tmp_path / "run", validate=True, **options)
    RecordingTrainer(config).run()
    assert refused_keys(changed(config, generation__max_new_tokens=5)) == ["generation.max_new_tokens"]
    assert refused_keys(changed(config, validation__more={"path": data})) == []


def test_accepted_changes_are_printed_and_recorded(tmp_path, capsys):
    data = write_numbers(tmp_path)
    config = number_config(data, tmp_path / "run", max_steps=2, save_steps=2)
    RecordingTrainer(config).run()
    first = (tmp_path / "run" / "last").resolve()
    longer = changed(config, training__max_steps=4, training__logging_steps=2)
    train(longer, resume=True)
    printed = capsys.readouterr().err
    assert str(ConfigChange("training.max_steps", 2, 4)) in printed
    assert str(ConfigChange("training.logging_steps", 1, 2)) in printed
    assert load_config(tmp_path / "run" / "config.yaml", RunConfig) == longer
    for folder, expected in ((first, config), (tmp_path / "run" / "last", longer)):
        provenance = load_provenance(folder)
        assert provenance["config"] == expected.model_dump(mode="json")
        assert provenance["processes"] == 1
    train(longer, resume=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [None, "model: [", "unknown: 1\n"])
def test_run_without_a_readable_configuration_is_refused(tmp_path, content):
    config = number_config(write_numbers(tmp_path), tmp_path / "run", max_steps=2, save_steps=2)
    RecordingTrainer(config).run()
    path = tmp_path / "run" / "config.yaml"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(TrainingError) as error:
        train(config, resume=True, quiet=True)
    assert error.value.code == "training.run_config"


def test_state_of_an_older_version_can_be_resumed(tmp_path):
    config = number_config(write_numbers(tmp_path), tmp_path / "run", max_steps=4, save_steps=2)
    trainer = RecordingTrainer(config)
    trainer.stop_in = 2
    with pytest.raises(TrainingError):
        trainer.run()
    path = tmp_path / "run" / "last" / "training" / "progress.json"
    progress = json.loads(path.read_text())
    for key in ("num_processes", "validation_skipped"):
        del progress[key]
    path.write_text(json.dumps(progress))
    assert RecordingTrainer(config, resume=True).progress.step == 2
