"""Self-critical sequence training: sampled captions with their advantages replace the references."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from toy_runs import RecordingTrainer, metrics_lines, number_config, scst_config, state_bytes, write_numbers

from mmx.config.schema import RunConfig
from mmx.data.batching import Batch
from mmx.errors import ConfigError, MmxError, TrainingError
from mmx.evaluation.metrics.captions import Cider
from mmx.models.batching import IGNORE_INDEX
from mmx.training.loop import Trainer
from mmx.training.scst import END, tokens_with_end


class LabeledText(NamedTuple):
    """One text of a batch: the decoded inputs, and the labels that are learned from it."""

    text: str
    labels: list[int]


def build_trainer(config: RunConfig) -> Trainer:
    return Trainer(config, resume=False, quiet=True)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("scst")
    return build_trainer(scst_config(write_numbers(folder), folder / "run", per_device_batch_size=12))


@pytest.fixture(scope="module")
def before(trainer: Trainer) -> Batch:
    """A batch with its references."""
    (batch,) = next(trainer._steps())
    return batch


@pytest.fixture(scope="module")
def after(trainer: Trainer, before: Batch) -> Batch:
    """The same batch with sampled captions."""
    assert trainer.objective.scst is not None
    return trainer.objective.scst.sample_batch(before, seed=5)


def labeled_texts(trainer: Trainer, batch: Batch) -> list[list[LabeledText]]:
    """Return each text of each row."""
    targets = torch.full_like(batch.tokens, IGNORE_INDEX)
    for position, label in zip(batch.label_positions.tolist(), batch.labels.tolist(), strict=True):
        if label != IGNORE_INDEX:
            targets.view(-1)[position] = label
    rows = []
    for row in zip(batch.tokens, batch.mask, targets, strict=True):
        texts = []
        for tokens, mask, labels in zip(*row, strict=True):
            text = trainer.model.tokenizer.decode(tokens[mask].tolist())
            texts.append(LabeledText(text, labels[labels != IGNORE_INDEX].tolist()))
        rows.append(texts)
    return rows


def test_rewarded_rows_hold_sampled_captions_and_others_their_references(trainer, before, after):
    has_reward = [bool(references) for references in before.references]
    assert set(has_reward) == {True, False}
    assert after.advantages is not None
    old_texts = labeled_texts(trainer, before)
    new_texts = labeled_texts(trainer, after)
    for row, (old, new) in enumerate(zip(old_texts, new_texts, strict=True)):
        if not has_reward[row]:
            assert new == old
            assert after.advantages[row].isnan().all()
            continue
        assert not after.advantages[row].isnan().any()
        assert float(after.advantages[row].sum()) == pytest.approx(0, abs=1e-5)  # each minus the mean of the others
        for text, labels in new:  # the labels are the inputs, and the last token or the end
            assert trainer.model.tokenizer.decode(labels[:-1]) == text
            assert 1 <= len(labels) <= 4  # generation.max_new_tokens


def test_advantages_are_cider_minus_the_mean_of_the_other_captions(trainer, before, after):
    assert any(before.references)
    cider = Cider([tokens_with_end(example.tasks[0].targets) for example in trainer.data.sets[0][1]])
    tokenizer = trainer.model.tokenizer
    new_texts = labeled_texts(trainer, after)
    for row, references in enumerate(before.references):
        if not references:
            continue
        rewards = []
        for _, labels in new_texts[row]:
            is_finished = labels[-1] == tokenizer.eos_token_id
            words = tokens_with_end([tokenizer.decode(labels[:-1] if is_finished else labels)])[0]
            rewards.append(cider.score(words if is_finished else words[:-1], tokens_with_end(references)))
        means_of_others = [(sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]
        expected = [reward - mean for reward, mean in zip(rewards, means_of_others, strict=True)]
        assert after.advantages[row].tolist() == pytest.approx(expected, abs=1e-5)


def test_seed_determines_the_samples_and_training_mode_is_restored(trainer, before, after):
    trainer.model.train()
    same = trainer.objective.scst.sample_batch(before, seed=5)
    assert all(module.training for module in trainer.model.modules())
    assert torch.equal(same.tokens, after.tokens)
    assert not torch.equal(trainer.objective.scst.sample_batch(before, seed=6).tokens, after.tokens)


def test_batch_without_rewards_is_unchanged(trainer, before):
    batch = replace(before, references=[() for _ in before.references])
    assert trainer.objective.scst.sample_batch(batch, seed=5) is batch


def test_end_is_a_word_of_its_own():
    assert tokens_with_end(["A dog runs ."]) == [["a", "dog", "runs", END]]


def test_sampled_captions_fit_into_the_positions(tmp_path):
    document = scst_config(write_numbers(tmp_path), tmp_path / "run", per_device_batch_size=12).model_dump(mode="json")
    document["model"]["decoder"]["max_position_embeddings"] = 16
    document["generation"]["max_new_tokens"] = 40
    trainer = build_trainer(RunConfig.model_validate(document))
    (batch,) = next(trainer._steps())
    assert trainer.objective.scst.sample_batch(batch, seed=1).mask.sum(-1).max() == 16


def test_label_at_position_zero_is_kept(trainer, before):
    """Position 0 is also where the padding of `label_positions` points to."""
    references = [(), *[("number 1",)] * (len(before.ids) - 1)]
    positions = torch.tensor([0, 1, 0])
    labels = torch.tensor([7, 8, IGNORE_INDEX])
    batch = replace(before, label_positions=positions, labels=labels, references=references)
    after = trainer.objective.scst.sample_batch(batch, seed=5)
    assert after.labels[after.label_positions == 0].tolist()[0] == 7


def test_one_text_per_image_is_refused(tmp_path):
    config = scst_config(write_numbers(tmp_path), tmp_path / "run", texts_per_image=1)
    with pytest.raises(ConfigError) as error:
        build_trainer(config)
    assert error.value.code == "training.texts_per_image"


def test_captions_are_sampled_without_the_questions_of_other_rows(tmp_path):
    """If a text source reads the questions, sampled captions are those of a batch without questions."""
    document = scst_config(write_numbers(tmp_path), tmp_path / "run", per_device_batch_size=12).model_dump(mode="json")
    encoder = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    document["model"]["sources"]["text"] = {"encoder": "text", "options": encoder}
    document["model"]["question_input"] = "text"
    rows = [{"numbers": [n / 9], "question": f"what is {n}?", "answer": "it"} for n in range(9)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document["train"][1] = {"path": str(tmp_path / "questions.jsonl")}
    trainer = build_trainer(RunConfig.model_validate(document))
    (batch,) = next(trainer._steps())
    rewarded = [row for row, references in enumerate(batch.references) if references]
    assert "text" in batch.sources
    assert 0 < len(rewarded) < len(batch.ids)
    sources = {name: source for name, source in batch.sources.items() if name != "text"}
    expected = trainer.objective.scst._sample(replace(batch, sources=sources), rewarded, seed=5)
    assert trainer.objective.scst._sample(batch, rewarded, seed=5) == expected
    assert trainer._step([batch]).loss > 0


# ---- whole runs --------------------------------------------------------------------------------------------------

OPTIONS = {
    "learning_rate": 0.01,
    "per_device_batch_size": 12,
    "ema_decay": 0.0,
    "logging_steps": 8,
    "save_steps": 100,
    "modality_dropout": 0.0,
    "weight_decay": 0.0,
}


class PretrainedRun(NamedTuple):
    """Data and a model that was trained on it by cross-entropy for a few steps."""

    data: str
    checkpoint: Path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> PretrainedRun:
    folder = tmp_path_factory.mktemp("pretrained")
    data = write_numbers(folder, count=12)
    config = number_config(data, folder / "run", dropout=0.0, max_steps=8, **OPTIONS)
    return PretrainedRun(data, build_trainer(config).run())


def reported_rewards(
    pretrained: PretrainedRun, folder: Path, monkeypatch: pytest.MonkeyPatch, sign: float
) -> list[float]:
    """Return the rewards of a run that is trained by reward alone, times `sign`."""
    options = {**OPTIONS, "max_steps": 40, "learning_rate": 0.003}
    document = scst_config(pretrained.data, folder, **options).model_dump(mode="json")
    rewarded = {"path": pretrained.data, "reward": "cider"}
    document |= {"model": None, "init": str(pretrained.checkpoint), "train": [rewarded]}
    trainer = build_trainer(RunConfig.model_validate(document))
    score = trainer.objective.scst._score

    def signed_score(*args: Sequence[object]) -> list[float]:
        return [sign * reward for reward in score(*args)]

    monkeypatch.setattr(trainer.objective.scst, "_score", signed_score)
    trainer.run()
    return [sign * line["reward"] for line in metrics_lines(folder) if "reward" in line]


def test_reward_rises_when_it_is_trained(pretrained, tmp_path, monkeypatch):
    rewards = reported_rewards(pretrained, tmp_path / "run", monkeypatch, sign=1.0)
    print(rewards)
    assert len(rewards) == 5
    assert rewards[-1] > 1.5 * max(rewards[0], 0.05)


def test_reward_falls_when_its_sign_is_reversed(pretrained, tmp_path, monkeypatch):
    rewards = reported_rewards(pretrained, tmp_path / "run", monkeypatch, sign=-1.0)
    print(rewards)
    assert rewards[-1] < rewards[0]


def test_resumed_run_is_bit_equal_to_uninterrupted_run(tmp_path):
    data = write_numbers(tmp_path)
    options = {"max_steps": 4, "save_steps": 2, "logging_steps": 3}
    RecordingTrainer(scst_config(data, tmp_path / "whole", **options)).run()
    stopped = RecordingTrainer(scst_config(data, tmp_path / "run", **options))
    stopped.stop_in = 2
    with pytest.raises(TrainingError):
        stopped.run()
    RecordingTrainer(scst_config(data, tmp_path / "run", **options), resume=True).run()
    assert state_bytes(tmp_path / "run") == state_bytes(tmp_path / "whole")
    assert metrics_lines(tmp_path / "run") == metrics_lines(tmp_path / "whole")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_encoder_that_is_not_finite_is_named_before_the_weights_change(tmp_path, accumulation):
    data = write_numbers(tmp_path, damaged=11)
    options = {"per_device_batch_size": 2, "save_steps": 1, "gradient_accumulation_steps": accumulation}
    trainer = RecordingTrainer(scst_config(data, tmp_path / "run", **options))
    with pytest.raises(TrainingError) as error:
        trainer.run()
    details = error.value.details
    assert (error.value.code, details["step"]) == ("training.encoder_not_finite", len(trainer.recorded) + 1)
    assert (details["source"], details["stage"]) == ("numbers", "prepare")
    assert details["sample"].startswith("[nan, ")


def test_logits_of_sampling_that_are_not_finite_name_the_learning_rate(tmp_path):
    trainer = RecordingTrainer(scst_config(write_numbers(tmp_path), tmp_path / "run"))
    with torch.no_grad():
        next(trainer.model.decoder.parameters()).fill_(float("inf"))
    with pytest.raises(TrainingError) as error:
        trainer.run()
    assert (error.value.code, error.value.details["step"]) == ("training.not_finite", 1)


def test_other_errors_of_sampling_are_not_changed(tmp_path, monkeypatch):
    trainer = RecordingTrainer(scst_config(write_numbers(tmp_path), tmp_path / "run"))
    problem = MmxError("a problem.", code="encoder.features")

    def failing(*args: object) -> Batch:
        raise problem

    monkeypatch.setattr(trainer.objective.scst, "sample_batch", failing)
    with pytest.raises(MmxError) as error:
        trainer.run()
    assert error.value is problem
