"""A source: an encoder with its key-value projection. Raw inputs to batches, and batches to a memory.

B rows (examples), K streams, n inputs of one source.

Rows need not have the same sources: an absent source is not encoded, and its slots are masked out in that row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmx.config.loader import parse_config
from mmx.config.schema import FrozenModel, ModelConfig, SourceConfig
from mmx.encoders.base import Encoder
from mmx.encoders.contract import PreparedInput, accepts, collate, encode, encoder_errors, prepare
from mmx.encoders.registry import resolve
from mmx.errors import EncoderError, MmxError
from mmx.memory import Memory
from mmx.models.projection import KeyValueProjection
from mmx.text.tokenizer import Tokenizer

Encoders = Mapping[str, Encoder]


class SourceBatch(NamedTuple):
    """The inputs of one source in a batch.

    Attributes:
        inputs: tensors from the encoder's `collate`, n inputs.
        rows: int [n], the row of each input: 0..B-1, or 0..B*K-1 with `streams`.
        dropped: bool [n], inputs that are encoded but masked out (modality dropout), or None.
        streams: K if each row has one input for each of K streams; 0 if it has one for all of them.
    """

    inputs: Mapping[str, Tensor]
    rows: Tensor
    dropped: Tensor | None = None
    streams: int = 0

    def to(self, device: torch.device) -> SourceBatch:
        """Return the batch on another device."""
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        dropped = None if self.dropped is None else self.dropped.to(device)
        return SourceBatch(inputs, self.rows.to(device), dropped, self.streams)


class Source(nn.Module):
    """An encoder and its key-value projection."""

    def __init__(self, name: str, config: SourceConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.name = name
        self.encoder = build_encoder(config, tokenizer, f"model.sources.{name}")
        self.projection = KeyValueProjection(
            config.projection,
            model.question_encoder or model.decoder,
            self.encoder.width,
            self.encoder.dimensions,
            name,
            tie_layers=model.tie_key_value != "none",
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> Memory:
        """Encode a batch of inputs to a memory."""
        weight = self.projection.key.weight
        features = encode(self.encoder, self.name, inputs, weight.device)
        if torch.is_autocast_enabled(weight.device.type):
            return self.projection(features)
        states = features.states.to(weight.dtype)  # an encoder may compute in another dtype
        return self.projection(features._replace(states=states))


# ---- building encoders -----------------------------------------------------------------------------------------


def build_encoder(config: SourceConfig, tokenizer: Tokenizer, where: str) -> Encoder:
    """Build the encoder of a source.

    Args:
        where: key of the source in the configuration, for messages.

    Raises:
        EncoderError: it does not exist, cannot be imported or breaks its contract.
        ConfigError: its options are not valid.
    """
    encoder_class = resolve(config.encoder)
    options = parse_config(config.options, encoder_class.Options, where=f"{where}.options")
    return construct_encoder(encoder_class, options, tokenizer, where)


def construct_encoder(encoder_class: type[Encoder], options: FrozenModel, tokenizer: Tokenizer, where: str) -> Encoder:
    """Call the constructor of an encoder and check what the contract requires of it. Raises EncoderError."""
    name = encoder_class.__name__
    with encoder_errors(
        f"encoder {name} of {where} cannot be built with its options:", "encoder.build", encoder=name, key=where
    ):
        arguments = (options, tokenizer) if encoder_class.uses_tokenizer else (options,)
        encoder = encoder_class(*arguments)
        given_options = getattr(encoder, "options", None)
        given_width = getattr(encoder, "width", None)
    problem = _constructor_problem(encoder, given_options, given_width)
    if problem is not None:
        raise EncoderError(f"encoder {name} of {where} {problem}.", code="encoder.constructor", encoder=name, key=where)
    return encoder


def _constructor_problem(encoder: Encoder, options: object, width: object) -> str | None:
    """What a constructor left undone, as the end of a sentence."""
    if options is None:
        return "does not call super().__init__(options); self.options must be its Options"
    if not isinstance(options, type(encoder).Options):
        return f"has options {type(options).__name__}; self.options must be its Options"
    if width is None:
        return "sets no self.width; set its feature size in __init__, an integer"
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        return f"has width {width!r}; set its feature size in __init__, a positive integer"
    if encoder.dimensions not in (1, 2):
        return f"has dimensions {encoder.dimensions!r}; expected 1, or 2 for features on a grid"
    return None


# ---- raw inputs to batches -------------------------------------------------------------------------------------


def prepare_inputs(encoders: Encoders, raw: Mapping[str, object]) -> dict[str, PreparedInput]:
    """Convert the raw inputs of one row, by source, to tensors. Raises MmxError for an input that cannot be read.

    None is an absent input. Sources that the model does not have are left out.
    """
    prepared = {}
    for name, value in raw.items():
        if name in encoders and value is not None:
            prepared[name] = prepare(encoders[name], name, value)
    return prepared


def collate_inputs(
    encoders: Encoders, prepared: Sequence[Mapping[str, Mapping[str, Tensor]]]
) -> dict[str, SourceBatch]:
    """Combine prepared rows to one batch for each source that occurs in them."""
    batches = {}
    for name, encoder in encoders.items():
        rows = [row for row, inputs in enumerate(prepared) if name in inputs]
        if rows:
            inputs = collate(encoder, name, [prepared[row][name] for row in rows])
            batches[name] = SourceBatch(inputs, torch.tensor(rows))
    return batches


def find_source(encoders: Encoders, raw: object) -> str:
    """Return the source for a raw input that is given without the name of one.

    A path goes to the first encoder that accepts it. Any other input, and a path that no encoder accepts, goes to the
    source `image`, or to the only source. Raises MmxError if there are several others.
    """
    if isinstance(raw, str):
        for name, encoder in encoders.items():
            if accepts(encoder, name, raw):
                return name
    if "image" in encoders:
        return "image"
    names = list(encoders)
    if len(names) == 1:
        return names[0]
    given = repr(raw)[:60] if isinstance(raw, str) else f"a {type(raw).__name__}"
    raise MmxError(
        f"{given} could be for any of the sources {', '.join(names)}; name it, as in {names[0]}=...",
        code="source.ambiguous",
        sources=names,
    )
