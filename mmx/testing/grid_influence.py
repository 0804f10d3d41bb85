"""Which pixels of an image influence the states of a cell most, by gradients.

Axes: B images, C channels, F feature size.
"""

from __future__ import annotations

import torch
from torch import Tensor

RESOLUTION = 16  # side of the maps of influence
EPSILON = 1e-30


def centers_of_influence(slots: list[Tensor], pixels: Tensor) -> list[tuple[float, float]]:
    """Return the center (y, x), in 0..1, of the pixels that influence each slot.

    Influence that all slots share, as in an encoder that mixes all positions, is subtracted.

    Args:
        slots: states [B, F] of each slot.
        pixels: images [B, C, height, width] that the states were computed from.
    """
    maps = torch.stack([_influence_map(slot, pixels) for slot in slots])
    shares = maps / maps.sum(0).clamp(min=EPSILON)
    own = (shares - 1 / len(slots)).clamp(min=0)
    own = own / own.sum((1, 2), keepdim=True).clamp(min=EPSILON)
    coordinates = torch.linspace(0, 1, RESOLUTION, dtype=torch.float64)
    centers = []
    for weights in own:
        y = float((weights.sum(1) * coordinates).sum())
        x = float((weights.sum(0) * coordinates).sum())
        centers.append((y, x))
    return centers


def _influence_map(slot: Tensor, pixels: Tensor) -> Tensor:
    """Return the squared gradient of a slot, averaged to a map that sums to 1: [RESOLUTION, RESOLUTION]."""
    (gradient,) = torch.autograd.grad((slot * slot.detach().sign()).sum(), pixels, retain_graph=True)
    energy = gradient.square().sum((0, 1), keepdim=True).double()
    energy = torch.nn.functional.adaptive_avg_pool2d(energy, RESOLUTION)[0, 0]
    return energy / energy.sum().clamp(min=EPSILON)
