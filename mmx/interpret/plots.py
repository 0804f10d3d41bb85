"""Plots of interpretability measurements: each function takes numbers and returns a matplotlib Figure.

matplotlib is in the extra `plots`. Colors are those of Okabe and Ito (2008), which are distinguishable with color
blindness; lines also differ in their markers. Axes have units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmx.errors import MmxError
from mmx.interpret.gradient_flow import TITLES, GradientFlow
from mmx.interpret.leakage import Leakage
from mmx.interpret.look import Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
POSITIVE, NEGATIVE = COLORS[0], COLORS[5]
WIDTH, DPI = 7.2, 130  # inches, dots per inch
LEGEND_CHARACTERS = 75  # that fit in one line of a legend


@dataclass(frozen=True)
class LinePanel:
    """One panel of `plot_lines`.

    Args:
        title: above the panel.
        unit: label of the y axis.
        series: y values by the name of a line.
        log: whether the y axis is logarithmic.
    """

    title: str
    unit: str
    series: Mapping[str, Sequence[float]]
    log: bool = False


def plot_attention_stats(look: Look) -> Figure:
    """Normalized entropy of each word's attention by layer and head, and the information gain of each word."""
    height = 1.2 + 0.3 * max(3, len(look.words))
    figure, axes = _subplots(1, 2, height, widths=(3, 1.4))
    left, right = axes[0]
    words = [word.text for word in look.words]
    layers = look.attention.shape[1]
    entropies = look.entropies().flatten(1)
    heads = entropies.shape[1] // layers
    image = left.imshow(entropies, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for layer in range(1, layers):
        left.axvline(layer * heads - 0.5, color="white", linewidth=2)
    centers = [layer * heads + (heads - 1) / 2 for layer in range(layers)]
    left.set_xticks(centers, [f"layer {layer}" for layer in range(layers)])
    left.set(title=f"entropy / log2 S, {heads} heads per layer", xlabel="cross-attention layer and head")
    left.set_yticks(range(len(words)), words)
    figure.colorbar(image, ax=left, label="0: one slot, 1: uniform")
    gains = [word.gain for word in look.words]
    right.barh(range(len(words)), gains, color=[POSITIVE if gain >= 0 else NEGATIVE for gain in gains])
    right.set(title="information gain", xlabel="bits", yticks=[], ylim=(len(words) - 0.5, -0.5))
    right.axvline(0, color="black", linewidth=0.8)
    return figure


def plot_gradient_flow(flow: GradientFlow) -> Figure:
    """Gradient norms of all rows in the three variants, in the order of the forward pass.

    A line joins the rows of one part of the model; keys and values have separate lines.
    """
    figure, grid = _subplots(1, 1, height=5.0)
    axes = grid[0][0]
    parts = [row.part for row in flow.rows]
    lines = _runs([(row.part, row.name.split(".")[1:2] if row.part == "projection" else []) for row in flow.rows])
    for number, title in enumerate(TITLES):
        norms = [row.norms[number] or math.nan for row in flow.rows]
        for line, indices in enumerate(lines):
            label = None if line else title
            _plot_line(axes, number, indices, [norms[index] for index in indices], label, markersize=5)
    axes.set_yscale("log")
    for indices in _runs(parts):
        center = sum(indices) / len(indices)
        axes.text(center, 1.01, parts[indices[0]], transform=axes.get_xaxis_transform(), ha="center", fontsize=8)
        if indices[0]:
            axes.axvline(indices[0] - 0.5, color="0.8", linewidth=0.8)
    axes.set_xticks(range(len(flow.rows)), [row.name for row in flow.rows], rotation=90, fontsize=8)
    axes.set(ylabel="gradient norm (nats per unit)", xlabel="input (left) to output (right); gaps: zero")
    figure.legend(frameon=False, ncols=3, loc="outside upper center")
    axes.grid(axis="y", alpha=0.3)
    return figure


def plot_leakage(audits: Mapping[str, Leakage], source: str) -> Figure:
    """Influence of each token, slot and input region on each text position, one column for each named audit.

    White cells are exactly zero. Cells below the line are later than the step. Audits that did not measure inputs have
    no third row. Raises MmxError for a source that an audit did not measure.
    """
    influences = {name: _influences(audit, source) for name, audit in audits.items()}
    titles = list(next(iter(influences.values()), {}))
    scale = _log_range([influence for by_title in influences.values() for influence in by_title.values()])
    figure, grid = _subplots(len(titles), len(audits), height=0.7 + 1.5 * len(titles))
    for column, (name, audit) in enumerate(audits.items()):
        for row, title in enumerate(titles):
            axes = grid[row][column]
            line = range(len(audit.alignment)) if row == 0 else audit.alignment.tolist()
            image = _plot_influence(axes, influences[name][title], line, scale)
            if column == 0:
                axes.set_ylabel(title)
        grid[0][column].set_title(name, fontsize=9)
        grid[-1][column].set_xlabel("text position")
    figure.colorbar(image, ax=list(chain(*grid)), label="largest change, log10 nats (white: none)")
    return figure


def plot_lines(x: Sequence[float], xlabel: str, panels: Sequence[LinePanel]) -> Figure:
    """Panels next to each other with the same x values; lines of the same name have the same color and marker."""
    figure, grid = _subplots(1, len(panels), height=3.2)
    for axes, panel in zip(grid[0], panels, strict=True):
        for number, (name, values) in enumerate(panel.series.items()):
            _plot_line(axes, number, x, values, name)
        axes.set(xlabel=xlabel, xticks=list(x), ylabel=panel.unit)
        axes.set_title(panel.title, fontsize=10)
        if panel.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def plot_bars(
    groups: Sequence[str], series: Mapping[str, Sequence[float]], unit: str, level: tuple[str, float] | None = None
) -> Figure:
    """Bars of several series for each group; `level` is a named dashed line, such as chance."""
    figure, grid = _subplots(1, 1, height=3.6)
    axes = grid[0][0]
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * width
        positions = [group + offset for group in range(len(groups))]
        bars = axes.bar(positions, values, width * 0.92, color=COLORS[number], label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
    names = list(series)
    if level is not None:
        axes.axhline(level[1], color="black", linestyle="--", linewidth=1, label=level[0])
        names.append(level[0])
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylabel=unit)
    axes.margins(y=0.16)
    if len(names) > 1:
        columns = LEGEND_CHARACTERS // (max(map(len, names)) + 6)  # 6 characters for the color sample
        figure.legend(frameon=False, ncols=max(1, min(5, columns)), fontsize=9, loc="outside upper center")
    return figure


def _influences(audit: Leakage, source: str) -> dict[str, Tensor]:
    """Influence [perturbed, T] by what was perturbed."""
    if source not in audit.slots:
        known = list(audit.slots)
        raise MmxError(
            f"source {source!r} was not measured; expected one of {', '.join(known) or 'none'}.",
            code="leakage.source",
            source=source,
            known=known,
        )
    influences = {"perturbed token": audit.targets, "perturbed slot": audit.slots[source]}
    if source in audit.inputs:
        influences["perturbed input"] = audit.inputs[source]
    return influences


def _log_range(influences: Sequence[Tensor]) -> tuple[int, int]:
    """The powers of ten that enclose all nonzero values."""
    values = torch.cat([influence.flatten().double() for influence in influences])
    powers = values[values > 0].log10()
    return (math.floor(powers.min()), math.floor(powers.max()) + 1) if len(powers) else (-1, 0)


def _plot_influence(axes: Axes, influence: Tensor, line: Sequence[int], scale: tuple[int, int]) -> AxesImage:
    """A matrix [perturbed, T] on a logarithmic color scale, with a line below the aligned element of each position."""
    powers = torch.log10(influence.double()).where(influence > 0, math.nan)
    image = axes.imshow(powers, cmap="cividis_r", vmin=scale[0], vmax=scale[1], aspect="auto", origin="upper")
    edges = [position - 0.5 for position in range(len(line) + 1)]
    axes.stairs([aligned + 0.5 for aligned in line], edges, baseline=None, color=NEGATIVE, linewidth=1.2)
    axes.set_ylim(len(influence) - 0.5, -0.5)
    axes.locator_params(integer=True, nbins=6)
    return image


def _plot_line(
    axes: Axes,
    number: int,
    x: Sequence[float],
    y: Sequence[float],
    label: str | None,
    markersize: float | None = None,
) -> list[Line2D]:
    """A line with the color and marker of its number."""
    return axes.plot(x, y, marker=MARKERS[number], color=COLORS[number], label=label, markersize=markersize)


def _subplots(
    rows: int, columns: int, height: float, widths: Sequence[float] | None = None
) -> tuple[Figure, list[list[Axes]]]:
    """An empty figure of a height in inches, and its axes [rows, columns]."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MmxError(
            "plots need matplotlib, which is not installed; type: pip install 'mmx[plots]'", code="plots.not_installed"
        ) from error
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    grid = [list(row) for row in figure.subplots(rows, columns, squeeze=False, width_ratios=widths)]
    for axes in chain(*grid):
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _runs(items: Sequence[object]) -> list[list[int]]:
    """The indices of equal neighbors, run by run."""
    return [[index for index, _ in run] for _, run in groupby(enumerate(items), lambda pair: pair[1])]
