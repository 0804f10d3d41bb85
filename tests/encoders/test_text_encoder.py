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
    facts = {"width": 16, "layers": 2, "heads": 2, "max_positions": 40, **options}
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
    assert tokens[-1] == encoder.tokenizer.eos
    assert tokens[:7].tolist() == encoder.tokenizer.encode("abcdefghijklmnop" * 50)[:7]
    assert encode(encoder, ["abcdefghijklmnop" * 50, "a"]).states.shape == (2, 8, 16)


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_an_empty_text_has_something_to_see(text):
    encoder = build()
    features = encode(encoder, [text, "longer"])
    assert features.mask[0].any()
    assert torch.isfinite(features.states[0][features.mask[0]]).all()
    assert encoder.prepare("")["tokens"].tolist() == [encoder.tokenizer.eos]


def test_one_position_holds_the_end_alone():
    encoder = build(max_positions=1)
    assert encoder.prepare("anything")["tokens"].tolist() == [encoder.tokenizer.eos]


def test_a_typed_mark_is_letters():
    encoder = build()
    tokens = encoder.prepare("<eos>")["tokens"].tolist()
    assert tokens.count(encoder.tokenizer.eos) == 1
    assert tokens[-1] == encoder.tokenizer.eos


def test_facts():
    assert TextEncoder.modality == "text"
    assert TextEncoder.dimensions == 1
    assert build().width == 16
    assert encode(build(), ["a"]).grid is None
