"""What may happen to a training picture: a crop, a mirror image, changed light, a part painted over. A pure function of
picture and rng."""

import math
from random import Random

from PIL import ImageEnhance
from PIL.Image import Image, Transpose

from mmx.config.schema import AugmentationConfig


def augment_image(picture: Image, config: AugmentationConfig, rng: Random) -> Image:
    """A changed copy of an RGB picture; with the default configuration, the picture itself."""
    if config.min_crop_scale < 1.0:
        picture = _crop(picture, config.min_crop_scale, rng)
    if config.horizontal_flip and rng.random() < 0.5:
        picture = picture.transpose(Transpose.FLIP_LEFT_RIGHT)
    if config.color_jitter > 0:
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            picture = change(picture).enhance(1 + config.color_jitter * rng.uniform(-1, 1))
    if config.random_erasing and rng.random() < config.random_erasing:
        picture = _erase(picture, rng)
    return picture


def _crop(picture: Image, smallest: float, rng: Random) -> Image:
    """A stretch of at least `smallest` of the area, with sides between 3:4 and 4:3 (Szegedy et al. 2015, section 6)
    where the picture is not too narrow for that."""
    width, height = picture.size
    area = rng.uniform(smallest, 1.0) * width * height
    ratio = math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
    w = min(width, max(math.sqrt(area * ratio), area / height))  # area / height: as wide as it must be to fit
    w, h = max(1, round(w)), max(1, round(min(height, area / w)))
    left, top = rng.randint(0, width - w), rng.randint(0, height - h)
    return picture.crop((left, top, left + w, top + h))


def _erase(picture: Image, rng: Random) -> Image:
    """One color over 2 to 25 % of the area, the sides between 1:2 and 2:1 (Zhong et al. 2020, "Random erasing")."""
    width, height = picture.size
    area, ratio = rng.uniform(0.02, 0.25) * width * height, 2 ** rng.uniform(-1, 1)
    w, h = min(width, round(math.sqrt(area * ratio))), min(height, round(math.sqrt(area / ratio)))
    left, top = rng.randint(0, width - w), rng.randint(0, height - h)
    painted = picture.copy()
    painted.paste(tuple(rng.randint(0, 255) for _ in range(3)), (left, top, left + w, top + h))
    return painted
