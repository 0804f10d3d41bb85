"""Plots draw the numbers they are given: lines, bars and cells are compared with what was made by hand."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from mmx.errors import MmxError
from mmx.interpret.attention_stats import relative_entropy
from mmx.interpret.gradient_flow import TITLES, FlowRow, FlowValues, GradientFlow
from mmx.interpret.leakage import Leakage
from mmx.interpret.plots import COLORS, MARKERS, plot_bars, plot_costs, plot_flow, plot_leakage, plot_spotlight

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex  # noqa: E402 (an extra: without it there is nothing to test)

SLOTS = 4


def some_look():
    """Two words, two layers, two heads: the first word looks at one slot, the second at the plain average."""
    attention = torch.zeros(2, 2, 2, SLOTS)
    attention[0, ..., 0] = 1.0
    attention[1] = 1 / SLOTS
    attention[1, 1, 1] = torch.tensor([0.5, 0.5, 0.0, 0.0])  # one bit of two
    words = (SimpleNamespace(text="red", gain=3.5), SimpleNamespace(text="of", gain=-0.25))
    return SimpleNamespace(words=words, attention=attention, spread=lambda: relative_entropy(attention))


def some_flow():
    rows = [
        FlowRow("features", "image", FlowValues(1.0, 2.0, 3.0)),
        FlowRow("projection", "image.key.0", FlowValues(4.0, 0.0, 5.0)),
        FlowRow("projection", "image.key.1", FlowValues(6.0, 7.0, 8.0)),
        FlowRow("projection", "image.value.0", FlowValues(9.0, 0.0, 1.5)),
        FlowRow("decoder", "blocks.0", FlowValues(2.5, 3.5, 1e-20)),
    ]
    return GradientFlow(tuple(rows), FlowValues(0.1, 0.2, 0.1))


def some_leak(inputs=True):
    targets, slots = torch.eye(3), torch.zeros(2, 3)
    targets[2, 0], slots[1, 2] = 1e-5, 1e-3
    return Leakage(targets, 0.0, (), {"text": slots}, {"text": 10 * slots} if inputs else {}, torch.tensor([0, 0, 1]))


def some_costs():
    kinds = ("way", "length", "milliseconds", "held", "recomputed")
    rows = [("none", 8, 1.0, 0, 8192), ("none", 16, 2.0, 0, 16384), ("static", 8, 0.5, 4096, 1024),
            ("static", 16, 0.6, 8192, 1024)]  # fmt: skip
    return [SimpleNamespace(**dict(zip(kinds, row))) for row in rows]


def labels(texts):
    return [text.get_text() for text in texts]


def legend(figure):
    (box,) = figure.legends
    return labels(box.get_texts())


# ---- the spotlight -----------------------------------------------------------------------------------------------


def test_a_cell_of_the_spotlight_is_the_entropy_of_a_head_relative_to_all_slots():
    left, right, bar = plot_spotlight(some_look()).axes
    (image,) = left.images
    assert image.get_array().tolist() == [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.5]]
    assert image.get_clim() == (0, 1)
    assert labels(left.get_yticklabels()) == ["red", "of"]
    assert labels(left.get_xticklabels()) == ["layer 0", "layer 1"]
    assert left.get_xticks().tolist() == [0.5, 2.5], "a layer's name stands in the middle of its heads"
    assert [line.get_xdata()[0] for line in left.lines] == [1.5], "and a line between layers"
    assert "log2 S" in left.get_title()
    assert "1: plain average" in bar.get_ylabel()
    assert [patch.get_width() for patch in right.patches] == [3.5, -0.25]
    assert right.get_xlabel() == "bits"


def test_what_looking_cost_has_another_colour_than_what_it_saved_and_stands_beside_its_word():
    left, right, _ = plot_spotlight(some_look()).axes
    assert [to_hex(patch.get_facecolor()).upper() for patch in right.patches] == [COLORS[0], COLORS[5]]
    assert right.get_ylim() == left.get_ylim() == (1.5, -0.5)


# ---- gradient flow -----------------------------------------------------------------------------------------------


def test_each_variant_of_the_flow_has_every_norm_and_no_line_from_one_part_to_the_next():
    (axes,) = plot_flow(some_flow()).axes
    rows = some_flow().rows
    for number in range(len(TITLES)):
        lines = [line for line in axes.lines if line.get_marker() == MARKERS[number]]
        assert [list(line.get_xdata()) for line in lines] == [[0], [1, 2], [3], [4]], "features, keys, values, decoder"
        drawn = [float(y) for line in lines for y in line.get_ydata()]
        assert drawn == pytest.approx([row.norms[number] or math.nan for row in rows], nan_ok=True)
        assert {line.get_color() for line in lines} == {COLORS[number]}


def test_the_flow_is_on_a_scale_of_logarithms_with_units_and_names():
    figure = plot_flow(some_flow())
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "gradient norm (nats per unit)"
    assert labels(axes.get_xticklabels()) == [row.name for row in some_flow().rows]
    assert labels(axes.texts) == ["features", "projection", "decoder"]
    assert legend(figure) == list(TITLES)


# ---- leakage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [True, False])
def test_leaks_are_drawn_as_powers_of_ten_and_what_moved_nothing_is_left_out(inputs):
    leak = some_leak(inputs)
    figure = plot_leakage({"one": leak, "other": leak}, "text")
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == (6 if inputs else 4)
    for axes, influence in zip(panels[::2], [leak.targets, leak.slots["text"], *leak.inputs.values()]):
        (image,) = axes.images
        shown = torch.from_numpy(image.get_array().filled(math.nan))
        assert torch.equal(shown.isfinite(), influence > 0)
        powers = influence[influence > 0].double().log10()
        assert torch.allclose(shown[shown.isfinite()].double(), powers, atol=1e-6)
    assert [axes.get_title() for axes in panels[:2]] == ["one", "other"]
    assert {axes.get_xlabel() for axes in panels[-2:]} == {"text position"}
    assert "log10 nats" in "".join(axes.get_ylabel() for axes in figure.axes)


def test_a_source_that_was_not_measured_is_named():
    with pytest.raises(MmxError, match="'sound'.*text"):
        plot_leakage({"one": some_leak()}, "sound")


# ---- costs -------------------------------------------------------------------------------------------------------


def test_costs_are_lines_over_the_length_in_milliseconds_and_kibibytes():
    panels = plot_costs(some_costs()).axes
    found = {axes.get_title(): [list(line.get_ydata()) for line in axes.lines] for axes in panels}
    assert [1.0, 2.0] in found["time"] and [0.5, 0.6] in found["time"]
    assert [[8.0, 16.0], [1.0, 1.0]] in found.values(), "bytes computed, over 1024"
    assert [[0.0, 0.0], [4.0, 8.0]] in found.values(), "bytes held, over 1024"
    for axes in panels:
        assert axes.get_xlabel() == "tokens of the text"
        assert "ms" in axes.get_ylabel() or "KiB" in axes.get_ylabel()
        assert all(list(line.get_xdata()) == [8, 16] for line in axes.lines)
        assert [line.get_marker() for line in axes.lines] == list(MARKERS[:2]), "ways differ without colour too"


# ---- bars --------------------------------------------------------------------------------------------------------


def test_bars_are_as_high_as_their_numbers_and_stand_around_their_group():
    figure = plot_bars(["a", "b"], {"x": [0.25, 0.5], "y": [1.0, 2.0], "z": [3.0, 0.0]}, "bits", ("chance", 0.125))
    (axes,) = figure.axes
    assert [[bar.get_height() for bar in bars] for bars in axes.containers] == [[0.25, 0.5], [1.0, 2.0], [3.0, 0.0]]
    for group in range(2):
        middles = [bars[group].get_x() + bars[group].get_width() / 2 for bars in axes.containers]
        assert sum(middles) / 3 == pytest.approx(group) and middles == sorted(middles)
        ends = [(bars[group].get_x(), bars[group].get_x() + bars[group].get_width()) for bars in axes.containers]
        assert all(before[1] < after[0] for before, after in zip(ends, ends[1:])), "beside each other"
    assert labels(axes.texts) == ["0.25", "0.50", "1.00", "2.00", "3.00", "0.00"]
    assert labels(axes.get_xticklabels()) == ["a", "b"]
    assert axes.get_ylabel() == "bits"
    assert set(legend(figure)) == {"x", "y", "z", "chance"}
    assert [line.get_ydata()[0] for line in axes.lines] == [0.125]
    assert len({bars[0].get_facecolor() for bars in axes.containers}) == 3


def test_one_series_alone_needs_no_legend():
    figure = plot_bars(["a"], {"x": [1.0]}, "bits")
    assert not figure.legends and figure.axes[0].get_legend() is None


# ---- all of them -------------------------------------------------------------------------------------------------

ALL = {
    "spotlight": lambda: plot_spotlight(some_look()),
    "flow": lambda: plot_flow(some_flow()),
    "leakage": lambda: plot_leakage({"one": some_leak()}, "text"),
    "costs": lambda: plot_costs(some_costs()),
    "bars": lambda: plot_bars(["a"], {"x": [1.0], "y": [2.0]}, "bits"),
}


@pytest.mark.parametrize("name", ALL)
def test_a_plot_can_be_saved(name, tmp_path):
    ALL[name]().savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ALL)
def test_without_matplotlib_one_sentence_says_what_to_type(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MmxError, match=r"^plots need matplotlib, .*; type: pip install 'mmx\[plots\]'$"):
        ALL[name]()


def luminance(color):
    """Relative luminance of a colour #RRGGBB, 0..1 (WCAG 2.1)."""
    shares = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [s / 12.92 if s <= 0.03928 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_and_markers_are_all_distinct_and_none_fades_into_the_paper():
    assert len(set(COLORS)) == len(COLORS) == len(set(MARKERS)) == len(MARKERS)
    assert all((1 + 0.05) / (luminance(color) + 0.05) > 2 for color in COLORS)
