"""The text encoder: independence of padding, of the batch and of its order; causal attention; long and empty texts."""

import pytest
import torch

from mmx.encoders.contract import check_features
from mmx.encoders.text import TextEncoder
from mmx.errors import MmxError
from mmx.testing import toy_tokenizer

TEXTS = ["a dog", "what is it?", "x", "a much longer text, by far"]
POSITIONS = ["learned", "sinusoidal", "rope", "none"]
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def build(**options):
    torch.manual_seed(0)
    fields = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 40, **options}
    return TextEncoder(TextEncoder.Options(**fields), toy_tokenizer()).eval()


def encode(encoder, texts):
    with torch.no_grad():
        return encoder(encoder.collate([encoder.prepare(text) for text in texts]))


def encode_tokens(encoder, tokens):
    with torch.no_grad():
        return encoder({"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}).states


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_states_do_not_depend_on_the_batch(positions, placement, causal):
    encoder = build(positions=positions, norm_placement=placement, causal=causal)
    batched = check_features(encode(encoder, TEXTS), encoder, "text")
    for row, text in enumerate(TEXTS):
        alone = encode(encoder, [text]).states[0]
        assert batched.mask[row].sum() == len(alone)
        assert batched.mask[row, : len(alone)].all()
        torch.testing.assert_close(batched.states[row, : len(alone)], alone, **CLOSE)


def test_tokens_in_padding_do_not_change_states():
    encoder = build()
    batch = encoder.collate([encoder.prepare(text) for text in TEXTS])
    changed = {**batch, "tokens": torch.where(batch["mask"], batch["tokens"], 77)}
    with torch.no_grad():
        expected = encoder(batch)
        found = encoder(changed)
    assert torch.equal(expected.states[batch["mask"]], found.states[batch["mask"]])


def test_order_of_the_batch_is_the_order_of_the_rows():
    encoder = build()
    forward = encode(encoder, TEXTS)
    backward = encode(encoder, TEXTS[::-1])
    expected = forward.states.flip(0)[forward.mask.flip(0)]
    torch.testing.assert_close(expected, backward.states[backward.mask], **CLOSE)


def test_attention_is_bidirectional_by_default():
    encoder = build()
    assert not encoder.options.causal
    difference = encode(encoder, ["ab"]).states[0, 0] - encode(encoder, ["ac"]).states[0, 0]
    assert difference.abs().max() > 1e-4, "the first token attends to the last"


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_causal_states_do_not_depend_on_later_tokens(positions, placement):
    """States before a changed token are exactly equal; its own and all later ones differ."""
    encoder = build(positions=positions, norm_placement=placement, causal=True)
    tokens = torch.tensor([[40, 41, 42, 43, 44, 45]] * 2)
    for changed in range(6):
        other = tokens.clone()
        other[:, changed] = 50
        expected = encode_tokens(encoder, tokens)
        found = encode_tokens(encoder, other)
        assert torch.equal(expected[:, :changed], found[:, :changed])
        assert ((expected - found).abs().amax(-1)[:, changed:] > 1e-6).all()


@pytest.mark.parametrize("positions", POSITIONS)
def test_causal_states_equal_the_last_states_of_all_prefixes(positions):
    """The slow reference of causal attention."""
    encoder = build(positions=positions, causal=True)
    tokens = torch.tensor([[40, 41, 42, 41, 40]])
    whole = encode_tokens(encoder, tokens)[0]
    for end in range(1, 6):
        prefix = encode_tokens(encoder, tokens[:, :end])[0]
        torch.testing.assert_close(prefix[-1], whole[end - 1], **CLOSE)


def test_causal_attention_has_no_weights_of_its_own():
    assert build().state_dict().keys() == build(causal=True).state_dict().keys()
    # A single token attends only to itself.
    torch.testing.assert_close(encode(build(), [""]).states, encode(build(causal=True), [""]).states)


@pytest.mark.parametrize("positions", POSITIONS)
def test_order_of_tokens_matters_only_with_positions(positions):
    encoder = build(positions=positions)
    forward = encode_tokens(encoder, torch.tensor([[40, 41, 42]]))[0]
    backward = encode_tokens(encoder, torch.tensor([[42, 41, 40]]))[0]
    difference = (forward - backward.flip(0)).abs().max()
    assert (difference < 1e-5) == (positions == "none")


def test_long_text_is_refused():
    encoder = build(max_position_embeddings=8)
    tokenizer = encoder.tokenizer
    longest = max(("a" * n for n in range(60)), key=lambda text: (len(tokenizer.encode(text)) == 7, len(text)))
    tokens = encoder.prepare(longest)["tokens"].tolist()
    assert tokens == [*tokenizer.encode(longest), tokenizer.eos_token_id]
    assert len(tokens) == 8
    text = "abcdefghijklmnop" * 50
    with pytest.raises(MmxError) as error:
        encoder.prepare(text)
    assert error.value.code == "text.too_long"
    assert error.value.details == {"length": len(tokenizer.encode(text)) + 1, "maximum": 8}


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_text_has_a_visible_slot(text):
    encoder = build()
    features = encode(encoder, [text, "longer"])
    assert features.mask[0].any()
    assert torch.isfinite(features.states[0][features.mask[0]]).all()
    assert encoder.prepare("")["tokens"].tolist() == [encoder.tokenizer.eos_token_id]


def test_single_position_holds_eos():
    encoder = build(max_position_embeddings=1)
    assert encoder.prepare("")["tokens"].tolist() == [encoder.tokenizer.eos_token_id]


def test_typed_special_token_is_plain_text():
    encoder = build()
    tokens = encoder.prepare("<eos>")["tokens"].tolist()
    assert tokens.count(encoder.tokenizer.eos_token_id) == 1
    assert tokens[-1] == encoder.tokenizer.eos_token_id


def test_attributes():
    assert TextEncoder.modality == "text"
    assert TextEncoder.dimensions == 1
    assert build().width == 16
    assert encode(build(), ["a"]).grid is None
