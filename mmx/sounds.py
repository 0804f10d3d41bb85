"""The one door for sounds: whatever is given, out come finite mono samples at the rate asked for, or a `SoundError`.

Files are read with `soundfile` and brought to the rate with `soxr`, both in the extra `audio`; samples that are at the
rate already need neither. Sizes have their limits here, before anything is decoded. Nothing is fetched.
Alphabet: T samples.
"""

import os
import re
import stat
from collections.abc import Sequence
from io import BytesIO
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mmx.errors import SoundError

Samples: TypeAlias = Tensor | np.ndarray | Sequence[Any]
Sound: TypeAlias = str | os.PathLike[str] | bytes | tuple[Samples, float]

MAX_BYTES = 256 * 2**20
MAX_SECONDS = 600
MAX_SAMPLES = 2**26  # of one channel: ten minutes at 96 kHz, 256 MB
MAX_CHANNELS = 32
BLOCK = 2**16  # frames that are decoded at once

_KNOWN = "aif aifc aiff au caf flac mp3 oga ogg opus rf64 w64 wav"
SUFFIXES = frozenset(f".{suffix}" for suffix in _KNOWN.split())

# kind of refusal: what is wrong; what was expected; what to do
_REASONS = {
    "type": "this cannot be read; expected a path, the bytes of a sound file, or a pair (samples, rate); save it first",
    "missing": "there is no such file; expected a sound on this computer; check the path",
    "address": "this is an address, not a file; expected a sound on this computer; download it first",
    "folder": "this is a folder; expected one sound; give the files in it",
    "special": "this is a device or a pipe; expected a regular file; save the sound to a file first",
    "permission": "reading this is not allowed; expected a file you may read; change its permissions",
    "unreadable": "the system could not read this; expected a readable file; check the path and the disk",
    "empty": "no samples in it; expected a sound; fetch or record it again",
    "bytes": f"over {MAX_BYTES // 2**20} MB; expected a smaller file; cut it, or save it as FLAC",
    "format": "no sound, or damaged at the start; expected WAV, FLAC, OGG, MP3, AIFF, AU or CAF; convert it",
    "damaged": "damaged or cut short; expected a complete sound; fetch or export it again",
    "long": f"too long; expected at most {MAX_SECONDS // 60} minutes and {MAX_SAMPLES:,} samples; cut it",
    "channels": f"too many channels; expected [T] or [T, channels] of up to {MAX_CHANNELS}; transpose or mix them",
    "shape": "this is no list of samples; expected numbers [T] or [T, channels]; flatten them",
    "range": "whole numbers of unknown full scale; expected floats from -1 to 1, or int16; divide them first",
    "finite": "values that are not finite; expected samples from -1 to 1; export it again",
    "rate": "its rate is no positive number; expected samples a second, such as 16000; give (samples, rate)",
    "extra": 'sound files need packages that are not installed; expected soundfile and soxr; pip install "mmx[audio]"',
}

_ADDRESS = re.compile(r"data:|[a-z][a-z0-9+.-]+://?", re.IGNORECASE)
_LOUDEST = {"int8": 2**7, "int16": 2**15, "int32": 2**31}


def load_sound(raw: Sound, rate: int) -> Tensor:
    """Mono float32 samples [T] at `rate`, the channels' mean, from a path, the bytes of a file, or (samples, rate).

    Samples are a tensor, array or list [T] or [T, channels]: floats, whose full scale is 1, or int8, int16 and int32,
    which are divided by theirs. Raises SoundError, and nothing else, for all that cannot become such a sound; its
    `kind` is a key of `_REASONS`.
    """
    try:
        samples, given = _decode(raw)
        return torch.from_numpy(_at_rate(samples, given, rate))
    except _Refusal as refusal:
        found = refusal
    except Exception:  # noqa: BLE001 - damaged files raise what their decoder likes
        found = _Refusal("damaged")
    label, name = _describe(raw)
    raise SoundError(f"{label}: {_REASONS[found.kind]}.", kind=found.kind, source=name)  # no other library's text


class _Refusal(Exception):
    """Stops the reading; becomes a `SoundError` at the door, where the name of the sound is known."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


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
        return _open(_read(os.fsdecode(raw)))
    if isinstance(raw, tuple | list) and len(raw) == 2 and np.ndim(raw[1]) == 0:
        return _mono(_array(raw[0])), _positive(raw[1])
    raise _Refusal("type")


def _read(path: str) -> bytes:
    """All bytes of a regular file."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise _Refusal("folder")
        if not stat.S_ISREG(status.st_mode):
            raise _Refusal("special")  # opening a pipe would wait for ever
        if status.st_size > MAX_BYTES:
            raise _Refusal("bytes")
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except PermissionError:
        raise _Refusal("permission") from None
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in the name
        raise _Refusal("address" if _ADDRESS.match(path) else "missing") from None
    except OSError:
        raise _Refusal("address" if _ADDRESS.match(path) else "unreadable") from None


def _open(data: bytes) -> tuple[np.ndarray, float]:
    """The samples of a file, mixed to mono block by block, so that many channels never stand in memory at once."""
    if not data:
        raise _Refusal("empty")
    if len(data) > MAX_BYTES:
        raise _Refusal("bytes")
    soundfile = _audio("soundfile")
    try:
        file = soundfile.SoundFile(_File(data))
    except Exception:  # noqa: BLE001 - as in load_sound
        raise _Refusal("format") from None
    with file:
        rate = _positive(file.samplerate)
        if file.channels > MAX_CHANNELS:
            raise _Refusal("channels")
        told = file.frames  # never more are read
        if told > min(MAX_SECONDS * rate, MAX_SAMPLES):
            raise _Refusal("long")
        pieces = [np.zeros(0, np.float32)]
        while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
            pieces.append(block.mean(axis=1))
        samples = np.concatenate(pieces)
        guessed = file.format == "MP3"  # which need not say how long it is
        if _cut_short(data) or (len(samples) < told and not guessed):
            raise _Refusal("damaged")
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
            raise _Refusal("shape") from None
    if array.dtype.kind in "iu":
        if array.dtype.name not in _LOUDEST:
            raise _Refusal("range")
        return array.astype(np.float32) / np.float32(_LOUDEST[array.dtype.name])
    if array.dtype.kind != "f":
        raise _Refusal("shape")
    return array.astype(np.float32)  # a copy: the caller's samples stay the caller's


def _mono(samples: np.ndarray) -> np.ndarray:
    """[T] or [T, channels] -> [T]."""
    if samples.ndim not in (1, 2):
        raise _Refusal("shape")
    if samples.ndim == 1:
        return samples
    if not 1 <= samples.shape[1] <= MAX_CHANNELS:
        raise _Refusal("channels" if samples.shape[1] else "empty")
    return samples.mean(axis=1, dtype=np.float32)


def _at_rate(samples: np.ndarray, given: float, rate: int) -> np.ndarray:
    if not len(samples):
        raise _Refusal("empty")
    if len(samples) > min(MAX_SECONDS * given, MAX_SAMPLES):
        raise _Refusal("long")
    if not np.isfinite(samples).all():
        raise _Refusal("finite")
    if given != rate:
        samples = _audio("soxr").resample(samples, given, rate)
    if not len(samples):  # two samples of a higher rate are none of a lower one
        raise _Refusal("empty")
    return samples


def _positive(rate: Any) -> float:
    try:
        number = float("nan" if isinstance(rate, bool | str) else rate)
    except (TypeError, ValueError, OverflowError):
        raise _Refusal("rate") from None
    if not 0 < number < float("inf"):
        raise _Refusal("rate")
    return number


def _audio(package: str) -> Any:
    """A package of the extra `audio`, imported on first use."""
    from importlib import import_module

    try:
        return import_module(package)
    except (ImportError, OSError):  # OSError: soundfile without its C library
        raise _Refusal("extra") from None


def _describe(raw: object) -> tuple[str, str]:
    """How the sentence calls the sound (short, printable), and its full name."""
    if isinstance(raw, bytes):
        return f"a sound of {len(raw):,} bytes", "bytes"
    if isinstance(raw, tuple | list):
        return "the samples given", "samples"
    if not isinstance(raw, str | os.PathLike):
        known = raw is None or type(raw).__module__ == "builtins"
        return f"a value of type {type(raw).__name__}" if known else "a value of another type", "value"
    name = os.fsdecode(raw)
    tail = name if len(name) <= 60 else "..." + name[-57:]  # the file is at the end
    return "'" + "".join(letter if letter.isprintable() else "?" for letter in tail) + "'", name
