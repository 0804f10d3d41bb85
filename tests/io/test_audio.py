"""The one door for sounds: out comes mono, finite, at the rate; what cannot be so is refused in our words."""

import os
import pickle
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
import torch

from mmx.errors import AudioError, MmxError
from mmx.io.audio import MAX_CHANNELS, MAX_SECONDS, SUFFIXES, load_audio

soundfile = pytest.importorskip("soundfile")

RATE = 16_000
WRITTEN = {  # format, subtype: how far from what was written
    ("WAV", "PCM_16"): 1e-4,
    ("WAV", "PCM_24"): 1e-6,
    ("WAV", "FLOAT"): 1e-7,
    ("WAVEX", "PCM_16"): 1e-4,
    ("RF64", "PCM_16"): 1e-4,
    ("W64", "PCM_16"): 1e-4,
    ("FLAC", "PCM_16"): 1e-4,
    ("AIFF", "PCM_16"): 1e-4,
    ("AU", "PCM_16"): 1e-4,
    ("CAF", "PCM_16"): 1e-4,
    ("OGG", "VORBIS"): 0.05,
    ("OGG", "OPUS"): 0.1,
    ("MP3", "MPEG_LAYER_III"): 0.1,
}


def tone(hertz=220.0, seconds=0.5, rate=RATE):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples, rate=RATE, kind="WAV", subtype="PCM_16"):
    file = BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def refusal(raw, rate=RATE):
    with pytest.raises(AudioError) as caught:
        load_audio(raw, rate)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert sentence.count(";") == 2, "what was given; what was expected; what to do"
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    return caught.value


@pytest.mark.parametrize("kind", WRITTEN, ids="-".join)
def test_every_format(kind):
    heard = load_audio(encoded(tone(), RATE, *kind), RATE)
    assert heard.dtype == torch.float32
    assert heard.shape == (RATE // 2,)
    middle = slice(1000, -1000)  # lossy formats smear the ends
    assert (heard - torch.from_numpy(tone()))[middle].abs().max() < WRITTEN[kind]


def test_path_bytes_and_pair_are_one(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(tone(), subtype="FLOAT"))
    expected = torch.from_numpy(tone())
    for raw in (path, str(path), path.read_bytes(), (tone(), RATE), (tone().tolist(), float(RATE)), (expected, RATE)):
        assert torch.equal(load_audio(raw, RATE), expected)
    assert torch.equal(load_audio((expected.double(), np.int64(RATE)), RATE), expected)
    assert torch.equal(load_audio([tone(), RATE], RATE), expected)


def test_channels_are_averaged():
    left, right = tone(220.0), tone(330.0)
    expected = torch.from_numpy((left + right) / 2)
    both = np.stack([left, right], axis=1)
    assert torch.allclose(load_audio((both, RATE), RATE), expected, atol=1e-7)
    assert torch.allclose(load_audio((torch.from_numpy(both), RATE), RATE), expected, atol=1e-7)
    assert torch.allclose(load_audio(encoded(both, subtype="FLOAT"), RATE), expected, atol=1e-7)
    long = np.repeat(np.arange(5, dtype=np.float32)[:, None] / 10, 40_000, 0) @ np.ones((1, 2), np.float32)
    assert torch.equal(load_audio(encoded(long, subtype="FLOAT"), RATE), torch.from_numpy(long[:, 0])), "block by block"


@pytest.mark.parametrize("given", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_the_tone(given):
    pytest.importorskip("soxr")
    heard = load_audio((tone(440.0, 1.0, given), given), RATE)
    assert abs(len(heard) - RATE) <= 1
    middle = slice(2000, -2000)
    assert (heard - torch.from_numpy(tone(440.0, 1.0))[: len(heard)])[middle].abs().max() < 1e-3
    assert int(torch.fft.rfft(heard).abs().argmax()) == 440


@pytest.mark.parametrize(("kind", "top"), [("int8", 2**7), ("int16", 2**15), ("int32", 2**31)])
def test_whole_numbers_are_divided_by_their_full_scale(kind, top):
    values = np.array([0, top // 2, -top // 2, -top], kind)
    for samples in (values, torch.from_numpy(values)):
        assert load_audio((samples, RATE), RATE).tolist() == [0.0, 0.5, -0.5, -1.0]
    assert load_audio(([0, 1, -1], RATE), RATE).tolist() == [0.0, 1.0, -1.0], "a list holds floats"


def test_the_callers_samples_stay_the_callers():
    mine = tone()
    heard = load_audio((mine, RATE), RATE)
    heard.zero_()
    assert np.array_equal(mine, tone())


NAN = np.array([0.0, np.nan, 0.0], np.float32)
REFUSED = {
    "nothing": (None, "type"),
    "a number": (3, "type"),
    "an array without its rate": (np.zeros(9), "type"),
    "three things": ((np.zeros(9), RATE, 1), "type"),
    "no bytes": (b"", "empty"),
    "no samples": (([], RATE), "empty"),
    "a file without samples": (encoded(np.zeros(0)), "empty"),
    "no channels": ((np.zeros((5, 0)), RATE), "empty"),
    "noise": (b"no sound at all" * 50, "format"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(200), "format"),
    "the start of a header": (encoded(tone())[:20], "format"),
    "half a WAV": (encoded(tone())[:8000], "damaged"),
    "half a FLAC": (encoded(tone(), kind="FLAC")[:3000], "damaged"),
    "channels first": ((np.zeros((2, 4000)), RATE), "channels"),
    "three axes": ((np.zeros((2, 2, 2)), RATE), "shape"),
    "one number": ((0.5, RATE), "shape"),
    "words": ((["a", "b"], RATE), "shape"),
    "lists of different lengths": (([[0.0], [0.0, 1.0]], RATE), "shape"),
    "complex numbers": ((np.zeros(4, complex), RATE), "shape"),
    "whole numbers of no known scale": ((np.zeros(4, np.int64), RATE), "range"),
    "not a number": ((NAN, RATE), "finite"),
    "infinity": (([0.0, float("inf")], RATE), "finite"),
    "not a number in a file": (encoded(NAN, subtype="FLOAT"), "finite"),
    "rate zero": ((np.zeros(9), 0), "rate"),
    "rate below": ((np.zeros(9), -1.0), "rate"),
    "rate nan": ((np.zeros(9), float("nan")), "rate"),
    "rate a word": ((np.zeros(9), "16000"), "rate"),
    "rate true": ((np.zeros(9), True), "rate"),
    "rate none": ((np.zeros(9), None), "rate"),
    "too long": ((np.zeros(MAX_SECONDS * 10 + 1), 10), "long"),
    "too long a file": (encoded(np.zeros(MAX_SECONDS * 10 + 1), 10, "FLAC"), "long"),
    "an address": ("https://example.org/a.wav", "address"),
    "no such file": ("no/such/file.wav", "missing"),
    "a zero byte": ("a\0.wav", "missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    raw, kind = REFUSED[name]
    assert refusal(raw).kind == kind


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    assert refusal(tmp_path).kind == "folder"
    os.mkfifo(tmp_path / "pipe.wav")
    assert refusal(tmp_path / "pipe.wav").kind == "special"
    monkeypatch.setattr(audio, "MAX_BYTES", 100)
    (tmp_path / "a.wav").write_bytes(encoded(tone()))
    assert refusal(tmp_path / "a.wav").kind == "bytes"
    assert refusal(encoded(tone())).kind == "bytes"

    def deny(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "stat", deny)
    with pytest.raises(AudioError) as caught:
        load_audio("a.wav", RATE)
    monkeypatch.undo()
    assert caught.value.kind == "permission"


def test_more_channels_than_are_mixed():
    assert refusal(encoded(np.zeros((9, MAX_CHANNELS + 1)))).kind == "channels"
    assert len(load_audio(encoded(np.zeros((9, MAX_CHANNELS))), RATE)) == 9


def test_flipped_bytes_end_in_a_sound_or_a_refusal(capfd):
    """And in no traceback from within the decoder, which calls Python back."""
    generator = np.random.default_rng(0)
    kinds = []
    for kind, subtype in [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("AIFF", "PCM_16")]:
        whole = np.frombuffer(encoded(tone(seconds=0.2), RATE, kind, subtype), np.uint8)
        for _ in range(50):
            torn = whole.copy()
            torn[generator.integers(0, generator.choice([60, len(torn)]), 4)] = generator.integers(0, 256, 4)
            try:
                heard = load_audio(torn.tobytes(), RATE)
                kinds.append("sound")
                assert len(heard)
                assert heard.isfinite().all()
            except AudioError as error:
                kinds.append(error.kind)
    assert {"sound", "format", "damaged"} <= set(kinds)
    assert "Traceback" not in capfd.readouterr().err


def test_a_streamed_wav_does_not_know_its_length():
    data = encoded(tone())
    endless = data[:4] + b"\xff\xff\xff\xff" + data[8:]
    assert torch.equal(load_audio(endless, RATE), load_audio(data, RATE))


def test_too_short_to_leave_a_sample():
    pytest.importorskip("soxr")
    assert refusal((np.zeros(1, np.float32), 48_000)).kind == "empty"


def test_the_error_names_the_sound_and_travels_between_processes(tmp_path):
    error = refusal(str(tmp_path / "a\nb.wav"))
    assert "a?b.wav'" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, MmxError)
    assert (str(again), again.kind, again.source) == (str(error), "missing", str(tmp_path / "a\nb.wav"))
    assert str(refusal(b"x" * 1234)).startswith("a sound of 1,234 bytes: no sound, or damaged at the start;")
    assert str(refusal(None)).startswith("a value of type NoneType: ")


@pytest.mark.parametrize("missing", ["soundfile", "soxr"])
def test_without_the_extra_the_sentence_says_what_to_type(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert len(load_audio((tone(), RATE), RATE)) == RATE // 2, "samples at the rate need neither"
    raw = encoded(tone(), 8_000) if missing == "soundfile" else (tone(), 8_000)
    error = refusal(raw)
    assert error.kind == "extra"
    assert 'pip install "mmx[audio]"' in str(error)


def test_importing_brings_no_reader():
    code = "import sys, mmx.io.audio; print({'soundfile', 'soxr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_known_suffixes_can_be_read():
    known = soundfile.available_formats()
    other = {"AIF": "AIFF", "AIFC": "AIFF", "OGA": "OGG", "OPUS": "OGG"}
    assert {other.get(name, name) for suffix in SUFFIXES for name in [suffix[1:].upper()]} <= set(known)
