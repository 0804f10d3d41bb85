"""Plots of what inspection measures: each takes numbers and gives a matplotlib Figure, to be saved or shown.

matplotlib comes with the extra `plots`. Colours are those of Okabe and Ito (2008), which colour-blind eyes tell apart;
where lines stand for ways, their markers differ too. Axes carry units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mmx.errors import MmxError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from mmx.interpret.gradient_flow import GradientFlow
    from mmx.interpret.leakage import Leakage
    from mmx.interpret.look import Look

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDE, DPI = 7.2, 130  # inches, and dots of each


class CachingCost(Protocol):
    """What `plot_costs` needs of a row: see `mmx.bench.cache.Cost`."""

    way: str
    length: int
    milliseconds: float
    held: int
    recomputed: int


def plot_spotlight(look: Look) -> Figure:
    """How wide the spotlight of each word is, in every layer and head; and the bits that looking saved of it."""
    figure, (left, right) = _axes(1, 2, height=1.2 + 0.3 * max(3, len(look.words)), widths=(3, 1.4))
    words, layers = [word.text for word in look.words], look.attention.shape[1]
    wide = look.entropies().flatten(1)
    heads = wide.shape[1] // layers
    image = left.imshow(wide, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for layer in range(1, layers):
        left.axvline(layer * heads - 0.5, color="white", linewidth=2)
    left.set_xticks([layer * heads + (heads - 1) / 2 for layer in range(layers)], [f"layer {n}" for n in range(layers)])
    left.set(title=f"entropy / log2 S, {heads} heads a layer", xlabel="looking layer and head")
    left.set_yticks(range(len(words)), words)
    figure.colorbar(image, ax=left, label="0: one slot, 1: plain average")
    gains = [word.gain for word in look.words]
    right.barh(range(len(words)), gains, color=[COLORS[0] if gain >= 0 else COLORS[5] for gain in gains])
    right.set(title="saved by looking", xlabel="bits", yticks=[], ylim=(len(words) - 0.5, -0.5))
    right.axvline(0, color="black", linewidth=0.8)
    return figure


def plot_flow(flow: GradientFlow) -> Figure:
    """The gradient of each layer in the three variants, in the order of the forward. A line joins the rows of a part;
    keys and values have their own."""
    from mmx.interpret.gradient_flow import TITLES

    figure, axes = _axes(1, 1, height=5.0)
    names, parts = [row.name for row in flow.rows], [row.part for row in flow.rows]
    lines = _runs([(row.part, row.name.split(".")[1:2] if row.part == "projection" else []) for row in flow.rows])
    for number, title in enumerate(TITLES):
        norms = [row.norms[number] or float("nan") for row in flow.rows]
        style: dict[str, Any] = {"marker": MARKERS[number], "color": COLORS[number], "markersize": 5}
        for first, places in enumerate(lines):
            axes.plot(places, [norms[n] for n in places], label=None if first else title, **style)
    axes.set_yscale("log")
    for places in _runs(parts):
        middle, above = sum(places) / len(places), axes.get_xaxis_transform()
        axes.text(middle, 1.01, parts[places[0]], transform=above, ha="center", fontsize=8)
        if places[0]:
            axes.axvline(places[0] - 0.5, color="0.8", linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set(ylabel="gradient norm (nats per unit)", xlabel="from the picture (left) to the word (right); gaps: zero")
    figure.legend(frameon=False, ncols=3, loc="outside upper center")
    axes.grid(axis="y", alpha=0.3)
    return figure


def plot_leakage(leaks: Mapping[str, Leakage], source: str) -> Figure:
    """For each named audit: what every word, every slot and every place of a source moved at every text position.

    White moved nothing, to the bit; below the line is what is beyond the step. Audits that did not measure `inputs`
    have no third row. Raises MmxError for a source that an audit did not measure.
    """
    parts = {name: _moved(leak, source) for name, leak in leaks.items()}
    titles = list(next(iter(parts.values()), {}))
    scale = _powers([influence for moved in parts.values() for influence in moved.values()])
    figure, grid = _axes(len(titles), len(leaks), height=0.7 + 1.5 * len(titles))
    for column, (name, leak) in enumerate(leaks.items()):
        for row, title in enumerate(titles):
            axes = grid[row][column]
            line = range(len(leak.alignment)) if row == 0 else leak.alignment.tolist()
            image = _influence(axes, parts[name][title], line, scale)
            if column == 0:
                axes.set_ylabel(title)
        grid[0][column].set_title(name, fontsize=9)
        grid[-1][column].set_xlabel("text position")
    figure.colorbar(image, ax=grid, label="largest change, log10 nats (white: none)")
    return figure


def _moved(leak: Leakage, source: str) -> dict[str, Tensor]:
    """What was changed -> its influence, [changed, T]."""
    if source not in leak.slots:
        raise MmxError(f"the audit did not measure {source!r}; expected one of {', '.join(leak.slots) or 'none'}.")
    moved = {"word changed": leak.targets, "slot changed": leak.slots[source]}
    return {**moved, "input changed": leak.inputs[source]} if source in leak.inputs else moved


def _powers(influences: Sequence[Tensor]) -> tuple[int, int]:
    """The powers of ten between which all of them lie that are not zero."""
    every = torch.cat([influence.flatten().double() for influence in influences])
    powers = every[every > 0].log10()
    return (math.floor(powers.min()), math.floor(powers.max()) + 1) if len(powers) else (-1, 0)


def _influence(axes: Axes, influence: Tensor, line: Sequence[int], scale: tuple[int, int]) -> AxesImage:
    """A matrix [changed, T] on a scale of logarithms, which zero is not on; under the line is what lies ahead."""
    shown = torch.log10(influence.double()).where(influence > 0, float("nan"))
    image = axes.imshow(shown, cmap="cividis_r", vmin=scale[0], vmax=scale[1], aspect="auto", origin="upper")
    edges = [t - 0.5 for t in range(len(line) + 1)]
    axes.stairs([own + 0.5 for own in line], edges, baseline=None, color=COLORS[5], linewidth=1.2)
    axes.set_ylim(len(influence) - 0.5, -0.5)
    axes.locator_params(integer=True, nbins=6)
    return image


def plot_costs(costs: Sequence[CachingCost]) -> Figure:
    """Of a token: its time, and the bytes of keys and values made for it; of the text: the bytes held. Over its length,
    each way a line."""
    figure, panels = _axes(1, 3, height=3.2)
    for number, way in enumerate(dict.fromkeys(cost.way for cost in costs)):
        rows = [cost for cost in costs if cost.way == way]
        style: dict[str, Any] = {"marker": MARKERS[number], "color": COLORS[number], "label": way}
        lengths = [cost.length for cost in rows]
        panels[0].plot(lengths, [cost.milliseconds for cost in rows], **style)
        panels[1].plot(lengths, [cost.recomputed / 2**10 for cost in rows], **style)
        panels[2].plot(lengths, [cost.held / 2**10 for cost in rows], **style)
    panels[0].set(ylabel="ms a token", title="time", ylim=(0, None))
    panels[1].set(ylabel="KiB a token", title="keys and values made", yscale="log")
    panels[1].yaxis.set_major_formatter("{x:g}")
    panels[2].set(ylabel="KiB", title="held between tokens", ylim=(0, None))
    for axes in panels:
        axes.set(xlabel="tokens of the text", xticks=sorted({cost.length for cost in costs}))
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def plot_bars(
    groups: Sequence[str], series: Mapping[str, Sequence[float]], unit: str, level: tuple[str, float] | None = None
) -> Figure:
    """Bars of several series beside each other for each group; `level` is a dashed line with its name (chance)."""
    figure, axes = _axes(1, 1, height=3.6)
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
        bars = axes.bar(places, values, width * 0.92, color=COLORS[number], label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
    if level is not None:
        axes.axhline(level[1], color="black", linestyle="--", linewidth=1, label=level[0])
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylabel=unit)
    axes.margins(y=0.16)
    if len(series) > 1 or level is not None:
        longest = max(len(name) for name in [*series, *([level[0]] if level else [])])
        columns = max(1, min(5, 75 // (longest + 6)))  # about 75 letters and the samples of colour fit
        figure.legend(frameon=False, ncols=columns, fontsize=9, loc="outside upper center")
    return figure


def _axes(rows: int, columns: int, height: float, widths: Sequence[float] | None = None) -> tuple[Figure, Any]:
    """An empty figure and its axes: one, a row, or rows of them."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MmxError("plots need matplotlib, which is not installed; type: pip install 'mmx[plots]'") from error
    figure = Figure(figsize=(WIDE, height), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, width_ratios=widths)
    for axes in grid.flat:
        _plain(axes)
    return figure, grid if rows > 1 else grid[0] if columns > 1 else grid[0][0]


def _runs(kinds: Sequence[object]) -> list[list[int]]:
    """Places of equal neighbours, run by run."""
    return [[n for n, _ in run] for _, run in groupby(enumerate(kinds), lambda pair: pair[1])]


def _plain(axes: Axes) -> None:
    """No frame where nothing is."""
    axes.spines[["top", "right"]].set_visible(False)
