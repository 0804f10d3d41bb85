"""Plots draw the numbers they are given: lines, bars and cells are compared with values made by hand."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from mmx.errors import MmxError
from mmx.interpret.attention_stats import normalized_entropy
from mmx.interpret.gradient_flow import TITLES, FlowRow, FlowValues, GradientFlow
from mmx.interpret.leakage import Leakage
from mmx.interpret.plots import (
    COLORS,
    MARKERS,
    NEGATIVE,
    POSITIVE,
    LinePanel,
    plot_attention_stats,
    plot_bars,
    plot_gradient_flow,
    plot_leakage,
    plot_lines,
)

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex  # noqa: E402 (an optional dependency)

SLOTS = 4


def make_look():
    """Two words, two layers, two heads: the first word attends to one slot, the second uniformly."""
    attention = torch.zeros(2, 2, 2, SLOTS)
    attention[0, ..., 0] = 1.0
    attention[1] = 1 / SLOTS
    attention[1, 1, 1] = torch.tensor([0.5, 0.5, 0.0, 0.0])  # one of two bits
    words = (SimpleNamespace(text="red", gain=3.5), SimpleNamespace(text="of", gain=-0.25))
    return SimpleNamespace(words=words, attention=attention, entropies=lambda: normalized_entropy(attention))


def make_flow():
    rows = [
        FlowRow("features", "image", FlowValues(1.0, 2.0, 3.0)),
        FlowRow("projection", "image.key.0", FlowValues(4.0, 0.0, 5.0)),
        FlowRow("projection", "image.key.1", FlowValues(6.0, 7.0, 8.0)),
        FlowRow("projection", "image.value.0", FlowValues(9.0, 0.0, 1.5)),
        FlowRow("decoder", "layers.0", FlowValues(2.5, 3.5, 1e-20)),
    ]
    return GradientFlow(tuple(rows), FlowValues(0.1, 0.2, 0.1))


def make_leakage(inputs=True):
    targets = torch.eye(3)
    targets[2, 0] = 1e-5
    slots = torch.zeros(2, 3)
    slots[1, 2] = 1e-3
    return Leakage(targets, 0.0, (), {"text": slots}, {"text": 10 * slots} if inputs else {}, torch.tensor([0, 0, 1]))


PANELS = [
    LinePanel("time", "ms", {"cached": [1.0, 2.0], "uncached": [3.0, 5.0]}),
    LinePanel("bytes", "KiB", {"cached": [8.0, 8.0], "uncached": [16.0, 64.0]}, log=True),
]


def labels(texts):
    return [text.get_text() for text in texts]


def legend(figure):
    (box,) = figure.legends
    return labels(box.get_texts())


# ---- attention statistics ----------------------------------------------------------------------------------------


def test_cells_are_normalized_entropies():
    left, right, bar = plot_attention_stats(make_look()).axes
    (image,) = left.images
    assert image.get_array().tolist() == [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.5]]
    assert image.get_clim() == (0, 1)
    assert labels(left.get_yticklabels()) == ["red", "of"]
    assert labels(left.get_xticklabels()) == ["layer 0", "layer 1"]
    assert left.get_xticks().tolist() == [0.5, 2.5], "the label of a layer is at the center of its heads"
    assert [line.get_xdata()[0] for line in left.lines] == [1.5], "a line separates the layers"
    assert "log2 S" in left.get_title()
    assert "1: uniform" in bar.get_ylabel()
    assert [patch.get_width() for patch in right.patches] == [3.5, -0.25]
    assert right.get_xlabel() == "bits"


def test_negative_gains_have_another_color_and_bars_are_next_to_their_words():
    left, right, _ = plot_attention_stats(make_look()).axes
    assert [to_hex(patch.get_facecolor()).upper() for patch in right.patches] == [POSITIVE, NEGATIVE]
    assert right.get_ylim() == left.get_ylim() == (1.5, -0.5)


# ---- gradient flow -----------------------------------------------------------------------------------------------


def test_each_variant_has_all_norms_and_one_line_for_each_part():
    (axes,) = plot_gradient_flow(make_flow()).axes
    rows = make_flow().rows
    for number in range(len(TITLES)):
        lines = [line for line in axes.lines if line.get_marker() == MARKERS[number]]
        assert [list(line.get_xdata()) for line in lines] == [[0], [1, 2], [3], [4]], "features, keys, values, decoder"
        drawn = [float(y) for line in lines for y in line.get_ydata()]
        assert drawn == pytest.approx([row.norms[number] or math.nan for row in rows], nan_ok=True)
        assert {line.get_color() for line in lines} == {COLORS[number]}


def test_the_axes_of_gradient_flow_have_units_and_names():
    figure = plot_gradient_flow(make_flow())
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "gradient norm (nats per unit)"
    assert labels(axes.get_xticklabels()) == [row.name for row in make_flow().rows]
    assert labels(axes.texts) == ["features", "projection", "decoder"]
    assert legend(figure) == list(TITLES)


# ---- leakage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [True, False])
def test_influences_are_powers_of_ten_and_zeros_are_left_out(inputs):
    audit = make_leakage(inputs)
    figure = plot_leakage({"one": audit, "other": audit}, "text")
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == (6 if inputs else 4)
    for axes, influence in zip(panels[::2], [audit.targets, audit.slots["text"], *audit.inputs.values()]):
        (image,) = axes.images
        shown = torch.from_numpy(image.get_array().filled(math.nan))
        assert torch.equal(shown.isfinite(), influence > 0)
        powers = influence[influence > 0].double().log10()
        assert torch.allclose(shown[shown.isfinite()].double(), powers, atol=1e-6)
    assert [axes.get_title() for axes in panels[:2]] == ["one", "other"]
    assert {axes.get_xlabel() for axes in panels[-2:]} == {"text position"}
    assert "log10 nats" in "".join(axes.get_ylabel() for axes in figure.axes)


def test_a_source_that_was_not_measured_is_an_error():
    with pytest.raises(MmxError) as error:
        plot_leakage({"one": make_leakage()}, "audio")
    assert error.value.code == "leakage.source"
    assert error.value.details == {"source": "audio", "known": ["text"]}


# ---- lines -------------------------------------------------------------------------------------------------------


def test_lines_have_the_values_of_their_panel_and_the_same_style_in_all_panels():
    figure = plot_lines([8, 16], "tokens", PANELS)
    assert len(figure.axes) == 2
    for axes, panel in zip(figure.axes, PANELS, strict=True):
        assert [list(line.get_ydata()) for line in axes.lines] == list(panel.series.values())
        assert all(list(line.get_xdata()) == [8, 16] for line in axes.lines)
        assert [line.get_marker() for line in axes.lines] == list(MARKERS[:2])
        assert [line.get_color() for line in axes.lines] == list(COLORS[:2])
        assert (axes.get_title(), axes.get_ylabel(), axes.get_xlabel()) == (panel.title, panel.unit, "tokens")
        assert axes.get_yscale() == ("log" if panel.log else "linear")
    assert legend(figure) == ["cached", "uncached"]


# ---- bars --------------------------------------------------------------------------------------------------------


def test_bars_have_the_heights_of_their_values_and_are_centered_at_their_group():
    figure = plot_bars(["a", "b"], {"x": [0.25, 0.5], "y": [1.0, 2.0], "z": [3.0, 0.0]}, "bits", ("chance", 0.125))
    (axes,) = figure.axes
    assert [[bar.get_height() for bar in bars] for bars in axes.containers] == [[0.25, 0.5], [1.0, 2.0], [3.0, 0.0]]
    for group in range(2):
        centers = [bars[group].get_x() + bars[group].get_width() / 2 for bars in axes.containers]
        assert sum(centers) / 3 == pytest.approx(group) and centers == sorted(centers)
        ends = [(bars[group].get_x(), bars[group].get_x() + bars[group].get_width()) for bars in axes.containers]
        assert all(before[1] < after[0] for before, after in zip(ends, ends[1:])), "bars do not overlap"
    assert labels(axes.texts) == ["0.25", "0.50", "1.00", "2.00", "3.00", "0.00"]
    assert labels(axes.get_xticklabels()) == ["a", "b"]
    assert axes.get_ylabel() == "bits"
    assert set(legend(figure)) == {"x", "y", "z", "chance"}
    assert [line.get_ydata()[0] for line in axes.lines] == [0.125]
    assert len({bars[0].get_facecolor() for bars in axes.containers}) == 3


def test_one_series_has_no_legend():
    figure = plot_bars(["a"], {"x": [1.0]}, "bits")
    assert not figure.legends and figure.axes[0].get_legend() is None


# ---- all plots -------------------------------------------------------------------------------------------------

PLOTS = {
    "attention stats": lambda: plot_attention_stats(make_look()),
    "gradient flow": lambda: plot_gradient_flow(make_flow()),
    "leakage": lambda: plot_leakage({"one": make_leakage()}, "text"),
    "lines": lambda: plot_lines([8, 16], "tokens", PANELS),
    "bars": lambda: plot_bars(["a"], {"x": [1.0], "y": [2.0]}, "bits"),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_can_be_saved(name, tmp_path):
    PLOTS[name]().savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", PLOTS)
def test_without_matplotlib_there_is_an_error(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MmxError) as error:
        PLOTS[name]()
    assert error.value.code == "plots.not_installed"


def luminance(color):
    """Relative luminance of a color #RRGGBB, 0..1 (WCAG 2.1)."""
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colors_and_markers_are_distinct_and_have_contrast_to_white():
    assert len(set(COLORS)) == len(COLORS) == len(set(MARKERS)) == len(MARKERS)
    assert all((1 + 0.05) / (luminance(color) + 0.05) > 2 for color in COLORS)
