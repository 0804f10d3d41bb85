"""Does the map point at what the word is about? The peak of a map, and its mass, against boxes that are known.

Alphabet: n cases, L looking layers, H heads, R rows and C columns of the picture's grid. Boxes are shares of it.

Source: Zhang et al. 2018, "Top-down Neural Attention by Excitation Backprop", section 4.1 (the pointing game).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmx.data.scenes import Scene
from mmx.errors import MmxError
from mmx.evaluation.scene_maps import SceneMaps, compute_scene_maps
from mmx.inference.pipeline import Pipeline
from mmx.interpret.grid import heatmap
from mmx.interpret.relevance import relevance_maps

MapMethod = Literal["attention", "weighted", "relevance", "both"]
PARTS_OF_BOTH: tuple[MapMethod, ...] = ("weighted", "relevance")
MEAN = ", mean of all"
NAMES: dict[MapMethod, str] = {  # of the maps of all layers and heads
    "both": "weighted and relevance",
    "relevance": "relevance",
    "weighted": "weighted",
    "attention": f"attention{MEAN}",
}
KINDS = ("color", "shape", "size", "position", "neighbour", "caption")
EVERY = "all"  # the row of all kinds together
RASTER = 128  # pixels a side of a drawn map, as the scenes are painted
PAIRED = 8  # heads, the best ones, of which pairs are tried
TIED = 1e-5  # of a map's peak: what lies this near is as high, so that a flat map points everywhere, not at a corner
Z = 1.959964  # two-sided 95 % of a normal distribution
OF_ITS_KIND = "attention, best head of its kind"
Head = tuple[int, int]  # looking layer and head


class PointingMethod(NamedTuple):
    """A way to make one map out of L x H of them: raw attention, the same weighed by what each slot hands over,
    relevance, or the mean of the last two, of these heads."""

    name: str
    map_method: MapMethod
    heads: tuple[Head, ...]

    def maps(self, seen: SceneMaps) -> Tensor:
        """[n, R, C]: the mean of attention; of relevance, what its layers keep (see `relevance_maps`)."""
        if self.map_method == "both":
            halves = [self._replace(map_method=of).maps(seen) for of in PARTS_OF_BOTH]
            return torch.stack([half / half.sum((1, 2), keepdim=True).clamp(min=1e-12) for half in halves]).mean(0)
        parts: Tensor = getattr(seen, self.map_method).flatten(3)
        chosen = parts.new_zeros(parts.shape[1:3])
        for layer, head in self.heads:
            chosen[layer, head] = 1.0
        weighed = parts * chosen[..., None]
        joined = relevance_maps(weighed) if self.map_method == "relevance" else weighed.sum((1, 2)) / len(self.heads)
        return joined.unflatten(1, seen.touched.shape[1:])


@dataclass(frozen=True)
class PointingResult:
    """How well one way points in n cases of a kind. strictly: share of peaks, drawn over the picture, within the box;
    by_cells: share of best cells that touch the box; mass: share of the drawn map within the box."""

    method: str
    question_type: str
    n: int
    exact: float
    by_cells: float
    mass: float


@dataclass(frozen=True)
class PointingReport:
    """rows: every way and kind; area, cells: what chance gives, by kind (the box's share of the picture, and the share
    of cells that touch it); chosen: the ways that were best on other scenes."""

    rows: tuple[PointingResult, ...]
    area: dict[str, float]
    cells: dict[str, float]
    chosen: tuple[PointingMethod, ...] = ()

    def row(self, way: str, kind: str = EVERY) -> PointingResult:
        """One row. Raises MmxError where there is none."""
        found = [row for row in self.rows if (row.method, row.question_type) == (way, kind)]
        if not found:
            raise MmxError(
                f"nothing was measured for {way!r}, {kind!r}; known: {', '.join(self.methods)}; {self.question_types}."
            )
        return found[0]

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the ways, in order."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    @property
    def question_types(self) -> tuple[str, ...]:
        """The kinds that occurred, all of them together last."""
        return tuple(dict.fromkeys(row.question_type for row in self.rows))

    @property
    def main_methods(self) -> tuple[str, ...]:
        """The ways that join all layers and heads, and those that were chosen."""
        told = [
            "weighted and relevance",
            "relevance",
            "weighted",
            "attention, mean of all",
            *(way.name for way in self.chosen),
            OF_ITS_KIND,
        ]
        return tuple(way for way in told if way in self.methods)

    def table(self, ways: Sequence[str] = ()) -> str:
        """Text: for each way and kind the three shares, the first two with their 95 % interval, and chance."""
        lines = [f"{'kind':<10}{'map':<34}{'n':>5}  {'peak in the box':<21}{'cell touches it':<21}mass"]
        for kind in self.question_types:
            chance = f"{self.area[kind]:.3f}", f"{self.cells[kind]:.3f}"
            lines.append(f"{kind:<10}{'chance':<34}{'':>5}  {chance[0]:<21}{chance[1]:<21}{chance[0]}")
            for row in (self.row(way, kind) for way in ways or self.methods):
                shares = [share_text(row.exact, row.n), share_text(row.by_cells, row.n)]
                lines.append(f"{'':<10}{row.method:<34}{row.n:>5}  {shares[0]:<21}{shares[1]:<21}{row.mass:.3f}")
        return "\n".join(lines)


def pointing_game(pipeline: Pipeline, scenes: Sequence[Scene], choosing: Sequence[Scene] = ()) -> PointingReport:
    """How well attention (all, each layer, each head, and the best of them) and relevance point in these scenes.

    The best layer, head and pair of heads, of all kinds together and by cells, are chosen on the scenes of `choosing`,
    and so is the best head of each kind, for which one would have to know the kind; without `choosing` there are none.
    Deterministic. Raises MmxError for a model without a grid for pictures.
    """
    seen = compute_scene_maps(pipeline, scenes)
    if not choosing:
        return score_pointing(seen, standard_methods(seen))
    elsewhere = compute_scene_maps(pipeline, choosing)
    chosen = select_heads(elsewhere)
    report = score_pointing(seen, (*standard_methods(seen), *chosen), chosen)
    heads = [way for way in standard_methods(seen) if way.map_method == "attention" and len(way.heads) == 1]
    return replace(report, rows=report.rows + _best_of_its_kind(report, score_pointing(elsewhere, heads)))


def standard_methods(seen: SceneMaps) -> tuple[PointingMethod, ...]:
    """Those that need no choice: all and each layer of relevance, of weighted and of raw attention, and its heads."""
    layers, heads = seen.attention.shape[1:3]
    single = [(layer, head) for layer in range(layers) for head in range(heads)]
    by_layer = [(layer, tuple(h for h in single if h[0] == layer)) for layer in range(layers)]
    ways = []
    for kind, name in NAMES.items():
        ways.append(PointingMethod(name, kind, tuple(single)))
        ways += [PointingMethod(f"{name.removesuffix(MEAN)} of layer {layer}", kind, of) for layer, of in by_layer]
    return (
        *ways,
        *(PointingMethod(f"attention of head {layer}.{head}", "attention", ((layer, head),)) for layer, head in single),
    )


def select_heads(seen: SceneMaps) -> tuple[PointingMethod, ...]:
    """The best layer, head and pair of heads of attention in these cases, by cells."""
    ways = [way for way in standard_methods(seen) if way.map_method == "attention"]
    width, right = seen.attention.shape[2], {way: _by_cells(way.maps(seen), seen).mean().item() for way in ways}
    heads = sorted((way for way in ways if len(way.heads) == 1), key=lambda way: -right[way])
    pairs = [PointingMethod("", "attention", one.heads + other.heads) for one, other in combinations(heads[:PAIRED], 2)]
    right |= {way: _by_cells(way.maps(seen), seen).mean().item() for way in pairs}
    layers = [way for way in ways if len(way.heads) == width and len({layer for layer, _ in way.heads}) == 1]
    groups = {"best layer": layers, "best head": heads, "best pair": pairs}
    best = {name: max(group, key=lambda way: right[way]) for name, group in groups.items() if group}
    return tuple(
        PointingMethod(f"attention, {name} {_names(name, way)}", "attention", way.heads) for name, way in best.items()
    )


def _best_of_its_kind(report: PointingReport, elsewhere: PointingReport) -> tuple[PointingResult, ...]:
    """The rows of the head that was best elsewhere, kind by kind, and all of them together."""
    rows = []
    for kind in (kind for kind in report.question_types if kind != EVERY and kind in elsewhere.question_types):
        best = max(elsewhere.methods, key=lambda way: elsewhere.row(way, kind).by_cells)
        rows.append(replace(report.row(best, kind), method=OF_ITS_KIND))
    count = sum(row.n for row in rows)
    means = [sum(getattr(row, of) * row.n for row in rows) / count for of in ("strictly", "by_cells", "mass")]
    return (*rows, PointingResult(OF_ITS_KIND, EVERY, count, *means))


def score_pointing(
    seen: SceneMaps, ways: Sequence[PointingMethod], chosen: Sequence[PointingMethod] = ()
) -> PointingReport:
    """How well these ways point in the cases seen."""
    kinds = {kind: torch.tensor([case.question_type == kind for case in seen.cases]) for kind in KINDS}
    kinds = {kind: of for kind, of in kinds.items() if of.any()} | {EVERY: torch.ones(len(seen.cases)).bool()}
    boxes = torch.tensor([case.box for case in seen.cases])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    cells, rows = seen.touched.float().mean((1, 2)), []
    for way in ways:
        maps = way.maps(seen)
        strictly, mass = _strictly(maps, boxes, seen.displacement)
        by_cells = _by_cells(maps, seen)
        for kind, of in kinds.items():
            shares = [float(hits[of].mean()) for hits in (strictly, by_cells, mass)]
            rows.append(PointingResult(way.name, kind, int(of.sum()), *shares))
    by_chance = [{kind: float(share[of].mean()) for kind, of in kinds.items()} for share in (area, cells)]
    return PointingReport(tuple(rows), by_chance[0], by_chance[1], tuple(chosen))


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n (Wilson 1927, "Probable Inference, the Law of Succession ...", equation 4)."""
    middle, spread = share + Z * Z / (2 * n), Z * sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    whole = 1 + Z * Z / n
    return max(0.0, (middle - spread) / whole), min(1.0, (middle + spread) / whole)


def _strictly(maps: Tensor, boxes: Tensor, displacement: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """For maps [n, R, C] drawn over the picture: does the peak lie in the box, and what share of all does, [n] each."""
    hits, masses = [], []
    places = (torch.arange(RASTER) + 0.5) / RASTER
    for some, (x0, y0, x1, y1) in ((m, b.T[..., None]) for m, b in zip(maps.split(256), boxes.split(256))):
        inside = ((places >= y0) & (places <= y1))[:, :, None] & ((places >= x0) & (places <= x1))[:, None]
        drawn = heatmap(some, RASTER, RASTER, displacement)
        hits.append(_at_the_peak(drawn, inside))
        total = drawn.sum((1, 2))
        masses.append((drawn * inside).sum((1, 2)) / total.where(total > 0, 1.0))
    return torch.cat(hits), torch.cat(masses)


def _by_cells(maps: Tensor, seen: SceneMaps) -> Tensor:
    """Whether the best cell touches the box, [n]."""
    return _at_the_peak(maps, seen.touched)


def _at_the_peak(maps: Tensor, inside: Tensor) -> Tensor:
    """The share of each map's highest points, [n, ., .], that lie inside: 1 or 0, but for ties."""
    peak = maps.amax((1, 2), keepdim=True)
    highest = maps >= peak - TIED * peak.abs()
    return (highest & inside).sum((1, 2)) / highest.sum((1, 2))


def share_text(share: float, n: int) -> str:
    """A share with its 95 % interval."""
    low, high = wilson(share, n)
    return f"{share:.3f} ({low:.3f}-{high:.3f})"


def _names(group: str, way: PointingMethod) -> str:
    """The place of a chosen layer, head or pair: "1", "1.2", "1.2+2.0"."""
    return str(way.heads[0][0]) if group == "best layer" else "+".join(f"{layer}.{head}" for layer, head in way.heads)
