"""What a check works on: an encoder that can be built again and again, always with the same weights, and raw inputs.

Alphabet: B rows, S slots, F feature width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from torch import Tensor

from mmx.config.loader import dump_config, parse_config
from mmx.data.scenes import generate_scene, render_scene
from mmx.encoders.base import Encoder
from mmx.encoders.contract import PreparedInput, check_features, collate, encoder_errors, prepare
from mmx.errors import EncoderError
from mmx.models.source import construct_encoder
from mmx.nn.features import Features
from mmx.testing.toys import toy_tokenizer

RATE = 16_000  # samples a second of the sounds made here


@dataclass
class EncoderUnderTest:
    """An encoder class, its options, and raw inputs for it."""

    kind: type[Encoder]
    options: Any
    samples: Sequence[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the sentences call it."""
        return f"encoder {self.kind.__name__}"

    def build(self, options: Any = None) -> Encoder:
        """A new encoder in eval mode; every one has the same random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return construct_encoder(
                self.kind, self.options if options is None else options, toy_tokenizer(), "kit"
            ).eval()

    def prepared(self, encoder: Encoder) -> list[PreparedInput]:
        """All samples as tensors."""
        return [prepare(encoder, "kit", raw) for raw in self.samples]

    def encode(self, encoder: Encoder, rows: Sequence[PreparedInput]) -> Features:
        """Prepared rows in one batch, without gradients, through the contract's door."""
        with torch.no_grad(), encoder_errors(f"{self.name} failed in forward with"):
            features = encoder(collate(encoder, "kit", rows))
        return self.check(encoder, features)

    def check(self, encoder: Encoder, features: Any) -> Features:
        """The features, of which only the form is looked at here; values have a check of their own."""
        with torch.enable_grad():
            return check_features(features, encoder, "kit")


def samples_of(encoder: Encoder, given: Sequence[Any] | None) -> list[Any]:
    """The given samples, those the encoder brings, or some of its modality. Raises EncoderError where few."""
    with encoder_errors(f"encoder {type(encoder).__name__} has samples that cannot be listed:"):
        samples = list(encoder.samples() if given is None else given)
    if not samples and encoder.modality in MADE:
        samples = MADE[encoder.modality]()
    if len(samples) < 3:
        raise EncoderError(
            f"the kit has {len(samples)} inputs for {type(encoder).__name__} of modality {encoder.modality!r}; give "
            "three or more: define samples(self), or pass samples=[...] (--sample FILE on the command line)."
        )
    return samples


def visible(features: Features, row: int) -> Tensor:
    """The states [n, F] of the slots of one row that may be attended."""
    return features.states[row][features.mask[row]].float()


def max_relative_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors, in units of the first one's root mean square; inf where shapes differ.
    NaN and infinity are like themselves: whether they may be there is another question."""
    if a.shape != b.shape:
        return math.inf
    alike = (a == b) | (a.isnan() & b.isnan())
    scale = a[torch.isfinite(a)].square().mean().sqrt().nan_to_num(1.0).clamp(min=1e-6)
    return float((a - b).abs().masked_fill(alike, 0.0).max() / scale) if a.numel() else 0.0


def rebuilt_options(encoder: Encoder) -> Any:
    """The options of an encoder after a stay in a checkpoint's config.yaml."""
    text = dump_config(encoder.options)
    return parse_config(yaml.safe_load(text) or {}, type(encoder.options), where="kit")


def unlike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that two dicts do not share, NaN being equal to NaN."""
    if a.keys() != b.keys():
        return next(iter(a.keys() ^ b.keys()))
    return next((n for n in a if a[n].dtype != b[n].dtype or not equal(a[n], b[n])), None)


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _pictures() -> list[Any]:
    return [
        render_scene(generate_scene(0, number), 96).resize(size)
        for number, size in enumerate([(96, 64), (64, 96), (80, 80)])
    ]


def _texts() -> list[Any]:
    return ["a red star", "two dogs run through the snow behind a house", "where?"]


def _sounds() -> list[Any]:
    """Tones of different heights and lengths, as (samples, rate)."""
    tones = []
    for hertz, seconds in ((220.0, 0.5), (440.0, 0.9), (880.0, 0.7)):
        time = torch.arange(round(seconds * RATE)) / RATE
        tones.append((0.5 * torch.sin(2 * math.pi * hertz * time), RATE))
    return tones


MADE = {"image": _pictures, "text": _texts, "audio": _sounds}
