"""The pointing game: whether the maximum of a map is inside the box of the object that a word is about.

Axes: n cases, L cross-attention layers, H heads, R rows and C columns of the image's grid. Boxes are in fractions of
the image.

Source: Zhang et al. 2018, "Top-down Neural Attention by Excitation Backprop", section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from mmx.data.scenes import Scene
from mmx.errors import MmxError
from mmx.evaluation.confidence import format_proportion
from mmx.evaluation.pointing_methods import MAP_METHODS, PointingMethod, standard_methods
from mmx.evaluation.scene_maps import SceneMaps, compute_scene_maps
from mmx.inference.pipeline import Pipeline
from mmx.interpret.grid import Displacement, heatmap

QUESTION_TYPES = ("color", "shape", "size", "position", "neighbor", "caption")
ALL_TYPES = "all"  # the rows of all question types together
BEST_HEAD_BY_TYPE = "attention, best head by type"
HEATMAP_SIDE = 128  # pixels, as large as the scenes
MAX_PAIRED_HEADS = 8  # the best heads, from which pairs are made
TIE_TOLERANCE = 1e-5  # relative to the peak; a constant map has its maximum everywhere, not in one corner


@dataclass(frozen=True)
class PointingResult:
    """Results of one method on the n cases of one question type.

    Args:
        method: name of the method.
        question_type: of the cases.
        n: number of cases.
        accuracy: fraction of maxima of the heatmap inside the box.
        cell_accuracy: fraction of maximal cells that touch the box.
        mass: fraction of the heatmap inside the box.
    """

    method: str
    question_type: str
    n: int
    accuracy: float
    cell_accuracy: float
    mass: float


@dataclass(frozen=True)
class PointingReport:
    """Results of all methods.

    Args:
        rows: one for each method and question type.
        chance: expected accuracy and mass of a random map by question type, the area of the boxes.
        chance_cells: expected cell accuracy of a random map by question type.
        selected: the best methods on other scenes.
    """

    rows: tuple[PointingResult, ...]
    chance: dict[str, float]
    chance_cells: dict[str, float]
    selected: tuple[PointingMethod, ...] = ()

    def row(self, method: str, question_type: str = ALL_TYPES) -> PointingResult:
        """One row. Raises MmxError if there is none."""
        for row in self.rows:
            if (row.method, row.question_type) == (method, question_type):
                return row
        raise MmxError(
            f"there is no result for {method!r}, {question_type!r}; known: {', '.join(self.methods)}; "
            f"{', '.join(self.question_types)}.",
            code="pointing_game.row",
            method=method,
            question_type=question_type,
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of all methods."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    @property
    def question_types(self) -> tuple[str, ...]:
        """The question types of the cases, all of them together last."""
        return tuple(dict.fromkeys(row.question_type for row in self.rows))

    @property
    def main_methods(self) -> tuple[str, ...]:
        """The methods of all layers and heads, and the selected ones."""
        names = [*MAP_METHODS, *(method.name for method in self.selected), BEST_HEAD_BY_TYPE]
        return tuple(name for name in names if name in self.methods)

    def table(self, methods: Sequence[str] = ()) -> str:
        """Lines of text: accuracies with 95 % confidence intervals and mass, by question type and method."""
        lines = [f"{'type':<10}{'map':<34}{'n':>5}  {'accuracy':<21}{'cell accuracy':<21}mass"]
        for question_type in self.question_types:
            chance = f"{self.chance[question_type]:.3f}"
            chance_cells = f"{self.chance_cells[question_type]:.3f}"
            lines.append(f"{question_type:<10}{'chance':<34}{'':>5}  {chance:<21}{chance_cells:<21}{chance}")
            for method in methods or self.methods:
                row = self.row(method, question_type)
                accuracy = format_proportion(row.accuracy, row.n)
                cell_accuracy = format_proportion(row.cell_accuracy, row.n)
                lines.append(f"{'':<10}{method:<34}{row.n:>5}  {accuracy:<21}{cell_accuracy:<21}{row.mass:.3f}")
        return "\n".join(lines)


def pointing_game(
    pipeline: Pipeline, scenes: Sequence[Scene], selection_scenes: Sequence[Scene] = ()
) -> PointingReport:
    """Measure attention (all heads, each layer, each head) and relevance in the pointing game. Deterministic.

    With `selection_scenes`, the best layer, head and pair of heads on those scenes by cell accuracy are measured too,
    and so is the best head for each question type.

    Raises:
        MmxError: a model whose image source has no grid.
    """
    scene_maps = compute_scene_maps(pipeline, scenes)
    methods = standard_methods(scene_maps)
    if not selection_scenes:
        return score_pointing(scene_maps, methods)
    selection_maps = compute_scene_maps(pipeline, selection_scenes)
    selected = select_heads(selection_maps)
    report = replace(score_pointing(scene_maps, (*methods, *selected)), selected=selected)
    heads = [method for method in methods if method.map_method == "attention" and len(method.heads) == 1]
    selection_report = score_pointing(selection_maps, heads)
    return replace(report, rows=report.rows + _best_head_by_type(report, selection_report))


def select_heads(scene_maps: SceneMaps) -> tuple[PointingMethod, ...]:
    """The best layer, head and pair of heads of attention in these cases, by cell accuracy."""
    methods = [method for method in standard_methods(scene_maps) if method.map_method == "attention"]
    accuracy = {method: _mean_cell_accuracy(method, scene_maps) for method in methods}
    heads = sorted((method for method in methods if len(method.heads) == 1), key=lambda m: -accuracy[m])
    pairs = []
    for one, other in combinations(heads[:MAX_PAIRED_HEADS], 2):
        pairs.append(PointingMethod("", "attention", one.heads + other.heads))
    accuracy |= {method: _mean_cell_accuracy(method, scene_maps) for method in pairs}
    num_heads = scene_maps.attention.shape[2]
    layers = []
    for method in methods:
        if len(method.heads) == num_heads and len({layer for layer, _ in method.heads}) == 1:
            layers.append(method)
    selected = []
    for name, group in {"best layer": layers, "best head": heads, "best pair": pairs}.items():
        if group:
            best = max(group, key=lambda m: accuracy[m])
            selected.append(best._replace(name=f"attention, {name} {_describe_heads(name, best)}"))
    return tuple(selected)


def score_pointing(scene_maps: SceneMaps, methods: Sequence[PointingMethod]) -> PointingReport:
    """Measure some methods on the cases of scene maps."""
    types = _cases_by_type(scene_maps)
    boxes = torch.tensor([case.box for case in scene_maps.cases])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    cells = scene_maps.touched.float().mean((1, 2))
    rows = []
    for method in methods:
        maps = method.maps(scene_maps)
        scores = _score_heatmaps(maps, boxes, scene_maps.displacement)
        cell_hits = _fraction_of_maxima_inside(maps, scene_maps.touched)
        for question_type, of_type in types.items():
            rows.append(
                PointingResult(
                    method=method.name,
                    question_type=question_type,
                    n=int(of_type.sum()),
                    accuracy=float(scores.hits[of_type].mean()),
                    cell_accuracy=float(cell_hits[of_type].mean()),
                    mass=float(scores.mass[of_type].mean()),
                )
            )
    chance = {question_type: float(area[of_type].mean()) for question_type, of_type in types.items()}
    chance_cells = {question_type: float(cells[of_type].mean()) for question_type, of_type in types.items()}
    return PointingReport(tuple(rows), chance, chance_cells)


def _cases_by_type(scene_maps: SceneMaps) -> dict[str, Tensor]:
    """bool [n] for each question type with a case, and for all."""
    types = {}
    for question_type in QUESTION_TYPES:
        of_type = torch.tensor([case.question_type == question_type for case in scene_maps.cases])
        if of_type.any():
            types[question_type] = of_type
    types[ALL_TYPES] = torch.ones(len(scene_maps.cases), dtype=torch.bool)
    return types


def _best_head_by_type(report: PointingReport, selection: PointingReport) -> tuple[PointingResult, ...]:
    """The results of the head that is best on other scenes, for each question type and for all together."""
    rows = []
    for question_type in report.question_types:
        if question_type != ALL_TYPES and question_type in selection.question_types:
            best = max(selection.methods, key=lambda m: selection.row(m, question_type).cell_accuracy)
            rows.append(replace(report.row(best, question_type), method=BEST_HEAD_BY_TYPE))
    count = sum(row.n for row in rows)
    total = PointingResult(
        method=BEST_HEAD_BY_TYPE,
        question_type=ALL_TYPES,
        n=count,
        accuracy=sum(row.accuracy * row.n for row in rows) / count,
        cell_accuracy=sum(row.cell_accuracy * row.n for row in rows) / count,
        mass=sum(row.mass * row.n for row in rows) / count,
    )
    return (*rows, total)


class _HeatmapScores(NamedTuple):
    """[n] each: the fraction of maxima inside the box, and the fraction of the heatmap inside it."""

    hits: Tensor
    mass: Tensor


def _score_heatmaps(maps: Tensor, boxes: Tensor, displacement: Displacement) -> _HeatmapScores:
    """Scores of maps [n, R, C] as heatmaps over the image, against boxes [n, 4]."""
    centers = (torch.arange(HEATMAP_SIDE) + 0.5) / HEATMAP_SIDE
    hits = []
    masses = []
    for part, part_boxes in zip(maps.split(256), boxes.split(256), strict=True):
        x0, y0, x1, y1 = part_boxes.T[..., None]
        rows = (centers >= y0) & (centers <= y1)
        columns = (centers >= x0) & (centers <= x1)
        inside = rows[:, :, None] & columns[:, None]
        heatmaps = heatmap(part, HEATMAP_SIDE, HEATMAP_SIDE, displacement)
        total = heatmaps.sum((1, 2))
        hits.append(_fraction_of_maxima_inside(heatmaps, inside))
        masses.append((heatmaps * inside).sum((1, 2)) / total.where(total > 0, 1.0))
    return _HeatmapScores(torch.cat(hits), torch.cat(masses))


def _mean_cell_accuracy(method: PointingMethod, scene_maps: SceneMaps) -> float:
    return _fraction_of_maxima_inside(method.maps(scene_maps), scene_maps.touched).mean().item()


def _fraction_of_maxima_inside(maps: Tensor, inside: Tensor) -> Tensor:
    """[n]: 1 or 0 for a unique maximum of [n, ., .], a fraction for ties."""
    peak = maps.amax((1, 2), keepdim=True)
    maxima = maps >= peak - TIE_TOLERANCE * peak.abs()
    return (maxima & inside).sum((1, 2)) / maxima.sum((1, 2))


def _describe_heads(group: str, method: PointingMethod) -> str:
    """A selected layer, head or pair: "1", "1.2", "1.2+2.0"."""
    if group == "best layer":
        return str(method.heads[0][0])
    return "+".join(f"{layer}.{head}" for layer, head in method.heads)
