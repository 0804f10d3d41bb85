"""What a cache is worth: three ways say the same words, and the bytes are those of what stands and what is made."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from mmx.bench.cache import METHODS, DecodingCost, RecomputingDecodeStep, cache, decoding_costs, features_of
from mmx.bench.hf_references import BenchSetting, build_pair
from mmx.encoders.pretrained.hf_models import suppress_hf_output
from mmx.errors import MmxError
from mmx.generation.decode_step import DecoderStep, UncachedStep
from mmx.testing.toys import tiny_model


@pytest.fixture(scope="module")
def model():
    """Weights so large that every token depends on the text and on the memory."""
    made = tiny_model(layers=2)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(5.0 if weight.ndim > 1 else 1.0)
    return made


@pytest.fixture(scope="module")
def features(model):
    return features_of(model, "numbers", model.collate("numbers", [[0.1, 2.0, -1.0, 0.4, 1.0]]).inputs)


def test_features_are_what_the_projection_is_given(model, features):
    batch = model.collate("numbers", [[0.1, 2.0, -1.0, 0.4, 1.0]])
    with torch.no_grad():
        assert torch.equal(features.states, model.encoder("numbers")(batch.inputs).states)
        projected = model.sources["numbers"].projection(features)
        assert torch.equal(projected.keys, model.encode({"numbers": batch}, 1).keys)


def test_bytes_by_hand(model, features):
    """Two layers of width 32 in float32: a position holds 2 * 2 * 32 * 4 = 512 bytes, of a text as of five slots."""
    position, memory, states = 512, 5 * 512, 5 * 8 * 4
    costs = {(cost.method, cost.length): cost for cost in decoding_costs(model, "numbers", features, (1, 7), repeats=1)}
    assert list(costs) == [(way, length) for length in (1, 7) for way in METHODS]
    for length in (1, 7):
        cached, uncached, anew = (costs[way, length] for way in METHODS)
        assert (cached.held, cached.recomputed) == (length * position + memory, position)
        assert (uncached.held, uncached.recomputed) == (memory, sum(range(1, length + 1)) * position // length)
        assert (anew.held, anew.recomputed) == (length * position + states, position + memory)
    assert all(cost.same and cost.milliseconds > 0 for cost in costs.values())
    with pytest.raises(FrozenInstanceError):
        cached.held = 0


def test_what_looks_anew_gives_the_logits_of_a_static_memory(model, features):
    with torch.no_grad():
        memory = model.sources["numbers"].projection(features)
    calls = []

    def project():
        calls.append(1)
        return memory

    prompt = torch.tensor([[[3, 7, 9]]])
    with torch.no_grad():
        steps = [
            DecoderStep(model.decoder, memory, 4, unrolled=False),
            UncachedStep(model.decoder, memory),
            RecomputingDecodeStep(model.decoder, project, 1, 4),
        ]
        first = [step.prefill(prompt, torch.ones_like(prompt, dtype=torch.bool)) for step in steps]
        later = [[step(torch.tensor([token])) for token in (5, 60, 17)] for step in steps]
    assert torch.equal(first[2], first[0]) and all(torch.equal(a, b) for a, b in zip(later[2], later[0]))
    torch.testing.assert_close(torch.stack(later[1]), torch.stack(later[0]), atol=1e-3, rtol=1e-4)
    assert len(calls) == 4, "one projection a token"
    assert steps[2].memory.nbytes == 0, "and none is kept"
    assert not torch.equal(later[0][0], later[0][1])


def test_what_looks_anew_keeps_all_its_rows(model):
    step = RecomputingDecodeStep(model.decoder, lambda: model.decoder.empty_memory(1), 1, 2)
    with pytest.raises(MmxError, match=r"keep some rows, but projects all; use DecoderStep\.$"):
        step.select(torch.tensor([0]))


def test_another_text_is_noticed(model, features, monkeypatch):
    """The check has teeth: what looks anew sees another thing, and only its rows say so."""

    class Elsewhere(RecomputingDecodeStep):
        def _looking(self, ask):
            memory, self.project = self.project(), lambda: memory.mask_out(torch.tensor([[True] * 4 + [False]]))
            return super()._looking(ask)

    monkeypatch.setattr("mmx.bench.cache.LookingAnewStep", Elsewhere)
    costs = decoding_costs(model, "numbers", features, (12,), repeats=1)
    assert [(cost.method, cost.same) for cost in costs] == [("cached", True), ("uncached", True), ("anew", False)]


@pytest.mark.parametrize("lengths", [(), (0,), (4, 129)], ids=str)
def test_lengths_that_cannot_be_read_are_refused(model, features, lengths):
    with pytest.raises(MmxError, match=r"cannot be measured; give numbers of tokens from 1 to 128\.$"):
        decoding_costs(model, "numbers", features, lengths)


def test_several_inputs_and_unknown_sources_are_refused(model, features):
    two = features_of(model, "numbers", model.collate("numbers", [[0.1], [0.2]]).inputs)
    with pytest.raises(MmxError, match=r"^the features are of 2 inputs; give those of one\.$"):
        decoding_costs(model, "numbers", two, (2,))
    with pytest.raises(MmxError, match="the model has no source 'number'; did you mean 'numbers'?"):
        decoding_costs(model, "number", features, (2,))


def test_a_model_with_a_reader_is_refused():
    with suppress_hf_output():
        pair = build_pair("blip-vqa", BenchSetting("micro", 1))
    features = features_of(pair.model, "image", {"pixels": pair.pixels(1)})
    with pytest.raises(MmxError, match="the model's reader looks at the source"):
        decoding_costs(pair.model, "image", features, (2,))


def test_the_figures_of_the_benchmark_tell_bytes():
    with suppress_hf_output():
        first, second, *others = cache(BenchSetting("micro", 1))
    assert (first.name, second.name) == (
        "cache, 4 tokens, beside no cache",
        "cache, 4 tokens, beside looking anew",
    )
    assert first.ours == second.ours and first.theirs != second.theirs
    assert all(figure.same for figure in (first, second, *others))
    # 17 slots and 4 positions of 2 layers of width 32: 512 bytes each; features are a fourth of their keys and values.
    assert (
        "held 0.011 MB, other way 0.009 MB; keys and values computed a token 0.001 MB, other way 0.001 MB" in first.note
    )
    assert (
        "held 0.011 MB, other way 0.004 MB; keys and values computed a token 0.001 MB, other way 0.009 MB"
        in second.note
    )


def test_a_cost_is_plain_values():
    assert vars(DecodingCost("cached", 4, 1.5, 100, 10, True)) == {
        "way": "cached",
        "length": 4,
        "milliseconds": 1.5,
        "held": 100,
        "recomputed": 10,
        "same": True,
    }
