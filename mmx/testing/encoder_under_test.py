"""The subject of a check: an encoder that can be built repeatedly with the same weights, and raw inputs.

Axes: B rows, S slots, F feature size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import yaml
from torch import Tensor

from mmx.config.loader import dump_config, parse_config
from mmx.config.schema import FrozenModel
from mmx.data.scenes import generate_scene, render_scene
from mmx.encoders.base import Encoder
from mmx.encoders.contract import PreparedInput, check_features, collate, encoder_errors, prepare
from mmx.errors import EncoderError
from mmx.models.source import construct_encoder
from mmx.nn.features import Features
from mmx.testing.toys import toy_tokenizer

SOURCE = "kit"  # name of the source in errors
SAMPLING_RATE = 16_000  # of the generated audio
MIN_SAMPLES = 3
MIN_SCALE = 1e-6  # lower bound of a scale that is divided by


@dataclass
class EncoderUnderTest:
    """An encoder class, its options, and raw inputs for it."""

    encoder_class: type[Encoder]
    options: FrozenModel
    samples: Sequence[object] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The encoder in messages."""
        return f"encoder {self.encoder_class.__name__}"

    def build(self, options: FrozenModel | None = None) -> Encoder:
        """Return a new encoder in eval mode, always with the same random weights."""
        if options is None:
            options = self.options
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return construct_encoder(self.encoder_class, options, toy_tokenizer(), SOURCE).eval()

    def prepare_all(self, encoder: Encoder) -> list[PreparedInput]:
        """Convert all samples to tensors."""
        return [prepare(encoder, SOURCE, raw) for raw in self.samples]

    def encode(self, encoder: Encoder, rows: Sequence[PreparedInput]) -> Features:
        """Encode prepared rows in one batch, without gradients."""
        batch = collate(encoder, SOURCE, rows)
        with torch.no_grad(), encoder_errors(f"{self.name} failed in forward with"):
            features = encoder(batch)
        return self.check_shapes(encoder, features)

    def check_shapes(self, encoder: Encoder, features: object) -> Features:
        """Check features without their values, which have checks of their own."""
        with torch.enable_grad():
            return check_features(features, encoder, SOURCE)


def samples_of(encoder: Encoder, given: Sequence[object] | None) -> list[object]:
    """Return the given samples, those of the encoder, or generated ones of its modality.

    Raises EncoderError if there are fewer than three.
    """
    with encoder_errors(f"{type(encoder).__name__}.samples() failed with", code="encoder.samples"):
        samples = list(encoder.samples() if given is None else given)
    if not samples and encoder.modality in GENERATORS:
        samples = GENERATORS[encoder.modality]()
    if len(samples) < MIN_SAMPLES:
        raise EncoderError(
            f"the kit has {len(samples)} inputs for {type(encoder).__name__} of modality {encoder.modality!r}; give "
            "three or more: define samples(self), or pass samples=[...] (--sample FILE on the command line).",
            code="encoder.samples",
            given=len(samples),
            expected=MIN_SAMPLES,
        )
    return samples


def visible_states(features: Features, row: int) -> Tensor:
    """Return the states [n, F] of the slots of one row that may be attended."""
    return features.states[row][features.mask[row]].float()


def max_relative_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the root mean square of `a`; infinity for different shapes.

    NaN equals NaN and infinity equals infinity: whether they are allowed is another check.
    """
    if a.shape != b.shape:
        return math.inf
    if not a.numel():
        return 0.0
    is_equal = (a == b) | (a.isnan() & b.isnan())
    scale = a[torch.isfinite(a)].square().mean().sqrt().nan_to_num(1.0).clamp(min=MIN_SCALE)
    difference = (a - b).abs().masked_fill(is_equal, 0.0)
    return float(difference.max() / scale)


def reloaded_options(encoder: Encoder) -> FrozenModel:
    """Return the options of an encoder after writing and reading a checkpoint's config.yaml."""
    text = dump_config(encoder.options)
    return parse_config(yaml.safe_load(text) or {}, type(encoder.options), where=SOURCE)


def first_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor that differs between two dicts, if any. NaN equals NaN."""
    if a.keys() != b.keys():
        return next(iter(a.keys() ^ b.keys()))
    for name in a:
        if a[name].dtype != b[name].dtype or not is_equal(a[name], b[name]):
            return name
    return None


def is_equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, with NaN equal to NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _images() -> list[object]:
    sizes = [(96, 64), (64, 96), (80, 80)]
    return [render_scene(generate_scene(0, number), 96).resize(size) for number, size in enumerate(sizes)]


def _texts() -> list[object]:
    return ["a red star", "two dogs run through the snow behind a house", "where?"]


def _audio() -> list[object]:
    """Tones of different frequencies and lengths, as (samples, sampling rate)."""
    tones: list[object] = []
    for frequency, seconds in ((220.0, 0.5), (440.0, 0.9), (880.0, 0.7)):
        time = torch.arange(round(seconds * SAMPLING_RATE)) / SAMPLING_RATE
        tones.append((0.5 * torch.sin(2 * math.pi * frequency * time), SAMPLING_RATE))
    return tones


GENERATORS = {"image": _images, "text": _texts, "audio": _audio}
