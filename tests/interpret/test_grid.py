"""Where a map lies: hand-made encoders that look beside their cells, and peaks that must come to their true place."""

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
    """One convolution of stride 8; a class token stands before its cells."""

    modality, dimensions, width = "image", 2, 4

    def __init__(self, padding=(0, 0, 0, 0), kernel=8):
        super().__init__(self.Options())
        self.pad, self.map = nn.ZeroPad2d(padding), nn.Conv2d(3, 4, kernel, stride=8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, batch):
        cells = self.dropout(self.map(self.pad(batch["pixels"])))
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
def test_a_convolution_looks_where_its_padding_says(padding, expected):
    """By hand: a patch of 8 pixels moved by the padding, in cells of 8; equal weights have their centroid amid it."""
    encoder = Convolution(padding)
    nn.init.constant_(encoder.map.weight, 0.1)
    assert displacement(encoder, PIXELS) == pytest.approx(expected, abs=1e-5)


def test_a_resnet_looks_half_a_cell_up_and_left_and_patches_straight_ahead():
    inputs = {"pixels": torch.zeros(1, 3, 64, 64)}
    torch.manual_seed(0)
    resnet = ImageEncoder(ImageEncoder.Options(backbone="resnet18", size=64, stage=2))
    assert displacement(resnet, inputs) == pytest.approx((-0.47, -0.47), abs=0.08)
    vit = ImageEncoder(ImageEncoder.Options(backbone="vit_tiny_patch16_224", size=64, arguments={"depth": 2}))
    assert displacement(vit, inputs) == pytest.approx((0, 0), abs=0.08)


def test_the_encoder_is_left_as_it_was_and_the_seed_decides():
    encoder = Convolution((4, 0, 4, 0)).train()
    encoder.map.eval()
    torch.nn.init.normal_(encoder.map.weight)
    with torch.inference_mode():
        found = displacement(encoder, PIXELS)
    assert found == displacement(encoder, PIXELS) != displacement(encoder, PIXELS, seed=1)
    assert encoder.training and encoder.dropout.training and not encoder.map.training
    assert all(parameter.grad is None for parameter in encoder.parameters())


class Gridless(Convolution):
    def forward(self, batch):
        return super().forward(batch)._replace(grid=None)


class Frozen(Convolution):
    def forward(self, batch):
        with torch.no_grad():
            return super().forward(batch)


@pytest.mark.parametrize("kind", [Gridless, Frozen])
def test_an_encoder_that_cannot_be_asked_looks_straight_ahead(kind):
    assert displacement(kind((4, 0, 4, 0)), PIXELS) == (0.0, 0.0)


@pytest.mark.parametrize(
    "inputs",
    [
        {"numbers": torch.zeros(1, 5)},
        {"tokens": torch.zeros(1, 3, 8, 8, dtype=torch.long)},
        {**PIXELS, "more": PIXELS["pixels"]},
    ],
    ids=["flat", "whole numbers", "two"],
)
def test_inputs_without_one_plane(inputs):
    assert displacement(Convolution((4, 0, 4, 0)), inputs) == (0.0, 0.0)


def test_cells_are_the_last_slots_of_their_segment():
    maps = torch.arange(20.0).expand(2, 3, 20)
    segment = Segment("image", 4, 17, (3, 4))
    assert torch.equal(segment_cells(maps, segment)[1, 2], torch.arange(5.0, 17.0).view(3, 4))
    assert torch.equal(grid_cells(maps, (2, 3))[0, 0], torch.arange(14.0, 20.0).view(2, 3))
    with pytest.raises(MmxError, match="source 'text' has no grid"):
        segment_cells(maps, Segment("text", 0, 20))


moves = st.floats(-0.48, 0.48)  # at half a cell the place may lie on the very edge of the box


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.data(), moves, moves, st.sampled_from(["bicubic", "bilinear"]))
def test_a_peak_comes_to_its_true_center(rows, columns, data, down, right, interpolation):
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    box = data.draw(st.sampled_from([(0.0, 0.0, 1.0, 1.0), (0.2, 0.1, 0.7, 0.9)]))
    cells = torch.zeros(rows, columns, dtype=torch.float64)
    cells[row, column] = 1
    drawn = heatmap(cells, 120, 240, (down, right), box, interpolation)
    y = box[1] + (box[3] - box[1]) * (row + 0.5 + down) / rows
    x = box[0] + (box[2] - box[0]) * (column + 0.5 + right) / columns
    # Beyond the outermost cells their value goes on: the peak is then a plateau that holds the place.
    assert drawn[min(int(y * 120), 119), min(int(x * 240), 239)] > 0.95 * drawn.max()
    ys, xs = (drawn > 0.999 * drawn.max()).nonzero().unbind(1)
    if 0 < row < rows - 1:
        assert ys.double().mean().item() + 0.5 == pytest.approx(y * 120, abs=1)
    if 0 < column < columns - 1:
        assert xs.double().mean().item() + 0.5 == pytest.approx(x * 240, abs=1)
    assert drawn.min() >= 0


def test_bilinear_by_hand_and_zero_outside_the_box():
    drawn = heatmap(torch.tensor([[0.0, 4.0]]), 1, 4, interpolation="bilinear")
    assert drawn.tolist() == [[0.0, 1.0, 3.0, 4.0]]
    moved = heatmap(torch.tensor([[0.0, 4.0]]), 1, 4, (0.0, -0.5), interpolation="bilinear")
    assert moved.tolist() == [[1.0, 3.0, 4.0, 4.0]]
    boxed = heatmap(torch.tensor([[1.0, 1.0]]), 2, 8, (0.0, 0.0), (0.25, 0.5, 0.75, 1.0))
    assert boxed.tolist() == [[0.0] * 8, [0, 0, 1, 1, 1, 1, 0, 0]]


def test_bicubic_is_that_of_keys_and_a_ramp_stays_one():
    ramp = torch.arange(6.0).expand(5, 6)
    drawn = heatmap(ramp, 50, 60)
    middle = (torch.arange(60) + 0.5) / 10 - 0.5
    torch.testing.assert_close(drawn[25, 15:45], middle[15:45], atol=1e-5, rtol=0)
    batch = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(heatmap(batch, 4, 5), batch)
    torch.testing.assert_close(heatmap(batch, 9, 7)[1, 2], heatmap(batch[1, 2], 9, 7))
