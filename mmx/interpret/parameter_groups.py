"""Parameters of a model grouped by part, source and layer, for measurements of gradients."""

from __future__ import annotations

import os.path
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from mmx.models.model import Model
from mmx.models.question_encoder import QUESTION_ENCODER, QuestionEncoder
from mmx.models.source import Source

ModulePart = Literal["encoder", "features", "projection", "question_encoder", "decoder"]
RowKey = tuple[ModulePart, str]
LAYERED_PARAMETERS = ("key.weight", "key.bias", "value.weight", "value.bias")  # their rows are grouped by layer


class MeasuredTensor(NamedTuple):
    """A tensor whose gradient is measured. With `layers`, its first axis is divided into one row for each layer."""

    part: ModulePart
    name: str
    tensor: Tensor
    layers: int | None = None

    def keys(self) -> list[RowKey]:
        """The rows that the tensor belongs to."""
        if self.layers is None:
            return [(self.part, self.name)]
        return [(self.part, f"{self.name}.{layer}") for layer in range(self.layers)]

    def squared_norms(self, gradient: Tensor | None) -> list[float]:
        """The squared gradient norm in each of these rows."""
        if gradient is None:
            return [0.0] * len(self.keys())
        chunks = [self.tensor] if self.layers is None else self.tensor.chunk(self.layers)
        parts = gradient.double().flatten().split([chunk.numel() for chunk in chunks])
        return [float(part.square().sum()) for part in parts]


def measured_parameters(model: Model) -> list[MeasuredTensor]:
    """Every floating-point parameter once, with its row."""
    located = []
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            located.append((_locate(name), parameter))
    names: dict[tuple[ModulePart, str], list[str]] = defaultdict(list)
    for where, _ in located:
        names[where.part, where.source].append(where.name)
    owners = projection_owners(model)
    measured = []
    for where, parameter in located:
        if where.part == "projection":
            layers = owners[where.source].projection.num_layers if where.name in LAYERED_PARAMETERS else None
            row = f"{where.source}.{where.name.split('.')[0]}"
            measured.append(MeasuredTensor(where.part, row, parameter, layers))
        else:
            group = parameter_group(where.name, names[where.part, where.source])
            row = f"{where.source}.{group}" if where.part == "encoder" else group
            measured.append(MeasuredTensor(where.part, row, parameter))
    return measured


def projection_owners(model: Model) -> dict[str, Source | QuestionEncoder]:
    """The modules with a projection, by name."""
    owners: dict[str, Source | QuestionEncoder] = dict(model.sources.items())  # type: ignore[arg-type]
    if model.question_encoder is not None:
        owners[QUESTION_ENCODER] = model.question_encoder
    return owners


class _ParameterLocation(NamedTuple):
    """The part, the source, and the rest of the name of a parameter."""

    part: ModulePart
    source: str
    name: str


def _locate(name: str) -> _ParameterLocation:
    first, rest = name.split(".", 1)
    if first == "sources":
        source, part, rest = rest.split(".", 2)
        return _ParameterLocation(part, source, rest)  # type: ignore[arg-type]
    if name.startswith("question_encoder.projection."):
        return _ParameterLocation("projection", QUESTION_ENCODER, rest.removeprefix("projection."))
    return _ParameterLocation(first, first, rest)  # type: ignore[arg-type]


def parameter_group(name: str, names: Sequence[str]) -> str:
    """The layer that a parameter belongs to.

    Its name up to and including the first component that is a number, as backbone.layer1.0. Without a number, its name
    up to the first component that is not common to all `names`, as backbone.conv1.
    """
    components = name.split(".")
    index = next((i for i, component in enumerate(components) if component.isdigit()), None)
    if index is None:
        common = os.path.commonprefix([other.split(".")[:-1] for other in names])
        index = max(0, min(len(common), len(components) - 2))
    return ".".join(components[: index + 1])
