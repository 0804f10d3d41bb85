"""Whisper's language, task and missing speech: the same languages and tokens as transformers, row by row."""

from pathlib import Path

import pytest
import torch
import yaml
from parity_cases import strip_generated
from transformers import GenerationMixin, WhisperForConditionalGeneration
from whisper_cases import (
    EOS,
    MULTILINGUAL,
    NO_TIMES,
    PROMPT,
    START,
    SUPPRESSED,
    TRANSCRIBE,
    TRANSLATE,
    build,
    save,
)

import mmx
from mmx.config.schema import GenerationConfig
from mmx.errors import MmxError
from mmx.generation.outputs import GenerationOutput
from mmx.inference import speech
from mmx.inference.speech import SpeechProperties, is_without_speech
from mmx.models.checkpoint import load_generation, save_model

RATE = 16_000
LANGUAGES = {"<|en|>": 2, "<|de|>": 3, "<|fr|>": 40, "<|it|>": 41, "<|ja|>": 42, "<|ko|>": 43}
NO_SPEECH = 7  # the first further token
MODEL_SEED = 3


def noises(count, seconds=0.8):
    """Inputs that differ."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for index in range(count):
        loudness = 0.4 * (index + 1) / count
        noise = torch.randn(int(seconds * RATE), generator=generator)
        tone = torch.sin(torch.arange(len(noise)) * (index + 1) / 40)
        samples.append((loudness * (0.1 * noise + tone), RATE))
    return samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("whisper")
    return save(
        path, build(MODEL_SEED), ("<|nospeech|>",), **{**MULTILINGUAL, "lang_to_id": LANGUAGES}, max_new_tokens=12
    )


@pytest.fixture(scope="module")
def pipeline(folder):
    return mmx.load(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return WhisperForConditionalGeneration.from_pretrained(folder).eval()


def spectra(pipeline, inputs):
    return pipeline.model.collate("audio", inputs).inputs["spectrum"]


def transformers_tokens(pipeline, reference, inputs, language=None, task=TRANSCRIBE, **options):
    """The texts of transformers. Its own generate would take the tokens of this tiny vocabulary for timestamps."""
    features = spectra(pipeline, inputs)
    languages = [language] * len(inputs) if language else reference.detect_language(features).tolist()
    prompts = torch.tensor([[START, detected, task, NO_TIMES] for detected in languages])
    settings = {"max_new_tokens": 12, **SUPPRESSED, **options}
    with torch.no_grad():
        generated = GenerationMixin.generate(reference, features, decoder_input_ids=prompts, **settings)
    return strip_generated(generated, 4, EOS)


def code_of(function, *arguments, **options):
    with pytest.raises(MmxError) as error:
        function(*arguments, **options)
    return error.value.code


def test_languages_are_those_that_transformers_detects(pipeline, reference):
    inputs = noises(8)
    expected = reference.detect_language(spectra(pipeline, inputs)).tolist()
    found = [result.language for _, result in pipeline.captions(inputs, batch_size=3)]
    assert [LANGUAGES[f"<|{code}|>"] for code in found] == expected
    assert len(set(found)) > 1, "a batch may mix languages"


def test_tokens_without_a_language_are_those_of_transformers(pipeline, reference):
    inputs = noises(6)
    expected = transformers_tokens(pipeline, reference, inputs)
    memory = pipeline.encode(audio=inputs)
    ours = pipeline.generate_tokens(memory, [[None]] * 6, pipeline.generation_config({}))
    assert [list(row[0][0].tokens) for row in ours] == expected
    assert len({tuple(text) for text in expected}) > 1


@pytest.mark.parametrize("language", ["fr", "French", "<|fr|>", "FRENCH"])
def test_a_given_language_and_task_are_those_of_transformers(pipeline, reference, language):
    (item,) = noises(1)
    options = {"language": language, "task": "translate", "max_new_tokens": 8}
    text = transformers_tokens(pipeline, reference, [item], LANGUAGES["<|fr|>"], TRANSLATE, max_new_tokens=8)[0]
    result = pipeline.generate(item, **options)[0]
    assert (result.language, result.language_score, result.task) == ("fr", None, "translate")
    assert result.text == pipeline.model.tokenizer.decode(text)
    assert result.text != pipeline.caption(item, max_new_tokens=8, language="ja")


def test_scores_are_probabilities_after_the_first_token(pipeline, reference):
    """Of the language among the languages, of no speech among all tokens."""
    inputs = noises(3)
    with torch.no_grad():
        tokens = torch.full((3, 1), START)
        logits = reference(input_features=spectra(pipeline, inputs), decoder_input_ids=tokens).logits[:, 0]
    languages = logits[:, list(LANGUAGES.values())].softmax(-1).max(-1).values
    for (_, result), language, row in zip(pipeline.captions(inputs), languages, logits.softmax(-1), strict=True):
        assert result.language_score == pytest.approx(float(language), rel=1e-3)
        assert result.no_speech_prob == pytest.approx(float(row[NO_SPEECH]), rel=1e-3, abs=1e-6)
        assert result.task == "transcribe"


def test_rows_of_a_batch_equal_single_inputs(pipeline):
    inputs = noises(5)
    single = [pipeline.generate(item)[0] for item in inputs]
    together = [result for _, result in pipeline.captions(inputs, batch_size=5)]
    assert [(one.text, one.language) for one in single] == [(one.text, one.language) for one in together]
    assert [list(pipeline.stream(item))[-1] for item in inputs] == [one.text for one in single]


def test_rank_and_look_use_the_detected_language(pipeline):
    item = next(item for item, result in pipeline.captions(noises(8)) if result.language != "en")
    memory = pipeline.encode(audio=item)
    prompt = pipeline.prompt_of(memory, None, pipeline.generation)
    assert prompt[1] == LANGUAGES[f"<|{pipeline.generate(item)[0].language}|>"]
    assert pipeline.look(item).text == pipeline.caption(item)
    fixed = pipeline.look(item, language="ja")
    assert fixed.text == pipeline.caption(item, language="ja")


def test_unknown_languages_and_tasks_are_errors(pipeline):
    (item,) = noises(1)
    assert code_of(pipeline.caption, item, language="frensh") == "generation.language"
    assert code_of(pipeline.caption, item, language="da") == "generation.language", "not of this model"
    assert code_of(pipeline.caption, item, task="summarize") == "config.value"
    given = GenerationConfig(language="xx")
    assert code_of(pipeline.generate_batch, pipeline.encode(audio=item), [[None]], given) == "generation.language"


def test_a_model_without_languages_refuses_them(tmp_path):
    english_only = mmx.load(save(tmp_path, build()))
    (item,) = noises(1)
    result = english_only.generate(item)[0]
    assert (result.language, result.language_score, result.task, result.no_speech_prob) == (None,) * 4
    assert result.speech_fields() == {}
    assert code_of(english_only.caption, item, language="en") == "generation.no_languages"
    assert code_of(english_only.caption, item, task="transcribe") == "generation.no_languages"
    bundled = mmx.load()
    assert code_of(bundled.caption, torch.zeros(3, 8, 8), language="en") == "generation.no_languages"


def test_a_language_of_the_published_configuration_is_kept(tmp_path):
    pipeline = mmx.load(save(tmp_path, build(), **MULTILINGUAL, language="german"))
    assert pipeline.generation.language == "de"
    assert pipeline.generate(noises(1)[0])[0].language == "de"
    forced = [[1, MULTILINGUAL["lang_to_id"]["<|de|>"]], [2, TRANSCRIBE]]
    (tmp_path / "forced").mkdir()
    forced_pipeline = mmx.load(save(tmp_path / "forced", build(), **MULTILINGUAL, forced_decoder_ids=forced))
    assert forced_pipeline.generation.language == "de"


def test_languages_survive_saving(folder, pipeline, tmp_path):
    saved = save_model(tmp_path / "saved", mmx.load(folder).model, None, pipeline.generation)
    again = mmx.load(saved)
    inputs = noises(6)
    for (_, first), (_, second) in zip(pipeline.captions(inputs), again.captions(inputs), strict=True):
        assert (first.text, first.language, first.no_speech_prob) == (
            second.text,
            second.language,
            pytest.approx(second.no_speech_prob),
        )


def test_folders_of_before_keep_their_fixed_language(folder, pipeline, tmp_path):
    """Without the key `speech` the prompt is fixed."""
    saved = save_model(tmp_path / "saved", mmx.load(folder).model, None, pipeline.generation)
    path = Path(saved) / "config.yaml"
    config = yaml.safe_load(path.read_text())
    del config["speech"]
    path.write_text(yaml.safe_dump(config))
    generation = yaml.safe_load((Path(saved) / "generation.yaml").read_text())
    del generation["language"], generation["task"]
    (Path(saved) / "generation.yaml").write_text(yaml.safe_dump(generation))
    old = mmx.load(saved)
    assert load_generation(saved).language is None
    assert old.model.tokenizer.encode_prompt(old.model.prompt()) == PROMPT
    for item in noises(4):
        result = old.generate(item)[0]
        assert (result.language, result.text) == (None, pipeline.caption(item, language="en"))
    assert code_of(old.caption, noises(1)[0], language="de") == "generation.no_languages"


@pytest.mark.parametrize(
    ("no_speech_prob", "logprobs", "expected"),
    [
        (0.7, (-1.5, -0.9), True),
        (0.7, (-1.5, -0.4), False),
        (0.5, (-3.0, -3.0), False),
        (None, (-3.0, -3.0), False),
        (0.7, (), False),
    ],
)
def test_text_without_speech_is_improbable_text(no_speech_prob, logprobs, expected):
    properties = SpeechProperties(no_speech_prob=no_speech_prob)
    output = GenerationOutput((5,) * len(logprobs), logprobs, sum(logprobs), finished=False)
    assert is_without_speech(properties, output) == expected


def test_missing_speech_gives_an_empty_text(pipeline, monkeypatch):
    (item,) = noises(1)
    heard = pipeline.generate(item)[0]
    assert heard.text
    monkeypatch.setattr(speech, "NO_SPEECH_THRESHOLD", heard.no_speech_prob / 2)
    monkeypatch.setattr(speech, "LOGPROB_THRESHOLD", heard.score - 1.0)
    assert pipeline.generate(item)[0].text == heard.text, "a probable text is kept"
    assert list(pipeline.stream(item)) == [heard.text]
    monkeypatch.setattr(speech, "LOGPROB_THRESHOLD", heard.score + 1.0)
    dropped = pipeline.generate(item)[0]
    assert (dropped.text, dropped.tokens) == ("", ())
    assert (dropped.no_speech_prob, dropped.score) == (heard.no_speech_prob, heard.score)
    assert list(pipeline.stream(item)) == [""]
    assert next(iter(pipeline.captions([item])))[1].text == ""


@pytest.mark.parametrize("level", [0.0, 5e-5])
def test_audio_without_sound_is_not_decoded(pipeline, level, monkeypatch):
    noise = torch.rand(RATE // 2, generator=torch.Generator().manual_seed(0)) * level
    (item,) = noises(1)
    expected = pipeline.caption(item)
    encoded = []
    encode = mmx.Pipeline.encode_prepared
    monkeypatch.setattr(mmx.Pipeline, "encode_prepared", lambda self, p: encoded.append(len(p)) or encode(self, p))
    result = pipeline.generate((noise, RATE))[0]
    assert (result.text, result.no_speech_prob, result.language) == ("", 1.0, None)
    assert list(pipeline.stream((noise, RATE)))[-1] == ""
    assert encoded == []
    mixed = [result.text for _, result in pipeline.captions([(noise, RATE), item, (noise, RATE)])]
    assert mixed == ["", expected, ""]
    assert encoded == [1]


# ---- windows ---------------------------------------------------------------------------------------------------


def long_audio(seconds=3.4):
    """Audio of several windows, with a pause of silence of more than a window."""
    samples = torch.cat([item[0] for item in noises(5, 1.0)])
    samples[int(1.5 * RATE) : int(2.8 * RATE)] = 0
    return samples[: int(seconds * RATE)], RATE


def test_the_text_of_long_audio_is_that_of_its_windows(pipeline):
    samples, rate = long_audio()
    result = pipeline.generate((samples, rate))[0]
    assert len(result.windows) > 3
    assert (result.windows[0].start, result.windows[-1].end) == (0.0, len(samples) / rate)
    for window in result.windows:
        part = samples[round(window.start * rate) : round(window.end * rate)]
        alone = pipeline.generate((part, rate))[0]
        assert (alone.text, alone.language, alone.windows) == (window.text, window.language, ())
        assert alone.no_speech_prob == pytest.approx(window.no_speech_prob, rel=1e-3)
    assert result.text == " ".join(window.text for window in result.windows if window.text)
    assert "" in [window.text for window in result.windows], "the pause"
    assert pipeline.caption((samples, rate)) == result.text
    assert result.no_speech_prob == min(window.no_speech_prob for window in result.windows)


def test_long_audio_is_streamed_window_by_window(pipeline):
    audio = long_audio()
    result = pipeline.generate(audio)[0]
    grown = list(pipeline.stream(audio))
    assert grown[-1] == result.text
    assert result.windows[0].text in grown, "the first window is complete before the second begins"
    assert all(text.startswith(result.windows[0].text) for text in grown[grown.index(result.windows[0].text) :])


def test_batches_hold_no_more_windows_than_inputs(pipeline, monkeypatch):
    audio = long_audio()
    short = noises(2)
    expected = [pipeline.caption(item) for item in (short[0], audio, short[1])]
    rows = []
    encode = mmx.Pipeline.encode_prepared
    monkeypatch.setattr(mmx.Pipeline, "encode_prepared", lambda self, p: rows.append(len(p)) or encode(self, p))
    results = list(pipeline.captions([short[0], audio, "missing.wav", short[1]], batch_size=2))
    assert [getattr(result, "text", None) for _, result in results] == [*expected[:2], None, expected[2]]
    assert results[2][1].code == "audio.missing"
    assert max(rows) == 2


def test_one_memory_has_no_windows(pipeline):
    audio = long_audio()
    assert code_of(pipeline.encode, audio=audio) == "audio.too_long"
    assert code_of(pipeline.look, audio) == "audio.too_long"
    assert code_of(pipeline.rank, audio, None, ["a"]) == "audio.too_long"
    assert code_of(pipeline.generate, audio, num_beams=2, num_return_sequences=2) == "audio.too_long"
