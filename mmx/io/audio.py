"""The one door for sounds: whatever is given, out come finite mono samples at the rate asked for, or a `AudioError`.

Files are read with `soundfile` and brought to the rate with `soxr`, both in the extra `audio`; samples that are at the
rate already need neither. Sizes have their limits here, before anything is decoded. Nothing is fetched.
Alphabet: T samples.
"""

import os
from collections.abc import Sequence
from io import BytesIO
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mmx.errors import AudioError
from mmx.io.files import ReadFailure, display_name, failure_messages, read_file

Samples: TypeAlias = Tensor | np.ndarray | Sequence[Any]
AudioInput: TypeAlias = str | os.PathLike[str] | bytes | tuple[Samples, float]

MAX_BYTES = 256 * 2**20
MAX_SECONDS = 600
MAX_SAMPLES = 2**26  # of one channel: ten minutes at 96 kHz, 256 MB
MAX_CHANNELS = 32
BLOCK = 2**16  # frames that are decoded at once

_KNOWN = "aif aifc aiff au caf flac mp3 oga ogg opus rf64 w64 wav"
SUFFIXES = frozenset(f".{suffix}" for suffix in _KNOWN.split())

# kind of refusal: what is wrong; what was expected; what to do
_REASONS = {
    **failure_messages("sound", MAX_BYTES),
    "type": "this cannot be read; expected a path, the bytes of a sound file, or a pair (samples, rate); save it first",
    "empty": "no samples in it; expected a sound; fetch or record it again",
    "format": "no sound, or damaged at the start; expected WAV, FLAC, OGG, MP3, AIFF, AU or CAF; convert it",
    "long": f"too long; expected at most {MAX_SECONDS // 60} minutes and {MAX_SAMPLES:,} samples; cut it",
    "channels": f"too many channels; expected [T] or [T, channels] of up to {MAX_CHANNELS}; transpose or mix them",
    "shape": "this is no list of samples; expected numbers [T] or [T, channels]; flatten them",
    "range": "whole numbers of unknown full scale; expected floats from -1 to 1, or int16; divide them first",
    "finite": "values that are not finite; expected samples from -1 to 1; export it again",
    "rate": "its rate is no positive number; expected samples a second, such as 16000; give (samples, rate)",
    "extra": 'sound files need packages that are not installed; expected soundfile and soxr; pip install "mmx[audio]"',
}

_LOUDEST = {"int8": 2**7, "int16": 2**15, "int32": 2**31}


def load_audio(raw: AudioInput, rate: int) -> Tensor:
    """Mono float32 samples [T] at `rate`, the channels' mean, from a path, the bytes of a file, or (samples, rate).

    Samples are a tensor, array or list [T] or [T, channels]: floats, whose full scale is 1, or int8, int16 and int32,
    which are divided by theirs. Raises AudioError, and nothing else, for all that cannot become such a sound; its
    `kind` is a key of `_REASONS`.
    """
    try:
        samples, given = _decode(raw)
        return torch.from_numpy(_at_rate(samples, given, rate))
    except ReadFailure as refusal:
        found = refusal
    except Exception:  # noqa: BLE001 - damaged files raise what their decoder likes
        found = ReadFailure("damaged")
    pair = isinstance(raw, tuple | list)
    label, name = ("the samples given", "samples") if pair else display_name(raw, "sound")
    raise AudioError(
        f"{label}: {_REASONS[found.kind]}.", code=f"audio.{found.kind}", source=name
    )  # no other library's text


class _File(BytesIO):
    """Bytes in which a damaged header may point before the start: the error could not reach us through C."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


def _decode(raw: object) -> tuple[np.ndarray, float]:
    """Mono float32 samples [T] and their rate."""
    if isinstance(raw, bytes):
        return _open(raw)
    if isinstance(raw, str | os.PathLike):
        return _open(read_file(os.fsdecode(raw), MAX_BYTES))
    if isinstance(raw, tuple | list) and len(raw) == 2 and np.ndim(raw[1]) == 0:
        return _mono(_array(raw[0])), _positive(raw[1])
    raise ReadFailure("type")


def _open(data: bytes) -> tuple[np.ndarray, float]:
    """The samples of a file, mixed to mono block by block, so that many channels never stand in memory at once."""
    if not data:
        raise ReadFailure("empty")
    if len(data) > MAX_BYTES:
        raise ReadFailure("bytes")
    soundfile = _audio("soundfile")
    try:
        file = soundfile.SoundFile(_File(data))
    except Exception:  # noqa: BLE001 - as in load_audio
        raise ReadFailure("format") from None
    with file:
        rate = _positive(file.samplerate)
        if file.channels > MAX_CHANNELS:
            raise ReadFailure("channels")
        told = file.frames  # never more are read
        if told > min(MAX_SECONDS * rate, MAX_SAMPLES):
            raise ReadFailure("long")
        pieces = [np.zeros(0, np.float32)]
        while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
            pieces.append(block.mean(axis=1))
        samples = np.concatenate(pieces)
        guessed = file.format == "MP3"  # which need not say how long it is
        if _cut_short(data) or (len(samples) < told and not guessed):
            raise ReadFailure("damaged")
    return samples, rate


def _cut_short(data: bytes) -> bool:
    """Whether a WAV says that it is longer than it is; one that was streamed says next to 2 or 4 GB, and may."""
    told = int.from_bytes(data[4:8], "little")
    return data[:4] == b"RIFF" and len(data) + 8 < told < 0x7FFF0000


def _array(samples: Any) -> np.ndarray:
    """Samples as floats whose full scale is 1."""
    if isinstance(samples, Tensor):
        samples = samples.detach().cpu()
        array = (samples.float() if samples.is_floating_point() else samples).numpy()
    else:
        try:
            array = np.asarray(samples, None if isinstance(samples, np.ndarray) else np.float32)
        except (TypeError, ValueError, OverflowError):  # words, or lists of different lengths
            raise ReadFailure("shape") from None
    if array.dtype.kind in "iu":
        if array.dtype.name not in _LOUDEST:
            raise ReadFailure("range")
        return array.astype(np.float32) / np.float32(_LOUDEST[array.dtype.name])
    if array.dtype.kind != "f":
        raise ReadFailure("shape")
    return array.astype(np.float32)  # a copy: the caller's samples stay the caller's


def _mono(samples: np.ndarray) -> np.ndarray:
    """[T] or [T, channels] -> [T]."""
    if samples.ndim not in (1, 2):
        raise ReadFailure("shape")
    if samples.ndim == 1:
        return samples
    if not 1 <= samples.shape[1] <= MAX_CHANNELS:
        raise ReadFailure("channels" if samples.shape[1] else "empty")
    return samples.mean(axis=1, dtype=np.float32)


def _at_rate(samples: np.ndarray, given: float, rate: int) -> np.ndarray:
    if not len(samples):
        raise ReadFailure("empty")
    if len(samples) > min(MAX_SECONDS * given, MAX_SAMPLES):
        raise ReadFailure("long")
    if not np.isfinite(samples).all():
        raise ReadFailure("finite")
    if given != rate:
        samples = _audio("soxr").resample(samples, given, rate)
    if not len(samples):  # two samples of a higher rate are none of a lower one
        raise ReadFailure("empty")
    return samples


def _positive(rate: Any) -> float:
    try:
        number = float("nan" if isinstance(rate, bool | str) else rate)
    except (TypeError, ValueError, OverflowError):
        raise ReadFailure("rate") from None
    if not 0 < number < float("inf"):
        raise ReadFailure("rate")
    return number


def _audio(package: str) -> Any:
    """A package of the extra `audio`, imported on first use."""
    from importlib import import_module

    try:
        return import_module(package)
    except (ImportError, OSError):  # OSError: soundfile without its C library
        raise ReadFailure("extra") from None
