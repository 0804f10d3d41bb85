"""The training loop in one process: bit-exact resume, SIGTERM, skipped examples, and errors for wrong results."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import COUNT, RecordingTrainer, metrics_lines, number_config, state_bytes, write_numbers

from mmx.config.schema import DataConfig, RunConfig, TokenizerConfig
from mmx.data.batching import Batch
from mmx.data.examples import Example
from mmx.encoders.base import Features
from mmx.errors import CheckpointError, ConfigError, DataError, TrainingError
from mmx.models.checkpoint import load_model, load_provenance
from mmx.testing import ToyEncoder
from mmx.training.loop import StepResult, Trainer, train
from mmx.training.state import latest_state


def raw_weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / name / "training" / "model.safetensors")


def run_to_end(config: RunConfig, resume: bool = False) -> RecordingTrainer:
    trainer = RecordingTrainer(config, resume)
    trainer.run()
    return trainer


def run_until_stopped(config: RunConfig, stop_in: int) -> RecordingTrainer:
    """Run with a simulated SIGTERM during the step `stop_in`."""
    trainer = RecordingTrainer(config)
    trainer.stop_in = stop_in
    with pytest.raises(TrainingError) as error:
        trainer.run()
    assert error.value.code == "training.stopped"
    assert error.value.details["step"] == stop_in
    assert "--resume" in str(error.value)
    return trainer


def recorded_ids(*trainers: RecordingTrainer) -> list[str]:
    return [name for trainer in trainers for step in trainer.recorded for name in step.ids]


# ---- resume ------------------------------------------------------------------------------------------------------


class FinishedRun(NamedTuple):
    """An uninterrupted run: its data, its folder and its trainer."""

    data: str
    folder: Path
    trainer: RecordingTrainer

    def config(self, folder: Path, **training: object) -> RunConfig:
        """Return the same configuration for another folder."""
        options = {"gradient_accumulation_steps": 2, **training}
        return number_config(self.data, folder, validate=True, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Twelve steps of two micro-batches with dropout, moving average and validation: the reference of other runs."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_numbers(folder)
    config = number_config(data, folder / "run", validate=True, gradient_accumulation_steps=2)
    return FinishedRun(data, folder / "run", run_to_end(config))


STOPS = sorted({6, *random.Random(7).sample(range(1, 12), 3)})  # a validation is due in step 6


@pytest.mark.parametrize("stop", STOPS)
def test_resumed_run_is_bit_equal_to_uninterrupted_run(whole, tmp_path, stop):
    config = whole.config(tmp_path / "run")
    first = run_until_stopped(config, stop)
    second = run_to_end(config, resume=True)
    assert first.recorded + second.recorded == whole.trainer.recorded
    assert state_bytes(tmp_path / "run") == state_bytes(whole.folder)
    assert len(state_bytes(whole.folder)) == 3
    assert metrics_lines(tmp_path / "run") == metrics_lines(whole.folder)
    assert os.readlink(tmp_path / "run" / "best") == os.readlink(whole.folder / "best")


def test_killed_run_resumes_from_its_last_state(whole, tmp_path):
    """Steps after the last state are trained again and reported once."""
    config = whole.config(tmp_path / "run")
    trainer = RecordingTrainer(config)
    trainer._step = failing_step(trainer, fail_in=7)  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # incomplete line
    resumed = run_to_end(config, resume=True)
    assert resumed.recorded == whole.trainer.recorded[6:]  # step 6 was the best so far and was saved
    assert state_bytes(tmp_path / "run") == state_bytes(whole.folder)
    assert metrics_lines(tmp_path / "run") == metrics_lines(whole.folder)


def failing_step(trainer: RecordingTrainer, fail_in: int) -> Callable[[Sequence[Batch]], StepResult]:
    step = trainer._step

    def failing(batches: Sequence[Batch]) -> StepResult:
        if trainer.progress.step + 1 == fail_in:
            raise ZeroDivisionError
        return step(batches)

    return failing


def test_seed_determines_the_run(whole, tmp_path):
    same = run_to_end(whole.config(tmp_path / "same"))
    assert same.recorded == whole.trainer.recorded
    assert state_bytes(tmp_path / "same") == state_bytes(whole.folder)
    other = run_to_end(whole.config(tmp_path / "other", seed=1, max_steps=2))
    assert other.recorded[0].loss != whole.trainer.recorded[0].loss
    assert other.recorded[0].ids != whole.trainer.recorded[0].ids


def test_every_epoch_has_every_sample_once(whole):
    stream = recorded_ids(whole.trainer)
    assert len(stream) == 96
    for epoch in range(len(stream) // COUNT):
        assert len(set(stream[epoch * COUNT : (epoch + 1) * COUNT])) == COUNT


def test_resume_with_another_batch_size_repeats_and_skips_no_sample(tmp_path):
    """The size of a step stays: half the batch, twice the accumulation."""
    data = write_numbers(tmp_path, count=20)
    first = run_to_end(number_config(data, tmp_path / "run", max_steps=3, per_device_batch_size=4))
    options = {"per_device_batch_size": 2, "gradient_accumulation_steps": 2}
    second = run_to_end(number_config(data, tmp_path / "run", max_steps=5, **options), resume=True)
    stream = recorded_ids(first, second)
    assert len(second.recorded) == 2
    assert len(stream) == 20
    assert len(set(stream)) == 20


def test_data_workers_do_not_change_the_run(tmp_path):
    data = write_numbers(tmp_path)
    runs = [run_to_end(number_config(data, tmp_path / f"w{n}", num_workers=n, max_steps=4)) for n in (0, 2)]
    assert runs[0].recorded == runs[1].recorded
    assert state_bytes(tmp_path / "w0") == state_bytes(tmp_path / "w2")


def scene_config(output_dir: Path, **training: object) -> RunConfig:
    """Return a run with a convolutional encoder with batch norms, and augmented images."""
    encoder = {"backbone": "resnet10t", "size": 32, "stage": 1}
    augmentation = {"min_crop_scale": 0.5, "horizontal_flip": True, "color_jitter": 0.3}
    options = {
        "mixed_precision": "no",
        "max_steps": 4,
        "per_device_batch_size": 3,
        "texts_per_image": 2,
        "warmup_steps": 1,
        "logging_steps": 1,
        "save_steps": 4,
        "ema_decay": 0.9,
        **training,
    }
    document = {
        "model": {
            "sources": {"image": {"encoder": "image", "options": encoder}},
            "decoder": {"hidden_size": 32, "num_layers": 1, "num_heads": 4},
            "vocab_size": 300,
        },
        "train": [{"path": "scenes", "num_examples": 10, "augmentation": augmentation}],
        "training": options,
        "output_dir": str(output_dir),
    }
    return RunConfig.model_validate(document)


def test_run_with_images_resumes_bit_equal(tmp_path):
    uninterrupted = run_to_end(scene_config(tmp_path / "whole"))
    first = run_until_stopped(scene_config(tmp_path / "resumed"), stop_in=2)
    second = run_to_end(scene_config(tmp_path / "resumed"), resume=True)
    assert first.recorded + second.recorded == uninterrupted.recorded
    assert state_bytes(tmp_path / "resumed") == state_bytes(tmp_path / "whole")


def test_frozen_groups_do_not_change(tmp_path):
    config = scene_config(tmp_path / "run", max_steps=2, param_groups={"sources.image.encoder": {"freeze": True}})
    trainer = RecordingTrainer(config)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.run()
    after = trainer.model.state_dict()
    frozen = [name for name in before if name.startswith("sources.image.encoder")]
    assert any("running_mean" in name for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["decoder.embedding.weight"], after["decoder.embedding.weight"])


# ---- the loss ----------------------------------------------------------------------------------------------------


def test_two_micro_batches_equal_one_batch(tmp_path):
    """Texts differ in length, so a mean of means would differ in the loss and in the gradient."""
    data = write_numbers(tmp_path)
    options = {"dropout": 0.0, "max_steps": 3, "ema_decay": 0.0, "learning_rate": 1e-5, "max_grad_norm": 1e9}
    split_config = number_config(
        data, tmp_path / "split", per_device_batch_size=4, gradient_accumulation_steps=2, **options
    )
    split = RecordingTrainer(split_config)
    joined = RecordingTrainer(number_config(data, tmp_path / "joined", per_device_batch_size=8, **options))
    split_gradients = record_gradients(split)
    joined_gradients = record_gradients(joined)
    start = {name: tensor.clone() for name, tensor in split.model.state_dict().items()}
    split.run()
    joined.run()
    for ours, theirs in zip(split.recorded, joined.recorded, strict=True):
        assert ours.ids == theirs.ids
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
    for ours, theirs in zip(split_gradients, joined_gradients, strict=True):
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-6
    one = raw_weights(tmp_path / "split")
    other = raw_weights(tmp_path / "joined")
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 2e-5
    name = "decoder.embedding.weight"  # biases of keys have only noise as gradient, which Adam would amplify
    assert float((one[name] - other[name]).abs().max()) < 1e-6


def record_gradients(trainer: RecordingTrainer) -> list[dict[str, torch.Tensor]]:
    """Return a list that is filled with the gradients of each step, at the time the loss is checked."""
    recorded: list[dict[str, torch.Tensor]] = []
    check = trainer._check_finite

    def recording(*args: object) -> None:
        gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
        recorded.append(gradients)
        check(*args)

    trainer._check_finite = recording  # type: ignore[method-assign]
    return recorded


@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path, accumulation):
    data = write_numbers(tmp_path, damaged=11)
    config = number_config(
        data,
        tmp_path / "run",
        per_device_batch_size=2,
        gradient_accumulation_steps=accumulation,
        save_steps=1,
    )
    trainer = RecordingTrainer(config)
    with pytest.raises(TrainingError) as error:
        trainer.run()
    done = len(trainer.recorded)
    assert error.value.code == "training.encoder_not_finite"
    assert error.value.details["step"] == done + 1
    assert error.value.details["sample"].startswith("[nan, ")
    assert (error.value.details["source"], error.value.details["stage"]) == ("numbers", "prepare")
    assert "learning_rate" not in str(error.value)
    assert trainer.progress.step == done > 0
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    assert int(latest_state(tmp_path / "run").name) == done
    saved = raw_weights(tmp_path / "run")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trainer.model.state_dict().items())
    assert RecordingTrainer(config, resume=True).progress.step == done


def test_loss_that_is_not_finite_in_the_first_step_names_no_state(tmp_path):
    data = write_numbers(tmp_path, count=2, damaged=0)
    with pytest.raises(TrainingError) as error:
        train(number_config(data, tmp_path / "run"), quiet=True)
    assert error.value.code == "training.encoder_not_finite"
    assert error.value.details["state"] is None


def test_loss_that_is_not_finite_with_finite_features_names_the_learning_rate(tmp_path):
    trainer = RecordingTrainer(number_config(write_numbers(tmp_path), tmp_path / "run"))
    loss = trainer.objective.loss
    trainer.objective.loss = lambda logits, batch: loss(logits, batch) * float("nan")  # type: ignore[method-assign]
    with pytest.raises(TrainingError) as error:
        trainer.run()
    assert error.value.code == "training.not_finite"
    assert error.value.details["samples"]
    assert "training.learning_rate" in str(error.value)


class InvalidForOneInput(ToyEncoder):
    """Is NaN for one finite input, the first number of the 12th sample."""

    def forward(self, batch):
        features = super().forward(batch)
        is_invalid = (batch["numbers"] - (4 / 7 + 0.011)).abs() < 1e-6
        return Features(features.states.masked_fill(is_invalid[..., None], float("nan")), features.mask)


class NormOverBatch(ToyEncoder):
    """In training, divides by the deviation over the batch, which is NaN for a batch of one."""

    def forward(self, batch):
        features = super().forward(batch)
        scale = features.states.mean(1, keepdim=True).std(0) if self.training else 1.0
        return Features(features.states / scale, features.mask)


class HugeFeatures(ToyEncoder):
    """Features that are finite, with keys that are not."""

    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states * 3e38, features.mask)


@pytest.mark.parametrize(
    ("encoder", "batch_size", "stage", "sample"),
    [
        (InvalidForOneInput, 4, "forward", "[0.5824"),
        (NormOverBatch, 1, "forward", None),
        (HugeFeatures, 4, "projection", None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_encoder_that_is_not_finite_is_named(tmp_path, encoder, batch_size, stage, sample):
    config = number_config(write_numbers(tmp_path), tmp_path / "run", per_device_batch_size=batch_size)
    document = config.model_dump(mode="json")
    source = {"encoder": f"{__name__}:{encoder.__name__}", "projection": {"norm": "none"}}
    document["model"]["sources"]["numbers"] = source
    trainer = RecordingTrainer(RunConfig.model_validate(document))
    with torch.no_grad():
        trainer.model.sources["numbers"].projection.key.weight.mul_(100)
    batches = []
    check = trainer._check_finite

    def recording(loss, norm, step_batches):
        batches.extend(step_batches)
        check(loss, norm, step_batches)

    trainer._check_finite = recording  # type: ignore[method-assign]
    with pytest.raises(TrainingError) as error:
        trainer.run()
    details = error.value.details
    assert error.value.code == "training.encoder_not_finite"
    assert (details["source"], details["encoder"], details["stage"]) == ("numbers", encoder.__name__, stage)
    assert details["sample"].startswith(sample or batches[-1].ids[0])
    assert details["sample"] in batches[-1].ids
    assert trainer.model.sources["numbers"].training


# ---- the run folder ----------------------------------------------------------------------------------------------


def test_files_of_a_run(whole):
    folder = whole.folder
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "metrics.jsonl", "steps", "last", "best"}
    assert os.readlink(folder / "last") == "steps/000012"
    provenance = load_provenance(folder / "last")
    assert (provenance["step"], provenance["data"]) == (12, [whole.data])
    lines = metrics_lines(folder)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert all(line.keys() == {"step", "loss", "learning_rate"} for line in lines if "loss" in line)
    losses = {line["step"]: line["some.loss"] for line in lines if "some.loss" in line}
    assert list(losses) == [6, 12]
    assert os.readlink(folder / "best") == f"steps/{min(losses, key=losses.get):06d}"
    assert not load_model(folder / "best").training


def test_best_state_is_kept_when_later_ones_are_worse(tmp_path):
    data = write_numbers(tmp_path)
    config = number_config(data, tmp_path / "run", validate=True, eval_steps=2, save_steps=2, save_total_limit=1)
    trainer = RecordingTrainer(config)
    values = iter([1.0, 3.0, 2.0, 0.0, 1.0, 2.5])
    trainer._evaluate = lambda examples: {"loss": 1.0, "score": next(values)}  # type: ignore[method-assign]
    trainer.options = trainer.options.model_copy(update={"metric_for_best_model": "some.score"})
    best = trainer.run()
    assert best == tmp_path / "run" / "best"
    assert os.readlink(best) == "steps/000004"
    assert sorted(path.name for path in (tmp_path / "run" / "steps").iterdir()) == ["000004", "000012"]


def test_resume_must_fit_the_run_folder(whole, tmp_path):
    before = state_bytes(whole.folder)
    with pytest.raises(TrainingError) as error:
        train(number_config(whole.data, whole.folder), quiet=True)
    assert error.value.code == "training.run_exists"
    with pytest.raises(TrainingError) as error:
        train(number_config(whole.data, tmp_path / "new"), resume=True, quiet=True)
    assert error.value.code == "training.nothing_to_resume"
    assert not (tmp_path / "new").exists()
    assert state_bytes(whole.folder) == before


def test_resuming_a_finished_run_ends_at_once(whole):
    trainer = RecordingTrainer(whole.config(whole.folder), resume=True)
    assert trainer.run() == whole.folder / "best"
    assert trainer.recorded == []


def test_run_without_a_saved_state_starts_from_the_beginning(tmp_path):
    data = write_numbers(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 9}\n')
    run_to_end(number_config(data, folder, max_steps=2))
    assert [line["step"] for line in metrics_lines(folder)] == [1, 2]


def test_unknown_metric_for_the_best_model_is_refused(tmp_path):
    data = write_numbers(tmp_path)
    with pytest.raises(ConfigError) as error:
        RecordingTrainer(number_config(data, tmp_path, validate=True, metric_for_best_model="sme.CIDEr"))
    assert error.value.code == "training.best_metric"
    assert error.value.details["known"] == ["loss", "some"]
    config = number_config(data, tmp_path, validate=True, metric_for_best_model="some.CIDER", eval_steps=1)
    with pytest.raises(TrainingError) as error:
        RecordingTrainer(config).run()
    assert error.value.code == "training.best_metric"
    assert "some.CIDEr" in error.value.details["known"]


def test_full_disk_keeps_the_previous_state(tmp_path, monkeypatch):
    data = write_numbers(tmp_path)
    config = number_config(data, tmp_path / "run", save_steps=2)
    trainer = RecordingTrainer(config)
    real_fsync = os.fsync

    def full_disk(handle: int) -> None:
        if trainer.progress.step >= 4:
            raise OSError(28, "No space left on device")
        real_fsync(handle)

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(CheckpointError) as error:
        trainer.run()
    assert error.value.code == "checkpoint.write"
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert RecordingTrainer(config, resume=True).progress.step == 2
    assert [path.name for path in (tmp_path / "run" / "steps").iterdir()] == ["000002"]


def test_metrics_that_cannot_be_written_are_an_error(tmp_path):
    data = write_numbers(tmp_path)
    trainer = RecordingTrainer(number_config(data, tmp_path / "run"))
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(TrainingError) as error:
        trainer.run()
    assert error.value.code == "training.write"
    assert error.value.details["path"] == str(tmp_path / "run" / "metrics.jsonl")


# ---- SIGTERM -----------------------------------------------------------------------------------------------------


def test_sigterm_saves_a_complete_state(tmp_path):
    data = write_numbers(tmp_path)
    config = number_config(data, tmp_path / "run", max_steps=10_000, save_steps=10_000)
    trainer = RecordingTrainer(config)
    previous_handler = signal.getsignal(signal.SIGTERM)
    step = trainer._step

    def signalling(batches: Sequence[Batch]) -> StepResult:
        if trainer.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batches)

    trainer._step = signalling  # type: ignore[method-assign]
    started = time.monotonic()
    with pytest.raises(TrainingError) as error:
        trainer.run()
    assert error.value.code == "training.stopped"
    assert time.monotonic() - started < 30
    assert signal.getsignal(signal.SIGTERM) == previous_handler
    assert latest_state(tmp_path / "run").name == "000004"
    load_model(tmp_path / "run" / "last")
    assert RecordingTrainer(config, resume=True).progress.step == 4


def test_sigterm_during_validation_leaves_it_pending(whole, tmp_path):
    config = whole.config(tmp_path / "run")
    trainer = RecordingTrainer(config)
    evaluate = trainer._evaluate

    def interrupted(examples: Sequence[Example]) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(examples)

    trainer._evaluate = interrupted  # type: ignore[method-assign]
    with pytest.raises(TrainingError) as error:
        trainer.run()
    assert error.value.details["step"] == 6
    resumed = run_to_end(config, resume=True)
    assert trainer.recorded + resumed.recorded == whole.trainer.recorded
    assert metrics_lines(tmp_path / "run") == metrics_lines(whole.folder)
    assert state_bytes(tmp_path / "run") == state_bytes(whole.folder)


def test_training_runs_outside_the_main_thread(tmp_path):
    config = number_config(write_numbers(tmp_path), tmp_path / "run", max_steps=2)
    finished: list[Path] = []
    thread = threading.Thread(target=lambda: finished.append(train(config, quiet=True)))
    thread.start()
    thread.join(120)
    assert finished == [tmp_path / "run" / "last"]


# ---- skipped examples --------------------------------------------------------------------------------------------


def write_questions(folder: Path, unanswered: int, count: int = 40) -> str:
    """Write numbers with a question each; the first few have no answer to learn."""
    rows = []
    for i in range(count):
        row = {"numbers": [i / 10], "question": f"what is {i}?"}
        if i >= unanswered:
            row["answer"] = str(i)
        rows.append(row)
    random.Random(1).shuffle(rows)
    path = folder / f"questions-{unanswered}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sparse_config(data: str, output_dir: Path, max_steps: int, **training: object) -> RunConfig:
    """Return a run that saves and reports at its end only."""
    return number_config(
        data, output_dir, max_steps=max_steps, logging_steps=max_steps, save_steps=max_steps, **training
    )


def test_skipped_examples_are_counted_named_and_remembered(tmp_path):
    data = write_questions(tmp_path, unanswered=4)
    trainer = run_to_end(sparse_config(data, tmp_path / "run", 20))
    assert len(trainer.progress.skipped) == 4
    assert all(message.startswith(data) for message in trainer.progress.skipped)
    assert load_provenance(tmp_path / "run" / "last")["skipped examples"] == 4
    resumed = RecordingTrainer(number_config(data, tmp_path / "run", max_steps=24), resume=True)
    assert resumed.progress.skipped == trainer.progress.skipped


def test_too_many_skipped_examples_stop_the_run(tmp_path):
    data = write_questions(tmp_path, unanswered=12)
    with pytest.raises(TrainingError) as error:
        train(sparse_config(data, tmp_path / "refused", 60), quiet=True)
    assert error.value.code == "training.too_many_skipped"
    assert error.value.details["skipped"] > error.value.details["limit"] == 4  # a tenth of 40
    assert error.value.details["first"].startswith(f"{data}:")
    tolerant = run_to_end(sparse_config(data, tmp_path / "tolerant", 20, max_skip_fraction=0.5))
    assert len(tolerant.progress.skipped) == 12


def write_captions(folder: Path, captions: list[str]) -> str:
    rows = [{"numbers": [i / 10], "captions": [caption]} for i, caption in enumerate(captions)]
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_cut_targets_are_counted_reported_and_remembered(tmp_path, capsys):
    data = write_captions(tmp_path, ["a", "b", "c", "qwertyuiopasdfghjkl"])
    config = number_config(data, tmp_path / "run", max_steps=4, texts_per_image=1, max_target_length=9)
    trainer = Trainer(config, resume=False, quiet=False)
    trainer.run()
    progress = trainer.progress
    assert (progress.texts_seen, progress.cut_texts, progress.first_cut) == (16, 4, f"{data}:4")
    err = capsys.readouterr().err
    assert err.count(f"{data}:4") == 2, "when it is first seen, and at the end"
    assert "4 of 16 target texts (25.00%)" in err
    shares = [line.get("cut targets", 0) for line in metrics_lines(tmp_path / "run") if "loss" in line]
    assert len(shares) == 4
    assert shares[-1] == 0.25
    assert load_provenance(tmp_path / "run" / "last")["cut targets"] == 4
    assert RecordingTrainer(config, resume=True).progress.cut_texts == 4


def test_texts_that_fit_report_no_cut(tmp_path, capsys):
    data = write_captions(tmp_path, ["a", "b"])
    Trainer(number_config(data, tmp_path / "run", max_steps=2), resume=False, quiet=False).run()
    assert "cut" not in capsys.readouterr().err


def test_cut_references_of_a_validation_are_reported(tmp_path, capsys):
    data = write_captions(tmp_path, ["a", "".join(chr(0x4E00 + i) for i in range(300))])
    config = number_config(data, tmp_path / "run", max_steps=1)
    config = config.model_copy(update={"validation": {"held_out": DataConfig(path=data)}})
    Trainer(config, resume=False, quiet=False).run()
    assert "validation: 1 of 2 target texts" in capsys.readouterr().err
    validations = [line for line in metrics_lines(tmp_path / "run") if "held_out.loss" in line]
    assert [line["held_out.cut targets"] for line in validations] == [1]


@pytest.mark.parametrize("options", [{}, {"lowercase": True, "nfkc": True}])
def test_a_new_model_says_its_texts_as_written_unless_configured(tmp_path, options):
    texts = ["Zoë ½", "U.S.A.", "..."]
    config = number_config(write_captions(tmp_path, texts), tmp_path / "run", max_steps=1)
    model = config.model.model_copy(update={"tokenizer": TokenizerConfig(**options)})
    trainer = Trainer(config.model_copy(update={"model": model}), resume=False, quiet=True)
    tokenizer = trainer.model.tokenizer
    expected = ["zoë 1⁄2", "u.s.a.", "..."] if options else texts
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == expected
    trainer.lock.release()


def validated_config(folder: Path, count: int, unreadable: int, **training: object) -> RunConfig:
    """Return a run that is validated on numbers of which the last ones are no lists."""
    data = write_numbers(folder)
    lines = Path(write_numbers(folder, count=count, name="held_out.jsonl")).read_text().splitlines()
    for i in range(count - unreadable, count):
        lines[i] = json.dumps({"numbers": f"no list {i}", "captions": ["one", "two"]})
    held_out = folder / "held_out.jsonl"
    held_out.write_text("\n".join(lines) + "\n")
    options = {"max_steps": 4, "eval_steps": 2, "save_steps": 4, **training}
    document = number_config(data, folder / "run", **options).model_dump(mode="json")
    document["validation"] = {"some": {"path": str(held_out)}}
    return RunConfig.model_validate(document)


def test_skipped_validation_examples_are_counted_and_named(tmp_path, capsys):
    config = validated_config(tmp_path, 20, 2)
    assert train(config) == tmp_path / "run" / "best"
    printed = capsys.readouterr().err
    assert [printed.count(f"held_out.jsonl:{line}") for line in (18, 19, 20)] == [0, 1, 1]
    assert load_provenance(tmp_path / "run" / "last")["skipped validation examples"] == 2
    assert [line["some.skipped"] for line in metrics_lines(tmp_path / "run") if "some.loss" in line] == [2, 2]


@pytest.mark.parametrize(("count", "unreadable"), [(20, 3), (7, 7)])
def test_unreadable_validation_stops_training_and_can_be_resumed(tmp_path, count, unreadable):
    config = validated_config(tmp_path, count, unreadable)
    with pytest.raises(TrainingError) as error:
        train(config, quiet=True)
    assert error.value.code == "training.validation_unreadable"
    details = error.value.details
    assert (details["skipped"], details["examples"]) == (unreadable, count)
    assert f"held_out.jsonl:{count - unreadable + 1}" in str(error.value)
    assert latest_state(tmp_path / "run").name == "000002"
    write_numbers(tmp_path, count=count, name="held_out.jsonl")
    resumed = run_to_end(config, resume=True)
    assert [step.step for step in resumed.recorded] == [3, 4]
    assert [line["step"] for line in metrics_lines(tmp_path / "run") if "some.loss" in line] == [2, 4]


def test_validation_may_have_the_configured_fraction_of_unreadable_examples(tmp_path):
    run = run_to_end(validated_config(tmp_path, 7, 3, max_skip_fraction=0.5))
    assert run.progress.best is not None
    assert len(run.progress.validation_skipped) == 3


@pytest.mark.parametrize(
    ("metrics", "code"),
    [
        ({"loss": float("nan")}, "training.metric_not_finite"),
        ({"loss": float("inf")}, "training.metric_not_finite"),
        ({"loss": 1.0, "CIDEr": float("nan")}, "training.metric_not_finite"),
        ({"captions": 0.0}, "training.best_metric"),
    ],
)
def test_metric_that_is_missing_or_not_finite_is_an_error(tmp_path, metrics, code):
    config = number_config(write_numbers(tmp_path), tmp_path / "run", validate=True, max_steps=4, eval_steps=2)
    trainer = RecordingTrainer(config)
    trainer._evaluate = lambda examples: metrics  # type: ignore[method-assign]
    with pytest.raises(TrainingError) as error:
        trainer.run()
    assert error.value.code == code
    assert trainer.progress.step == 2
    assert trainer.progress.best is None
    assert not any("some.loss" in line for line in metrics_lines(tmp_path / "run"))


def test_data_without_any_text_is_an_error(tmp_path):
    data = write_questions(tmp_path, unanswered=40)
    with pytest.raises(DataError) as error:
        train(number_config(data, tmp_path / "run"), quiet=True)
    assert error.value.code == "data.too_many_unreadable"
    assert error.value.details["last"].startswith(f"{data}:")
