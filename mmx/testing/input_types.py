"""The check that an encoder of images or audio reads every type of input that `Encoder.prepare` states."""

from __future__ import annotations

import os
import wave
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch

from mmx.encoders.base import Encoder
from mmx.encoders.contract import PreparedInput, prepare
from mmx.errors import MmxError
from mmx.io.audio import load_audio
from mmx.io.images import load_image
from mmx.testing.check import CheckFailed, CheckSkipped
from mmx.testing.encoder_under_test import SAMPLING_RATE, SOURCE, EncoderUnderTest, first_difference

INT16_SCALE = 2**15


def check_input_types(subject: EncoderUnderTest) -> None:
    """An image becomes the same tensors as a path, bytes and a PIL image; audio as a path, bytes and samples."""
    encoder = subject.build()
    if encoder.modality not in ("image", "audio"):
        raise CheckSkipped("it is for the modalities image and audio, whose inputs have several types")
    with TemporaryDirectory() as folder:
        for number, sample in enumerate(subject.samples):
            path = Path(folder) / str(number)
            if encoder.modality == "image":
                inputs = _image_types(sample, path.with_suffix(".png"))
            else:
                inputs = _audio_types(sample, path.with_suffix(".wav"))
            _compare(encoder, number, inputs)


def _compare(encoder: Encoder, number: int, inputs: Mapping[str, object]) -> None:
    """Prepare one sample in each type and compare the tensors with those of the first type."""
    expected: PreparedInput | None = None
    first_type = next(iter(inputs))
    for input_type, raw in inputs.items():
        prepared = _prepare(encoder, number, input_type, raw)
        if expected is None:
            expected = prepared
        elif name := first_difference(expected, prepared):
            raise CheckFailed(f"{name!r} of sample {number} differs between {first_type} and {input_type}")


def _prepare(encoder: Encoder, number: int, input_type: str, raw: object) -> PreparedInput:
    try:
        return prepare(encoder, SOURCE, raw)
    except MmxError as error:
        if error.code == "audio.missing_package":
            raise CheckSkipped(f"audio files cannot be read here: {error}") from None
        raise CheckFailed(f"sample {number} as {input_type}: {error}") from None


def _image_types(sample: object, path: Path) -> dict[str, object]:
    """Return an image in each type. A sample that is a file is used as it is, otherwise one is written to `path`."""
    image = load_image(cast(Any, sample))
    if isinstance(sample, str | os.PathLike):
        path = Path(sample)
    else:
        image.save(path)
    return {"a PIL image": image, "a path": str(path), "bytes": path.read_bytes()}


def _audio_types(sample: object, path: Path) -> dict[str, object]:
    """Return audio in each type, after rounding to 16 bits. The file is written to `path`."""
    rate = round(sample[1]) if isinstance(sample, tuple | list) else SAMPLING_RATE
    samples = load_audio(cast(Any, sample), rate)
    rounded = (samples * INT16_SCALE).round().clamp(-INT16_SCALE, INT16_SCALE - 1).to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(rounded.element_size())
        file.setframerate(rate)
        file.writeframes(rounded.numpy().astype("<i2").tobytes())
    return {
        "(samples, rate)": (rounded.float() / INT16_SCALE, rate),
        "a path": str(path),
        "bytes": path.read_bytes(),
    }
