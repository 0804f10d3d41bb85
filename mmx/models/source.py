"""Sources: the way of a raw input to its memory, and of many rows with different inputs into one batch.

Alphabet: B rows (examples), K streams, n inputs of one source.

A source is an encoder and its projection under a name. Rows need not have the same sources: an absent one is not
encoded, and its row finds nothing of it to see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmx.config.loader import parse_config
from mmx.config.schema import ModelConfig, SourceConfig
from mmx.encoders.base import Encoder
from mmx.encoders.contract import PreparedInput, accepts, collate, encode, encoder_errors, prepare
from mmx.encoders.registry import resolve
from mmx.errors import EncoderError, MmxError
from mmx.memory import Memory
from mmx.models.projection import KeyValueProjection
from mmx.text.tokenizer import Tokenizer

Encoders = Mapping[str, Encoder]


class SourceBatch(NamedTuple):
    """One source's part of a batch. inputs: what its encoder collated; rows: int [n], which row of B each is of;
    withheld: bool [n], encoded but not shown; streams: how many inputs, one a stream, each row has (0: one for all).
    """

    inputs: Mapping[str, Tensor]
    rows: Tensor
    dropped: Tensor | None = None
    streams: int = 0

    def to(self, device: torch.device) -> SourceBatch:
        """The same on another device."""
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        withheld = None if self.dropped is None else self.dropped.to(device)
        return SourceBatch(inputs, self.rows.to(device), withheld, self.streams)


class Source(nn.Module):
    """An encoder and its projection: raw tensors in, Memory out."""

    def __init__(self, name: str, config: SourceConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.name = name
        self.encoder = build_encoder(config, tokenizer, f"model.sources.{name}")
        dimensions, width = self.encoder.dimensions, self.encoder.width
        self.projection = KeyValueProjection(
            config.projection,
            model.question_encoder or model.decoder,
            width,
            dimensions,
            name,
            model.tie_key_value != "none",
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> Memory:
        """A batch of inputs to its memory."""
        features = encode(self.encoder, self.name, inputs, self.projection.key.weight.device)
        states = features.states
        if not torch.is_autocast_enabled(states.device.type):  # an encoder may compute in a type of its own
            states = states.to(self.projection.key.weight.dtype)
        return self.projection(features._replace(states=states))


def build_encoder(config: SourceConfig, tokenizer: Tokenizer, where: str) -> Encoder:
    """The encoder that a source names, with its own options checked. Raises EncoderError or ConfigError."""
    kind = resolve(config.encoder)
    return construct_encoder(
        kind, parse_config(config.options, kind.Options, where=f"{where}.options"), tokenizer, where
    )


def construct_encoder(kind: type[Encoder], options: Any, tokenizer: Tokenizer, where: str) -> Encoder:
    """An encoder of a class with its options. Whatever a stranger's constructor raises is told with its name."""
    with encoder_errors(f"encoder {kind.__name__} of {where} cannot be built with its options:"):
        encoder = kind(options, tokenizer) if kind.uses_tokenizer else kind(options)  # type: ignore[call-arg]
        options, width = getattr(encoder, "options", None), getattr(encoder, "width", None)
    if not isinstance(options, kind.Options):
        given = (
            "does not call super().__init__(options)" if options is None else f"has options {type(options).__name__}"
        )
        raise EncoderError(f"encoder {kind.__name__} of {where} {given}; self.options must be its Options.")
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        given = "sets no self.width" if width is None else f"has width {width!r}"
        raise EncoderError(
            f"encoder {kind.__name__} of {where} {given}; give its feature width in __init__, a whole number."
        )
    if encoder.dimensions not in (1, 2):
        given = f"has dimensions {encoder.dimensions!r}"
        raise EncoderError(f"encoder {kind.__name__} of {where} {given}; expected 1, or 2 for features on a grid.")
    return encoder


def prepare_inputs(encoders: Encoders, raw: Mapping[str, Any]) -> dict[str, PreparedInput]:
    """The inputs of one row, by source name, as tensors; None is an absent one, and sources that are not mounted are
    passed over. Raises MmxError for what cannot be read."""
    return {
        name: prepare(encoders[name], name, given)
        for name, given in raw.items()
        if name in encoders and given is not None
    }


def collate_inputs(
    encoders: Encoders, prepared: Sequence[Mapping[str, Mapping[str, Tensor]]]
) -> dict[str, SourceBatch]:
    """Prepared rows to one batch of each source that any of them has."""
    batch = {}
    for name, encoder in encoders.items():
        rows = [row for row, inputs in enumerate(prepared) if name in inputs]
        if rows:
            inputs = collate(encoder, name, [prepared[row][name] for row in rows])
            batch[name] = SourceBatch(inputs, torch.tensor(rows))
    return batch


def find_source(encoders: Encoders, raw: Any) -> str:
    """Which source a raw input without a name is meant for: a path goes to the encoder that accepts it; anything else,
    and a path that none accepts, to the picture encoder or to the only one there is. Raises MmxError."""
    accepting = [n for n, e in encoders.items() if isinstance(raw, str) and accepts(e, n, raw)]
    if accepting:
        return accepting[0]
    if "image" in encoders or len(encoders) == 1:
        return "image" if "image" in encoders else next(iter(encoders))
    shown = repr(raw)[:60] if isinstance(raw, str) else f"a {type(raw).__name__}"
    raise MmxError(
        f"{shown} could be for any of the sources {', '.join(encoders)}; name it, as in {next(iter(encoders))}=..."
    )
