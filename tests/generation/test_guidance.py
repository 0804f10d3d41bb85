"""Classifier-free guidance against a slow reference: two full passes at every step, combined as probabilities."""

import math

import pytest
import torch
from generation_cases import encode_inputs, pad_prompts, random_inputs, random_table_step, varied_model
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mmx.config.schema import GenerationConfig
from mmx.generation import CachedDecodeStep, generate, stream
from mmx.generation.decode_step import UncachedDecodeStep
from mmx.generation.guidance import GuidedDecodeStep, apply_guidance

EOS = 80
METHODS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "seed": 5},
}
every_method = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)


class ReferenceGuidedStep(UncachedDecodeStep):
    """Processes the texts twice at every step, and combines the probabilities."""

    def __init__(self, decoder, memory, scale):
        super().__init__(decoder, memory)
        self.scale = scale

    def _logits(self):
        blind = UncachedDecodeStep(self.decoder, self.decoder.empty_memory(self.memory.batch_size))
        blind.tokens = self.tokens
        blind.mask = self.mask
        p = super()._logits().double().softmax(-1)
        q = blind._logits().double().softmax(-1)
        return (q * (p / q) ** self.scale).log().float()


@pytest.fixture(scope="module")
def model():
    return varied_model()


def random_prompts():
    generator = torch.Generator().manual_seed(4)
    rows = []
    for lengths in [[2, 5], [1, 3], [6, 2], [4, 4], [3, 1]]:
        rows.append([torch.randint(6, 262, (length,), generator=generator).tolist() for length in lengths])
    return pad_prompts(rows)


def memory_of(model, empty=False):
    return model.decoder.empty_memory(5) if empty else encode_inputs(model, random_inputs(5))


def guided_step(model, scale):
    conditional = CachedDecodeStep(model.decoder, memory_of(model), 8)
    unconditional = CachedDecodeStep(model.decoder, memory_of(model, empty=True), 8)
    return GuidedDecodeStep(conditional, unconditional, scale)


def generate_texts(step, **options):
    with torch.no_grad():
        rows = generate(step, random_prompts(), GenerationConfig(max_new_tokens=8, **options), EOS)
    return [text for row in rows for texts in row for text in texts]


def assert_same_texts(found, expected):
    assert [text.tokens for text in found] == [text.tokens for text in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@every_method
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_guidance_equals_two_full_passes(model, scale, options):
    fast = generate_texts(guided_step(model, scale), **options)
    slow = generate_texts(ReferenceGuidedStep(model.decoder, memory_of(model), scale), **options)
    assert_same_texts(fast, slow)
    plain = generate_texts(CachedDecodeStep(model.decoder, memory_of(model), 8), **options)
    assert [text.tokens for text in fast] != [text.tokens for text in plain], "guidance changed nothing"


@every_method
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_scale_0_ignores_the_memory_and_scale_1_is_unguided(model, scale, options):
    step = CachedDecodeStep(model.decoder, memory_of(model, empty=scale == 0.0), 8)
    assert_same_texts(generate_texts(guided_step(model, scale), **options), generate_texts(step, **options))


def test_streaming_yields_the_generated_tokens(model):
    with torch.no_grad():
        rows = list(stream(guided_step(model, 1.5), random_prompts(), GenerationConfig(max_new_tokens=8), EOS))
    for text, tokens in zip(generate_texts(guided_step(model, 1.5)), zip(*rows, strict=True), strict=True):
        assert tokens[: len(text.tokens)] == text.tokens


def test_both_steps_are_reordered():
    conditional = random_table_step(5, memories=3, seed=0)
    unconditional = random_table_step(5, memories=3, seed=1)
    reference = random_table_step(5, memories=3, seed=0)
    guided = GuidedDecodeStep(conditional, unconditional, 1.0)
    batch = pad_prompts([[[1, 2], [3, 4]], [[0, 1], [2, 2]], [[4, 4], [1, 1]]])
    for step in (guided, reference):
        step.prefill(*batch)
        step.reorder(torch.tensor([1, 1, 2, 3, 5, 4]))
        step.select(torch.tensor([2, 0]))
    tokens = torch.tensor([0, 1, 2, 3])
    assert torch.allclose(guided(tokens), reference(tokens).log_softmax(-1), atol=1e-5)
    for name in ("memory", "previous", "last"):
        assert torch.equal(getattr(conditional, name), getattr(unconditional, name))


logit_rows = st.lists(st.floats(-8, 8), min_size=4, max_size=4)


@settings(max_examples=50, deadline=None)
@given(logit_rows, logit_rows, st.floats(0, 5), st.floats(-9, 9))
def test_guidance_formula(conditional, unconditional, scale, shift):
    """A product of powers, invariant to a constant added to the logits."""
    p = torch.tensor(conditional).double().softmax(-1)
    q = torch.tensor(unconditional).double().softmax(-1)
    weights = q * (p / q) ** scale
    guided = apply_guidance(torch.tensor(conditional), torch.tensor(unconditional), scale).softmax(-1)
    assert guided.tolist() == pytest.approx((weights / weights.sum()).tolist(), abs=1e-4)
    shifted = apply_guidance(torch.tensor(conditional) + shift, torch.tensor(unconditional) - shift, scale)
    assert torch.allclose(shifted.softmax(-1), guided, atol=1e-4)
    unguided = apply_guidance(torch.tensor(conditional), torch.tensor(unconditional), 0.0)
    assert torch.equal(unguided, torch.tensor(unconditional).log_softmax(-1))


@pytest.mark.parametrize("scale", [-0.1, math.inf, math.nan])
def test_invalid_scales_are_refused(scale):
    with pytest.raises(ValidationError) as error:
        GenerationConfig(guidance_scale=scale)
    assert error.value.errors()[0]["loc"] == ("guidance_scale",)
