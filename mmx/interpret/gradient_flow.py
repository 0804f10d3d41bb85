"""Gradient flow: how much of the loss's gradient reaches each layer, as the model is and with paths taken away.

Alphabet: B rows (examples), K streams, T text positions, S slots, F feature width, L looking layers. Masks: True = may
be attended.

Three variants of one model, each a copy whose decoder is changed; the model itself stays as it was:
- `as_it_is`: every looking layer looks;
- `last_look`: only the last looking layer looks, the others have no cross-attention;
- `cut`: the decoder's residual paths carry no gradient, only its sublayers do. The numbers of the forward are the same,
  and what is left decays with depth: why the paths are there (He et al. 2016, "Identity Mappings in Deep Residual
  Networks", section 2, equation 5: without them the gradient is a product over the layers, with them a sum).
"""

from __future__ import annotations

import math
import os.path
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmx.errors import MmxError
from mmx.memory import Memory
from mmx.models.decoder import TextDecoder
from mmx.models.model import Model
from mmx.models.projection import KeyValueProjection
from mmx.models.question_encoder import QUESTION_ENCODER
from mmx.models.source import SourceBatch
from mmx.nn.features import Features
from mmx.nn.layers import PostNorm, PreNorm
from mmx.nn.transformer import DecoderLayer

ModulePart = Literal["encoder", "features", "projection", "question_encoder", "decoder"]
Key = tuple[ModulePart, str]
SPLIT = ("key.weight", "key.bias", "value.weight", "value.bias")  # their rows are those of the looking layers


class FlowValues(NamedTuple):
    """One number of each variant."""

    baseline: float
    last_cross_attention_only: float
    without_residuals: float


TITLES = ("as it is", "last look only", "highway cut")


@dataclass(frozen=True)
class FlowRow:
    """The L2 norm of the loss's gradient, in nats per unit, with respect to one group of weights or features.

    name: of an encoder or projection it begins with the source, as image.backbone.layer1.0 or image.key.2 (that of
    looking layer 2); of features it is the source; of the decoder and the reader a block or another part, as blocks.0.
    """

    part: ModulePart
    name: str
    norms: FlowValues


@dataclass(frozen=True)
class GradientFlow:
    """Rows in the order of the forward, as far as the order of the parameters tells; no weight is in two of them.
    losses: the mean cross-entropy in nats of each variant."""

    rows: tuple[FlowRow, ...]
    losses: FlowValues

    def of(self, part: ModulePart, source: str | None = None) -> tuple[FlowRow, ...]:
        """The rows of a part, of all its sources or of one (the reader's projection is that of source `reader`)."""
        return tuple(r for r in self.rows if r.part == part and source in (None, r.name.split(".")[0]))

    def total(self, part: ModulePart, source: str | None = None) -> FlowValues:
        """The norm over all rows of a part at once: the root of their squares' sum; 0 where there is no row."""
        norms = [row.norms for row in self.of(part, source)]
        return FlowValues(*(math.hypot(*(n[variant] for n in norms)) for variant in range(len(TITLES))))

    def share(self, source: str) -> FlowValues:
        """The gradient that reaches a source's features, relative to that of the model as it is; NaN where nothing
        does then, as behind gates that are shut. Raises MmxError for another source."""
        found = self.of("features", source)
        if not found:
            known = ", ".join(row.name for row in self.of("features"))
            raise MmxError(f"the flow has no source {source!r}; expected one of {known}.")
        whole, *_ = norms = found[0].norms
        return FlowValues(*(norm / whole if whole else math.nan for norm in norms))

    def table(self) -> str:
        """Lines to print: every row, the shares that reach the features, the losses."""
        wide = max(len("gradient of"), *(len(row.name) for row in self.rows)) + 2
        lines = [_line("part", "gradient of", TITLES, wide), *(_line(r.part, r.name, r.norms, wide) for r in self.rows)]
        lines += [_line("share", r.name, self.share(r.name), wide) for r in self.of("features")]
        return "\n".join([*lines, _line("loss", "", self.losses, wide)])


def gradient_flow(
    model: Model,
    sources: Mapping[str, SourceBatch],
    tokens: Tensor,
    mask: Tensor | None,
    targets: Tensor,
    boxes: Tensor | None = None,
) -> GradientFlow:
    """How much gradient of the mean cross-entropy reaches each layer of a model in eval mode, in three variants.

    sources, tokens int [B, K, T], mask bool [B, K, T], boxes [B, K, 4]: as for `Model.forward`; targets: int [B, K, T],
    the token that should follow each position, negative where nothing is to be learned (`pad_texts` makes all three).
    Dropout is off and running statistics stand still, so that the figures come again; weights that training freezes
    are measured like the others. A reader keeps its looks and its residual paths in all variants. Raises MmxError for
    a model that is laid out for speaking, and for targets that do not fit.
    """
    _check(model, tokens, targets)
    flat = targets.flatten()
    wanted = (flat >= 0).nonzero()[:, 0]

    def loss_of(twin: Model) -> Tensor:
        return F.cross_entropy(twin(sources, tokens, mask, wanted, boxes).float(), flat[wanted])

    found = [_measure(model, change, loss_of) for change in (_leave, _blind_all_but_last, _cut_highway)]
    whole = found[0][1]
    rows = [FlowRow(*key, FlowValues(*(norms.get(key, 0.0) for _, norms in found))) for key in whole]
    return GradientFlow(tuple(rows), FlowValues(*(loss for loss, _ in found)))


def _check(model: Model, tokens: Tensor, targets: Tensor) -> None:
    if model.decoder.is_prepacked:
        raise MmxError(
            "the decoder is laid out for speaking, which carries no gradient; take the model as "
            "mmx.models.checkpoint.load_model(FOLDER) gives it."
        )
    if targets.shape != tokens.shape or not (targets >= 0).any():
        raise MmxError(
            f"targets {list(targets.shape)} with {int((targets >= 0).sum())} to be learned do not fit tokens "
            f"{list(tokens.shape)}; give the token that follows each position, -100 where nothing is learned."
        )


# ---- variants --------------------------------------------------------------------------------------------------------


class _CutPreNorm(PreNorm):
    """A residual path that hands the numbers on and no gradient; made of the parts of the one it stands for."""

    def __init__(self, part: PreNorm) -> None:
        nn.Module.__init__(self)
        self.norm, self.dropout, self.gate = part.norm, part.dropout, part.gate

    def forward(self, x: Tensor, sublayer: Callable[..., Tensor], *args: object) -> Tensor:
        """[N, T, E] -> [N, T, E]."""
        return x.detach() + self.gate(self.dropout(sublayer(self.norm(x), *args)))


class _CutPostNorm(_CutPreNorm):
    """The same of norm(x + sublayer(x))."""

    def forward(self, x: Tensor, sublayer: Callable[..., Tensor], *args: object) -> Tensor:
        """[N, T, E] -> [N, T, E]."""
        return self.norm(x.detach() + self.gate(self.dropout(sublayer(x, *args))))


def _leave(decoder: TextDecoder) -> None:
    """As it is."""


def _blind_all_but_last(decoder: TextDecoder) -> None:
    looking: list[DecoderLayer] = [block for block in decoder.layers if block.cross_attention is not None]  # type: ignore[misc]
    for block in looking[:-1]:
        block.cross_attention = None


def _cut_highway(decoder: TextDecoder) -> None:
    for name, part in list(decoder.named_modules()):
        if isinstance(part, PreNorm):
            decoder.set_submodule(name, (_CutPostNorm if isinstance(part, PostNorm) else _CutPreNorm)(part))


# ---- one variant, measured -------------------------------------------------------------------------------------------


class _Watched(nn.Module):
    """A projection that remembers the features it was given, as something to ask the gradient of."""

    def __init__(self, projection: KeyValueProjection) -> None:
        super().__init__()
        self.projection, self.key = projection, projection.key
        self.states: Tensor | None = None

    def forward(self, features: Features) -> Memory:
        """Features -> Memory."""
        states = features.states
        # Of an encoder that computes without gradients the features are where the gradient ends.
        self.states = states if states.requires_grad else states.clone().requires_grad_()
        return self.projection(features._replace(states=self.states))


class _Piece(NamedTuple):
    """A tensor whose gradient is asked for; along its first axis it is that of `layers` looking layers."""

    part: ModulePart
    name: str
    tensor: Tensor
    layers: int | None = None

    def squares(self, gradient: Tensor | None) -> list[tuple[Key, float]]:
        """The sum of squares of each row that it belongs to."""
        parts = [self.tensor] if self.layers is None else self.tensor.chunk(self.layers)
        names = [self.name] if self.layers is None else [f"{self.name}.{i}" for i in range(self.layers)]
        if gradient is None:
            return [((self.part, name), 0.0) for name in names]
        rows = gradient.double().flatten().split([part.numel() for part in parts])
        return [((self.part, name), float(row.square().sum())) for name, row in zip(names, rows)]


def _measure(
    model: Model, change: Callable[[TextDecoder], None], loss_of: Callable[[Model], Tensor]
) -> tuple[float, dict[Key, float]]:
    """The loss of a changed copy, and the norm of its gradient by row."""
    twin = deepcopy(model).eval()
    change(twin.decoder)
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    weights, watched = _weights(twin), _watch(twin)
    with torch.enable_grad():
        loss = loss_of(twin)
    return float(loss.detach()), _norms(loss, weights, watched)


def _norms(loss: Tensor, weights: Sequence[_Piece], watched: Mapping[str, _Watched]) -> dict[Key, float]:
    features = [_Piece("features", name, watch.states) for name, watch in watched.items() if watch.states is not None]
    pieces = [*weights, *features]
    gradients = torch.autograd.grad(loss, [piece.tensor for piece in pieces], allow_unused=True)
    squares = dict.fromkeys(_order(weights, watched), 0.0)
    for piece, gradient in zip(pieces, gradients):
        for key, square in piece.squares(gradient):
            squares[key] += square
    return {key: math.sqrt(square) for key, square in squares.items()}


def _order(weights: Sequence[_Piece], names: Mapping[str, _Watched]) -> list[Key]:
    """The rows, each once; features stand where the forward has them, before the projection of their source."""
    keys: dict[Key, None] = {}
    for piece in weights:
        owner = piece.name.split(".")[0]
        if piece.part == "projection" and owner in names:
            keys["features", owner] = None
        keys |= {key: None for key, _ in piece.squares(None)}
    return [*keys, *(("features", name) for name in names if ("features", name) not in keys)]


def _watch(twin: Model) -> dict[str, _Watched]:
    """Put a watch on the features of each source, and on what the reader makes of questions."""
    owners = _owners(twin)
    watched = {name: _Watched(owner.projection) for name, owner in owners.items()}
    for name, owner in owners.items():
        owner.projection = watched[name]
    return watched


def _weights(twin: Model) -> list[_Piece]:
    """Every weight of floating type, once, with the row that it belongs to."""
    placed = [(*_place(name), weight) for name, weight in twin.named_parameters() if weight.is_floating_point()]
    names: dict[tuple[ModulePart, str], list[str]] = defaultdict(list)
    for part, owner, name, _ in placed:
        names[part, owner].append(name)
    layers = {name: owner.projection.layers for name, owner in _owners(twin).items()}
    pieces = []
    for part, owner, name, weight in placed:
        if part == "projection":
            split = layers[owner] if name in SPLIT else None
            pieces.append(_Piece(part, f"{owner}.{name.split('.')[0]}", weight, split))
        else:
            group = group_of(name, names[part, owner])
            pieces.append(_Piece(part, f"{owner}.{group}" if part == "encoder" else group, weight))
    return pieces


def _owners(twin: Model) -> dict[str, Any]:
    """What has a projection, by name."""
    return {**twin.sources, **({} if twin.question_encoder is None else {QUESTION_ENCODER: twin.question_encoder})}


def _place(name: str) -> tuple[ModulePart, str, str]:
    """The part, the source and the rest of a parameter's name in a model."""
    first, rest = name.split(".", 1)
    if first == "sources":
        source, part, rest = rest.split(".", 2)
        return part, source, rest  # type: ignore[return-value]
    if name.startswith("question_encoder.projection."):
        return "projection", QUESTION_ENCODER, name.removeprefix("question_encoder.projection.")
    return first, first, rest  # type: ignore[return-value]


def group_of(name: str, names: Sequence[str]) -> str:
    """The layer that a parameter belongs to: its name up to and including the first component that is a number, as
    backbone.layer1.0; else its first component that does not hold everything, as backbone.conv1. `names`: all names."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        holders = os.path.commonprefix([other.split(".")[:-1] for other in names])
        number = max(0, min(len(holders), len(parts) - 2))
    return ".".join(parts[: number + 1])


def _line(part: str, name: str, cells: Sequence[float | str], wide: int) -> str:
    told = (cell if isinstance(cell, str) else "-" if math.isnan(cell) else f"{cell:.3g}" for cell in cells)
    return f"{part:<11}{name:<{wide}}" + "".join(f"{cell:>16}" for cell in told)
