"""Augmentation: a pure function of image and random generator, within its limits."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from mmx.config.schema import AugmentationConfig
from mmx.data.augmentation import augment_image


def gradient(width: int, height: int) -> Image.Image:
    """Return an image whose red grows to the right and whose green grows downwards."""
    vertical = Image.linear_gradient("L")
    horizontal = vertical.rotate(90)
    constant = Image.new("L", (256, 256), 90)
    return Image.merge("RGB", (horizontal, vertical, constant)).resize((width, height))


probabilities = st.floats(0.0, 1.0)
configs = st.builds(
    AugmentationConfig,
    min_crop_scale=st.floats(0.01, 1.0),
    horizontal_flip=st.booleans(),
    color_jitter=probabilities,
    random_erasing=probabilities,
)


@given(configs, st.integers(1, 60), st.integers(1, 60), st.integers())
@settings(max_examples=50, deadline=None)
def test_equal_generators_give_equal_images_within_the_size(config, width, height, seed):
    image = gradient(width, height)
    first, second = (augment_image(image, config, Random(seed)) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.mode == "RGB"
    assert 1 <= first.width <= width
    assert 1 <= first.height <= height
    assert image.tobytes() == gradient(width, height).tobytes()  # the input is unchanged


def test_default_returns_the_image_itself():
    image = gradient(20, 10)
    assert augment_image(image, AugmentationConfig(), Random(0)) is image


@pytest.mark.parametrize(("width", "height"), [(200, 200), (300, 150), (40, 400), (1, 2000)])
def test_crop_has_its_area_and_aspect_ratio(width, height):
    image = Image.new("RGB", (width, height))
    min_scale = 0.4
    areas = []
    for seed in range(200):
        cut = augment_image(image, AugmentationConfig(min_crop_scale=min_scale), Random(seed))
        areas.append(cut.width * cut.height / (width * height))
        if cut.width < width and cut.height < height:
            assert 3 / 4 * 0.97 <= cut.width / cut.height <= 4 / 3 * 1.03
    rounding = (1 / width if width > 1 else 0) + 1 / height
    assert min(areas) >= min_scale * (1 - rounding) - 0.5 * rounding
    assert max(areas) > 0.9
    assert min(areas) < 0.5


def test_half_of_the_images_are_flipped():
    image = gradient(16, 8)
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    found = [
        augment_image(image, AugmentationConfig(horizontal_flip=True), Random(seed)).tobytes() for seed in range(300)
    ]
    assert set(found) == {image.tobytes(), flipped}
    assert 110 < found.count(flipped) < 190


def test_color_jitter_stays_within_its_strength():
    gray = Image.new("RGB", (4, 4), (100, 100, 100))
    values = [
        augment_image(gray, AugmentationConfig(color_jitter=0.3), Random(seed)).getpixel((0, 0))[0]
        for seed in range(300)
    ]
    assert 69 <= min(values) < 75
    assert 125 < max(values) <= 131


def test_random_erasing_fills_a_rectangle_with_its_probability():
    image = Image.new("RGB", (100, 60), (7, 8, 9))
    fractions = []
    for seed in range(400):
        changed = augment_image(image, AugmentationConfig(random_erasing=0.3), Random(seed))
        box = ImageChops.difference(changed, image).getbbox()
        if box is not None:
            width, height = box[2] - box[0], box[3] - box[1]
            fractions.append(width * height / 6000)
            assert len(set(changed.crop(box).getdata())) == 1
            assert 0.45 <= width / height <= 2.2
    assert 90 < len(fractions) < 150
    assert 0.015 < min(fractions) < 0.06
    assert 0.2 < max(fractions) < 0.26


def test_without_geometry_keeps_color_jitter_only():
    config = AugmentationConfig(min_crop_scale=0.5, horizontal_flip=True, random_erasing=1.0, color_jitter=0.2)
    assert config.without_geometry() == AugmentationConfig(color_jitter=0.2)


def test_color_jitter_does_not_change_the_crops():
    image = gradient(64, 64)
    crops = [augment_image(image, AugmentationConfig(min_crop_scale=0.5), Random(seed)) for seed in range(5)]
    jittered = [
        augment_image(image, AugmentationConfig(min_crop_scale=0.5, color_jitter=0.2), Random(seed))
        for seed in range(5)
    ]
    assert [c.size for c in crops] == [c.size for c in jittered]
    assert ImageChops.difference(crops[0], jittered[0]).getbbox() is not None
