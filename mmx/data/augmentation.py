"""Augmentation of training images: crop, horizontal flip, color jitter and random erasing.

Each change is a pure function of the image and the random generator.
"""

import math
from random import Random

from PIL import ImageEnhance
from PIL.Image import Image, Transpose

from mmx.config.schema import AugmentationConfig


def augment_image(image: Image, config: AugmentationConfig, rng: Random) -> Image:
    """Return a changed copy of an RGB image; with the default configuration, the image itself."""
    if config.min_crop_scale < 1.0:
        image = _random_crop(image, config.min_crop_scale, rng)
    if config.horizontal_flip and rng.random() < 0.5:
        image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
    if config.color_jitter > 0:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(1 + config.color_jitter * rng.uniform(-1, 1))
    if config.random_erasing and rng.random() < config.random_erasing:
        image = _random_erase(image, rng)
    return image


def _random_crop(image: Image, min_scale: float, rng: Random) -> Image:
    """Crop at least `min_scale` of the area (Szegedy et al. 2015, "Going deeper with convolutions", section 6).

    The aspect ratio lies between 3:4 and 4:3, unless the image is too narrow for that.
    """
    width, height = image.size
    area = rng.uniform(min_scale, 1.0) * width * height
    ratio = math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
    # A crop of this area must be at least area / height wide, or it would be higher than the image.
    exact_width = min(width, max(math.sqrt(area * ratio), area / height))
    crop_width = max(1, round(exact_width))
    crop_height = max(1, round(min(height, area / exact_width)))
    left = rng.randint(0, width - crop_width)
    top = rng.randint(0, height - crop_height)
    return image.crop((left, top, left + crop_width, top + crop_height))


def _random_erase(image: Image, rng: Random) -> Image:
    """Fill 2 to 25 % of the area with one color, aspect ratio 1:2 to 2:1 (Zhong et al. 2020, "Random erasing")."""
    width, height = image.size
    area = rng.uniform(0.02, 0.25) * width * height
    ratio = 2 ** rng.uniform(-1, 1)
    box_width = min(width, round(math.sqrt(area * ratio)))
    box_height = min(height, round(math.sqrt(area / ratio)))
    left = rng.randint(0, width - box_width)
    top = rng.randint(0, height - box_height)
    erased = image.copy()
    color = tuple(rng.randint(0, 255) for _ in range(3))
    erased.paste(color, (left, top, left + box_width, top + box_height))
    return erased
