"""Tables from published weights to ours: which tensors of theirs make each of ours, and which are dropped on purpose.

Everything is accounted for: a tensor that no rule takes and no pattern drops is an error, as is one that lacks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmx.errors import CheckpointError

Change = Callable[[Tensor], Tensor]
LAYER = "{i}"


def identity(tensor: Tensor) -> Tensor:
    """No change."""
    return tensor


@dataclass(frozen=True)
class WeightMapping:
    """`ours` is made of `theirs`, each changed, one under another along the first axis.

    optional: a part that is lacking counts as zeros, as the bias of a layer that has none.
    """

    ours: str
    theirs: tuple[str, ...]
    transform: Change = identity
    optional: bool = False


def linear(ours: str, *theirs: str, change: Change = identity, optional_bias: bool = False) -> list[WeightMapping]:
    """Weight and bias of a linear map, fused of several where there are several."""
    weight, bias = (tuple(f"{name}.{part}" for name in theirs) for part in ("weight", "bias"))
    return [WeightMapping(f"{ours}.weight", weight, change), WeightMapping(f"{ours}.bias", bias, change, optional_bias)]


def norm(ours: str, theirs: str) -> list[WeightMapping]:
    """Weight and bias of a layer norm."""
    return linear(ours, theirs)


def each_layer(layers: int, rules: Iterable[WeightMapping]) -> list[WeightMapping]:
    """The rules of one layer, written with {i}, for every layer."""
    return [
        replace(rule, ours=_at(rule.ours, i), theirs=tuple(_at(name, i) for name in rule.theirs))
        for rule in rules
        for i in range(layers)
    ]


def all_layers(layers: int, rules: Iterable[WeightMapping]) -> list[WeightMapping]:
    """Rules whose parts, written with {i}, are those of all layers one under another: keys and values of a memory."""
    return [replace(rule, theirs=tuple(_at(name, i) for i in range(layers) for name in rule.theirs)) for rule in rules]


def convert(
    rules: Sequence[WeightMapping],
    dropped: Sequence[str],
    theirs: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    where: str,
) -> dict[str, Tensor]:
    """Our tensors, in float32. `dropped`: patterns of whole names; `shapes`: those that ours must have.

    Raises CheckpointError, with a name, for a tensor that is missing, is left over or has another shape.
    """
    made, taken = {}, set()
    for rule in rules:
        taken |= set(rule.theirs)
        made[rule.ours] = _made(rule, theirs, shapes, where)
    if extra := sorted(name for name in theirs if name not in taken and not matches(name, dropped)):
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(f"{where} holds {extra[0]}{more}, which its family has not; is config.json its own?")
    return made


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the regular expressions is the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _made(rule: WeightMapping, theirs: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], where: str) -> Tensor:
    lacking = [name for name in rule.theirs if name not in theirs]
    if lacking and not rule.optional:
        raise CheckpointError(f"{where} lacks {lacking[0]}; expected all tensors of its family, download it again.")
    try:
        parts = {name: rule.transform(theirs[name]).float() for name in rule.theirs if name in theirs}
        expected = shapes[rule.ours]
        if lacking:
            rows = (expected[0] - sum(len(part) for part in parts.values())) // len(lacking)
            parts |= dict.fromkeys(lacking, torch.zeros(rows, *expected[1:]))
        made = torch.cat([parts[name] for name in rule.theirs])
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where} holds {rule.theirs[0]} as {_shape(theirs.get(rule.theirs[0]))}, which does not fit its "
            "config.json; download both again."
        ) from error
    if made.shape != expected:
        raise CheckpointError(
            f"{where} holds {rule.theirs[0]} as {_shape(theirs.get(rule.theirs[0]))}; with its config.json it would "
            f"make {rule.ours} {list(made.shape)}, expected {list(expected)}; download both again."
        )
    return made


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else str(list(tensor.shape))


def _at(name: str, layer: int) -> str:
    return name.replace(LAYER, str(layer))
