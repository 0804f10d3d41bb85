"""Mappings from published tensors to ours. Every published tensor is mapped, dropped on purpose, or an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmx.errors import CheckpointError

Transform = Callable[[Tensor], Tensor]
LAYER = "{i}"  # placeholder of a layer index in tensor names


def identity(tensor: Tensor) -> Tensor:
    """Return the tensor unchanged."""
    return tensor


@dataclass(frozen=True)
class WeightMapping:
    """`ours` is the concatenation along the first axis of the tensors `theirs`, each after `transform`.

    optional: a missing tensor counts as zeros, such as the bias of a layer without one.
    """

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = identity
    optional: bool = False


def linear(
    ours: str, *theirs: str, transform: Transform = identity, optional_bias: bool = False
) -> list[WeightMapping]:
    """Map weight and bias of a linear layer, made of one or several published layers."""
    weights = tuple(f"{name}.weight" for name in theirs)
    biases = tuple(f"{name}.bias" for name in theirs)
    return [
        WeightMapping(f"{ours}.weight", weights, transform),
        WeightMapping(f"{ours}.bias", biases, transform, optional_bias),
    ]


def norm(ours: str, theirs: str) -> list[WeightMapping]:
    """Map weight and bias of a layer norm."""
    return linear(ours, theirs)


def each_layer(num_layers: int, mappings: Iterable[WeightMapping]) -> list[WeightMapping]:
    """Repeat the mappings of one layer, whose names contain {i}, for every layer."""
    repeated = []
    for mapping in mappings:
        for i in range(num_layers):
            theirs = tuple(_at_layer(name, i) for name in mapping.theirs)
            repeated.append(replace(mapping, ours=_at_layer(mapping.ours, i), theirs=theirs))
    return repeated


def all_layers(num_layers: int, mappings: Iterable[WeightMapping]) -> list[WeightMapping]:
    """Concatenate the tensors of all layers, whose names contain {i}: the key-value projection has all layers."""
    concatenated = []
    for mapping in mappings:
        theirs: list[str] = []
        for i in range(num_layers):
            theirs.extend(_at_layer(name, i) for name in mapping.theirs)
        concatenated.append(replace(mapping, theirs=tuple(theirs)))
    return concatenated


def computed_mapping(ours: str, present: str, tensor: Tensor) -> WeightMapping:
    """Map a tensor that is computed rather than published. `present`: any published tensor."""
    return WeightMapping(ours, (present,), lambda _: tensor)


def convert(
    mappings: Sequence[WeightMapping],
    dropped: Sequence[str],
    theirs: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    name: str,
) -> dict[str, Tensor]:
    """Convert published tensors to ours, in float32.

    Args:
        mappings: one for each of our tensors.
        dropped: patterns of whole names of published tensors that are not needed.
        theirs: the published tensors.
        shapes: expected shapes of our tensors.
        name: name of the published model, for errors.

    Raises CheckpointError, naming the tensor, if one is missing, unexpected or of another shape.
    """
    converted: dict[str, Tensor] = {}
    used: set[str] = set()
    for mapping in mappings:
        used.update(mapping.theirs)
        converted[mapping.ours] = _convert_one(mapping, theirs, shapes[mapping.ours], name)
    unexpected = sorted(tensor for tensor in theirs if tensor not in used and not matches(tensor, dropped))
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise CheckpointError(
            f"{name!r} holds {unexpected[0]}{more}, which its family does not have; is config.json its own?",
            code="hub.unexpected_tensors",
            name=name,
            tensors=unexpected,
        )
    return converted


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether one of the regular expressions matches the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _convert_one(mapping: WeightMapping, theirs: Mapping[str, Tensor], expected: torch.Size, name: str) -> Tensor:
    missing = [tensor for tensor in mapping.theirs if tensor not in theirs]
    if missing and not mapping.optional:
        raise CheckpointError(
            f"{name!r} lacks {missing[0]}; expected all tensors of its family, download it again.",
            code="hub.missing_tensors",
            name=name,
            tensors=missing,
        )
    try:
        converted = _concatenate(mapping, theirs, missing, expected)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise _shape_error(mapping, theirs, expected, name, None) from error
    if converted.shape != expected:
        raise _shape_error(mapping, theirs, expected, name, converted.shape)
    return converted


def _concatenate(
    mapping: WeightMapping, theirs: Mapping[str, Tensor], missing: Sequence[str], expected: torch.Size
) -> Tensor:
    """Concatenate the transformed tensors; missing ones are zeros of the size that is left."""
    parts: dict[str, Tensor] = {}
    for tensor in mapping.theirs:
        if tensor in theirs:
            parts[tensor] = mapping.transform(theirs[tensor]).float()
    if missing:
        num_present = sum(len(part) for part in parts.values())
        rows = (expected[0] - num_present) // len(missing)
        parts |= dict.fromkeys(missing, torch.zeros(rows, *expected[1:]))
    return torch.cat([parts[tensor] for tensor in mapping.theirs])


def _shape_error(
    mapping: WeightMapping,
    theirs: Mapping[str, Tensor],
    expected: torch.Size,
    name: str,
    converted: torch.Size | None,
) -> CheckpointError:
    tensor = mapping.theirs[0]
    shape = list(theirs[tensor].shape) if tensor in theirs else None
    result = f" (it would make {list(converted)})" if converted is not None else ""
    return CheckpointError(
        f"{name!r} holds {tensor} as {shape}, which does not fit its config.json: {mapping.ours} has shape "
        f"{list(expected)}{result}; download both again.",
        code="hub.tensor_shape",
        name=name,
        tensor=tensor,
        given=shape,
        expected=list(expected),
    )


def _at_layer(name: str, layer: int) -> str:
    return name.replace(LAYER, str(layer))
