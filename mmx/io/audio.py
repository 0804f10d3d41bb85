"""Audio: `load_audio` turns any supported input into finite mono samples at a given rate, or raises an `AudioError`.

Files are decoded with `soundfile` and resampled with `soxr`, both in the extra `audio`; samples that already have the
rate need neither. Sizes are checked before decoding.
T: samples.
"""

import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from io import BytesIO
from types import ModuleType
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mmx.errors import AudioError
from mmx.io.files import BinaryFile, ReadFailure, display_name, failure_messages, read_source

Samples: TypeAlias = Tensor | np.ndarray | Sequence[float] | Sequence[Sequence[float]]
AudioInput: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryFile | tuple[Samples, float]

MAX_BYTES = 256 * 2**20
MAX_SECONDS = 600
MAX_SAMPLES = 2**26  # of one channel: ten minutes at 96 kHz, 256 MB
MAX_CHANNELS = 32
MAX_PEAK = 2.0  # full scale is 1; mixing and lossy formats exceed it a little, integers as floats by far
MIN_MIX_ENERGY = 0.01  # of the mean of independent channels; less means that the channels cancel each other
BLOCK = 2**16  # frames that are decoded at once

_KNOWN = "aif aifc aiff au caf flac mp3 oga ogg opus rf64 w64 wav"
SUFFIXES = frozenset(f".{suffix}" for suffix in _KNOWN.split())

# Last part of the error code -> the problem; what was expected; what to do.
_MESSAGES = {
    **failure_messages("audio", MAX_BYTES),
    "type": "not a supported type; expected a path, bytes, a binary file, or a pair (samples, rate); convert it first",
    "format": "unknown format, or damaged at the start; expected WAV, FLAC, OGG, MP3, AIFF, AU or CAF; convert it",
    "too_long": f"too long; expected at most {MAX_SECONDS // 60} minutes and {MAX_SAMPLES:,} samples; cut it",
    "channels": f"too many channels; expected [T] or [T, channels] of up to {MAX_CHANNELS}; transpose or mix them",
    "shape": "not an array of samples; expected numbers [T] or [T, channels]; reshape them",
    "dtype": "integers of unknown full scale; expected floats from -1 to 1, or int16; divide by the full scale first",
    "not_finite": "NaN or infinite samples; expected samples from -1 to 1; export it again",
    "scale": "far above full scale; expected samples from -1 to 1; divide by the full scale, 32768 for 16 bits",
    "rate": "the rate is not a positive number; expected samples per second, such as 16000; give (samples, rate)",
    "missing_package": "packages for audio are not installed; expected soundfile and soxr; pip install 'mmx[audio]'",
}

_FULL_SCALE = {"int8": 2**7, "int16": 2**15, "int32": 2**31}


def load_audio(source: AudioInput, rate: int, *, allow_urls: bool = False) -> Tensor:
    """Return mono samples [T] at `rate` Hz in float32, the mean of the channels.

    Where the channels cancel each other (stereo in opposite phase: the mean has less than 1 % of the energy that the
    mean of independent channels has), the loudest channel is returned instead. Samples above MAX_PEAK are refused.

    Args:
        source: a path, the bytes of an audio file, a binary file object (read from its start), or a pair
            (samples, rate). Samples are a tensor, an array or a list [T] or [T, channels] of floats with full scale 1,
            or of int8, int16 or int32, which are divided by their full scale.
        rate: samples per second of the result.
        allow_urls: whether a path that starts with http:// or https:// is downloaded, of at most MAX_BYTES.

    Raises:
        AudioError: the input cannot be read; its code is `audio.REASON`, such as audio.missing or audio.damaged.
    """
    try:
        samples, source_rate = _decode(source, allow_urls)
        return torch.from_numpy(_resample(samples, source_rate, rate))
    except ReadFailure as error:
        failure = error
    except Exception:  # noqa: BLE001 - decoders raise many types for damaged files
        failure = ReadFailure("damaged")
    label, name = ("the samples", "samples") if isinstance(source, tuple | list) else display_name(source, "audio")
    # Outside of the handlers, so that no other library's error is chained.
    message = f"{label}{failure.detail}: {_MESSAGES[failure.reason]}."
    raise AudioError(message, code=f"audio.{failure.reason}", source=name)


class _OpenAudio(Protocol):
    """What is used of `soundfile.SoundFile`."""

    channels: int

    def read(self, frames: int, dtype: str, always_2d: bool) -> np.ndarray: ...

    def seek(self, frames: int) -> int: ...


class _AudioBytes(BytesIO):
    """Bytes in which a damaged header may seek before the start: an exception could not pass through the C library."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


def _decode(source: object, allow_urls: bool) -> tuple[np.ndarray, float]:
    """Return mono float32 samples [T] and their rate."""
    if not isinstance(source, tuple | list):
        return _decode_file(read_source(source, MAX_BYTES, allow_urls))
    if len(source) != 2 or np.ndim(source[1]) != 0:
        raise ReadFailure("type")
    samples = _to_float(source[0])
    rate = _positive(source[1])
    _check_range(samples)
    return _mix_channels(samples), rate


def _decode_file(data: bytes) -> tuple[np.ndarray, float]:
    """Decode block by block, so that not all channels of a file are in memory at once."""
    soundfile = _import_extra("soundfile")
    try:
        file = soundfile.SoundFile(_AudioBytes(data))
    except Exception:  # noqa: BLE001 - as in load_audio
        raise ReadFailure("format") from None
    with file:
        rate = _positive(file.samplerate)
        if file.channels > MAX_CHANNELS:
            raise ReadFailure("channels")
        declared = file.frames  # never more are read
        if declared > min(MAX_SECONDS * rate, MAX_SAMPLES):
            raise ReadFailure("too_long")
        samples = _decode_mono(file)
        length_is_exact = file.format != "MP3"
        if _is_truncated_wav(data) or (length_is_exact and len(samples) < declared):
            raise ReadFailure("damaged")
    return samples, rate


def _decode_mono(file: _OpenAudio) -> np.ndarray:
    """The mean of the channels of an open file; if they cancel each other, the loudest of them."""
    energies = np.zeros(file.channels)
    means = [np.zeros(0, np.float32)]
    for block in _blocks(file):
        _check_range(block)
        energies += np.square(block, dtype=np.float64).sum(axis=0)
        means.append(block.mean(axis=1))
    samples = np.concatenate(means)
    if not _is_cancelled(samples, energies):
        return samples
    file.seek(0)
    loudest = energies.argmax()
    return np.concatenate([block[:, loudest] for block in _blocks(file)])


def _blocks(file: _OpenAudio) -> Iterator[np.ndarray]:
    """Decode up to BLOCK frames [T, channels] at a time."""
    while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
        yield block


def _is_cancelled(mean: np.ndarray, energies: np.ndarray) -> bool:
    """Whether the mean of channels, given their energies, is far quieter than the mean of independent channels."""
    expected = float(energies.sum()) / len(energies) ** 2
    return float(np.dot(mean, mean)) < MIN_MIX_ENERGY * expected


def _check_range(samples: np.ndarray) -> None:
    """Refuse NaN, infinite values, and floats that do not have full scale 1."""
    if not np.isfinite(samples).all():
        raise ReadFailure("not_finite")
    peak = float(np.abs(samples).max(initial=0.0))
    if peak > MAX_PEAK:
        raise ReadFailure("scale", f" (peak {peak:.6g})")


def _is_truncated_wav(data: bytes) -> bool:
    """Whether a WAV declares more bytes than it has. Streamed files declare almost 2 or 4 GB, which is allowed."""
    declared = int.from_bytes(data[4:8], "little")
    return data[:4] == b"RIFF" and len(data) + 8 < declared < 0x7FFF0000


def _to_float(samples: object) -> np.ndarray:
    """Return a new array of floats with full scale 1."""
    if isinstance(samples, Tensor):
        samples = samples.detach().cpu()
        array = (samples.float() if samples.is_floating_point() else samples).numpy()
    else:
        try:
            array = np.asarray(samples, None if isinstance(samples, np.ndarray) else np.float32)
        except (TypeError, ValueError, OverflowError):  # texts, or lists of different lengths
            raise ReadFailure("shape") from None
    if array.dtype.kind in "iu":
        if array.dtype.name not in _FULL_SCALE:
            raise ReadFailure("dtype")
        return array.astype(np.float32) / np.float32(_FULL_SCALE[array.dtype.name])
    if array.dtype.kind != "f":
        raise ReadFailure("shape")
    return array.astype(np.float32)


def _mix_channels(samples: np.ndarray) -> np.ndarray:
    """[T] or [T, channels] -> [T]."""
    if samples.ndim not in (1, 2):
        raise ReadFailure("shape")
    if samples.ndim == 1:
        return samples
    if not 1 <= samples.shape[1] <= MAX_CHANNELS:
        raise ReadFailure("channels" if samples.shape[1] else "empty")
    mean = samples.mean(axis=1, dtype=np.float32)
    energies = np.array([np.dot(channel, channel) for channel in samples.T])
    return samples[:, energies.argmax()].copy() if _is_cancelled(mean, energies) else mean


def _resample(samples: np.ndarray, source_rate: float, rate: int) -> np.ndarray:
    if not len(samples):
        raise ReadFailure("empty")
    if len(samples) > min(MAX_SECONDS * source_rate, MAX_SAMPLES):
        raise ReadFailure("too_long")
    if source_rate != rate:
        samples = _import_extra("soxr").resample(samples, source_rate, rate)
    if not len(samples):  # a few samples at a high rate are none at a lower one
        raise ReadFailure("empty")
    return samples


def _positive(rate: object) -> float:
    try:
        number = float("nan" if isinstance(rate, bool | str) else rate)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ReadFailure("rate") from None
    if not 0 < number < float("inf"):
        raise ReadFailure("rate")
    return number


def _import_extra(package: str) -> ModuleType:
    """Import a package of the extra `audio`."""
    try:
        return import_module(package)
    except (ImportError, OSError):  # OSError: soundfile without its C library
        raise ReadFailure("missing_package") from None
