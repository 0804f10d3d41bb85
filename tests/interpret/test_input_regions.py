"""Regions of prepared inputs: elements of sequences, stretches of long ones, and the areas of grid cells."""

import torch

from mmx.interpret.input_regions import InputRegion, input_regions

ALL = slice(None)


def bool_mask(length):
    return torch.ones(1, length, dtype=torch.bool)


def test_a_sequence_is_divided_into_elements():
    tokens = {"tokens": torch.zeros(2, 3, dtype=torch.long), "mask": torch.ones(2, 3, dtype=torch.bool)}
    assert input_regions(tokens, 3, None) == [InputRegion("tokens", (ALL, slice(i, i + 1))) for i in range(3)]


def test_a_sequence_longer_than_the_slots_is_divided_equally():
    samples = {"mask": bool_mask(10), "samples": torch.zeros(1, 10)}
    regions = [region.slices[1] for region in input_regions(samples, 3, None)]
    assert regions == [slice(0, 3), slice(3, 6), slice(6, 10)]


def test_the_sequence_axis_is_as_long_as_the_mask_or_the_last():
    frames = {"spectrum": torch.zeros(1, 8, 4)}
    assert input_regions(frames, 2, None) == [InputRegion("spectrum", (ALL, ALL, slice(i, i + 2))) for i in (0, 2)]
    series = {"rows": torch.zeros(1, 4, 8), "mask": bool_mask(4)}
    assert input_regions(series, 4, None)[0] == InputRegion("rows", (ALL, slice(0, 1)))


def test_pixels_are_divided_into_the_areas_of_the_cells():
    regions = input_regions({"pixels": torch.zeros(1, 3, 8, 8)}, 7, (2, 3))
    assert [region.slices[1:] for region in regions[:3]] == [
        (slice(0, 4), slice(0, 2)),
        (slice(0, 4), slice(2, 5)),
        (slice(0, 4), slice(5, 8)),
    ]
    assert len(regions) == 6


def test_the_areas_of_the_cells_cover_the_image_once():
    counts = torch.zeros(1, 3, 11, 7)
    for region in input_regions({"pixels": counts}, 12, (4, 3)):
        counts[region.slices] += 1
    assert (counts == 1).all()


def test_a_mask_alone_has_no_regions():
    assert input_regions({"mask": bool_mask(4)}, 4, None) == []
