"""Self-critical training: what the model says itself, weighed against its fellows, in the place of people's texts."""

import json
from pathlib import Path

import pytest
import torch
from toy_runs import Watched, critical_config, number_config, reports, state_bytes, write_numbers

from mmx.config.schema import RunConfig
from mmx.data.batching import IGNORE_INDEX, Batch
from mmx.errors import ConfigError, TrainingError
from mmx.evaluation.metrics.captions import Cider
from mmx.training.loop import Trainer
from mmx.training.scst import END, tokens_with_end


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    config = critical_config(write_numbers(tmp_path), tmp_path / "run", batch_size=12)
    return Trainer(config, resume=False, quiet=True)


@pytest.fixture
def batches(trainer: Trainer) -> tuple[Batch, Batch]:
    """A batch before and after the model spoke."""
    (before,) = next(trainer._groups())
    assert trainer.critic is not None
    return before, trainer.critic.sample_batch(before, seed=5)


def texts_of(trainer: Trainer, batch: Batch) -> list[list[tuple[str, list[int]]]]:
    """Each text of each row: its words, and the labels that are learned from it."""
    targets = torch.full_like(batch.tokens, IGNORE_INDEX)
    for place, label in zip(batch.label_positions.tolist(), batch.labels.tolist(), strict=True):
        if label != IGNORE_INDEX:
            targets.view(-1)[place] = label
    decode = trainer.model.tokenizer.decode
    return [
        [(decode(t[m].tolist()), w[w != IGNORE_INDEX].tolist()) for t, m, w in zip(*row, strict=True)]
        for row in zip(batch.tokens, batch.mask, targets, strict=True)
    ]


def test_rows_by_reward_hold_what_was_said_and_the_others_what_people_said(trainer, batches):
    before, after = batches
    rewarded = [bool(references) for references in before.references]
    assert set(rewarded) == {True, False}
    for row, (old, new) in enumerate(zip(texts_of(trainer, before), texts_of(trainer, after), strict=True)):
        assert after.advantages is not None
        if not rewarded[row]:
            assert new == old
            assert after.advantages[row].isnan().all()
            continue
        assert not after.advantages[row].isnan().any()
        assert float(after.advantages[row].sum()) == pytest.approx(0, abs=1e-5)  # each beside the mean of the others
        for words, labels in new:  # what stands in the input is what is learned, but for a last word or the end
            assert trainer.model.tokenizer.decode(labels[:-1]) == words
            assert 1 <= len(labels) <= 4  # generation.max_new_tokens


def test_advantages_are_ciders_of_the_texts(trainer, batches):
    before, after = batches
    assert any(before.references)
    corpus = Cider([tokens_with_end(e.turns[0].targets) for e in trainer.data.sets[0][1]])
    for row, references in enumerate(before.references):
        if references:
            rewards = []
            for _, labels in texts_of(trainer, after)[row]:
                finished = labels[-1] == trainer.model.tokenizer.eos_token_id
                said = trainer.model.tokenizer.decode(labels[: -1 if finished else None])
                tokens = tokens_with_end([said])[0]
                rewards.append(corpus.score(tokens if finished else tokens[:-1], tokens_with_end(references)))
            others = [(sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]
            expected = [reward - other for reward, other in zip(rewards, others, strict=True)]
            assert after.advantages[row].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_same_seed_says_the_same_and_dropout_stays_as_it_was(trainer, batches):
    before, after = batches
    trainer.model.train()
    again = trainer.critic.sample_batch(before, seed=5)
    assert trainer.model.training
    assert all(module.training for module in trainer.model.modules())
    assert torch.equal(again.tokens, after.tokens)
    assert not torch.equal(trainer.critic.sample_batch(before, seed=6).tokens, after.tokens)


def test_a_batch_without_rewards_is_left_alone(trainer, batches):
    before, _ = batches
    plain = Batch(**{**vars(before), "references": [() for _ in before.references]})
    assert trainer.critic.sample_batch(plain, seed=5) is plain


def test_the_end_is_a_word_of_its_own():
    assert tokens_with_end(["A dog runs ."]) == [["a", "dog", "runs", END]]


def rewards_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: float) -> list[float]:
    """The rewards of a run that has the captions by reward alone, begun from a few steps of them word by word."""
    data = write_numbers(tmp_path, count=12)
    facts = {
        "learning_rate": 0.01,
        "per_device_batch_size": 12,
        "ema_decay": 0.0,
        "logging_steps": 10,
        "modality_dropout": 0.0,
        "weight_decay": 0.0,
    }
    start = number_config(data, tmp_path / "start", dropout=0.0, steps=8, **facts)
    best = Trainer(start, resume=False, quiet=True).run()
    document = critical_config(data, tmp_path / "run", **facts | {"max_steps": 60, "learning_rate": 0.003}).model_dump(
        mode="json"
    )
    document |= {"model": None, "init": str(best), "train": [{"path": data, "reward": "cider"}]}
    trainer = Trainer(RunConfig.model_validate(document), resume=False, quiet=True)
    rewards = trainer.critic._rewards
    monkeypatch.setattr(trainer.critic, "_rewards", lambda *given: [sign * reward for reward in rewards(*given)])
    trainer.run()
    return [sign * line["reward"] for line in reports(tmp_path / "run") if "reward" in line]


def test_reward_rises_where_it_alone_is_trained(tmp_path, monkeypatch):
    rewards = rewards_of(tmp_path, monkeypatch, sign=1.0)
    print(rewards)
    assert len(rewards) == 6
    assert rewards[-1] > 1.5 * max(rewards[0], 0.05)


def test_reward_falls_where_its_sign_is_turned(tmp_path, monkeypatch):
    rewards = rewards_of(tmp_path, monkeypatch, sign=-1.0)
    print(rewards)
    assert rewards[-1] < rewards[0]


def test_a_caption_fits_into_the_positions(tmp_path):
    document = critical_config(write_numbers(tmp_path), tmp_path / "run", batch_size=12).model_dump(mode="json")
    document["model"]["decoder"]["max_position_embeddings"] = 16
    document["generation"]["max_new_tokens"] = 40
    trainer = Trainer(RunConfig.model_validate(document), resume=False, quiet=True)
    (batch,) = next(trainer._groups())
    assert trainer.critic.sample_batch(batch, seed=1).mask.sum(-1).max() == 16


def test_the_first_word_after_a_mark_of_one_token_is_learned(trainer, batches):
    """Place 0 of the batch, which the filling of `wanted` points at as well."""
    before, _ = batches
    filled = Batch(**{**vars(before), "wanted": torch.tensor([0, 1, 0]), "labels": torch.tensor([7, 8, IGNORE_INDEX])})
    filled.references = [(), *[("number 1",)] * (len(filled.ids) - 1)]
    after = trainer.critic.sample_batch(filled, seed=5)
    assert after.labels[after.wanted == 0].tolist()[0] == 7


def test_resumed_is_uninterrupted_to_the_bit(tmp_path):
    data, facts = write_numbers(tmp_path), {"max_steps": 4, "save_steps": 2, "logging_steps": 3}
    Watched(critical_config(data, tmp_path / "whole", **facts)).run()
    stopped = Watched(critical_config(data, tmp_path / "run", **facts))
    stopped.stop_in = 2
    with pytest.raises(TrainingError, match="asked to stop"):
        stopped.run()
    Watched(critical_config(data, tmp_path / "run", **facts), resume=True).run()
    assert state_bytes(tmp_path / "run") == state_bytes(tmp_path / "whole")
    assert reports(tmp_path / "run") == reports(tmp_path / "whole")


def test_one_caption_has_none_to_be_compared_with(tmp_path):
    config = critical_config(write_numbers(tmp_path), tmp_path / "run", streams=1)
    with pytest.raises(ConfigError, match=r"reward compares captions .* training.texts_per_image is 1; set it to 5"):
        Trainer(config, resume=False, quiet=True)


def test_where_questions_go_to_an_encoder_captions_are_said_of_the_picture_alone(tmp_path):
    """Beside rows that are asked something, what is said of the others is what would be said of them alone."""
    document = critical_config(write_numbers(tmp_path), tmp_path / "run", batch_size=12).model_dump(mode="json")
    document["model"]["sources"]["text"] = {
        "encoder": "text",
        "options": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
    }
    document["model"]["question_input"] = "text"
    rows = [{"numbers": [n / 9], "question": f"what is {n}?", "answer": "it"} for n in range(9)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document["train"][1] = {"path": str(tmp_path / "asked.jsonl")}
    trainer = Trainer(RunConfig.model_validate(document), resume=False, quiet=True)
    (batch,) = next(trainer._groups())
    rewarded = [row for row, references in enumerate(batch.references) if references]
    assert "text" in batch.sources and 0 < len(rewarded) < len(batch.ids)
    unasked = {name: source for name, source in batch.sources.items() if name != "text"}
    alone = trainer.critic._sample(Batch(**{**vars(batch), "sources": unasked}), rewarded, seed=5)
    assert trainer.critic._sample(batch, rewarded, seed=5) == alone
    assert trainer._step([batch])[0] > 0
