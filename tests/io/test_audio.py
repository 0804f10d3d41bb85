"""`load_audio`: every format and input type, resampling, and refused inputs."""

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
MAX_DIFFERENCE = {  # (format, subtype) -> largest difference to the original samples
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


def load_error(source, rate=RATE):
    with pytest.raises(AudioError) as caught:
        load_audio(source, rate)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert message.count(";") == 2, "the problem; what was expected; what to do"
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    return caught.value


@pytest.mark.parametrize("kind", MAX_DIFFERENCE, ids="-".join)
def test_formats(kind):
    loaded = load_audio(encoded(tone(), RATE, *kind), RATE)
    assert loaded.dtype == torch.float32
    assert loaded.shape == (RATE // 2,)
    middle = slice(1000, -1000)  # lossy formats change the ends
    assert (loaded - torch.from_numpy(tone()))[middle].abs().max() < MAX_DIFFERENCE[kind]


def test_paths_bytes_and_pairs_give_equal_samples(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(tone(), subtype="FLOAT"))
    expected = torch.from_numpy(tone())
    for source in (
        path,
        str(path),
        path.read_bytes(),
        (tone(), RATE),
        (tone().tolist(), float(RATE)),
        (expected, RATE),
        bytearray(path.read_bytes()),
        memoryview(path.read_bytes()),
        BytesIO(path.read_bytes()),
    ):
        assert torch.equal(load_audio(source, RATE), expected)
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
    assert torch.equal(load_audio(encoded(long, subtype="FLOAT"), RATE), torch.from_numpy(long[:, 0])), (
        "decoded block by block"
    )


@pytest.mark.parametrize("quiet", [1.0, 0.97])
def test_channels_in_opposite_phase_give_the_louder_one(quiet):
    voice = np.repeat(tone()[None], 20, 0).flatten()  # several blocks
    both = np.stack([-quiet * voice, voice], axis=1)
    expected = torch.from_numpy(voice if quiet < 1 else -voice)
    assert torch.equal(load_audio((both, RATE), RATE), expected)
    assert torch.equal(load_audio((torch.from_numpy(both), RATE), RATE), expected)
    assert torch.equal(load_audio(encoded(both, subtype="FLOAT"), RATE), expected)
    loaded = load_audio(encoded(both, kind="FLAC"), RATE)
    assert torch.allclose(loaded, expected, atol=1e-4)


def test_other_quiet_means_are_kept():
    """A single active channel of many, silence, and channels that are independent or partly opposite."""
    only = np.zeros((8000, MAX_CHANNELS), np.float32)
    only[:, 3] = tone()
    assert torch.allclose(load_audio((only, RATE), RATE), torch.from_numpy(tone() / MAX_CHANNELS))
    assert not load_audio((np.zeros((9, 2)), RATE), RATE).any()
    partly = np.stack([tone(), -0.5 * tone()], axis=1)
    assert torch.allclose(load_audio((partly, RATE), RATE), torch.from_numpy(tone() / 4))


def test_samples_a_little_above_full_scale_are_kept():
    loud = np.array([0.0, 1.9, -1.9], np.float32)
    assert load_audio((loud, RATE), RATE).tolist() == loud.tolist()
    assert load_audio(encoded(loud, subtype="FLOAT"), RATE).tolist() == loud.tolist()


def test_the_peak_is_named():
    assert "the samples (peak 16384): " in str(load_error((tone(4000.0) * 32768, RATE)))


@pytest.mark.parametrize("source_rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_the_tone(source_rate):
    pytest.importorskip("soxr")
    loaded = load_audio((tone(440.0, 1.0, source_rate), source_rate), RATE)
    assert abs(len(loaded) - RATE) <= 1
    middle = slice(2000, -2000)
    assert (loaded - torch.from_numpy(tone(440.0, 1.0))[: len(loaded)])[middle].abs().max() < 1e-3
    assert int(torch.fft.rfft(loaded).abs().argmax()) == 440


@pytest.mark.parametrize(("dtype", "full_scale"), [("int8", 2**7), ("int16", 2**15), ("int32", 2**31)])
def test_integers_are_divided_by_their_full_scale(dtype, full_scale):
    values = np.array([0, full_scale // 2, -full_scale // 2, -full_scale], dtype)
    for samples in (values, torch.from_numpy(values)):
        assert load_audio((samples, RATE), RATE).tolist() == [0.0, 0.5, -0.5, -1.0]
    assert load_audio(([0, 1, -1], RATE), RATE).tolist() == [0.0, 1.0, -1.0], "lists are floats"


def test_samples_of_the_caller_are_not_changed():
    samples = tone()
    loaded = load_audio((samples, RATE), RATE)
    loaded.zero_()
    assert np.array_equal(samples, tone())


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
    "noise": (b"no audio at all" * 50, "format"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(200), "format"),
    "the start of a header": (encoded(tone())[:20], "format"),
    "half a WAV": (encoded(tone())[:8000], "damaged"),
    "half a FLAC": (encoded(tone(), kind="FLAC")[:3000], "damaged"),
    "channels first": ((np.zeros((2, 4000)), RATE), "channels"),
    "three axes": ((np.zeros((2, 2, 2)), RATE), "shape"),
    "one number": ((0.5, RATE), "shape"),
    "words": ((["a", "b"], RATE), "shape"),
    "lists of different lengths": (([[0.0], [0.0, 1.0]], RATE), "shape"),
    "complex numbers": ((np.zeros(4, complex), RATE), "shape"),
    "whole numbers of no known scale": ((np.zeros(4, np.int64), RATE), "dtype"),
    "not a number": ((NAN, RATE), "not_finite"),
    "infinity": (([0.0, float("inf")], RATE), "not_finite"),
    "not a number in a file": (encoded(NAN, subtype="FLOAT"), "not_finite"),
    "integers as floats": ((tone() * 32768, RATE), "scale"),
    "integers as floats in a list": (([0.0, -32768.0], RATE), "scale"),
    "integers as floats in a file": (encoded(tone() * 32768, subtype="FLOAT"), "scale"),
    "one loud channel of a file": (encoded(np.stack([tone(), 5 * tone()], 1), subtype="FLOAT"), "scale"),
    "one loud channel": ((np.stack([tone(), 5 * tone()], 1), RATE), "scale"),
    "rate zero": ((np.zeros(9), 0), "rate"),
    "rate below": ((np.zeros(9), -1.0), "rate"),
    "rate nan": ((np.zeros(9), float("nan")), "rate"),
    "rate a word": ((np.zeros(9), "16000"), "rate"),
    "rate true": ((np.zeros(9), True), "rate"),
    "rate none": ((np.zeros(9), None), "rate"),
    "too long": ((np.zeros(MAX_SECONDS * 10 + 1), 10), "too_long"),
    "too long a file": (encoded(np.zeros(MAX_SECONDS * 10 + 1), 10, "FLAC"), "too_long"),
    "an address": ("https://example.org/a.wav", "url"),
    "no such file": ("no/such/file.wav", "missing"),
    "a zero byte": ("a\0.wav", "missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_inputs(name):
    source, reason = REFUSED[name]
    assert load_error(source).code == f"audio.{reason}"


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    assert load_error(tmp_path).code == "audio.folder"
    os.mkfifo(tmp_path / "pipe.wav")
    assert load_error(tmp_path / "pipe.wav").code == "audio.not_a_file"
    monkeypatch.setattr("mmx.io.audio.MAX_BYTES", 100)
    (tmp_path / "a.wav").write_bytes(encoded(tone()))
    assert load_error(tmp_path / "a.wav").code == "audio.too_large"
    assert load_error(encoded(tone())).code == "audio.too_large"

    def deny(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "stat", deny)
    with pytest.raises(AudioError) as caught:
        load_audio("a.wav", RATE)
    monkeypatch.undo()
    assert caught.value.code == "audio.permission"


def test_the_number_of_channels_is_limited():
    assert load_error(encoded(np.zeros((9, MAX_CHANNELS + 1)))).code == "audio.channels"
    assert len(load_audio(encoded(np.zeros((9, MAX_CHANNELS))), RATE)) == 9


def test_damaged_files_give_samples_or_an_audio_error(capfd):
    """And no traceback from the decoder, which calls Python functions."""
    generator = np.random.default_rng(0)
    outcomes = []
    for kind, subtype in [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("AIFF", "PCM_16")]:
        original = np.frombuffer(encoded(tone(seconds=0.2), RATE, kind, subtype), np.uint8)
        for _ in range(50):
            damaged = original.copy()
            damaged[generator.integers(0, generator.choice([60, len(damaged)]), 4)] = generator.integers(0, 256, 4)
            try:
                loaded = load_audio(damaged.tobytes(), RATE)
                outcomes.append("loaded")
                assert len(loaded)
                assert loaded.isfinite().all()
            except AudioError as error:
                outcomes.append(error.code)
    assert {"loaded", "audio.format", "audio.damaged"} <= set(outcomes)
    assert "Traceback" not in capfd.readouterr().err


def test_a_streamed_wav_has_no_length():
    data = encoded(tone())
    streamed = data[:4] + b"\xff\xff\xff\xff" + data[8:]
    assert torch.equal(load_audio(streamed, RATE), load_audio(data, RATE))


def test_too_few_samples_to_resample():
    pytest.importorskip("soxr")
    assert load_error((np.zeros(1, np.float32), 48_000)).code == "audio.empty"


def test_errors_name_the_source_and_can_be_pickled(tmp_path):
    error = load_error(str(tmp_path / "a\nb.wav"))
    assert "a?b.wav'" in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, MmxError)
    assert (str(copy), copy.code, copy.details) == (str(error), "audio.missing", {"source": str(tmp_path / "a\nb.wav")})
    assert str(load_error(b"x" * 1234)).startswith("audio data of 1,234 bytes: ")
    assert str(load_error(None)).startswith("a value of type NoneType: ")


@pytest.mark.parametrize("missing", ["soundfile", "soxr"])
def test_missing_packages_are_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert len(load_audio((tone(), RATE), RATE)) == RATE // 2, "samples at the rate need no package"
    source = encoded(tone(), 8_000) if missing == "soundfile" else (tone(), 8_000)
    error = load_error(source)
    assert error.code == "audio.missing_package"
    assert "pip install 'mmx[audio]'" in str(error)


def test_import_loads_no_decoder():
    code = "import sys, mmx.io.audio; print({'soundfile', 'soxr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_known_suffixes_can_be_read():
    known = soundfile.available_formats()
    other = {"AIF": "AIFF", "AIFC": "AIFF", "OGA": "OGG", "OPUS": "OGG"}
    assert {other.get(name, name) for suffix in SUFFIXES for name in [suffix[1:].upper()]} <= set(known)
