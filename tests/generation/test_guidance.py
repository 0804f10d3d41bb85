"""Guided decoding against its slow twin: two full passes at every step, combined by hand."""

import math

import pytest
import torch
from generation_cases import chain, loud_model, numbers, prompts, remember
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mmx.config.schema import GenerationConfig
from mmx.generation import DecoderStep, generate, stream
from mmx.generation.decode_step import UncachedStep
from mmx.generation.guidance import GuidedStep, apply_guidance

EOS = 80
WAYS = [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "seed": 5}]


class Twin(UncachedStep):
    """Reads both texts again at every step; the formula stands here a second time, as probabilities."""

    def __init__(self, decoder, memory, scale):
        super().__init__(decoder, memory)
        self.scale = scale

    def _logits(self):
        seeing, nothing = (
            super()._logits(),
            UncachedStep(self.decoder, self.decoder.empty_memory(self.memory.batch_size)),
        )
        nothing.tokens, nothing.mask = self.tokens, self.mask
        p, q = seeing.double().softmax(-1), nothing._logits().double().softmax(-1)
        return (q * (p / q) ** self.scale).log().float()


@pytest.fixture(scope="module")
def model():
    return loud_model()


def asked():
    generator = torch.Generator().manual_seed(4)
    lengths = [[2, 5], [1, 3], [6, 2], [4, 4], [3, 1]]
    return prompts([[torch.randint(6, 262, (n,), generator=generator).tolist() for n in row] for row in lengths])


def memory_of(model, empty=False):
    return model.decoder.empty_memory(5) if empty else remember(model, numbers(5))


def guided_step(model, scale):
    seeing, blind = (DecoderStep(model.decoder, memory_of(model, empty), 8) for empty in (False, True))
    return GuidedStep(seeing, blind, scale)


def texts(step, **options):
    with torch.no_grad():
        made = generate(step, *asked(), GenerationConfig(max_new_tokens=8, **options), EOS)
    return [text for row in made for found in row for text in found]


@pytest.mark.parametrize("way", WAYS, ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_tokens_and_scores_are_those_of_two_full_passes_combined(model, scale, way):
    fast, slow = texts(guided_step(model, scale), **way), texts(Twin(model.decoder, memory_of(model), scale), **way)
    assert [t.tokens for t in fast] == [t.tokens for t in slow]
    for a, b in zip(fast, slow, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    plain = texts(DecoderStep(model.decoder, memory_of(model), 8), **way)
    assert [t.tokens for t in fast] != [t.tokens for t in plain], "guidance must matter, or equality says nothing"


@pytest.mark.parametrize("way", WAYS, ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_scale_0_says_what_is_said_blindly_and_1_what_is_said_seeing(model, scale, way):
    step = DecoderStep(model.decoder, memory_of(model, empty=scale == 0.0), 8)
    found, expected = texts(guided_step(model, scale), **way), texts(step, **way)
    assert [t.tokens for t in found] == [t.tokens for t in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_it_streams_what_it_generates(model):
    options = GenerationConfig(max_new_tokens=8)
    with torch.no_grad():
        rows = list(stream(guided_step(model, 1.5), *asked(), options, EOS))
    for text, said in zip(texts(guided_step(model, 1.5)), zip(*rows, strict=True), strict=True):
        assert list(said[: len(text.tokens)]) == list(text.tokens)


def test_both_steps_are_regrouped_alike():
    seeing, blind, twin = chain(5, memories=3, seed=0), chain(5, memories=3, seed=1), chain(5, memories=3, seed=0)
    step = GuidedStep(seeing, blind, 1.0)
    batch = prompts([[[1, 2], [3, 4]], [[0, 1], [2, 2]], [[4, 4], [1, 1]]])
    for one in (step, twin):
        one.prefill(*batch)
        one.reorder(torch.tensor([1, 1, 2, 3, 5, 4]))
        one.select(torch.tensor([2, 0]))
    token = torch.tensor([0, 1, 2, 3])
    assert torch.allclose(step(token), twin(token).log_softmax(-1), atol=1e-5)
    for fact in ("memory", "before", "last"):
        assert torch.equal(getattr(seeing, fact), getattr(blind, fact))


SCORES = st.lists(st.floats(-8, 8), min_size=4, max_size=4)


@settings(max_examples=50, deadline=None)
@given(SCORES, SCORES, st.floats(0, 5), st.floats(-9, 9))
def test_the_formula_is_a_product_of_powers_and_forgets_what_logits_share(sees, guesses, scale, shift):
    logits = torch.tensor(sees), torch.tensor(guesses)
    found = apply_guidance(*logits, scale).softmax(-1)
    p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (sees, guesses))
    weights = [b * (a / b) ** scale for a, b in zip(p, q, strict=True)]
    assert found.tolist() == pytest.approx([w / sum(weights) for w in weights], abs=1e-4)
    assert torch.allclose(apply_guidance(logits[0] + shift, logits[1] - shift, scale).softmax(-1), found, atol=1e-4)
    assert torch.equal(apply_guidance(*logits, 0.0), logits[1].log_softmax(-1))


@pytest.mark.parametrize("scale", [-0.1, math.inf, math.nan])
def test_a_scale_that_means_nothing_is_refused(scale):
    with pytest.raises(ValidationError, match="guidance_scale"):
        GenerationConfig(guidance_scale=scale)
