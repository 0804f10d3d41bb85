"""The text encoder: padding, neighbours and order in the batch change no number; no text is too long or empty."""

import pytest
import torch

from mmx.encoders.contract import check_features
from mmx.encoders.text import TextEncoder
from mmx.testing import toy_tokenizer

TEXTS = ["a dog", "what is it?", "x", "a much longer text, by far"]
SCHEMES = ["learned", "sinusoidal", "rope", "none"]


def build(**options):
    torch.manual_seed(0)
    facts = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 40, **options}
    return TextEncoder(TextEncoder.Options(**facts), toy_tokenizer()).eval()


def encode(encoder, texts):
    with torch.no_grad():
        return encoder(encoder.collate([encoder.prepare(text) for text in texts]))


@pytest.mark.parametrize("positions", SCHEMES)
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_alone_as_in_a_batch(positions, placement):
    encoder = build(positions=positions, norm_placement=placement)
    together = check_features(encode(encoder, TEXTS), encoder, "text")
    for row, text in enumerate(TEXTS):
        alone = encode(encoder, [text])
        length = alone.states.shape[1]
        assert together.mask[row].sum() == length
        assert together.mask[row, :length].all()
        torch.testing.assert_close(together.states[row, :length], alone.states[0], atol=1e-6, rtol=1e-5)


def test_what_stands_in_the_padding_is_not_read():
    encoder = build()
    batch = encoder.collate([encoder.prepare(text) for text in TEXTS])
    scribbled = {**batch, "tokens": torch.where(batch["mask"], batch["tokens"], 77)}
    with torch.no_grad():
        one, other = encoder(batch), encoder(scribbled)
    assert torch.equal(one.states[batch["mask"]], other.states[batch["mask"]])


def test_the_order_of_the_batch_is_the_order_of_the_rows():
    encoder = build()
    ahead, back = encode(encoder, TEXTS), encode(encoder, TEXTS[::-1])
    torch.testing.assert_close(ahead.states.flip(0)[ahead.mask.flip(0)], back.states[back.mask], atol=1e-6, rtol=1e-5)


def test_every_token_sees_the_whole_text():
    encoder = build()
    one, other = encode(encoder, ["ab"]), encode(encoder, ["ac"])
    assert (one.states[0, 0] - other.states[0, 0]).abs().max() > 1e-4, "the first token sees the last"


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("positions", SCHEMES)
def test_a_causal_text_has_states_that_no_later_token_moves(positions, placement):
    """Exactly: the states before a changed token are the same to the bit, its own and all after it are others."""
    encoder = build(positions=positions, norm_placement=placement, causal=True)
    tokens = torch.tensor([[40, 41, 42, 43, 44, 45]] * 2)
    for changed in range(6):
        other = tokens.clone()
        other[:, changed] = 50
        with torch.no_grad():
            mask = torch.ones_like(tokens, dtype=torch.bool)
            one, two = (encoder({"tokens": t, "mask": mask}).states for t in (tokens, other))
        assert torch.equal(one[:, :changed], two[:, :changed])
        assert ((one - two).abs().amax(-1)[:, changed:] > 1e-6).all()


@pytest.mark.parametrize("positions", SCHEMES)
def test_a_causal_text_is_read_as_its_beginnings_are(positions):
    """The slow twin: the state of each token is the last of the text that ends there."""
    encoder = build(positions=positions, causal=True)
    tokens = torch.tensor([[40, 41, 42, 41, 40]])
    ones = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        whole = encoder({"tokens": tokens, "mask": ones}).states[0]
        for end in range(1, 6):
            part = encoder({"tokens": tokens[:, :end], "mask": ones[:, :end]}).states[0]
            torch.testing.assert_close(part[-1], whole[end - 1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("positions", SCHEMES)
def test_causal_alone_as_in_a_batch(positions):
    encoder = build(positions=positions, causal=True)
    together = check_features(encode(encoder, TEXTS), encoder, "text")
    for row, text in enumerate(TEXTS):
        alone = encode(encoder, [text]).states[0]
        torch.testing.assert_close(together.states[row, : len(alone)], alone, atol=1e-6, rtol=1e-5)


def test_causal_is_off_by_default_and_has_no_weights_of_its_own():
    plain, causal = build(), build(causal=True)
    assert not plain.options.causal
    assert plain.state_dict().keys() == causal.state_dict().keys()
    ahead, back = encode(plain, ["abc"]), encode(causal, ["abc"])
    assert (ahead.states[0, 0] - back.states[0, 0]).abs().max() > 1e-4
    torch.testing.assert_close(encode(plain, [""]).states, encode(causal, [""]).states)  # one token sees itself


def test_word_order_matters_only_where_positions_tell_it():
    for scheme in SCHEMES:
        encoder = build(positions=scheme)
        ahead, back = (encoder(encoder.collate([{"tokens": torch.tensor(tokens), "mask": torch.ones(3, dtype=bool)}]))
                       for tokens in ([40, 41, 42], [42, 41, 40]))  # fmt: skip
        gap = (ahead.states[0] - back.states[0].flip(0)).abs().max()
        assert (gap < 1e-5) == (scheme == "none"), (scheme, float(gap))


def test_a_long_text_is_cut_and_still_closed():
    encoder = build(max_positions=8)
    tokens = encoder.prepare("abcdefghijklmnop" * 50)["tokens"]
    assert len(tokens) == 8
    assert tokens[-1] == encoder.tokenizer.eos_token_id
    assert tokens[:7].tolist() == encoder.tokenizer.encode("abcdefghijklmnop" * 50)[:7]
    assert encode(encoder, ["abcdefghijklmnop" * 50, "a"]).states.shape == (2, 8, 16)


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_an_empty_text_has_something_to_see(text):
    encoder = build()
    features = encode(encoder, [text, "longer"])
    assert features.mask[0].any()
    assert torch.isfinite(features.states[0][features.mask[0]]).all()
    assert encoder.prepare("")["tokens"].tolist() == [encoder.tokenizer.eos_token_id]


def test_one_position_holds_the_end_alone():
    encoder = build(max_positions=1)
    assert encoder.prepare("anything")["tokens"].tolist() == [encoder.tokenizer.eos_token_id]


def test_a_typed_mark_is_letters():
    encoder = build()
    tokens = encoder.prepare("<eos>")["tokens"].tolist()
    assert tokens.count(encoder.tokenizer.eos_token_id) == 1
    assert tokens[-1] == encoder.tokenizer.eos_token_id


def test_facts():
    assert TextEncoder.modality == "text"
    assert TextEncoder.dimensions == 1
    assert build().width == 16
    assert encode(build(), ["a"]).grid is None
