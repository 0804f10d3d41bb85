"""Gradient flow: the norm of the loss's gradient at each layer, for the model and for two variants of it.

Axes: B rows (examples), K streams, T text positions, S slots, F feature size, L cross-attention layers.
Masks: True = may be attended.

Variants are copies of the model with a changed decoder; the model itself is not changed:
- `baseline`: the model as it is;
- `last_cross_attention_only`: cross-attention only in the last layer that has it;
- `without_residuals`: the residual connections of the decoder carry no gradient. The forward pass is the same. The
  gradient that remains decays with depth (He et al. 2016, "Identity Mappings in Deep Residual Networks", section 2,
  equation 5: with residual connections the gradient is a sum over the layers, without them a product).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmx.errors import MmxError
from mmx.interpret.attention_stats import cross_attention_layers
from mmx.interpret.parameter_groups import MeasuredTensor, ModulePart, RowKey, measured_parameters, projection_owners
from mmx.interpret.text_batch import TextBatch
from mmx.memory import Memory
from mmx.models.decoder import TextDecoder
from mmx.models.model import Model
from mmx.models.projection import KeyValueProjection
from mmx.models.source import SourceBatch
from mmx.nn.features import Features
from mmx.nn.layers import PostNorm, PreNorm


class FlowValues(NamedTuple):
    """One number for each variant."""

    baseline: float
    last_cross_attention_only: float
    without_residuals: float


TITLES = ("baseline", "last cross-attention only", "without residuals")
COLUMN_WIDTH = max(map(len, TITLES)) + 2


@dataclass(frozen=True)
class FlowRow:
    """The L2 norm of the loss's gradient, in nats per unit, with respect to a group of parameters or to features.

    Args:
        part: of the model.
        name: begins with the source for encoders and projections, as image.backbone.layer1.0 or image.key.2 (keys of
            cross-attention layer 2). It is the source for features. For the decoder and the question encoder it is a
            layer or another module, as layers.0.
        norms: one for each variant.
    """

    part: ModulePart
    name: str
    norms: FlowValues


@dataclass(frozen=True)
class GradientFlow:
    """Gradient norms and losses of the three variants.

    Args:
        rows: in the order of the forward pass as far as the order of the parameters gives it. No parameter is in two
            rows.
        losses: mean cross-entropy in nats.
    """

    rows: tuple[FlowRow, ...]
    losses: FlowValues

    def of(self, part: ModulePart, source: str | None = None) -> tuple[FlowRow, ...]:
        """The rows of a part, of all sources or of one.

        The source of the question encoder's projection and features is `question_encoder`.
        """
        return tuple(row for row in self.rows if row.part == part and source in (None, row.name.split(".")[0]))

    def total(self, part: ModulePart, source: str | None = None) -> FlowValues:
        """The gradient norm over all rows of a part together; 0 without rows."""
        norms = [row.norms for row in self.of(part, source)]
        return (
            FlowValues(*(math.hypot(*values) for values in zip(*norms, strict=True))) if norms else FlowValues(0, 0, 0)
        )

    def share(self, source: str) -> FlowValues:
        """The gradient norm at a source's features relative to the baseline.

        NaN if the baseline is zero, as behind closed gates. Raises MmxError for an unknown source.
        """
        found = self.of("features", source)
        if not found:
            known = [row.name for row in self.of("features")]
            raise MmxError(
                f"the flow has no source {source!r}; expected one of {', '.join(known)}.",
                code="gradient_flow.source",
                source=source,
                known=known,
            )
        norms = found[0].norms
        return FlowValues(*(norm / norms.baseline if norms.baseline else math.nan for norm in norms))

    def table(self) -> str:
        """Lines of text: every row, the relative gradient norms at the features, and the losses."""
        width = max(len("gradient of"), *(len(row.name) for row in self.rows)) + 2
        lines = [_table_line("part", "gradient of", TITLES, width)]
        lines += [_table_line(row.part, row.name, row.norms, width) for row in self.rows]
        lines += [_table_line("share", row.name, self.share(row.name), width) for row in self.of("features")]
        return "\n".join([*lines, _table_line("loss", "", self.losses, width)])


def gradient_flow(
    model: Model, sources: Mapping[str, SourceBatch], text: TextBatch, boxes: Tensor | None = None
) -> GradientFlow:
    """The gradient of the mean cross-entropy at each layer of a model, in three variants.

    The copies are in eval mode: without dropout and with fixed running statistics, so results are reproducible.
    Frozen parameters are measured as well. The question encoder is the same in all variants.

    Args:
        model: a model that was not prepared for inference.
        sources: as for `Model.forward`.
        text: the texts and their targets.
        boxes: [B, K, 4], as for `Model.forward`.

    Raises:
        MmxError: weights prepacked for inference, which have no gradient; or no target.
    """
    _check_arguments(model, text)
    targets = text.targets.flatten()
    positions = (targets >= 0).nonzero()[:, 0]

    def loss_of(variant: Model) -> Tensor:
        logits = variant(sources, text.tokens, text.mask, positions, boxes)
        return F.cross_entropy(logits.float(), targets[positions])

    changes = (_keep, _remove_all_but_last_cross_attention, _detach_residuals)
    measured = [_measure(model, change, loss_of) for change in changes]
    rows = []
    for part, name in measured[0].norms:
        rows.append(FlowRow(part, name, FlowValues(*(m.norms.get((part, name), 0.0) for m in measured))))
    return GradientFlow(tuple(rows), FlowValues(*(m.loss for m in measured)))


def _check_arguments(model: Model, text: TextBatch) -> None:
    if model.decoder.is_prepacked:
        raise MmxError(
            "the decoder is prepared for inference, and its prepacked weights have no gradient; load the model with "
            "mmx.models.checkpoint.load_model(FOLDER).",
            code="gradient_flow.prepacked",
        )
    if not (text.targets >= 0).any():
        raise MmxError(
            "targets have no token to predict; give the token that follows each position, -100 where none is measured.",
            code="gradient_flow.no_targets",
        )


# ---- variants --------------------------------------------------------------------------------------------------------


class _DetachedPreNorm(PreNorm):
    """A residual connection whose identity path carries no gradient, with the modules of the original."""

    def __init__(self, original: PreNorm) -> None:
        nn.Module.__init__(self)
        self.norm = original.norm
        self.dropout = original.dropout
        self.gate = original.gate

    def forward(self, x: Tensor, sublayer: Callable[..., Tensor], *args: object) -> Tensor:
        """[N, T, E] -> [N, T, E]."""
        return x.detach() + self.gate(self.dropout(sublayer(self.norm(x), *args)))


class _DetachedPostNorm(_DetachedPreNorm):
    """The same for norm(x + sublayer(x))."""

    def forward(self, x: Tensor, sublayer: Callable[..., Tensor], *args: object) -> Tensor:
        """[N, T, E] -> [N, T, E]."""
        normalized: Tensor = self.norm(x.detach() + self.gate(self.dropout(sublayer(x, *args))))
        return normalized


def _keep(decoder: TextDecoder) -> None:
    """The baseline."""


def _remove_all_but_last_cross_attention(decoder: TextDecoder) -> None:
    for layer in cross_attention_layers(decoder)[:-1]:
        layer.cross_attention = None


def _detach_residuals(decoder: TextDecoder) -> None:
    for name, module in list(decoder.named_modules()):
        if isinstance(module, PreNorm):
            detached = _DetachedPostNorm if isinstance(module, PostNorm) else _DetachedPreNorm
            decoder.set_submodule(name, detached(module))


# ---- measurement of one variant --------------------------------------------------------------------------------------


class _FeatureProbe(nn.Module):
    """A projection that keeps the features that it was given, so that their gradient can be computed."""

    def __init__(self, projection: KeyValueProjection) -> None:
        super().__init__()
        self.projection = projection
        self.key = projection.key
        self.states: Tensor | None = None

    def forward(self, features: Features) -> Memory:
        """Features -> Memory."""
        states = features.states
        if not states.requires_grad:  # the encoder runs without gradients
            states = states.clone().requires_grad_()
        self.states = states
        memory: Memory = self.projection(features._replace(states=states))
        return memory


class _Measurement(NamedTuple):
    """The loss of one variant, and its gradient norms by row."""

    loss: float
    norms: dict[RowKey, float]


def _measure(model: Model, change: Callable[[TextDecoder], None], loss_of: Callable[[Model], Tensor]) -> _Measurement:
    variant = deepcopy(model).eval()
    change(variant.decoder)
    for parameter in variant.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    parameters = measured_parameters(variant)
    probes = _insert_probes(variant)
    with torch.enable_grad():
        loss = loss_of(variant)
    return _Measurement(float(loss.detach()), _gradient_norms(loss, parameters, probes))


def _gradient_norms(
    loss: Tensor, parameters: Sequence[MeasuredTensor], probes: Mapping[str, _FeatureProbe]
) -> dict[RowKey, float]:
    measured = list(parameters)
    for name, probe in probes.items():
        if probe.states is not None:
            measured.append(MeasuredTensor("features", name, probe.states))
    gradients = torch.autograd.grad(loss, [item.tensor for item in measured], allow_unused=True)
    squares = dict.fromkeys(_row_order(parameters, probes), 0.0)
    for item, gradient in zip(measured, gradients, strict=True):
        for key, square in zip(item.keys(), item.squared_norms(gradient), strict=True):
            squares[key] += square
    return {key: math.sqrt(square) for key, square in squares.items()}


def _row_order(parameters: Sequence[MeasuredTensor], probes: Mapping[str, _FeatureProbe]) -> list[RowKey]:
    """All rows once, the features of a source before its projection."""
    keys: dict[RowKey, None] = {}
    for item in parameters:
        source = item.name.split(".")[0]
        if item.part == "projection" and source in probes:
            keys["features", source] = None
        keys |= dict.fromkeys(item.keys())
    keys |= {("features", source): None for source in probes}
    return list(keys)


def _insert_probes(model: Model) -> dict[str, _FeatureProbe]:
    """Replace the projection of each source, and of the question encoder, by a probe around it."""
    probes = {}
    for name, owner in projection_owners(model).items():
        probe = _FeatureProbe(owner.projection)
        owner.projection = probe  # type: ignore[assignment]
        probes[name] = probe
    return probes


def _table_line(part: str, name: str, cells: Sequence[float | str], width: int) -> str:
    texts = [cell if isinstance(cell, str) else _format_norm(cell) for cell in cells]
    return f"{part:<18}{name:<{width}}" + "".join(f"{text:>{COLUMN_WIDTH}}" for text in texts)


def _format_norm(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
