"""Whisper in mmx against transformers: the same logits in float64, the same generated tokens, the same prompt."""

import json

import pytest
import torch
from parity_cases import (
    PUBLISHED_SIZE_TOLERANCE,
    assert_diverse,
    assert_logits,
    byte_tokenizer,
    encode_inputs,
    generate_tokens,
    load_double,
    load_error,
    relative_difference,
    save_all,
    strip_generated,
)
from transformers import (
    GenerationMixin,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from whisper_cases import (
    ENGLISH,
    EOS,
    FRAMES,
    GENERATION,
    GERMAN,
    HIDDEN_SIZE,
    MEL_BANDS,
    MULTILINGUAL,
    NO_TIMES,
    PROMPT,
    START,
    SUPPRESSED,
    TOKENS,
    TRANSCRIBE,
    TRANSLATE,
    VOCAB_SIZE,
    build,
    save,
)

from mmx.hub import load_hf_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(the reference, the model that mmx loads from its folder), in float64."""
    reference = build()
    folder = save(tmp_path_factory.mktemp("checkpoint"), reference, **MULTILINGUAL)
    return reference.double(), load_double(folder)


def random_spectra(count):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, MEL_BANDS, 2 * FRAMES, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_equal_at_every_position(models, batch):
    reference, model = models
    spectra = random_spectra(batch)
    tokens = torch.randint(1, VOCAB_SIZE, (batch, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(input_features=spectra, decoder_input_ids=tokens).logits
        assert_logits(model, encode_inputs(model, "audio", {"spectrum": spectra}), tokens, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "early_stopping": True}], ids=str)
def test_generated_tokens_equal(models, options):
    reference, model = models
    spectra = random_spectra(3)
    options = {**SUPPRESSED, "max_new_tokens": 16, **options}
    with torch.no_grad():
        prompts = torch.tensor([PROMPT] * 3)
        theirs = GenerationMixin.generate(reference, spectra, decoder_input_ids=prompts, **options)
        memory = encode_inputs(model, "audio", {"spectrum": spectra})
        ours = generate_tokens(model, memory, [[PROMPT]] * 3, **options)
    assert [row[0] for row in ours] == strip_generated(theirs, len(PROMPT), EOS)
    assert_diverse([row[0] for row in ours])


def test_published_settings_generate_the_text_of_transformers_own_whisper(tmp_path):
    """Prompt, lengths and suppressed tokens come from the folder."""
    folder = save(tmp_path, build(), **MULTILINGUAL, language="en", task="transcribe")
    model, generation, _ = load_hf_model(folder)
    model.double()
    assert model.tokenizer.encode_prompt(model.prompt()) == PROMPT
    assert generation.max_new_tokens == 30 - len(PROMPT), "limited by the number of positions"
    reference = WhisperForConditionalGeneration.from_pretrained(folder).double()
    spectra = random_spectra(3)
    with torch.no_grad():
        theirs = reference.generate(spectra, max_new_tokens=26)
        memory = encode_inputs(model, "audio", {"spectrum": spectra})
        ours = generate_tokens(model, memory, [[PROMPT]] * 3, **generation.model_dump())
    expected = []
    for row in theirs.tolist():
        text = row[row.index(NO_TIMES) + 1 :] if NO_TIMES in row else row
        expected.append(text[: text.index(EOS)] if EOS in text else text)
    assert [row[0] for row in ours] == expected
    assert_diverse(expected)


def test_audio_is_encoded_as_in_transformers(models):
    reference, model = models
    samples = torch.randn(9000, generator=torch.Generator().manual_seed(3)).numpy() * 0.1
    extractor = WhisperFeatureExtractor(feature_size=MEL_BANDS, chunk_length=1)
    spectrum = extractor(samples, sampling_rate=16000, return_tensors="pt").input_features.double()
    batch = model.collate("audio", [(samples, 16000)])
    torch.testing.assert_close(batch.inputs["spectrum"].double(), spectrum)
    with torch.no_grad():
        states = model.encoder("audio")({"spectrum": spectrum}).states
        torch.testing.assert_close(states, reference.get_encoder()(spectrum).last_hidden_state)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (MULTILINGUAL, PROMPT),
        ({**MULTILINGUAL, "language": "german"}, [START, GERMAN, TRANSCRIBE, NO_TIMES]),
        ({**MULTILINGUAL, "language": "<|de|>", "task": "translate"}, [START, GERMAN, TRANSLATE, NO_TIMES]),
        (
            {**MULTILINGUAL, "forced_decoder_ids": [[1, None], [2, TRANSLATE]]},
            [START, ENGLISH, TRANSLATE, NO_TIMES],
        ),
        (
            {**MULTILINGUAL, "forced_decoder_ids": [[1, GERMAN], [2, TRANSCRIBE], [3, NO_TIMES]]},
            [START, GERMAN, TRANSCRIBE, NO_TIMES],
        ),
        ({}, [START, NO_TIMES]),
        ({"forced_decoder_ids": [[1, NO_TIMES]]}, [START, NO_TIMES]),
    ],
    ids=["default", "language name", "token", "forced task", "all forced", "English only", "English only, forced"],
)
def test_prompt_follows_the_configuration(tmp_path, fields, expected):
    model, generation, _ = load_hf_model(save(tmp_path, build(), **fields))
    assert model.tokenizer.encode_prompt(model.prompt()) == expected
    assert generation.suppress_tokens == tuple(SUPPRESSED["suppress_tokens"])
    assert generation.begin_suppress_tokens == tuple(SUPPRESSED["begin_suppress_tokens"])


def test_unknown_language_is_an_error(tmp_path):
    error = load_error(save(tmp_path, build(), **MULTILINGUAL, language="finnish"))
    assert (error.code, error.details["given"], error.details["expected"]) == ("hub.language", "finnish", ["en", "de"])


def test_keys_have_no_bias(models):
    _, model = models
    assert not model.sources["audio"].projection.key.bias.any()
    for layer in model.decoder.layers:
        bias = layer.self_attention.qkv.bias
        assert not bias[HIDDEN_SIZE : 2 * HIDDEN_SIZE].any()
        assert bias[:HIDDEN_SIZE].any()


@pytest.mark.slow
def test_logits_equal_at_the_published_size(tmp_path):
    """As openai/whisper-tiny: 80 mel bands, 30 seconds, four layers of size 384 on both sides."""
    config = WhisperConfig(
        d_model=384,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        vocab_size=51865,
        encoder_layers=4,
        decoder_layers=4,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        bos_token_id=EOS,
        pad_token_id=EOS,
        eos_token_id=EOS,
        decoder_start_token_id=START,
    )
    torch.manual_seed(0)
    reference = WhisperForConditionalGeneration(config).eval()
    tokenizer = byte_tokenizer(51865, tuple(TOKENS), bos_token=TOKENS[0], eos_token=TOKENS[0])
    folder = save_all(tmp_path, reference, tokenizer, WhisperFeatureExtractor())
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | GENERATION | MULTILINGUAL))
    model = load_hf_model(folder).model
    spectrum = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(7))
    tokens = torch.randint(1, 51865, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(input_features=spectrum, decoder_input_ids=tokens).logits
        found = model.decoder(tokens[:, None], encode_inputs(model, "audio", {"spectrum": spectrum}))[:, 0]
    assert relative_difference(found, expected) < PUBLISHED_SIZE_TOLERANCE
