"""Model: sources may be absent, dropped, different by row, in any order, without changing the logits of other rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.config.schema import SourceConfig
from mmx.encoders.base import Features
from mmx.errors import ConfigError, EncoderError, MmxError
from mmx.memory import cat
from mmx.models.model import mount
from mmx.models.source import SourceBatch
from mmx.testing import ToyEncoder, tiny_model
from mmx.text.prompts import answer_prompt, caption_prompt, question_prompt

TOY = "mmx.testing:ToyEncoder"
MODEL = tiny_model({"left": TOY, "right": TOY})
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LEFT, RIGHT = [[0.1, 2.0, -1.0], [3.0], [-2.0, 0.5], [1.0, 1.0, 1.0, 4.0]], [[5.0], [-3.0, 1.0], [0.2] * 5, [-1.0]]


class WrongWidthEncoder(ToyEncoder):
    """Returns states of another feature size than it declares."""

    def forward(self, batch):
        states, mask, grid, _ = super().forward(batch)
        return Features(states[..., :-1], mask, grid)


def random_tokens(batch, streams=2, length=5, seed=0):
    return torch.randint(6, 262, (batch, streams, length), generator=torch.Generator().manual_seed(seed))


def logits(sources, tokens, model=MODEL, **options):
    with torch.no_grad():
        return model(sources, tokens, **options)


def batch_of(name, raw, rows=None, model=MODEL, **changes):
    return model.collate(name, raw, rows)._replace(**changes)


def test_logits_have_the_shape_of_streams_positions_and_vocabulary():
    assert logits({"left": batch_of("left", LEFT)}, random_tokens(4)).shape == (4, 2, 5, 262)


def test_sources_change_the_logits():
    tokens = random_tokens(4)
    found = [
        logits(sources, tokens)
        for sources in ({}, {"left": batch_of("left", LEFT)}, {"right": batch_of("right", LEFT)})
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (found[a] - found[b]).abs().max() > 1e-3


def test_no_source_is_an_empty_memory():
    empty = MODEL.encode({}, 3)
    assert (empty.batch_size, empty.num_slots, empty.layout) == (3, 0, ())
    none = SourceBatch({}, torch.zeros(0, dtype=torch.long))
    assert MODEL.encode({"left": none, "right": none}, 3).num_slots == 0
    with torch.no_grad():
        assert torch.equal(logits({}, random_tokens(3)), MODEL.decoder(random_tokens(3), MODEL.decoder.empty_memory(3)))


@settings(max_examples=15, deadline=None)
@given(left=st.sets(st.integers(0, 3)), right=st.sets(st.integers(0, 3)))
def test_rows_with_different_sources_equal_separate_runs(left, right):
    """The sources of a row change no logit of another row."""
    tokens = random_tokens(4)
    rows_of = {"left": (LEFT, sorted(left)), "right": (RIGHT, sorted(right))}
    mixed = {}
    for name, (raw, rows) in rows_of.items():
        if rows:
            mixed[name] = batch_of(name, [raw[row] for row in rows], rows)
    together = logits(mixed, tokens)
    for row in range(4):
        own = {name: batch_of(name, [raw[row]]) for name, (raw, rows) in rows_of.items() if row in rows}
        assert torch.allclose(together[row], logits(own, tokens[row : row + 1])[0], **CLOSE)


def test_rows_may_be_in_any_order():
    tokens, order = random_tokens(4), [2, 0, 3, 1]
    shuffled = batch_of("left", [LEFT[row] for row in order], order)
    assert torch.allclose(logits({"left": shuffled}, tokens), logits({"left": batch_of("left", LEFT)}, tokens), **CLOSE)


def test_dropped_inputs_equal_absent_ones():
    tokens, both = random_tokens(4), {"left": batch_of("left", LEFT), "right": batch_of("right", RIGHT)}
    dropped = torch.tensor([True, False, True, False])
    found = logits({**both, "left": both["left"]._replace(dropped=dropped)}, tokens)
    with_left, without = logits(both, tokens), logits({"right": both["right"]}, tokens)
    for row in range(4):
        assert torch.allclose(found[row], (without if dropped[row] else with_left)[row], **CLOSE)
    everything = both["left"]._replace(dropped=torch.ones(4, dtype=torch.bool))
    assert torch.allclose(logits({"left": everything}, tokens), logits({}, tokens), **CLOSE)


def test_logits_of_label_positions_equal_those_of_all_positions():
    sources, tokens = {"left": batch_of("left", LEFT)}, random_tokens(4)
    positions = torch.tensor([0, 39, 7, 7, 12])
    expected = logits(sources, tokens).flatten(0, 2)[positions]
    assert torch.allclose(logits(sources, tokens, label_positions=positions), expected, **CLOSE)


def test_the_order_of_sources_changes_no_logit():
    tokens = random_tokens(4)
    left, right = batch_of("left", LEFT), batch_of("right", RIGHT)
    one, other = logits({"left": left, "right": right}, tokens), logits({"right": right, "left": left}, tokens)
    assert torch.allclose(one, other, **CLOSE)
    with torch.no_grad():
        parts = MODEL.encode({"left": left}, 4), MODEL.encode({"right": right}, 4)
        assert torch.allclose(MODEL.decoder(tokens, cat(*parts)), one, **CLOSE)
        assert torch.allclose(MODEL.decoder(tokens, cat(*reversed(parts))), one, **CLOSE)


def test_an_input_of_a_stream_changes_the_logits_of_that_stream_only():
    tokens, left = random_tokens(2, 3), batch_of("left", LEFT[:2])
    raw = [[1.0, 2.0], [-4.0], [0.3] * 3, [7.0], [2.0, -2.0]]
    rows = [0, 1, 2, 3, 5]  # stream 1 of row 1 has none
    found = logits({"left": left, "right": batch_of("right", raw, rows, streams=3)}, tokens)
    for b in range(2):
        for k in range(3):
            own = {"left": batch_of("left", [LEFT[b]])}
            if 3 * b + k in rows:
                own["right"] = batch_of("right", [raw[rows.index(3 * b + k)]])
            assert torch.allclose(found[b, k], logits(own, tokens[b : b + 1, k : k + 1])[0, 0], **CLOSE)


def test_padding_of_streams_changes_no_other_logit():
    sources, tokens = {"left": batch_of("left", LEFT)}, random_tokens(4)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 0, 2:] = mask[2, 1] = False
    found, full = logits(sources, tokens, mask=mask), logits(sources, tokens)
    assert torch.allclose(found[mask], full[mask], **CLOSE)
    assert found.isfinite().all()


def test_the_prompt_holds_the_question_unless_an_encoder_reads_it():
    assert MODEL.prompt() == caption_prompt()
    assert MODEL.prompt("why") == question_prompt("why")
    asked = tiny_model({"right": TOY, "left": TOY}, question_input="left")
    assert asked.prompt() == caption_prompt()
    assert asked.prompt("why") == answer_prompt()


def test_an_unknown_source_is_refused():
    with pytest.raises(MmxError) as error:
        MODEL.encoder("lefd")
    assert error.value.code == "source.unknown"
    assert error.value.details == {"source": "lefd", "known": ["left", "right"]}
    assert "did you mean 'left'?" in str(error.value)


def test_features_of_another_size_are_refused():
    model = tiny_model({"left": f"{__name__}:WrongWidthEncoder"})
    with pytest.raises(EncoderError) as error:
        model.encode({"left": batch_of("left", LEFT, model=model)}, 4)
    assert error.value.code == "encoder.features"
    assert error.value.details["source"] == "left"


def test_an_unknown_option_of_an_encoder_is_refused_with_its_key():
    with pytest.raises(ConfigError) as error:
        tiny_model({"left": SourceConfig(encoder=TOY, options={"feature": 3})})
    assert error.value.code == "config.unknown_key"
    assert error.value.details["suggestion"] == "features"
    assert "model.sources.left.options" in str(error.value)


def test_a_source_of_the_same_name_cannot_be_mounted():
    with pytest.raises(ConfigError) as error:
        mount(MODEL, {"left": SourceConfig(encoder=TOY)})
    assert error.value.code == "mount.name"
    assert error.value.details == {"sources": ["left"]}


def test_a_mounted_source_shares_all_other_weights():
    extended = mount(MODEL, {"new": SourceConfig(encoder=TOY)})
    assert list(extended.sources) == ["left", "right", "new"]
    assert extended.decoder is MODEL.decoder
    assert extended.sources["left"] is MODEL.sources["left"]
    assert list(MODEL.sources) == ["left", "right"]


@pytest.mark.parametrize(("dtype", "code"), [("float17", "inference.dtype"), ("float32", "inference.prepacked")])
def test_weights_are_prepacked_once_and_for_known_dtypes(dtype, code):
    model = tiny_model(hidden_size=256)
    model.prepare_for_inference("float32")
    if code == "inference.dtype":
        model = tiny_model()
    with pytest.raises(MmxError) as error:
        model.prepare_for_inference(dtype)
    assert error.value.code == code


def test_every_parameter_has_a_gradient_if_no_source_is_in_the_batch():
    """Distributed training needs a gradient on every rank, even where only an absent source is trained."""
    model = tiny_model()
    model.decoder.requires_grad_(False)
    model({}, random_tokens(1)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.sources.parameters())
    assert all(parameter.grad.abs().max() == 0 for parameter in model.sources.parameters())


def test_repr_is_one_short_line():
    count = sum(parameter.numel() for parameter in MODEL.parameters())
    assert repr(MODEL) == (
        f"Model(left: ToyEncoder, right: ToyEncoder, decoder: 2 layers x 32, 262 tokens, {count:,} parameters, cpu)"
    )


def test_a_seed_determines_the_weights():
    first, same, other = (tiny_model(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
