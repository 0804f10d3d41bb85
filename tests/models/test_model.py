"""Model: sources may be absent, withheld, mixed by row, joined in any order; and no number changes that should not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.config.schema import SourceConfig
from mmx.encoders.base import Features
from mmx.errors import EncoderError, MmxError
from mmx.memory import cat
from mmx.models.model import SourceBatch
from mmx.testing import ToyEncoder, tiny_model
from mmx.text.prompts import answer_prompt, caption_prompt, question_prompt

TOY = "mmx.testing:ToyEncoder"
MODEL = tiny_model({"left": TOY, "right": TOY})
EXACT = {"atol": 1e-5, "rtol": 1e-5}
LEFT, RIGHT = [[0.1, 2.0, -1.0], [3.0], [-2.0, 0.5], [1.0, 1.0, 1.0, 4.0]], [[5.0], [-3.0, 1.0], [0.2] * 5, [-1.0]]


class Liar(ToyEncoder):
    """Gives states that are not as wide as it said."""

    def forward(self, batch):
        states, mask, grid = super().forward(batch)
        return Features(states[..., :-1], mask, grid)


def tokens_of(batch, streams=2, length=5, seed=0):
    return torch.randint(6, 262, (batch, streams, length), generator=torch.Generator().manual_seed(seed))


def logits(sources, tokens, model=MODEL, **options):
    with torch.no_grad():
        return model(sources, tokens, **options)


def given_(name, raw, rows=None, model=MODEL, **more):
    return model.collate(name, raw, rows)._replace(**more)


def test_logits_have_a_score_for_every_token_of_every_stream():
    assert logits({"left": given_("left", LEFT)}, tokens_of(4)).shape == (4, 2, 5, 262)


def test_sources_matter():
    tokens = tokens_of(4)
    seen = [logits(s, tokens) for s in ({}, {"left": given_("left", LEFT)}, {"right": given_("right", LEFT)})]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (seen[a] - seen[b]).abs().max() > 1e-3


def test_no_source_at_all_is_an_empty_memory():
    empty = MODEL.encode({}, 3)
    assert (empty.batch_size, empty.num_slots, empty.layout) == (3, 0, ())
    none = SourceBatch({}, torch.zeros(0, dtype=torch.long))
    assert MODEL.encode({"left": none, "right": none}, 3).num_slots == 0
    with torch.no_grad():
        assert torch.equal(logits({}, tokens_of(3)), MODEL.decoder(tokens_of(3), MODEL.decoder.empty_memory(3)))


@settings(max_examples=15, deadline=None)
@given(left=st.sets(st.integers(0, 3)), right=st.sets(st.integers(0, 3)))
def test_rows_with_different_sources_equal_separate_runs(left, right):
    """Each row is told what it has; that others have more, or less, changes none of its numbers."""
    tokens, of = tokens_of(4), {"left": (LEFT, sorted(left)), "right": (RIGHT, sorted(right))}
    mixed = {name: given_(name, [raw[r] for r in rows], rows) for name, (raw, rows) in of.items() if rows}
    together = logits(mixed, tokens)
    for row in range(4):
        own = {name: given_(name, [raw[row]]) for name, (raw, rows) in of.items() if row in rows}
        assert torch.allclose(together[row], logits(own, tokens[row : row + 1])[0], **EXACT)


def test_rows_may_be_named_in_any_order():
    tokens, order = tokens_of(4), [2, 0, 3, 1]
    shuffled = given_("left", [LEFT[row] for row in order], order)
    assert torch.allclose(logits({"left": shuffled}, tokens), logits({"left": given_("left", LEFT)}, tokens), **EXACT)


def test_withheld_is_absent():
    tokens, both = tokens_of(4), {"left": given_("left", LEFT), "right": given_("right", RIGHT)}
    withheld = torch.tensor([True, False, True, False])
    found = logits({**both, "left": both["left"]._replace(dropped=withheld)}, tokens)
    with_left, without = logits(both, tokens), logits({"right": both["right"]}, tokens)
    for row in range(4):
        assert torch.allclose(found[row], (without if withheld[row] else with_left)[row], **EXACT)
    everything = both["left"]._replace(dropped=torch.ones(4, dtype=torch.bool))
    assert torch.allclose(logits({"left": everything}, tokens), logits({}, tokens), **EXACT)


def test_wanted_places_equal_those_of_all_logits():
    sources, tokens = {"left": given_("left", LEFT)}, tokens_of(4)
    wanted = torch.tensor([0, 39, 7, 7, 12])
    assert torch.allclose(
        logits(sources, tokens, wanted=wanted), logits(sources, tokens).flatten(0, 2)[wanted], **EXACT
    )


def test_the_order_in_which_sources_are_joined_changes_nothing():
    tokens = tokens_of(4)
    left, right = given_("left", LEFT), given_("right", RIGHT)
    one, other = logits({"left": left, "right": right}, tokens), logits({"right": right, "left": left}, tokens)
    assert torch.allclose(one, other, **EXACT)
    with torch.no_grad():
        parts = MODEL.encode({"left": left}, 4), MODEL.encode({"right": right}, 4)
        assert torch.allclose(MODEL.decoder(tokens, cat(*parts)), one, **EXACT)
        assert torch.allclose(MODEL.decoder(tokens, cat(*reversed(parts))), one, **EXACT)


def test_an_input_for_each_stream_is_seen_by_that_stream_alone():
    tokens, left = tokens_of(2, 3), given_("left", LEFT[:2])
    asked = [[1.0, 2.0], [-4.0], [0.3] * 3, [7.0], [2.0, -2.0]]
    rows = [0, 1, 2, 3, 5]  # the fifth place, stream 1 of row 1, has none
    found = logits({"left": left, "right": given_("right", asked, rows, streams=3)}, tokens)
    for b in range(2):
        for k in range(3):
            own = {"left": given_("left", [LEFT[b]])}
            if 3 * b + k in rows:
                own["right"] = given_("right", [asked[rows.index(3 * b + k)]])
            assert torch.allclose(found[b, k], logits(own, tokens[b : b + 1, k : k + 1])[0, 0], **EXACT)


def test_padded_streams_change_no_number():
    sources, tokens = {"left": given_("left", LEFT)}, tokens_of(4)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 0, 2:] = mask[2, 1] = False
    found, full = logits(sources, tokens, mask=mask), logits(sources, tokens)
    assert torch.allclose(found[mask], full[mask], **EXACT)
    assert found.isfinite().all()


def test_prompts_follow_where_questions_go():
    assert MODEL.prompt() == caption_prompt()
    assert MODEL.prompt("why") == question_prompt("why")
    asked = tiny_model({"right": TOY, "left": TOY}, question_to="left")
    assert asked.prompt() == caption_prompt()
    assert asked.prompt("why") == answer_prompt()


def test_mistakes_are_named():
    with pytest.raises(MmxError, match="the model has no source 'lefd'; did you mean 'left'?"):
        MODEL.encoder("lefd")
    liar = tiny_model({"left": f"{__name__}:Liar"})
    given = {"left": given_("left", LEFT, model=liar)}
    with pytest.raises(EncoderError, match=r"Liar of source 'left' gave states \[4, 4, 7\]"):
        liar.encode(given, 4)
    with pytest.raises(MmxError, match="model.sources.left.options"):
        tiny_model({"left": SourceConfig(encoder=TOY, options={"feature": 3})})


def test_the_configuration_holds_every_option_of_the_encoders():
    assert MODEL.config.sources["left"].options == {"features": 8}


def test_a_seed_is_a_model():
    first, again, other = (tiny_model(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
