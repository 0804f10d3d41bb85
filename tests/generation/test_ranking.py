"""Ranking: one pass over all candidates gives the log-probabilities of each alone, token by token."""

import pytest
import torch
from generation_cases import encode_inputs, pad_prompts, random_inputs, varied_model
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.generation import CachedDecodeStep, score_texts
from mmx.models.batching import pad_texts

MODEL = varied_model()
EOS = MODEL.tokenizer.eos_token_id
token_ids = st.integers(6, 261)


def score_token_by_token(memory, prompt, candidate):
    """Sum of the log-probabilities from one decoding step per token."""
    step = CachedDecodeStep(MODEL.decoder, memory, len(candidate) + 1)
    logits = step.prefill(*pad_prompts([[prompt]]))
    total = 0.0
    for token in [*candidate, EOS]:
        total += logits.log_softmax(-1)[0, token].item()
        logits = step(torch.tensor([token]))
    return total


def score_in_one_pass(memory, rows):
    texts = [[(prompt, [*candidate, EOS]) for prompt, candidate in row] for row in rows]
    with torch.no_grad():
        return score_texts(MODEL.decoder, memory, *pad_texts(texts, len(rows[0]), 0))


@settings(max_examples=15, deadline=None)
@given(
    prompt=st.lists(token_ids, min_size=1, max_size=5),
    candidates=st.lists(st.lists(token_ids, max_size=6), min_size=1, max_size=5),
)
def test_one_pass_equals_token_by_token(prompt, candidates):
    memory = encode_inputs(MODEL, [[0.3, -1.0, 2.0]])
    scores = score_in_one_pass(memory, [[(prompt, candidate) for candidate in candidates]])
    assert scores.shape == (1, len(candidates))
    with torch.no_grad():
        expected = [score_token_by_token(memory, prompt, candidate) for candidate in candidates]
    assert scores[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_several_memories_and_prompts():
    inputs = random_inputs(3)
    memory = encode_inputs(MODEL, inputs)
    rows = []
    for b in range(3):
        rows.append([([7 + b] * (1 + k), [20 + b + k] * (4 - k)) for k in range(4)])
    scores = score_in_one_pass(memory, rows)
    for b, row in enumerate(rows):
        with torch.no_grad():
            alone = encode_inputs(MODEL, [inputs[b]])
            expected = [score_token_by_token(alone, prompt, candidate) for prompt, candidate in row]
        assert scores[b].tolist() == pytest.approx(expected, abs=1e-4)


def test_negative_targets_do_not_count():
    memory = encode_inputs(MODEL, [[1.0]])
    tokens, mask = pad_prompts([[[7, 8, 9]]])
    with torch.no_grad():
        logprobs = MODEL.decoder(tokens, memory, mask).log_softmax(-1)[0, 0]
        one = score_texts(MODEL.decoder, memory, tokens, mask, torch.tensor([[[-100, 30, -1]]]))
        none = score_texts(MODEL.decoder, memory, tokens, mask, torch.full((1, 1, 3), -100))
    assert one.item() == pytest.approx(logprobs[1, 30].item(), abs=1e-6)
    assert none.item() == 0.0
