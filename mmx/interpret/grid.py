"""Maps on grids: cells of a segment, receptive-field displacement of an encoder, and heatmaps over the input.

Axes: B rows, S slots, F feature size, R rows and C columns of a grid. Coordinates are fractions of the input, 0..1 from
the top left. A displacement is (down, right) in cells.

A strided convolution that is padded on both sides has its receptive field up and left of the center of its cell (half a
cell for a ResNet). A heatmap therefore places each cell at its displaced center. Patches have no displacement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from mmx.boxes import Box
from mmx.encoders.base import Encoder
from mmx.errors import MmxError
from mmx.memory import Segment

Displacement = tuple[float, float]  # (down, right), in cells
Interpolation = Literal["bicubic", "bilinear"]

FULL_BOX: Box = (0.0, 0.0, 1.0, 1.0)
NUM_NOISE_IMAGES = 8  # estimates a displacement to a few hundredths of a cell
CUBIC_A = -0.5  # the parameter a of Keys 1981, with which parabolas are reproduced exactly


def displacement(encoder: Encoder, inputs: Mapping[str, Tensor], seed: int = 0) -> Displacement:
    """Offset of the receptive field of a grid cell from the center of that cell, (down, right) in cells.

    Measured on noise images as the centroid of the squared gradient of a random projection of a central cell's
    features with respect to the pixels, averaged over images and over the one, two or four central cells.
    The encoder runs in eval mode, and its training flags are restored.

    Args:
        encoder: an encoder whose features have a grid.
        inputs: a batch as `collate` returns it. Of the float input only the shape is used.
        seed: of the noise.

    Returns:
        (0, 0) for an encoder without a grid, without a gradient, or without exactly one float input
        [B, ..., height, width].
    """
    names = [name for name, tensor in inputs.items() if tensor.is_floating_point() and tensor.ndim >= 3]
    if len(names) != 1:
        return 0.0, 0.0
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad(), _eval_mode(encoder):
        batch = {}
        for name, tensor in inputs.items():
            batch[name] = tensor[:1].expand(NUM_NOISE_IMAGES, *tensor.shape[1:]).clone()
        noise = _noise(batch[names[0]], generator).requires_grad_()
        batch[names[0]] = noise
        features = encoder(batch)
        if features.grid is None or not features.states.requires_grad:
            return 0.0, 0.0
        center = _central_cells(grid_cells(features.states.mT, features.grid)).flatten(2)
        scores = (center * _noise(center, generator)).sum((0, 1))
        gradients = [torch.autograd.grad(s, noise, retain_graph=True, allow_unused=True)[0] for s in scores]
    return _centroid_offset([gradient for gradient in gradients if gradient is not None], features.grid)


def grid_cells(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """The last R*C slots of maps [..., S] as [..., R, C]. Class tokens and registers come before them."""
    return maps[..., maps.shape[-1] - grid[0] * grid[1] :].unflatten(-1, grid)


def segment_cells(maps: Tensor, segment: Segment) -> Tensor:
    """The cells of one segment, taken from maps over all slots of a memory: [..., S] -> [..., R, C].

    Raises MmxError for a segment without a grid.
    """
    if segment.grid is None:
        raise MmxError(
            f"source {segment.source!r} has no grid; expected a source whose features have one.",
            code="interpret.no_grid",
            source=segment.source,
        )
    return grid_cells(maps[..., segment.start : segment.stop], segment.grid)


def heatmap(
    cells: Tensor,
    height: int,
    width: int,
    displacement: Displacement = (0.0, 0.0),
    box: Box = FULL_BOX,
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """Interpolate maps on a grid to pixels, [..., R, C] -> [..., height, width].

    Each cell is placed at its center plus the displacement. Values are constant beyond the outermost cells, and never
    less than the smallest cell. Bicubic interpolation: Keys 1981, "Cubic Convolution Interpolation for Digital Image
    Processing", equation 15.

    Args:
        cells: [..., R, C].
        height: in pixels.
        width: in pixels.
        displacement: (down, right) in cells, see `displacement`.
        box: the part of the input that the grid covers. The result is zero outside.
        interpolation: "bicubic" or "bilinear".
    """
    x0, y0, x1, y1 = box
    down = _interpolation_weights(cells.shape[-2], height, displacement[0], (y0, y1), interpolation).to(cells)
    right = _interpolation_weights(cells.shape[-1], width, displacement[1], (x0, x1), interpolation).to(cells)
    lowest = cells.amin((-2, -1), keepdim=True)
    pixels = (down @ cells @ right.mT).maximum(lowest)  # cubic interpolation undershoots
    return pixels * (down.any(-1)[:, None] & right.any(-1))


def _interpolation_weights(
    count: int, length: int, offset: float, span: tuple[float, float], interpolation: Interpolation
) -> Tensor:
    """[length, count]: the weight of each of `count` cells in each pixel along one axis; zero outside the span."""
    centers = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    fractions = (centers - span[0]) / (span[1] - span[0])
    inside = (fractions >= 0) & (fractions <= 1)
    positions = (fractions * count - 0.5 - offset).clamp(0, count - 1)
    kernel = _cubic_kernel if interpolation == "bicubic" else _linear_kernel
    weights = torch.zeros(length, count, dtype=torch.float64)
    for step in (-1, 0, 1, 2):
        cell = positions.floor() + step
        weights.scatter_add_(1, cell.clamp(0, count - 1).long()[:, None], kernel(positions - cell)[:, None])
    return weights * inside[:, None]


def _linear_kernel(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic_kernel(x: Tensor) -> Tensor:
    x = x.abs()
    a = CUBIC_A
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


def _central_cells(plane: Tensor) -> Tensor:
    """The one or two central rows and columns of [..., R, C]."""
    rows, columns = plane.shape[-2:]
    return plane[..., (rows - 1) // 2 : rows // 2 + 1, (columns - 1) // 2 : columns // 2 + 1]


def _centroid_offset(gradients: Sequence[Tensor], grid: tuple[int, int]) -> Displacement:
    """Mean offset of the centroids of squared gradients [B, ..., height, width] from the center, in cells."""
    if not gradients:
        return 0.0, 0.0
    energy = torch.cat(list(gradients)).detach().double().square().flatten(1, -3).sum(1)
    total = energy.sum((1, 2))
    energy = energy[(total > 0) & total.isfinite()]
    if not len(energy):
        return 0.0, 0.0
    down = _centroids(energy.sum(2)).mean().item()
    right = _centroids(energy.sum(1)).mean().item()
    return (down - 0.5) * grid[0], (right - 0.5) * grid[1]


def _centroids(weights: Tensor) -> Tensor:
    """Centroids of weights [n, length] as fractions of the length, [n]."""
    length = weights.shape[1]
    centers = (torch.arange(length, device=weights.device) + 0.5) / length
    return (weights * centers).sum(1) / weights.sum(1)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers like a tensor, drawn on the CPU so that they are equal on all devices."""
    return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)


@contextmanager
def _eval_mode(encoder: Encoder) -> Iterator[None]:
    """Eval mode for all modules; afterwards each has the training flag that it had before."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
