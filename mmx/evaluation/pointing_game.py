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
from mmx.evaluation.scene_maps import Seen, look
from mmx.inference.pipeline import Pipeline
from mmx.interpret.grid import heat
from mmx.interpret.relevance import relevance_maps

Of = Literal["attention", "weighted", "relevance", "both"]
PARTS_OF_BOTH: tuple[Of, ...] = ("weighted", "relevance")
MEAN = ", mean of all"
NAMES: dict[Of, str] = {  # of the maps of all layers and heads
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


class Way(NamedTuple):
    """A way to make one map out of L x H of them: raw attention, the same weighed by what each slot hands over,
    relevance, or the mean of the last two, of these heads."""

    name: str
    of: Of
    heads: tuple[Head, ...]

    def maps(self, seen: Seen) -> Tensor:
        """[n, R, C]: the mean of attention; of relevance, what its layers keep (see `relevance_maps`)."""
        if self.of == "both":
            halves = [self._replace(of=of).maps(seen) for of in PARTS_OF_BOTH]
            return torch.stack([half / half.sum((1, 2), keepdim=True).clamp(min=1e-12) for half in halves]).mean(0)
        parts: Tensor = getattr(seen, self.of).flatten(3)
        chosen = parts.new_zeros(parts.shape[1:3])
        for layer, head in self.heads:
            chosen[layer, head] = 1.0
        weighed = parts * chosen[..., None]
        joined = relevance_maps(weighed) if self.of == "relevance" else weighed.sum((1, 2)) / len(self.heads)
        return joined.unflatten(1, seen.touched.shape[1:])


@dataclass(frozen=True)
class Pointed:
    """How well one way points in n cases of a kind. strictly: share of peaks, drawn over the picture, within the box;
    by_cells: share of best cells that touch the box; mass: share of the drawn map within the box."""

    way: str
    kind: str
    n: int
    strictly: float
    by_cells: float
    mass: float


@dataclass(frozen=True)
class PointingReport:
    """rows: every way and kind; area, cells: what chance gives, by kind (the box's share of the picture, and the share
    of cells that touch it); chosen: the ways that were best on other scenes."""

    rows: tuple[Pointed, ...]
    area: dict[str, float]
    cells: dict[str, float]
    chosen: tuple[Way, ...] = ()

    def row(self, way: str, kind: str = EVERY) -> Pointed:
        """One row. Raises MmxError where there is none."""
        found = [row for row in self.rows if (row.way, row.kind) == (way, kind)]
        if not found:
            raise MmxError(f"nothing was measured for {way!r}, {kind!r}; known: {', '.join(self.ways)}; {self.kinds}.")
        return found[0]

    @property
    def ways(self) -> tuple[str, ...]:
        """The names of the ways, in order."""
        return tuple(dict.fromkeys(row.way for row in self.rows))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that occurred, all of them together last."""
        return tuple(dict.fromkeys(row.kind for row in self.rows))

    @property
    def worth_telling(self) -> tuple[str, ...]:
        """The ways that join all layers and heads, and those that were chosen."""
        told = [
            "weighted and relevance",
            "relevance",
            "weighted",
            "attention, mean of all",
            *(way.name for way in self.chosen),
            OF_ITS_KIND,
        ]
        return tuple(way for way in told if way in self.ways)

    def table(self, ways: Sequence[str] = ()) -> str:
        """Text: for each way and kind the three shares, the first two with their 95 % interval, and chance."""
        lines = [f"{'kind':<10}{'map':<34}{'n':>5}  {'peak in the box':<21}{'cell touches it':<21}mass"]
        for kind in self.kinds:
            chance = f"{self.area[kind]:.3f}", f"{self.cells[kind]:.3f}"
            lines.append(f"{kind:<10}{'chance':<34}{'':>5}  {chance[0]:<21}{chance[1]:<21}{chance[0]}")
            for row in (self.row(way, kind) for way in ways or self.ways):
                shares = [share_text(row.strictly, row.n), share_text(row.by_cells, row.n)]
                lines.append(f"{'':<10}{row.way:<34}{row.n:>5}  {shares[0]:<21}{shares[1]:<21}{row.mass:.3f}")
        return "\n".join(lines)


def pointing(pipeline: Pipeline, scenes: Sequence[Scene], choosing: Sequence[Scene] = ()) -> PointingReport:
    """How well attention (all, each layer, each head, and the best of them) and relevance point in these scenes.

    The best layer, head and pair of heads, of all kinds together and by cells, are chosen on the scenes of `choosing`,
    and so is the best head of each kind, for which one would have to know the kind; without `choosing` there are none.
    Deterministic. Raises MmxError for a model without a grid for pictures.
    """
    seen = look(pipeline, scenes)
    if not choosing:
        return point(seen, plain_ways(seen))
    elsewhere = look(pipeline, choosing)
    chosen = choose(elsewhere)
    report = point(seen, (*plain_ways(seen), *chosen), chosen)
    heads = [way for way in plain_ways(seen) if way.of == "attention" and len(way.heads) == 1]
    return replace(report, rows=report.rows + _best_of_its_kind(report, point(elsewhere, heads)))


def plain_ways(seen: Seen) -> tuple[Way, ...]:
    """Those that need no choice: all and each layer of relevance, of weighted and of raw attention, and its heads."""
    layers, heads = seen.attention.shape[1:3]
    single = [(layer, head) for layer in range(layers) for head in range(heads)]
    by_layer = [(layer, tuple(h for h in single if h[0] == layer)) for layer in range(layers)]
    ways = []
    for kind, name in NAMES.items():
        ways.append(Way(name, kind, tuple(single)))
        ways += [Way(f"{name.removesuffix(MEAN)} of layer {layer}", kind, of) for layer, of in by_layer]
    return (*ways, *(Way(f"attention of head {layer}.{head}", "attention", ((layer, head),)) for layer, head in single))


def choose(seen: Seen) -> tuple[Way, ...]:
    """The best layer, head and pair of heads of attention in these cases, by cells."""
    ways = [way for way in plain_ways(seen) if way.of == "attention"]
    width, right = seen.attention.shape[2], {way: _by_cells(way.maps(seen), seen).mean().item() for way in ways}
    heads = sorted((way for way in ways if len(way.heads) == 1), key=lambda way: -right[way])
    pairs = [Way("", "attention", one.heads + other.heads) for one, other in combinations(heads[:PAIRED], 2)]
    right |= {way: _by_cells(way.maps(seen), seen).mean().item() for way in pairs}
    layers = [way for way in ways if len(way.heads) == width and len({layer for layer, _ in way.heads}) == 1]
    groups = {"best layer": layers, "best head": heads, "best pair": pairs}
    best = {name: max(group, key=lambda way: right[way]) for name, group in groups.items() if group}
    return tuple(Way(f"attention, {name} {_names(name, way)}", "attention", way.heads) for name, way in best.items())


def _best_of_its_kind(report: PointingReport, elsewhere: PointingReport) -> tuple[Pointed, ...]:
    """The rows of the head that was best elsewhere, kind by kind, and all of them together."""
    rows = []
    for kind in (kind for kind in report.kinds if kind != EVERY and kind in elsewhere.kinds):
        best = max(elsewhere.ways, key=lambda way: elsewhere.row(way, kind).by_cells)
        rows.append(replace(report.row(best, kind), way=OF_ITS_KIND))
    count = sum(row.n for row in rows)
    means = [sum(getattr(row, of) * row.n for row in rows) / count for of in ("strictly", "by_cells", "mass")]
    return (*rows, Pointed(OF_ITS_KIND, EVERY, count, *means))


def point(seen: Seen, ways: Sequence[Way], chosen: Sequence[Way] = ()) -> PointingReport:
    """How well these ways point in the cases seen."""
    kinds = {kind: torch.tensor([case.kind == kind for case in seen.cases]) for kind in KINDS}
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
            rows.append(Pointed(way.name, kind, int(of.sum()), *shares))
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
        drawn = heat(some, RASTER, RASTER, displacement)
        hits.append(_at_the_peak(drawn, inside))
        total = drawn.sum((1, 2))
        masses.append((drawn * inside).sum((1, 2)) / total.where(total > 0, 1.0))
    return torch.cat(hits), torch.cat(masses)


def _by_cells(maps: Tensor, seen: Seen) -> Tensor:
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


def _names(group: str, way: Way) -> str:
    """The place of a chosen layer, head or pair: "1", "1.2", "1.2+2.0"."""
    return str(way.heads[0][0]) if group == "best layer" else "+".join(f"{layer}.{head}" for layer, head in way.heads)
