"""Ranking: all candidates in one pass give the log-probabilities of each read alone, one token at a time."""

import pytest
import torch
from generation_cases import loud_model, numbers, prompts, remember
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.data.batching import pad_texts
from mmx.generation import DecoderStep, score_texts

MODEL = loud_model()
EOS = MODEL.tokenizer.eos
WORDS = st.lists(st.integers(6, 261), min_size=0, max_size=6)


def token_by_token(memory, prompt, candidate):
    """The sum that generation would have made of these tokens: a step for each."""
    step = DecoderStep(MODEL.decoder, memory, len(candidate) + 1)
    logits, total = step.prefill(*prompts([[prompt]])), 0.0
    for token in [*candidate, EOS]:
        total += logits.log_softmax(-1)[0, token].item()
        logits = step(torch.tensor([token]))
    return total


def ranked(memory, rows):
    tokens, mask, targets = pad_texts([[(p, [*c, EOS]) for p, c in row] for row in rows], len(rows[0]), 0)
    with torch.no_grad():
        return score_texts(MODEL.decoder, memory, tokens, mask, targets)


@settings(max_examples=15, deadline=None)
@given(prompt=st.lists(st.integers(6, 261), min_size=1, max_size=5), candidates=st.lists(WORDS, min_size=1, max_size=5))
def test_one_pass_equals_one_candidate_and_one_token_at_a_time(prompt, candidates):
    memory = remember(MODEL, [[0.3, -1.0, 2.0]])
    found = ranked(memory, [[(prompt, candidate) for candidate in candidates]])
    assert found.shape == (1, len(candidates))
    with torch.no_grad():
        expected = [token_by_token(memory, prompt, candidate) for candidate in candidates]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_several_memories_and_prompts_at_once():
    raw = numbers(3)
    memory = remember(MODEL, raw)
    rows = [[([7 + b] * (1 + k), [20 + b + k] * (4 - k)) for k in range(4)] for b in range(3)]
    found = ranked(memory, rows)
    for b, row in enumerate(rows):
        with torch.no_grad():
            alone = remember(MODEL, [raw[b]])
            assert found[b].tolist() == pytest.approx([token_by_token(alone, p, c) for p, c in row], abs=1e-4)


def test_only_the_wanted_targets_count():
    memory = remember(MODEL, [[1.0]])
    tokens, mask = prompts([[[7, 8, 9]]])
    with torch.no_grad():
        logprobs = MODEL.decoder(tokens, memory, mask).log_softmax(-1)[0, 0]
        found = score_texts(MODEL.decoder, memory, tokens, mask, torch.tensor([[[-100, 30, -1]]]))
        nothing = score_texts(MODEL.decoder, memory, tokens, mask, torch.full((1, 1, 3), -100))
    assert found.item() == pytest.approx(logprobs[1, 30].item(), abs=1e-6)
    assert nothing.item() == 0.0
