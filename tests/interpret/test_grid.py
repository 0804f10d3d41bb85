"""Grids: displacements of encoders with known receptive fields, and heatmaps with peaks at known positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmx.encoders.base import Encoder, Features
from mmx.encoders.image import ImageEncoder
from mmx.errors import MmxError
from mmx.interpret.grid import displacement, grid_cells, heatmap, segment_cells
from mmx.memory import Segment

SIDE = 32
PIXELS = {"pixels": torch.zeros(1, 3, SIDE, SIDE)}


class Convolution(Encoder):
    """One convolution of stride 8, with a class token before its cells."""

    modality = "image"
    dimensions = 2
    feature_size = 4

    def __init__(self, padding=(0, 0, 0, 0), kernel=8):
        super().__init__(self.Options())
        self.pad = nn.ZeroPad2d(padding)
        self.convolution = nn.Conv2d(3, 4, kernel, stride=8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, batch):
        cells = self.dropout(self.convolution(self.pad(batch["pixels"])))
        states = torch.cat([cells.new_zeros(len(cells), 1, 4), cells.flatten(2).mT], 1)
        return Features(states, torch.ones(states.shape[:2], dtype=torch.bool), tuple(cells.shape[2:]))


@pytest.mark.parametrize(
    "padding, expected",  # left, right, top, bottom
    [
        ((0, 0, 0, 0), (0, 0)),
        ((4, 0, 4, 0), (-0.5, -0.5)),
        ((2, 0, 0, 0), (0, -0.25)),
        ((-3, 3, -1, 1), (0.125, 0.375)),
    ],
    ids=str,
)
def test_the_displacement_of_a_convolution_is_that_of_its_padding(padding, expected):
    """A patch of 8 pixels, moved by the padding, in cells of 8; with equal weights its centroid is its center."""
    encoder = Convolution(padding)
    nn.init.constant_(encoder.convolution.weight, 0.1)
    assert displacement(encoder, PIXELS) == pytest.approx(expected, abs=1e-5)


def test_a_resnet_has_a_displacement_of_half_a_cell_and_patches_have_none():
    inputs = {"pixels": torch.zeros(1, 3, 64, 64)}
    torch.manual_seed(0)
    resnet = ImageEncoder(ImageEncoder.Options(backbone="resnet18", size=64, stage=2))
    assert displacement(resnet, inputs) == pytest.approx((-0.47, -0.47), abs=0.08)
    vit = ImageEncoder(ImageEncoder.Options(backbone="vit_tiny_patch16_224", size=64, arguments={"depth": 2}))
    assert displacement(vit, inputs) == pytest.approx((0, 0), abs=0.08)


def test_the_encoder_is_unchanged_and_the_seed_determines_the_result():
    encoder = Convolution((4, 0, 4, 0)).train()
    encoder.convolution.eval()
    torch.nn.init.normal_(encoder.convolution.weight)
    with torch.inference_mode():
        found = displacement(encoder, PIXELS)
    assert found == displacement(encoder, PIXELS) != displacement(encoder, PIXELS, seed=1)
    assert encoder.training
    assert encoder.dropout.training
    assert not encoder.convolution.training
    assert all(parameter.grad is None for parameter in encoder.parameters())


class WithoutGrid(Convolution):
    def forward(self, batch):
        return super().forward(batch)._replace(grid=None)


class WithoutGradient(Convolution):
    def forward(self, batch):
        with torch.no_grad():
            return super().forward(batch)


@pytest.mark.parametrize("kind", [WithoutGrid, WithoutGradient])
def test_an_encoder_without_grid_or_gradient_has_no_displacement(kind):
    assert displacement(kind((4, 0, 4, 0)), PIXELS) == (0.0, 0.0)


@pytest.mark.parametrize(
    "inputs",
    [
        {"numbers": torch.zeros(1, 5)},
        {"tokens": torch.zeros(1, 3, 8, 8, dtype=torch.long)},
        {**PIXELS, "more": PIXELS["pixels"]},
    ],
    ids=["flat", "integers", "two"],
)
def test_inputs_without_exactly_one_float_image(inputs):
    assert displacement(Convolution((4, 0, 4, 0)), inputs) == (0.0, 0.0)


def test_cells_are_the_last_slots_of_their_segment():
    maps = torch.arange(20.0).expand(2, 3, 20)
    segment = Segment("image", 4, 17, (3, 4))
    assert torch.equal(segment_cells(maps, segment)[1, 2], torch.arange(5.0, 17.0).view(3, 4))
    assert torch.equal(grid_cells(maps, (2, 3))[0, 0], torch.arange(14.0, 20.0).view(2, 3))
    with pytest.raises(MmxError) as error:
        segment_cells(maps, Segment("text", 0, 20))
    assert (error.value.code, error.value.details["source"]) == ("interpret.no_grid", "text")


offsets = st.floats(-0.48, 0.48)  # at half a cell the peak may be exactly on the edge of the box


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.data(), offsets, offsets, st.sampled_from(["bicubic", "bilinear"]))
def test_a_peak_is_pixels_at_its_displaced_center(rows, columns, data, down, right, interpolation):
    row = data.draw(st.integers(0, rows - 1))
    column = data.draw(st.integers(0, columns - 1))
    box = data.draw(st.sampled_from([(0.0, 0.0, 1.0, 1.0), (0.2, 0.1, 0.7, 0.9)]))
    cells = torch.zeros(rows, columns, dtype=torch.float64)
    cells[row, column] = 1
    pixels = heatmap(cells, 120, 240, (down, right), box, interpolation)
    y = box[1] + (box[3] - box[1]) * (row + 0.5 + down) / rows
    x = box[0] + (box[2] - box[0]) * (column + 0.5 + right) / columns
    # Values are constant beyond the outermost cells, so a peak there is a plateau.
    assert pixels[min(int(y * 120), 119), min(int(x * 240), 239)] > 0.95 * pixels.max()
    ys, xs = (pixels > 0.999 * pixels.max()).nonzero().unbind(1)
    if 0 < row < rows - 1:
        assert ys.double().mean().item() + 0.5 == pytest.approx(y * 120, abs=1)
    if 0 < column < columns - 1:
        assert xs.double().mean().item() + 0.5 == pytest.approx(x * 240, abs=1)
    assert pixels.min() >= 0


def test_bilinear_by_hand_and_zero_outside_the_box():
    pixels = heatmap(torch.tensor([[0.0, 4.0]]), 1, 4, interpolation="bilinear")
    assert pixels.tolist() == [[0.0, 1.0, 3.0, 4.0]]
    moved = heatmap(torch.tensor([[0.0, 4.0]]), 1, 4, (0.0, -0.5), interpolation="bilinear")
    assert moved.tolist() == [[1.0, 3.0, 4.0, 4.0]]
    boxed = heatmap(torch.tensor([[1.0, 1.0]]), 2, 8, (0.0, 0.0), (0.25, 0.5, 0.75, 1.0))
    assert boxed.tolist() == [[0.0] * 8, [0, 0, 1, 1, 1, 1, 0, 0]]


def test_bicubic_interpolation_keeps_a_ramp_and_the_values_at_cell_centers():
    ramp = torch.arange(6.0).expand(5, 6)
    pixels = heatmap(ramp, 50, 60)
    middle = (torch.arange(60) + 0.5) / 10 - 0.5
    torch.testing.assert_close(pixels[25, 15:45], middle[15:45], atol=1e-5, rtol=0)
    batch = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(heatmap(batch, 4, 5), batch)
    torch.testing.assert_close(heatmap(batch, 9, 7)[1, 2], heatmap(batch[1, 2], 9, 7))
