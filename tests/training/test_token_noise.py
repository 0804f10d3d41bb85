"""Token noise replaces target tokens in the decoder inputs only, with its probability."""

import pytest
import torch
from toy_runs import RecordingTrainer, number_config, state_bytes, write_numbers

from mmx.data.batching import Batch
from mmx.errors import TrainingError
from mmx.models.batching import pad_texts, select_label_positions
from mmx.testing import toy_tokenizer
from mmx.training.token_noise import noisy_tokens, plain_tokens

TEXTS = [[([1, 2], [5, 6, 9]), ([3], [7, 8, 7, 9])], [([4], [7, 9])]]
# True at inputs that are target tokens; the last token of a target is no input.
IS_TARGET = [[[0, 0, 1, 1], [0, 1, 1, 1]], [[0, 1, 0, 0], [0, 0, 0, 0]]]


def make_batch() -> Batch:
    padded = pad_texts(TEXTS, 2, 0)
    selected = select_label_positions(padded.targets, 16)
    return Batch(
        ids=["a", "b"],
        sources={},
        tokens=padded.tokens,
        mask=padded.mask,
        label_positions=selected.positions,
        labels=selected.labels,
        boxes=None,
        skipped=[],
        num_texts=0,
        cut=[],
        references=[(), ()],
    )


def add_noise(probability: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return noisy_tokens(make_batch(), probability, torch.tensor([100, 101]), generator)


def test_prompts_and_padding_are_never_replaced():
    tokens = add_noise(0.999999)
    expected = torch.tensor(IS_TARGET, dtype=torch.bool)
    assert torch.equal(tokens >= 100, expected)
    assert torch.equal(tokens[~expected], make_batch().tokens[~expected])


def test_tokens_are_replaced_with_the_given_probability():
    replaced = sum(int((add_noise(0.25, seed) >= 100).sum()) for seed in range(300))
    assert 0.2 < replaced / (300 * 6) < 0.3
    assert torch.equal(add_noise(0.25, seed=4), add_noise(0.25, seed=4))


def test_special_tokens_are_no_candidates():
    tokenizer = toy_tokenizer()
    candidates = plain_tokens(tokenizer).tolist()
    assert tokenizer.pad_token_id not in candidates
    assert tokenizer.eos_token_id not in candidates
    assert len(candidates) == 256
    assert tokenizer.encode(" a")[0] in candidates


def test_run_with_noise_resumes_bit_equal(tmp_path):
    data = write_numbers(tmp_path)
    options = {"max_steps": 6, "target_noise": 0.5, "gradient_accumulation_steps": 2}
    whole = RecordingTrainer(number_config(data, tmp_path / "whole", **options))
    whole.run()
    config = number_config(data, tmp_path / "resumed", **options)
    first = RecordingTrainer(config)
    first.stop_in = 3
    with pytest.raises(TrainingError):
        first.run()
    second = RecordingTrainer(config, resume=True)
    second.run()
    assert first.recorded + second.recorded == whole.recorded
    assert state_bytes(tmp_path / "resumed") == state_bytes(tmp_path / "whole")
    clean = RecordingTrainer(number_config(data, tmp_path / "clean", max_steps=1, gradient_accumulation_steps=2))
    clean.run()
    assert clean.recorded[0].ids == whole.recorded[0].ids
    assert clean.recorded[0].loss != whole.recorded[0].loss
