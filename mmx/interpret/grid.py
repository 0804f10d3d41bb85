"""Where on its input a map lies: the cells of a grid, and how far beside its cell each of them looks.

Alphabet: B rows, S slots, F feature width, R rows and C columns of a grid. Coordinates are shares of the input, 0..1
from the top left; a displacement is (down, right) in cells.

A strided convolution with padding on both sides looks up and left of the middle of its cell: a ResNet by half a cell,
so that its maps, drawn as they lie in the grid, miss what they mean. Patches look straight ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from mmx.encoders.base import Encoder
from mmx.errors import MmxError
from mmx.memory import Box, Segment

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
NOISES = 8  # pictures of noise: enough for a few hundredths of a cell
SHARPNESS = -0.5  # Keys' a, for which a parabola is interpolated exactly


def displacement(encoder: Encoder, inputs: Mapping[str, Tensor], seed: int = 0) -> tuple[float, float]:
    """By how many cells (down, right) what a cell of the grid looks at stands away from the middle of the cell.

    inputs: a batch as `collate` makes it, of which only the size counts (and, of its first row, what is no picture).
    Measured as the centroid of the squared gradient of a central cell's state, projected at random, with respect to
    pictures of noise: the mean over pictures and over the one, two or four cells in the middle, each for itself. They
    lie symmetrically, so that an encoder that looks straight ahead gives 0.

    (0, 0) for an encoder without a grid, without just one float input [B, ..., height, width], or without a gradient.
    The encoder measures in eval mode, and is left as it was.
    """
    planes = [name for name, tensor in inputs.items() if tensor.is_floating_point() and tensor.ndim >= 3]
    if len(planes) != 1:
        return 0.0, 0.0
    dice = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad(), _in_eval_mode(encoder):
        batch = {name: tensor[:1].expand(NOISES, *tensor.shape[1:]).clone() for name, tensor in inputs.items()}
        noise = batch[planes[0]] = _noise(batch[planes[0]], dice).requires_grad_()
        features = encoder(batch)
        if features.grid is None or not features.states.requires_grad:
            return 0.0, 0.0
        middle = _central(grid_cells(features.states.mT, features.grid)).flatten(2)
        scores = (middle * _noise(middle, dice)).sum((0, 1))
        gradients = [torch.autograd.grad(s, noise, retain_graph=True, allow_unused=True)[0] for s in scores]
    return _off_center([gradient for gradient in gradients if gradient is not None], features.grid)


def grid_cells(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """The last R*C slots of maps [..., S] as a plane [..., R, C]; class tokens and registers stand before them."""
    return maps[..., maps.shape[-1] - grid[0] * grid[1] :].unflatten(-1, grid)


def segment_cells(maps: Tensor, segment: Segment) -> Tensor:
    """The cells of one segment of a memory, out of maps over all its slots: [..., S] -> [..., R, C].

    Raises MmxError for a segment without a grid.
    """
    if segment.grid is None:
        raise MmxError(f"source {segment.source!r} has no grid; a map lies on a source whose features have one.")
    return grid_cells(maps[..., segment.start : segment.stop], segment.grid)


def heatmap(
    cells: Tensor,
    height: int,
    width: int,
    displacement: tuple[float, float] = (0.0, 0.0),
    box: Box = WHOLE,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
) -> Tensor:
    """Maps on a grid, [..., R, C], as they lie over their input: [..., height, width], no less than the map's least.

    Each cell stands where it looks: in the middle of its place in the grid, moved by the displacement; beyond the
    outermost cells their value goes on. box: the part of the input that the grid covers; zero outside.
    Bicubic: Keys 1981, "Cubic Convolution Interpolation for Digital Image Processing", equation 15.
    """
    x0, y0, x1, y1 = box
    down = _weights(cells.shape[-2], height, displacement[0], (y0, y1), interpolation).to(cells)
    right = _weights(cells.shape[-1], width, displacement[1], (x0, x1), interpolation).to(cells)
    drawn = (down @ cells @ right.mT).maximum(cells.amin((-2, -1), keepdim=True))  # a cubic swings below what it joins
    return drawn * (down.any(-1)[:, None] & right.any(-1))


def _weights(count: int, length: int, moved: float, span: tuple[float, float], interpolation: str) -> Tensor:
    """[length, count]: what each of `count` cells gives to each pixel along one axis; zeros outside the span."""
    shares = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    places = (shares - span[0]) / (span[1] - span[0])
    inside = (places >= 0) & (places <= 1)
    along = (places * count - 0.5 - moved).clamp(0, count - 1)
    kernel = _cubic if interpolation == "bicubic" else _hat
    weights = torch.zeros(length, count, dtype=torch.float64)
    for step in (-1, 0, 1, 2):
        cell = along.floor() + step
        weights.scatter_add_(1, cell.clamp(0, count - 1).long()[:, None], kernel(along - cell)[:, None])
    return weights * inside[:, None]


def _hat(x: Tensor) -> Tensor:
    """Linear interpolation's weight at a distance."""
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    """Cubic convolution's weight at a distance, in cells."""
    x, a = x.abs(), SHARPNESS
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


def _central(plane: Tensor) -> Tensor:
    """The one or two middle rows and columns of [..., R, C]."""
    rows, columns = plane.shape[-2:]
    return plane[..., (rows - 1) // 2 : rows // 2 + 1, (columns - 1) // 2 : columns // 2 + 1]


def _off_center(gradients: Sequence[Tensor], grid: tuple[int, int]) -> tuple[float, float]:
    """How far the centroids of squared gradients [B, ..., height, width] lie from the middle, in cells; their mean."""
    if not gradients:
        return 0.0, 0.0
    energy = torch.cat(list(gradients)).detach().double().square().flatten(1, -3).sum(1)
    total = energy.sum((1, 2))
    energy = energy[(total > 0) & total.isfinite()]
    if not len(energy):
        return 0.0, 0.0
    down, right = (_centroids(energy.sum(axis)).mean().item() for axis in (2, 1))
    return (down - 0.5) * grid[0], (right - 0.5) * grid[1]


def _centroids(weights: Tensor) -> Tensor:
    """Where weights [n, length] balance, [n], as a share of their length."""
    length = weights.shape[1]
    places = (torch.arange(length, device=weights.device) + 0.5) / length
    return (weights * places).sum(1) / weights.sum(1)


def _noise(like: Tensor, dice: torch.Generator) -> Tensor:
    """Standard normal numbers of the same shape, type and device, drawn on the CPU: they are the same on a GPU."""
    return torch.randn(like.shape, generator=dice).to(like.device, like.dtype)


@contextmanager
def _in_eval_mode(encoder: Encoder) -> Iterator[None]:
    """Each part in eval mode, and afterwards in the mode it was in."""
    modes = [(part, part.training) for part in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
