"""Augmentation: a pure function of picture and rng, inside its bounds."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from mmx.config.schema import AugmentationConfig
from mmx.data.augmentation import augment_image


def gradient(width: int, height: int) -> Image.Image:
    """Red says how far right, green how far down."""
    across, down = Image.linear_gradient("L").rotate(90), Image.linear_gradient("L")
    flat = Image.new("L", (256, 256), 90)
    return Image.merge("RGB", (across, down, flat)).resize((width, height))


chances = st.floats(0.0, 1.0)
configs = st.builds(AugmentationConfig, crop=st.floats(0.01, 1.0), flip=st.booleans(), color=chances, erase=chances)


@given(configs, st.integers(1, 60), st.integers(1, 60), st.integers())
@settings(max_examples=50, deadline=None)
def test_the_same_rng_gives_the_same_picture_inside_the_old_one(config, width, height, seed):
    picture = gradient(width, height)
    first, second = (augment_image(picture, config, Random(seed)) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.mode == "RGB"
    assert 1 <= first.width <= width
    assert 1 <= first.height <= height
    assert picture.tobytes() == gradient(width, height).tobytes()  # the given one is left alone


def test_the_default_changes_nothing():
    picture = gradient(20, 10)
    assert augment_image(picture, AugmentationConfig(), Random(0)) is picture


@pytest.mark.parametrize(("width", "height"), [(200, 200), (300, 150), (40, 400), (1, 2000)])
def test_a_crop_keeps_its_area_and_where_it_can_its_shape(width, height):
    picture, smallest, areas = Image.new("RGB", (width, height)), 0.4, []
    for seed in range(200):
        cut = augment_image(picture, AugmentationConfig(min_crop_scale=smallest), Random(seed))
        areas.append(cut.width * cut.height / (width * height))
        if cut.width < width and cut.height < height:
            assert 3 / 4 * 0.97 <= cut.width / cut.height <= 4 / 3 * 1.03
    rounding = (1 / width if width > 1 else 0) + 1 / height
    assert min(areas) >= smallest * (1 - rounding) - 0.5 * rounding
    assert max(areas) > 0.9
    assert min(areas) < 0.5


def test_half_of_the_pictures_are_mirrored():
    picture = gradient(16, 8)
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    found = [
        augment_image(picture, AugmentationConfig(horizontal_flip=True), Random(seed)).tobytes() for seed in range(300)
    ]
    assert set(found) == {picture.tobytes(), mirrored}
    assert 110 < found.count(mirrored) < 190


def test_light_changes_stay_within_their_share():
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    values = [
        augment_image(grey, AugmentationConfig(color_jitter=0.3), Random(seed)).getpixel((0, 0))[0]
        for seed in range(300)
    ]
    assert 69 <= min(values) < 75
    assert 125 < max(values) <= 131


def test_erasing_paints_one_part_over_as_often_as_it_should():
    picture, shares = Image.new("RGB", (100, 60), (7, 8, 9)), []
    for seed in range(400):
        changed = augment_image(picture, AugmentationConfig(random_erasing=0.3), Random(seed))
        box = ImageChops.difference(changed, picture).getbbox()
        if box is not None:
            width, height = box[2] - box[0], box[3] - box[1]
            shares.append(width * height / 6000)
            assert len(set(changed.crop(box).getdata())) == 1
            assert 0.45 <= width / height <= 2.2
    assert 90 < len(shares) < 150
    assert 0.015 < min(shares) < 0.06
    assert 0.2 < max(shares) < 0.26
    assert (
        AugmentationConfig(min_crop_scale=0.5, horizontal_flip=True, random_erasing=1.0).without_geometry()
        == AugmentationConfig()
    )


def test_one_setting_does_not_move_the_choices_of_another_picture():
    picture = gradient(64, 64)
    crops = [augment_image(picture, AugmentationConfig(min_crop_scale=0.5), Random(seed)) for seed in range(5)]
    lit = [
        augment_image(picture, AugmentationConfig(min_crop_scale=0.5, color_jitter=0.2), Random(seed))
        for seed in range(5)
    ]
    assert [c.size for c in crops] == [c.size for c in lit]
    assert ImageChops.difference(crops[0], lit[0]).getbbox() is not None
