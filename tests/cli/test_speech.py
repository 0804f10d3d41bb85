"""`mmx caption` with speech: windows, language and task in the rows, and refused options."""

import wave

import pytest
import torch
from cli_cases import OK, read_rows, write_jsonl
from whisper_cases import MULTILINGUAL, build, save

RATE = 16_000


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A model that reads one second."""
    folder = tmp_path_factory.mktemp("whisper")
    return save(folder, build(), ("<|nospeech|>",), **MULTILINGUAL, max_new_tokens=4)


def write_wav(path, seconds, level=0.3):
    samples = torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(2)).clamp(-1, 1) * level
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((samples * 32767).short().numpy().tobytes())
    return path


def test_rows_have_windows_language_and_task(mmx, whisper, tmp_path):
    pytest.importorskip("soundfile")
    files = [write_wav(tmp_path / "long.wav", 2.5), write_wav(tmp_path / "a.wav", 0.5)]
    silent = write_wav(tmp_path / "silent.wav", 1.5, level=0.0)
    out = tmp_path / "texts.jsonl"
    words = ("caption", *files, silent, "--model", whisper, "--out", out, "--batch-size", 2)
    assert mmx(*words).outputs == OK
    long, short, silence = read_rows(out)
    assert [window["start"] for window in long["windows"]] == [0.0, *(w["end"] for w in long["windows"][:-1])]
    assert (len(long["windows"]), long["windows"][-1]["end"]) == (3, 2.5)
    assert long["caption"] == " ".join(window["text"] for window in long["windows"])
    assert long["language"] in {window["language"] for window in long["windows"]}
    assert "windows" not in short
    for row in (long, short):
        assert 0.5 <= row["language_score"] <= 1.0, "the more probable of two"
        assert row["task"] == "transcribe"
        assert 0 <= row["no_speech_prob"] <= 1
    assert (silence["caption"], silence["no_speech_prob"]) == ("", 1.0)
    content = out.read_bytes()
    assert mmx(*words).outputs == OK
    assert out.read_bytes() == content, "a continued run has nothing left to do"
    again = tmp_path / "again.jsonl"
    assert (
        mmx("caption", out, "--model", whisper, "--out", again, "--language", "German", "--task", "translate").code == 0
    )
    rows = read_rows(again)
    assert [row["audio"] for row in rows] == [str(path) for path in (*files, silent)]
    assert [(row.get("language"), row.get("task")) for row in rows[:2]] == [("de", "translate")] * 2
    assert "language_score" not in rows[0], "the results of the list are replaced"


def test_options_of_speech_are_refused_with_a_suggestion(mmx, whisper, model, images, tmp_path):
    audio = write_wav(tmp_path / "a.wav", 0.5)
    assert mmx("caption", audio, "--model", whisper, "--language", "germn").refused().code == "generation.language"
    assert mmx("caption", audio, "--model", whisper, "--task", "sing").refused().code == "option.task"
    assert mmx("caption", images[0], "--model", model, "--language", "de").refused().code == "generation.no_languages"


def test_lists_of_images_keep_a_field_named_language(mmx, model, images, tmp_path):
    """Only a model that reads audio has results of this name."""
    lines = [{"image": str(images[0]), "language": "de"}, {"image": str(images[0]), "language": "fr"}]
    data = write_jsonl(tmp_path / "list.jsonl", *lines)
    out = tmp_path / "captions.jsonl"
    assert mmx("caption", data, "--model", model, "--out", out).outputs == OK
    assert [row["language"] for row in read_rows(out)] == ["de", "fr"]
