"""The training loop in one process: resumed to the bit, stopped in time, and never wrong in silence."""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import COUNT, Watched, number_config, reports, state_bytes, write_numbers

from mmx.config.schema import RunConfig
from mmx.errors import CheckpointError, ConfigError, DataError, TrainingError
from mmx.models.checkpoint import load_model, load_provenance
from mmx.training.loop import train
from mmx.training.state import latest_state


def weights(out: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(out / name / "training" / "model.safetensors")


def watched(config: RunConfig, resume: bool = False, stop_in: int | None = None) -> Watched:
    """A whole run; with `stop_in`, one that is asked to stop in that step and does."""
    trainer = Watched(config, resume)
    trainer.stop_in = stop_in
    if stop_in is None:
        trainer.run()
        return trainer
    with pytest.raises(TrainingError, match=f"asked to stop .* after step {stop_in};.*--resume"):
        trainer.run()
    return trainer


# ---- resuming ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Watched]:
    """Twelve uninterrupted steps of two micro-batches, with dropout, average, validation: what all else must equal."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_numbers(folder)
    return data, folder / "run", watched(number_config(data, folder / "run", validate=True, accumulation=2))


STOPS = sorted({6, *random.Random(7).sample(range(1, 12), 3)})  # 6: where a validation is due


@pytest.mark.parametrize("stop", STOPS)
def test_resumed_is_uninterrupted_to_the_bit(whole, tmp_path, stop):
    data, expected, uninterrupted = whole
    config = number_config(data, tmp_path / "run", validate=True, accumulation=2)
    first = watched(config, stop_in=stop)
    second = watched(config, resume=True)
    assert first.taken + second.taken == uninterrupted.taken
    assert state_bytes(tmp_path / "run") == state_bytes(expected)
    assert len(state_bytes(expected)) == 3
    assert reports(tmp_path / "run") == reports(expected)
    assert os.readlink(tmp_path / "run" / "best") == os.readlink(expected / "best")


def test_a_run_cut_off_without_warning_goes_on_from_its_last_save(whole, tmp_path):
    """Steps 5 and 6 are taken twice and reported once."""
    data, expected, uninterrupted = whole
    config = number_config(data, tmp_path / "run", validate=True, accumulation=2)
    trainer = Watched(config)
    trainer._step = dying(trainer, at=7)  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # torn
    again = watched(config, resume=True)
    assert again.taken == uninterrupted.taken[6:]  # step 6 was the best so far, and so was saved
    assert state_bytes(tmp_path / "run") == state_bytes(expected)
    assert reports(tmp_path / "run") == reports(expected)


def dying(trainer: Watched, at: int) -> Any:
    step = trainer._step

    def stepping(batches: Any) -> Any:
        if trainer.progress.step + 1 == at:
            raise ZeroDivisionError
        return step(batches)

    return stepping


def test_the_same_seed_trains_the_same_and_another_does_not(whole, tmp_path):
    data, expected, uninterrupted = whole
    again = watched(number_config(data, tmp_path / "a", validate=True, accumulation=2))
    assert again.taken == uninterrupted.taken
    assert state_bytes(tmp_path / "a") == state_bytes(expected)
    other = watched(number_config(data, tmp_path / "b", accumulation=2, seed=1, steps=2))
    assert other.taken[0][1] != uninterrupted.taken[0][1]
    assert other.taken[0][3] != uninterrupted.taken[0][3]


def test_every_epoch_sees_every_sample_once_across_a_resume(whole):
    _, _, uninterrupted = whole
    stream = [name for _, _, _, ids in uninterrupted.taken for name in ids]
    assert len(stream) == 96
    for epoch in range(len(stream) // COUNT):
        assert len(set(stream[epoch * COUNT : (epoch + 1) * COUNT])) == COUNT


def test_a_run_resumed_with_another_batch_size_repeats_and_skips_nothing(tmp_path):
    data = write_numbers(tmp_path)
    first = watched(number_config(data, tmp_path / "run", steps=3, batch_size=5))
    second = watched(number_config(data, tmp_path / "run", steps=7, batch_size=2), resume=True)
    stream = [name for run in (first, second) for _, _, _, ids in run.taken for name in ids]
    assert len(stream) == COUNT
    assert len(set(stream)) == COUNT


def test_workers_change_nothing(tmp_path):
    data = write_numbers(tmp_path)
    runs = [watched(number_config(data, tmp_path / f"w{n}", workers=n, steps=5)) for n in (0, 2)]
    assert runs[0].taken == runs[1].taken
    assert state_bytes(tmp_path / "w0") == state_bytes(tmp_path / "w2")


def scene_config(out: Path, **training: Any) -> RunConfig:
    """A convolutional encoder with batch norms, and augmented pictures."""
    options = {"backbone": "resnet10t", "size": 32, "stage": 1}
    facts = {
        "max_steps": 4,
        "per_device_batch_size": 3,
        "texts_per_image": 2,
        "warmup_steps": 1,
        "logging_steps": 1,
        "save_steps": 4,
        "ema_decay": 0.9,
    }
    augment = {"min_crop_scale": 0.5, "horizontal_flip": True, "color_jitter": 0.3}
    model = {
        "sources": {"image": {"encoder": "image", "options": options}},
        "decoder": {"hidden_size": 32, "num_layers": 1, "num_heads": 4},
        "vocab_size": 300,
    }
    data = {"path": "scenes", "num_examples": 10, "augmentation": augment}
    return RunConfig.model_validate(
        {"model": model, "train": [data], "training": facts | training, "output_dir": str(out)}
    )


def test_pictures_resume_to_the_bit_too(tmp_path):
    uninterrupted = watched(scene_config(tmp_path / "whole"))
    first = watched(scene_config(tmp_path / "param_groups"), stop_in=2)
    second = watched(scene_config(tmp_path / "param_groups"), resume=True)
    assert first.taken + second.taken == uninterrupted.taken
    assert state_bytes(tmp_path / "param_groups") == state_bytes(tmp_path / "whole")


def test_frozen_parts_stand_still(tmp_path):
    config = scene_config(tmp_path / "run", parts={"sources.image.encoder": {"freeze": True}})
    trainer = Watched(config)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.run()
    after = trainer.model.state_dict()
    frozen = [name for name in before if name.startswith("sources.image.encoder")]
    assert any("running_mean" in name for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["decoder.embedding.weight"], after["decoder.embedding.weight"])


# ---- the loss ----------------------------------------------------------------------------------------------------


def test_two_micro_batches_are_one_batch_of_both(tmp_path):
    """Texts differ in length, so a mean of means would show, in the loss and in the gradient."""
    data = write_numbers(tmp_path)
    facts = {"dropout": 0.0, "max_steps": 3, "ema_decay": 0.0, "learning_rate": 1e-5, "max_grad_norm": 1e9}
    apart = Watched(number_config(data, tmp_path / "apart", batch_size=4, accumulation=2, **facts))
    joined = Watched(number_config(data, tmp_path / "joined", batch_size=8, **facts))
    gradients = [noting_gradients(trainer) for trainer in (apart, joined)]
    start = {name: tensor.clone() for name, tensor in apart.model.state_dict().items()}
    apart.run()
    joined.run()
    for mine, theirs in zip(apart.taken, joined.taken, strict=True):
        assert mine[3] == theirs[3]
        assert mine[1] == pytest.approx(theirs[1], abs=1e-6)
    for mine, theirs in zip(*gradients, strict=True):
        assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-6
    one, other = weights(tmp_path / "apart"), weights(tmp_path / "joined")
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 2e-5
    table = "decoder.embedding.weight"  # biases of keys have no gradient but noise, which Adam would show
    assert float((one[table] - other[table]).abs().max()) < 1e-6


def noting_gradients(trainer: Watched) -> list[dict[str, torch.Tensor]]:
    """The gradients of each step, as they are when the loss is checked."""
    noted: list[dict[str, torch.Tensor]] = []
    check = trainer._stop_unless_finite

    def noting(*facts: Any) -> None:
        noted.append({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})
        check(*facts)

    trainer._stop_unless_finite = noting  # type: ignore[method-assign]
    return noted


@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path, accumulation):
    data = write_numbers(tmp_path, bad=11)
    config = number_config(data, tmp_path / "run", batch_size=2, accumulation=accumulation, save_every=1)
    trainer = Watched(config)
    with pytest.raises(TrainingError, match=r"not finite at step \d+ \(samples .*lower training.learning_rate"):
        trainer.run()
    done = len(trainer.taken)
    assert trainer.progress.step == done
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    if done:
        assert int(latest_state(tmp_path / "run").name) == done
        saved = weights(tmp_path / "run")
        assert all(torch.equal(tensor, saved[name]) for name, tensor in trainer.model.state_dict().items())
        again = Watched(config, resume=True)
        assert again.progress.step == done


def test_a_loss_not_finite_at_once_does_not_speak_of_a_saved_state(tmp_path):
    data = write_numbers(tmp_path, count=2, bad=0)
    with pytest.raises(TrainingError, match="nothing was saved yet"):
        train(number_config(data, tmp_path / "run"), quiet=True)


# ---- the run folder ----------------------------------------------------------------------------------------------


def test_what_a_run_leaves(whole):
    data, out, _ = whole
    assert {path.name for path in out.iterdir()} == {"config.yaml", "metrics.jsonl", "steps", "last", "best"}
    assert os.readlink(out / "last") == "steps/000012"
    provenance = load_provenance(out / "last")
    assert (provenance["step"], provenance["data"]) == (12, [data])
    assert [line["step"] for line in reports(out) if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in reports(out) if "some.loss" in line] == [6, 12]
    losses = {line["step"]: line["some.loss"] for line in reports(out) if "some.loss" in line}
    assert os.readlink(out / "best") == f"steps/{min(losses, key=losses.get):06d}"
    assert not load_model(out / "best").training


def test_the_best_is_kept_though_later_ones_are_worse(tmp_path):
    data = write_numbers(tmp_path)
    config = number_config(data, tmp_path / "run", validate=True, validate_every=2, save_every=2, keep=1)
    trainer = Watched(config)
    values = iter([1.0, 3.0, 2.0, 0.0, 1.0, 2.5])
    trainer._evaluate = lambda examples: {"loss": 1.0, "score": next(values)}  # type: ignore[method-assign]
    trainer.options = trainer.options.model_copy(update={"metric_for_best_model": "some.score"})
    best = trainer.run()
    assert best == tmp_path / "run" / "best"
    assert os.readlink(best) == "steps/000004"
    assert sorted(path.name for path in (tmp_path / "run" / "steps").iterdir()) == ["000004", "000012"]


def test_an_existing_run_is_refused_without_resume_and_nothing_with_it(whole, tmp_path):
    data, out, _ = whole
    before = state_bytes(out)
    with pytest.raises(TrainingError, match="holds a run already; add --resume"):
        train(number_config(data, out), quiet=True)
    with pytest.raises(TrainingError, match="nothing to resume in .*leave --resume out"):
        train(number_config(data, tmp_path / "new"), resume=True, quiet=True)
    assert not (tmp_path / "new").exists()
    assert state_bytes(out) == before


def test_a_finished_run_resumes_to_its_end_at_once(whole):
    data, out, _ = whole
    trainer = Watched(number_config(data, out, validate=True, accumulation=2), resume=True)
    assert trainer.run() == out / "best"
    assert trainer.taken == []


def test_a_run_that_saved_nothing_starts_clean(tmp_path):
    data, out = write_numbers(tmp_path), tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 9}\n')
    watched(number_config(data, out, steps=2))
    assert [line["step"] for line in reports(out)] == [1, 2]


def test_a_monitor_that_cannot_be_is_refused_at_once(tmp_path):
    data = write_numbers(tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'some'"):
        Watched(number_config(data, tmp_path / "run", validate=True, monitor="sme.CIDEr"))
    trainer = Watched(number_config(data, tmp_path / "run", validate=True, monitor="some.CIDER"))
    with pytest.raises(TrainingError, match="expected 'loss' or one of .*some.CIDEr"):
        trainer.run()


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    data = write_numbers(tmp_path)
    config = number_config(data, tmp_path / "run", save_every=2)
    trainer = Watched(config)
    real = os.fsync

    def full(handle: int) -> None:
        if trainer.progress.step >= 4:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr("mmx.models.checkpoint.os.fsync", full)
    with pytest.raises(CheckpointError, match="no space is left on the disk; what stood there is untouched"):
        trainer.run()
    monkeypatch.undo()
    assert Watched(config, resume=True).progress.step == 2
    assert [path.name for path in (tmp_path / "run" / "steps").iterdir()] == ["000002"]


def test_a_report_that_cannot_be_written_is_one_sentence(tmp_path):
    data = write_numbers(tmp_path)
    trainer = Watched(number_config(data, tmp_path / "run"))
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(TrainingError, match=r"metrics.jsonl cannot be written: Is a directory"):
        trainer.run()


# ---- SIGTERM -----------------------------------------------------------------------------------------------------


def test_sigterm_saves_a_complete_state_and_says_so(tmp_path):
    data = write_numbers(tmp_path)
    config = number_config(data, tmp_path / "run", steps=10_000, save_every=10_000)
    trainer, before = Watched(config), signal.getsignal(signal.SIGTERM)
    step = trainer._step

    def signalled(batches: Any) -> Any:
        if trainer.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batches)

    trainer._step = signalled  # type: ignore[method-assign]
    started = time.monotonic()
    with pytest.raises(TrainingError, match="asked to stop"):
        trainer.run()
    assert time.monotonic() - started < 30
    assert signal.getsignal(signal.SIGTERM) == before
    assert latest_state(tmp_path / "run").name == "000004"
    load_model(tmp_path / "run" / "last")
    assert Watched(config, resume=True).progress.step == 4


def test_sigterm_inside_a_validation_leaves_it_for_later(whole, tmp_path):
    data, expected, uninterrupted = whole
    config = number_config(data, tmp_path / "run", validate=True, accumulation=2)
    trainer = Watched(config)
    evaluate = trainer._evaluate

    def interrupted(examples: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(examples)

    trainer._evaluate = interrupted  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="after step 6"):
        trainer.run()
    again = watched(config, resume=True)
    assert trainer.taken + again.taken == uninterrupted.taken
    assert reports(tmp_path / "run") == reports(expected)
    assert state_bytes(tmp_path / "run") == state_bytes(expected)


def test_training_runs_outside_the_main_thread(tmp_path):
    data, done = write_numbers(tmp_path), []
    config = number_config(data, tmp_path / "run", steps=2)
    thread = threading.Thread(target=lambda: done.append(train(config, quiet=True)))
    thread.start()
    thread.join(120)
    assert done == [tmp_path / "run" / "last"]


# ---- bad samples -------------------------------------------------------------------------------------------------


def write_questions(folder: Path, unanswered: int, count: int = 40) -> str:
    """Numbers with a question each; the first few have no answer to learn."""
    rows = [
        {"numbers": [i / 10], "question": f"what is {i}?"} | ({} if i < unanswered else {"answer": str(i)})
        for i in range(count)
    ]
    random.Random(1).shuffle(rows)
    path = folder / f"questions-{unanswered}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_bad_samples_are_counted_named_and_remembered(tmp_path):
    data = write_questions(tmp_path, unanswered=4)
    config = number_config(data, tmp_path / "run", steps=20, log_every=20, save_every=20)
    trainer = watched(config)
    assert len(trainer.progress.skipped) == 4
    assert all(
        sentence.startswith(data) and "has nothing to learn" in sentence for sentence in trainer.progress.skipped
    )
    assert load_provenance(tmp_path / "run" / "last")["bad samples"] == 4
    again = Watched(number_config(data, tmp_path / "run", steps=24), resume=True)
    assert again.progress.skipped == trainer.progress.skipped


def test_too_many_bad_samples_stop_the_run_with_a_name(tmp_path):
    data = write_questions(tmp_path, unanswered=12)
    with pytest.raises(
        TrainingError, match=r"1[12] samples cannot be read, more than training.max_skip_fraction 0.001"
    ) as caught:
        train(number_config(data, tmp_path / "a", steps=60, log_every=60, save_every=60), quiet=True)
    assert f"the first: {data}:" in str(caught.value)
    config = number_config(data, tmp_path / "b", steps=20, bad_limit=0.5, log_every=20, save_every=20)
    assert len(watched(config).progress.skipped) == 12


def test_nothing_to_learn_at_all_is_said_at_once(tmp_path):
    data = write_questions(tmp_path, unanswered=40)
    with pytest.raises(DataError, match="10 examples in a row cannot be read; the last: .* has nothing to learn"):
        train(number_config(data, tmp_path / "run"), quiet=True)
