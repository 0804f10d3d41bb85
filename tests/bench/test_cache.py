"""Costs of decoding with and without caches: the same tokens with each method, and the exact number of bytes."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from mmx.bench.cache import METHODS, RecomputingDecodeStep, cache, decoding_costs, features_of
from mmx.bench.hf_references import BenchSetting, build_pair
from mmx.encoders.pretrained.hf_models import suppress_hf_output
from mmx.errors import MmxError
from mmx.generation.decode_step import CachedDecodeStep, UncachedDecodeStep
from mmx.testing.toys import tiny_model

NUMBERS = [0.1, 2.0, -1.0, 0.4, 1.0]


@pytest.fixture(scope="module")
def model():
    """Large weights, so that every token depends on the text and on the memory."""
    model = tiny_model(num_layers=2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5.0 if weight.ndim > 1 else 1.0)
    return model


@pytest.fixture(scope="module")
def features(model):
    return features_of(model, "numbers", model.collate("numbers", [NUMBERS]).inputs)


def test_features_are_the_input_of_the_projection(model, features):
    batch = model.collate("numbers", [NUMBERS])
    with torch.no_grad():
        assert torch.equal(features.states, model.encoder("numbers")(batch.inputs).states)
        projected = model.sources["numbers"].projection(features)
        assert torch.equal(projected.keys, model.encode({"numbers": batch}, 1).keys)


def test_bytes_by_hand(model, features):
    """Two layers of size 32 in float32: one position has 2 * 2 * 32 * 4 = 512 bytes of keys and values."""
    position = 512
    memory = 5 * position
    states = 5 * 8 * 4
    costs = {(cost.method, cost.length): cost for cost in decoding_costs(model, "numbers", features, (1, 7), repeats=1)}
    assert list(costs) == [(method, length) for length in (1, 7) for method in METHODS]
    for length in (1, 7):
        cached = costs["cached", length]
        assert (cached.cached_bytes, cached.computed_bytes) == (length * position + memory, position)
        uncached = costs["uncached", length]
        average = sum(range(1, length + 1)) * position // length
        assert (uncached.cached_bytes, uncached.computed_bytes) == (memory, average)
        recomputed = costs["recomputed", length]
        expected = (length * position + states, position + memory)
        assert (recomputed.cached_bytes, recomputed.computed_bytes) == expected
    assert all(cost.same and cost.milliseconds > 0 for cost in costs.values())
    with pytest.raises(FrozenInstanceError):
        cached.cached_bytes = 0


@torch.no_grad()
def test_recomputing_gives_the_logits_of_a_static_memory(model, features):
    memory = model.sources["numbers"].projection(features)
    calls = []

    def project():
        calls.append(1)
        return memory

    prompt = torch.tensor([[[3, 7, 9]]])
    steps = [
        CachedDecodeStep(model.decoder, memory, 4, fast=False),
        UncachedDecodeStep(model.decoder, memory),
        RecomputingDecodeStep(model.decoder, project, 1, 4),
    ]
    logits = []
    for step in steps:
        rows = [step.prefill(prompt, torch.ones_like(prompt, dtype=torch.bool))]
        rows += [step(torch.tensor([token])) for token in (5, 60, 17)]
        logits.append(torch.stack(rows))
    cached, uncached, recomputed = logits
    assert torch.equal(recomputed, cached)
    torch.testing.assert_close(uncached, cached, atol=1e-3, rtol=1e-4)
    assert len(calls) == 4, "one projection per token"
    assert steps[2].memory.nbytes == 0, "the memory is dropped after each token"
    assert not torch.equal(cached[1], cached[2])


def test_recomputing_cannot_select_rows(model):
    step = RecomputingDecodeStep(model.decoder, lambda: model.decoder.empty_memory(1), 1, 2)
    with pytest.raises(MmxError) as error:
        step.select(torch.tensor([0]))
    assert error.value.code == "bench.select"


def test_a_different_text_is_detected(model, features, monkeypatch):
    class MaskedStep(RecomputingDecodeStep):
        def _with_memory(self, compute_logits):
            memory = self.project()
            self.project = lambda: memory.mask_out(torch.tensor([[True] * 4 + [False]]))
            return super()._with_memory(compute_logits)

    monkeypatch.setattr("mmx.bench.cache.RecomputingDecodeStep", MaskedStep)
    costs = decoding_costs(model, "numbers", features, (12,), repeats=1)
    assert {cost.method: cost.same for cost in costs} == {"cached": True, "uncached": True, "recomputed": False}


@pytest.mark.parametrize("lengths", [(), (0,), (4, 129)], ids=str)
def test_invalid_lengths_are_refused(model, features, lengths):
    with pytest.raises(MmxError) as error:
        decoding_costs(model, "numbers", features, lengths)
    assert error.value.code == "bench.lengths"
    assert error.value.details == {"given": list(lengths), "expected": 128}


def test_several_inputs_are_refused(model):
    features = features_of(model, "numbers", model.collate("numbers", [[0.1], [0.2]]).inputs)
    with pytest.raises(MmxError) as error:
        decoding_costs(model, "numbers", features, (2,))
    assert (error.value.code, error.value.details) == ("bench.batch_size", {"given": 2})


def test_an_unknown_source_is_refused(model, features):
    with pytest.raises(MmxError) as error:
        decoding_costs(model, "number", features, (2,))
    assert error.value.code == "source.unknown"


def test_a_model_with_a_question_encoder_is_refused():
    with suppress_hf_output():
        pair = build_pair("blip-vqa", BenchSetting("micro", 1))
    features = features_of(pair.model, "image", {"pixels": pair.pixels(1)})
    with pytest.raises(MmxError) as error:
        decoding_costs(pair.model, "image", features, (2,))
    assert error.value.code == "bench.question_encoder"


def test_the_results_of_the_workload_note_the_bytes():
    with suppress_hf_output():
        results = list(cache(BenchSetting("micro", 1)))
    first, second = results[:2]
    assert first.mmx == second.mmx
    assert first.reference != second.reference
    assert all(result.same for result in results)
    # 17 slots and 4 positions of 2 layers of size 32 have 512 bytes each; features have a quarter of the bytes of keys
    # and values.
    assert "cached 0.011 MB, reference 0.009 MB" in first.note
    assert "computed per token 0.001 MB, reference 0.001 MB" in first.note
    assert "cached 0.011 MB, reference 0.004 MB" in second.note
    assert "computed per token 0.001 MB, reference 0.009 MB" in second.note
