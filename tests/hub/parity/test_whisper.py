"""Whisper in mmx against transformers: the same logits in float64, the same tokens, the same opening of a text."""

import json

import pytest
import torch
from parity_cases import assert_diverse, assert_logits, byte_tokenizer, read, saved, randomized, generated, until_end
from transformers import (
    GenerationMixin,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from mmx.errors import CheckpointError
from mmx.hub import load_hf_model
from mmx.models.source import SourceBatch

MEL, FRAMES, SIZE = 8, 50, 120
EOS, START, ENGLISH, GERMAN, TRANSLATE, TRANSCRIBE, UNTIMED = range(7)
PROMPT = [START, ENGLISH, TRANSCRIBE, UNTIMED]
NAMES = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|no|>"]
MULTILINGUAL = {
    "lang_to_id": {"<|en|>": ENGLISH, "<|de|>": GERMAN},
    "task_to_id": {"translate": TRANSLATE, "transcribe": TRANSCRIBE},
    "is_multilingual": True,
}
SUPPRESSED = {"suppress_tokens": [20, 21, 22, START], "begin_suppress_tokens": [30, EOS]}
FACTS = {"no_timestamps_token_id": UNTIMED, "max_length": 40, **SUPPRESSED}


def build(seed=0):
    """A tiny reference."""
    facts = {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": SIZE}
    facts |= {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 48}
    facts |= {"num_mel_bins": MEL, "max_source_positions": FRAMES, "max_target_positions": 30, "scale_embedding": True}
    special = {"bos_token_id": EOS, "pad_token_id": EOS, "eos_token_id": EOS, "decoder_start_token_id": START}
    return randomized(WhisperForConditionalGeneration(WhisperConfig(**facts, **special)), seed, size=0.4)


def published(folder, reference, **generation):
    """A folder as it is published; `generation`: facts of generation_config.json."""
    tokenizer = byte_tokenizer(SIZE, bos_token=NAMES[0], eos_token=NAMES[0])
    tokenizer.add_special_tokens({"additional_special_tokens": NAMES[1:]})
    saved(folder, reference, tokenizer, WhisperFeatureExtractor(feature_size=MEL, chunk_length=1))
    path = folder / "generation_config.json"
    facts = json.loads(path.read_text())
    del facts["_from_model_config"]  # or transformers would not believe what is added
    path.write_text(json.dumps(facts | FACTS | generation))
    return str(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(the reference in float64, what mmx made of its folder)."""
    reference = build()
    folder = published(tmp_path_factory.mktemp("published"), reference, **MULTILINGUAL)
    return reference.double(), read(folder)


def spectra(count):
    return torch.randn(count, MEL, 2 * FRAMES, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def encoded(model, given):
    return model.encode({"audio": SourceBatch({"spectrum": given}, torch.arange(len(given)))}, len(given))


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_are_the_same_at_every_position(pair, batch):
    reference, model = pair
    tokens = torch.randint(1, SIZE, (batch, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(input_features=spectra(batch), decoder_input_ids=tokens).logits
        assert_logits(model, encoded(model, spectra(batch)), tokens, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "early_stopping": True}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_texts_are_the_same(pair, batch, options):
    reference, model = pair
    with torch.no_grad():
        prompts = torch.tensor([PROMPT] * batch)
        theirs = GenerationMixin.generate(
            reference, spectra(batch), decoder_input_ids=prompts, max_new_tokens=16, **SUPPRESSED, **options
        )
        memory = encoded(model, spectra(batch))
        ours = generated(model, memory, [[PROMPT]] * batch, max_new_tokens=16, **SUPPRESSED, **options)
    assert [row[0] for row in ours] == until_end(theirs, len(PROMPT), EOS)
    if batch > 1:
        assert_diverse([row[0] for row in ours])


def test_as_it_is_published_it_says_what_transformers_own_whisper_says(tmp_path):
    """With the opening, the lengths and the suppressed tokens of the folder itself, nothing said by the caller."""
    folder = published(tmp_path, build(), **MULTILINGUAL, language="en", task="transcribe")
    model, generation, _ = load_hf_model(folder)
    model.double()
    assert model.tokenizer.encode_prompt(model.prompt()) == PROMPT
    assert generation.max_new_tokens == 30 - len(PROMPT), "no more than there are positions for"
    reference = WhisperForConditionalGeneration.from_pretrained(folder).double()
    with torch.no_grad():
        theirs = reference.generate(spectra(3), max_new_tokens=26)
        ours = generated(model, encoded(model, spectra(3)), [[PROMPT]] * 3, **generation.model_dump())
    texts = [row[row.index(UNTIMED) + 1 :] if UNTIMED in row else row for row in theirs.tolist()]
    expected = [text[: text.index(EOS)] if EOS in text else text for text in texts]
    assert [row[0] for row in ours] == expected
    assert_diverse(expected)


def test_the_waves_of_a_sound_are_looked_at_as_transformers_hears_them(pair):
    reference, model = pair
    sound = torch.randn(9000, generator=torch.Generator().manual_seed(3)).numpy() * 0.1
    heard = WhisperFeatureExtractor(feature_size=MEL, chunk_length=1)(
        sound, sampling_rate=16000, return_tensors="pt"
    ).input_features.double()
    given = model.collate("audio", [(sound, 16000)])
    torch.testing.assert_close(given.inputs["spectrum"].double(), heard)
    with torch.no_grad():
        states = model.encoder("audio")({"spectrum": heard}).states
        torch.testing.assert_close(states, reference.get_encoder()(heard).last_hidden_state)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (MULTILINGUAL, PROMPT),
        ({**MULTILINGUAL, "language": "german"}, [START, GERMAN, TRANSCRIBE, UNTIMED]),
        ({**MULTILINGUAL, "language": "<|de|>", "task": "translate"}, [START, GERMAN, TRANSLATE, UNTIMED]),
        ({**MULTILINGUAL, "forced_decoder_ids": [[1, None], [2, TRANSLATE]]}, [START, ENGLISH, TRANSLATE, UNTIMED]),
        (
            {**MULTILINGUAL, "forced_decoder_ids": [[1, GERMAN], [2, TRANSCRIBE], [3, UNTIMED]]},
            [START, GERMAN, TRANSCRIBE, UNTIMED],
        ),
        ({}, [START, UNTIMED]),
        ({"forced_decoder_ids": [[1, UNTIMED]]}, [START, UNTIMED]),
    ],
    ids=["nothing said", "a name", "a token", "a task forced", "all forced", "English alone", "English, forced"],
)
def test_the_opening_is_what_the_folder_says(tmp_path, facts, expected):
    model, generation, _ = load_hf_model(published(tmp_path, build(), **facts))
    assert model.tokenizer.encode_prompt(model.prompt()) == expected
    assert generation.suppress_tokens == tuple(SUPPRESSED["suppress_tokens"])
    assert generation.begin_suppress_tokens == tuple(SUPPRESSED["begin_suppress_tokens"])


def test_a_language_that_it_does_not_speak_is_refused(tmp_path):
    folder = published(tmp_path, build(), **MULTILINGUAL, language="finnish")
    with pytest.raises(CheckpointError, match=r"is set to speak 'finnish'; expected one of en, de\.$"):
        load_hf_model(folder)


def test_keys_have_no_bias(pair):
    _, model = pair
    width = 32
    assert not model.sources["audio"].projection.key.bias.any()
    assert all(not block.self_attention.qkv.bias[width : 2 * width].any() for block in model.decoder.layers)
    assert all(block.self_attention.qkv.bias[:width].any() for block in model.decoder.layers)


@pytest.mark.slow
def test_logits_are_the_same_at_the_published_size(tmp_path):
    """As openai/whisper-tiny: 80 bands, 30 seconds, four layers of 384 on both sides."""
    facts = {"d_model": 384, "encoder_attention_heads": 6, "decoder_attention_heads": 6, "vocab_size": 51865}
    facts |= {"encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536}
    special = {"bos_token_id": EOS, "pad_token_id": EOS, "eos_token_id": EOS, "decoder_start_token_id": START}
    torch.manual_seed(0)
    reference = WhisperForConditionalGeneration(WhisperConfig(**facts, **special)).eval()
    tokenizer = byte_tokenizer(SIZE, bos_token=NAMES[0], eos_token=NAMES[0])
    tokenizer.add_special_tokens({"additional_special_tokens": NAMES[1:]})
    folder = saved(tmp_path, reference, tokenizer, WhisperFeatureExtractor())
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | FACTS | MULTILINGUAL))
    model = load_hf_model(folder)[0]
    given = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(7))
    tokens = torch.randint(1, 51865, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(input_features=given, decoder_input_ids=tokens).logits
        found = model.decoder(tokens[:, None], encoded(model, given))[:, 0]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
