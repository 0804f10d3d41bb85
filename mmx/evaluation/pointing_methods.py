"""Methods that make one map of a case from the maps of all layers and heads.

Axes: n cases, L cross-attention layers, H heads, R rows and C columns of the image's grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmx.evaluation.scene_maps import SceneMaps
from mmx.interpret.look import MapMethod
from mmx.interpret.relevance import relevance_maps

MAP_METHODS: tuple[MapMethod, ...] = ("both", "relevance", "weighted", "attention")
AVERAGED_BY_BOTH: tuple[MapMethod, ...] = ("weighted", "relevance")
Head = tuple[int, int]  # cross-attention layer and head


class PointingMethod(NamedTuple):
    """A kind of map and the heads that it is made of."""

    name: str
    map_method: MapMethod
    heads: tuple[Head, ...]

    def maps(self, scene_maps: SceneMaps) -> Tensor:
        """[n, R, C]: the mean over the heads; for relevance see `relevance_maps`."""
        if self.map_method == "both":
            normalized = []
            for method in AVERAGED_BY_BOTH:
                part = self._replace(map_method=method).maps(scene_maps)
                normalized.append(part / part.sum((1, 2), keepdim=True).clamp(min=1e-12))
            return torch.stack(normalized).mean(0)
        by_head: Tensor = getattr(scene_maps, self.map_method).flatten(3)
        selected = by_head.new_zeros(by_head.shape[1:3])
        for layer, head in self.heads:
            selected[layer, head] = 1.0
        chosen = by_head * selected[..., None]
        joined = relevance_maps(chosen) if self.map_method == "relevance" else chosen.sum((1, 2)) / len(self.heads)
        return joined.unflatten(1, scene_maps.touched.shape[1:])


def all_head_methods(scene_maps: SceneMaps) -> tuple[PointingMethod, ...]:
    """One method of all layers and heads for each kind of map, named after it."""
    layers, heads = scene_maps.attention.shape[1:3]
    every = tuple((layer, head) for layer in range(layers) for head in range(heads))
    return tuple(PointingMethod(method, method, every) for method in MAP_METHODS)


def standard_methods(scene_maps: SceneMaps) -> tuple[PointingMethod, ...]:
    """For each kind of map all heads and the heads of each layer; for attention also each head."""
    methods = []
    for whole in all_head_methods(scene_maps):
        methods.append(whole)
        for layer in range(scene_maps.attention.shape[1]):
            heads = tuple(head for head in whole.heads if head[0] == layer)
            methods.append(PointingMethod(f"{whole.name}, layer {layer}", whole.map_method, heads))
    for layer, head in methods[0].heads:
        methods.append(PointingMethod(f"attention, head {layer}.{head}", "attention", ((layer, head),)))
    return tuple(methods)
