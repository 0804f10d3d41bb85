"""Which encoder and which sample made a loss that is not finite.

Axes: B rows, S slots, F feature size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, cast

import torch
from torch import Tensor

from mmx.data.batching import Batch
from mmx.models.model import Model
from mmx.models.source import Source


class InvalidFeatures(NamedTuple):
    """An encoder whose features are not finite.

    Attributes:
        source: name of the source.
        encoder: class of its encoder.
        sample: id of the first example of the batch with such features.
        stage: "prepare" if its input tensors are not finite already, "forward" if its features are not, "projection"
            if the features are finite and their keys or values are not.
    """

    source: str
    encoder: str
    sample: str
    stage: str


class _InvalidRow(NamedTuple):
    row: int
    stage: str


def find_invalid_features(
    model: Model, batches: Sequence[Batch], autocast: AbstractContextManager[object]
) -> InvalidFeatures | None:
    """Encode the sources of the batches again and return the first whose features are not finite.

    In eval mode the rows of a batch are independent, so that the sample is the one at fault. Features that are finite
    in eval mode are encoded again in the modes of training.
    """
    with torch.no_grad(), autocast:
        for in_training_mode in (False, True):
            for batch in batches:
                if found := _search(model, batch, in_training_mode):
                    return found
    return None


def _search(model: Model, batch: Batch, in_training_mode: bool) -> InvalidFeatures | None:
    for name, inputs in batch.sources.items():
        if name not in model.sources:  # questions for a question encoder
            continue
        source = cast(Source, model.sources[name])
        modes = {module: module.training for module in source.modules()}
        if not in_training_mode:
            source.eval()
        invalid = _first_invalid_row(source, inputs.inputs)
        for module, was_training in modes.items():
            module.training = was_training
        if invalid is not None:
            position = int(inputs.rows[invalid.row]) // max(1, inputs.streams)
            return InvalidFeatures(name, type(source.encoder).__name__, batch.ids[position], invalid.stage)
    return None


def _first_invalid_row(source: Source, inputs: Mapping[str, Tensor]) -> _InvalidRow | None:
    """Return the first row of inputs whose features, or else whose keys or values, are not finite."""
    features = source.encoder(inputs)  # its shapes were checked when the loss was computed
    finite_rows = _finite_rows(features.states)
    if not finite_rows.all():
        row = int((~finite_rows).nonzero()[0])
        tensors = [tensor[row] for tensor in inputs.values() if tensor.is_floating_point()]
        is_prepared_finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
        return _InvalidRow(row, "forward" if is_prepared_finite else "prepare")
    memory = source(inputs)
    finite_rows = _finite_rows(memory.keys.transpose(0, 1)) & _finite_rows(memory.values.transpose(0, 1))
    if not finite_rows.all():
        return _InvalidRow(int((~finite_rows).nonzero()[0]), "projection")
    return None


def _finite_rows(x: Tensor) -> Tensor:
    """[B, ...] -> bool [B], True for rows without NaN and infinity."""
    return torch.isfinite(x).flatten(1).all(-1)
