"""Information gain: bits equal probabilities of single texts, and a channel of known capacity is measured."""

import math
from statistics import NormalDist

import pytest
import torch
from decoder_cases import random_decoder, random_memory, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.interpret import TextBatch
from mmx.interpret.information import information_gain, surprisal, word_bits, word_ids
from mmx.models.source import SourceBatch
from mmx.testing import tiny_model, toy_tokenizer
from mmx.text.tokenizer import Tokenizer

# ---- bits of tokens ----------------------------------------------------------------------------------------------


@pytest.fixture
def case():
    """A decoder, two memories, and three texts for each with targets at some positions."""
    torch.manual_seed(3)
    decoder = random_decoder()
    memory = random_memory(masked=1)
    tokens = random_tokens(2, 3, 6)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 2, 4:] = False
    targets = torch.where(mask, random_tokens(2, 3, 6), -100)
    targets[:, :, 0] = -100
    return decoder, memory, TextBatch(tokens, targets, mask)


def test_surprisal_is_the_probability_of_each_target_with_its_text_alone(case):
    decoder, memory, text = case
    found = surprisal(decoder, memory, text)
    for b, k in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        length = int(text.mask[b, k].sum())
        logits = decoder(text.tokens[b : b + 1, k : k + 1, :length], memory.select([b]))
        probabilities = logits[0, 0].softmax(-1)
        for position in range(6):
            token = int(text.targets[b, k, position])
            expected = -math.log2(probabilities[position, token]) if token >= 0 else 0.0
            assert found[b, k, position].item() == pytest.approx(expected, abs=1e-4)


def test_information_gain_is_a_difference_of_surprisals_and_zero_without_slots(case):
    decoder, memory, text = case
    empty = decoder.empty_memory(2)
    gain = information_gain(decoder, memory, text)
    assert torch.allclose(gain, surprisal(decoder, empty, text) - surprisal(decoder, memory, text), atol=1e-6)
    assert (gain.abs()[text.targets >= 0] > 1e-3).all(), "the memory changes every probability"
    assert not information_gain(decoder, empty, text).any()
    part = memory.mask_out(torch.arange(5) < 2)
    rest = information_gain(decoder, memory, text, baseline=part)
    assert torch.allclose(gain, rest + information_gain(decoder, part, text), atol=1e-5), "gains add up"
    masked = memory.mask_out(torch.ones(5, dtype=torch.bool))
    assert torch.allclose(information_gain(decoder, masked, text), torch.zeros(2, 3, 6), atol=1e-5)


# ---- tokens to words ---------------------------------------------------------------------------------------------


def test_words_begin_with_a_space_and_the_end_token_is_a_word():
    tokenizer = toy_tokenizer()
    # Every byte is a token; the first one is the space before "a".
    tokens = [*tokenizer.encode("a dog, né"), tokenizer.eos_token_id]
    assert word_ids(tokenizer, tokens) == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_merged_tokens_belong_to_one_word():
    tokenizer = Tokenizer.train(["the dogs run, the dogs ran"] * 4, 300)
    tokens = tokenizer.encode("the dogs run, ran")
    assert len(tokens) < 12, "some letters are merged"
    assert word_ids(tokenizer, tokens)[-1] == 3
    assert word_ids(tokenizer, []) == []
    assert word_ids(tokenizer, [tokenizer.eos_token_id]) == [0]


@settings(max_examples=50, deadline=None)
@given(st.text("abé,'☃ ", max_size=20))
def test_there_are_as_many_words_as_parts_between_spaces(text):
    tokenizer = toy_tokenizer()
    text = " ".join(text.split())
    ids = word_ids(tokenizer, tokenizer.encode(text)) if text else []
    assert (ids[-1] + 1 if ids else 0) == len(text.split())
    assert all(later - earlier in (0, 1) for earlier, later in zip(ids, ids[1:], strict=False))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9), st.booleans()), max_size=12))
def test_bits_are_summed_over_the_tokens_of_a_word(tokens):
    ids = []
    expected = []
    for bits, begins_word in tokens:
        if begins_word or not ids:
            expected.append(0.0)
        expected[-1] += bits
        ids.append(len(expected) - 1)
    bits = torch.tensor([bits for bits, _ in tokens], dtype=torch.float64)
    assert word_bits(bits, ids).tolist() == pytest.approx(expected, abs=1e-9)
    assert word_bits(bits.expand(2, 3, -1), ids).shape == (2, 3, len(expected))


# ---- a channel of known capacity ---------------------------------------------------------------------------------
#
# x and y are normal with correlation rho. The encoder reads x, the decoder generates y as one of 15 letters for bins of
# width h = 0.4 from -3 to 3. For the normal pair, Var(Y|X) = (1 - rho^2) Var(Y), and the mutual information is
# -log2(1 - rho^2) / 2 bits (Cover & Thomas 2006, section 8.5). Bins add h^2/12 = 0.0133 to both variances (Sheppard):
# rho^2 = 0.64 becomes 0.632, and 0.737 bits become 0.721, less the part that the outer bins cut off.
# With 20,000 pairs the information has a standard error of rho / ln 2 / sqrt(20000) = 0.008 bits.

BINS, BIN_WIDTH, RHO = 15, 0.4, 0.8
CENTERS = (torch.arange(BINS) - (BINS - 1) / 2) * BIN_WIDTH
DROPPED = 0.25  # fraction of the training pairs without x


def sample_pairs(rho, count, draws, generator):
    """x [B], and the bins [B, K] of K draws of y for each."""
    x = torch.randn(count, generator=generator)
    noise = torch.randn(count, draws, generator=generator)
    y = rho * x[:, None] + math.sqrt(1 - rho**2) * noise
    return x, ((y - CENTERS[0]) / BIN_WIDTH).round().clamp(0, BINS - 1).long()


def letter_tokens(model):
    return torch.tensor([model.tokenizer.encode(letter)[-1] for letter in "abcdefghijklmno"])


def bin_texts(model, bins):
    """Prompts whose last target is the letter of the bins [B, K]."""
    prompt = torch.tensor(model.tokenizer.encode_prompt(model.prompt()))
    tokens = prompt.expand(*bins.shape, -1)
    targets = torch.full_like(tokens, -100)
    targets[..., -1] = letter_tokens(model)[bins]
    return TextBatch(tokens, targets)


def encode_numbers(model, x):
    numbers = {"numbers": x[:, None], "mask": torch.ones(len(x), 1, dtype=torch.bool)}
    return model.encode({"numbers": SourceBatch(numbers, torch.arange(len(x)))}, len(x))


def train_model(rho, steps):
    model = tiny_model(num_layers=1, dropout=0.0).train()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        x, bins = sample_pairs(rho, 64, 4, generator)
        dropped = torch.rand(len(x), 1, generator=generator) < DROPPED
        text = bin_texts(model, bins)
        memory = encode_numbers(model, x).mask_out(dropped)
        states = model.decoder.hidden_states(text.tokens, memory)[..., -1, :]
        logits = model.decoder.logits(states.flatten(0, 1))
        loss = torch.nn.functional.cross_entropy(logits, text.targets[..., -1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def explained_variance(conditional, marginal):
    """1 - E[Var(Y|X)] / Var(Y), for probabilities [n, BINS] given each x and marginal ones [BINS]."""
    within, total = (p @ CENTERS**2 - (p @ CENTERS) ** 2 for p in (conditional, marginal))
    return (1 - within.mean() / total).item()


def true_probabilities(rho, x):
    """The probability of each bin given each x, [n, BINS], by the normal distribution."""
    edges = [-math.inf, *(CENTERS[:-1] + BIN_WIDTH / 2).tolist(), math.inf]
    rows = []
    for value in x.tolist():
        normal = NormalDist(rho * value, math.sqrt(1 - rho**2))
        rows.append([normal.cdf(edge) for edge in edges])
    return torch.tensor(rows).diff(dim=-1)


def predicted_probabilities(model, memory):
    """The probability of each bin for each row of a memory, [n, BINS]."""
    text = bin_texts(model, torch.zeros(memory.batch_size, 1, dtype=torch.long))
    return model.decoder(text.tokens, memory)[:, 0, -1].softmax(-1)[:, letter_tokens(model)]


def model_explained_variance(model, x):
    marginal = predicted_probabilities(model, model.decoder.empty_memory(1))[0]
    return explained_variance(predicted_probabilities(model, encode_numbers(model, x)), marginal)


def measured_gain(model, rho):
    x, bins = sample_pairs(rho, 4000, 5, torch.Generator().manual_seed(2))
    return information_gain(model.decoder, encode_numbers(model, x), bin_texts(model, bins))[..., -1].mean().item()


def test_a_model_of_two_normals_explains_rho_squared_and_gains_the_bits_of_the_channel():
    model = train_model(RHO, 200)
    x = torch.randn(2000, generator=torch.Generator().manual_seed(3))
    explained = model_explained_variance(model, x)
    marginal = predicted_probabilities(model, model.decoder.empty_memory(1))[0]
    exact = explained_variance(true_probabilities(RHO, x), marginal)
    print(f"explained {explained:.4f}, of the bins exactly {exact:.4f}, of the normals {RHO**2:.4f}")
    assert explained == pytest.approx(RHO**2, abs=0.03), "0.009 from bins, 0.015 from training on 51,000 pairs"
    gain = measured_gain(model, RHO)
    bits = -0.5 * math.log2(1 - RHO**2)
    print(f"gain {gain:.4f}, of the normals {bits:.4f}")
    assert gain == pytest.approx(bits, abs=0.05), "0.016 from bins, 0.008 from the sample, the rest from training"


def test_independent_variables_have_no_information_gain():
    model = train_model(0.0, 80)
    assert model_explained_variance(model, torch.linspace(-2, 2, 50)) == pytest.approx(0.0, abs=0.03)
    assert measured_gain(model, 0.0) == pytest.approx(0.0, abs=0.02)
