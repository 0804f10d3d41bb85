"""Information: bits against probabilities looked up one by one, and against a channel whose capacity is known."""

import math
from functools import cache
from statistics import NormalDist

import pytest
import torch
from decoder_cases import random_decoder, random_memory, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.interpret.information import information_gain, surprisal, word_bits, word_ids
from mmx.models.source import SourceBatch
from mmx.testing import tiny_model, toy_tokenizer
from mmx.text.tokenizer import Tokenizer

# ---- bits of tokens ----------------------------------------------------------------------------------------------


def a_case():
    """Two memories of three texts, of which some positions are wanted."""
    torch.manual_seed(3)
    decoder, memory, tokens = random_decoder(), random_memory(masked=1), random_tokens(2, 3, 6)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 2, 4:] = False
    targets = torch.where(mask, random_tokens(2, 3, 6), -100)
    targets[:, :, 0] = -100
    return decoder, memory, tokens, mask, targets


def test_the_surprise_is_the_probability_looked_up_of_each_text_alone():
    decoder, memory, tokens, mask, targets = a_case()
    found = surprisal(decoder, memory, tokens, mask, targets)
    for b, k in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        length = int(mask[b, k].sum())
        shares = decoder(tokens[b : b + 1, k : k + 1, :length], memory.select([b]))[0, 0].softmax(-1)
        for place in range(6):
            token = int(targets[b, k, place])
            expected = -math.log2(shares[place, token]) if token >= 0 else 0.0
            assert found[b, k, place].item() == pytest.approx(expected, abs=1e-4)


def test_the_gain_is_what_looking_saves_and_none_where_there_is_nothing_more_to_see():
    decoder, memory, *texts = a_case()
    nothing = decoder.empty_memory(2)
    gain = information_gain(decoder, memory, *texts)
    assert torch.allclose(gain, surprisal(decoder, nothing, *texts) - surprisal(decoder, memory, *texts), atol=1e-6)
    assert (gain.abs()[texts[2] >= 0] > 1e-3).all(), "looking must matter, or the sign says nothing"
    assert not information_gain(decoder, nothing, *texts).any()
    part = memory.mask_out(torch.arange(5) < 2)
    rest = information_gain(decoder, memory, *texts, blind=part)
    assert torch.allclose(gain, rest + information_gain(decoder, part, *texts), atol=1e-5), "a chain of gains adds up"
    hidden = memory.mask_out(torch.ones(5, dtype=torch.bool))
    assert torch.allclose(information_gain(decoder, hidden, *texts), torch.zeros(2, 3, 6), atol=1e-5)


# ---- tokens to words ---------------------------------------------------------------------------------------------


def test_words_begin_with_a_space_and_the_end_is_a_word_of_its_own():
    spelt = toy_tokenizer()
    tokens = [*spelt.encode("a dog, né"), spelt.eos_token_id]  # every byte is a token, and the first is the space before "a"
    assert word_ids(spelt, tokens) == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    merged = Tokenizer.train(["the dogs run, the dogs ran"] * 4, 300)
    tokens = merged.encode("the dogs run, ran")
    assert len(tokens) < 12, "some letters must be merged"
    assert word_ids(merged, tokens)[-1] == 3
    assert word_ids(merged, []) == []
    assert word_ids(merged, [merged.eos_token_id]) == [0]


@settings(max_examples=50, deadline=None)
@given(st.text("abé,'☃ ", max_size=20))
def test_there_are_as_many_words_as_spaces_divide_a_text_into(text):
    tokenizer, text = toy_tokenizer(), " ".join(text.split())
    places = word_ids(tokenizer, tokenizer.encode(text)) if text else []
    assert (places[-1] + 1 if places else 0) == len(text.split())
    assert all(later - place in (0, 1) for place, later in zip(places, places[1:], strict=False))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9), st.booleans()), max_size=12))
def test_the_pieces_of_a_word_are_summed(pieces):
    places, expected = [], []
    for bits, begins in pieces:
        if begins or not places:
            expected.append(0.0)
        expected[-1] += bits
        places.append(len(expected) - 1)
    bits = torch.tensor([bits for bits, _ in pieces], dtype=torch.float64)
    assert word_bits(bits, places).tolist() == pytest.approx(expected, abs=1e-9)
    assert word_bits(bits.expand(2, 3, -1), places).shape == (2, 3, len(expected))


# ---- a channel of known capacity ---------------------------------------------------------------------------------
#
# x and y are normal with correlation rho. The encoder reads x, the decoder says y, as one of 15 letters for bins of
# width h = 0.4 from -3 to 3. For the normal pair, Var(Y|X) = (1 - rho^2) Var(Y), and the information is
# -log2(1 - rho^2) / 2 bits (Cover & Thomas 2006, section 8.5). Bins add h^2/12 = 0.0133 to either variance (Sheppard):
# rho^2 = 0.64 becomes 0.632, and 0.737 bits become 0.721, less what the outer bins cut off.
# Of 20,000 pairs the information has a standard error of rho / ln 2 / sqrt(20000) = 0.008 bits.

BINS, WIDTH, RHO = 15, 0.4, 0.8
MIDDLES = (torch.arange(BINS) - (BINS - 1) / 2) * WIDTH


def pairs(rho, count, draws, generator):
    """x [B] and the bins [B, K] of K draws of y for each."""
    x, noise = torch.randn(count, generator=generator), torch.randn(count, draws, generator=generator)
    y = rho * x[:, None] + math.sqrt(1 - rho**2) * noise
    return x, ((y - MIDDLES[0]) / WIDTH).round().clamp(0, BINS - 1).long()


def texts_of(model, bins):
    """Prompts and the letters of the bins [B, K]: tokens, mask, targets [B, K, T]; the letter is the last target."""
    prompt = torch.tensor(model.tokenizer.encode_prompt(model.prompt()))
    letters = torch.tensor([model.tokenizer.encode(letter)[-1] for letter in "abcdefghijklmno"])
    tokens = prompt.expand(*bins.shape, -1)
    targets = torch.full_like(tokens, -100)
    targets[..., -1] = letters[bins]
    return (tokens, torch.ones_like(tokens, dtype=torch.bool), targets), letters


def memory_of(model, x):
    numbers = {"numbers": x[:, None], "mask": torch.ones(len(x), 1, dtype=torch.bool)}
    return model.encode({"numbers": SourceBatch(numbers, torch.arange(len(x)))}, len(x))


@cache
def trained(rho, steps):
    """A model that was shown x in three of four pairs, and in the others nothing."""
    model, generator = tiny_model(layers=1, dropout=0.0).train(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        x, bins = pairs(rho, 64, 4, generator)
        withheld = torch.rand(len(x), 1, generator=generator) < 0.25
        (tokens, mask, targets), _ = texts_of(model, bins)
        states = model.decoder.hidden_states(tokens, memory_of(model, x).mask_out(withheld), mask)[..., -1, :]
        logits = model.decoder.logits(states.flatten(0, 1))
        loss = torch.nn.functional.cross_entropy(logits, targets[..., -1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def variance_explained(p_of_x, p):
    """1 - E[Var(Y|X)] / Var(Y), of shares p_of_x [n, BINS] given each x, and p [BINS] of all."""
    inner, whole = (p_ @ MIDDLES**2 - (p_ @ MIDDLES) ** 2 for p_ in (p_of_x, p))
    return (1 - inner.mean() / whole).item()


def true_shares(rho, x):
    """The share of every bin given each x, [n, BINS], by the normal distribution itself."""
    edges = [-math.inf, *(MIDDLES[:-1] + WIDTH / 2).tolist(), math.inf]
    normals = [NormalDist(rho * one, math.sqrt(1 - rho**2)) for one in x.tolist()]
    below = torch.tensor([[normal.cdf(edge) for edge in edges] for normal in normals])
    return below.diff(dim=-1)


def predicted_shares(model, x):
    """The share of every bin given each x, and given nothing."""
    (tokens, mask, _), letters = texts_of(model, torch.zeros(len(x), 1, dtype=torch.long))
    memories = memory_of(model, x), model.decoder.empty_memory(len(x))
    given_x, blind = (model.decoder(tokens, memory, mask)[:, 0, -1].softmax(-1)[:, letters] for memory in memories)
    return given_x, blind[0]


def measured_gain(model, rho):
    x, bins = pairs(rho, 4000, 5, torch.Generator().manual_seed(2))
    (tokens, mask, targets), _ = texts_of(model, bins)
    return information_gain(model.decoder, memory_of(model, x), tokens, mask, targets)[..., -1].mean().item()


def test_a_model_that_learned_two_normals_explains_rho_squared_and_saves_the_bits_of_the_channel():
    model = trained(RHO, 700)
    x = torch.randn(2000, generator=torch.Generator().manual_seed(3))
    given_x, blind = predicted_shares(model, x)
    explained, exact = variance_explained(given_x, blind), variance_explained(true_shares(RHO, x), blind)
    print(f"explained {explained:.4f}, of the bins exactly {exact:.4f}, of the normals {RHO**2:.4f}")
    assert explained == pytest.approx(RHO**2, abs=0.03), "bins take 0.009, a model that met 180,000 pairs errs by 0.01"
    gain, bits = measured_gain(model, RHO), -0.5 * math.log2(1 - RHO**2)
    print(f"gain {gain:.4f}, of the normals {bits:.4f}")
    assert gain == pytest.approx(bits, abs=0.05), "bins take 0.016, the sample errs by 0.008, the model by its training"


def test_where_nothing_is_shared_nothing_is_gained():
    model = trained(0.0, 80)
    given_x, blind = predicted_shares(model, torch.linspace(-2, 2, 50))
    assert variance_explained(given_x, blind) == pytest.approx(0.0, abs=0.03)
    assert measured_gain(model, 0.0) == pytest.approx(0.0, abs=0.02)
