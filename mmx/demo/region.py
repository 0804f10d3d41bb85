"""A region of an image: from two clicks or four numbers, and drawn. Boxes (x0, y0, x1, y1) are in 0..1."""

from __future__ import annotations

from PIL import Image, ImageDraw

from mmx.boxes import Box
from mmx.errors import MmxError

Point = tuple[float, float]
WHOLE_IMAGE: Box = (0.0, 0.0, 1.0, 1.0)
MIN_SIDE = 480  # pixels of the longer side of the displayed copy; the model is given the image itself
MAX_SIDE = 768
MIN_BOX_SIDE = 0.01

_LINE_COLOR = (226, 27, 90)
_OUTLINE_COLOR = (255, 255, 255)


def box_from_numbers(x0: object, y0: object, x1: object, y1: object) -> Box | None:
    """Return the box of four numbers; None for the whole image, or if all are None. Raises MmxError."""
    numbers = [edge for edge in (x0, y0, x1, y1) if isinstance(edge, int | float) and not isinstance(edge, bool)]
    if x0 is None and y0 is None and x1 is None and y1 is None:
        return None
    if len(numbers) != 4:
        message = "the region needs four numbers in 0..1: left, top, right, bottom; fill in all, or none."
        raise MmxError(message, code="demo.region_numbers")
    left, top, right, bottom = map(float, numbers)
    box = (left, top, right, bottom)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        message = f"the region is {box}; expected left before right and top before bottom, all in 0..1."
        raise MmxError(message, code="demo.region", box=box)
    return None if box == WHOLE_IMAGE else box


def box_from_corners(first: Point, second: Point) -> Box:
    """Return the box of two opposite corners, in any order, of at least MIN_BOX_SIDE in width and height."""
    left, right = sorted((first[0], second[0]))
    top, bottom = sorted((first[1], second[1]))
    left = min(left, 1 - MIN_BOX_SIDE)
    top = min(top, 1 - MIN_BOX_SIDE)
    return left, top, max(right, left + MIN_BOX_SIDE), max(bottom, top + MIN_BOX_SIDE)


def draw_region(image: Image.Image, box: Box | None = None, corner: Point | None = None) -> Image.Image:
    """Return a copy of the image with a box drawn on it, or with the first corner of a box."""
    drawn = image.copy()
    line = max(2, max(image.size) // 200)
    draw = ImageDraw.Draw(drawn)
    if box is not None:
        edges = [fraction * side for fraction, side in zip(box, image.size * 2)]
        draw.rectangle(edges, outline=_OUTLINE_COLOR, width=2 * line)  # a light outline is visible on any color
        draw.rectangle(edges, outline=_LINE_COLOR, width=line)
    if corner is not None:
        x, y = (fraction * side for fraction, side in zip(corner, image.size))
        radius = 3 * line
        circle = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(circle, fill=_LINE_COLOR, outline=_OUTLINE_COLOR, width=line)
    return drawn


def display_copy(image: Image.Image) -> Image.Image:
    """Return a copy whose longer side has MIN_SIDE to MAX_SIDE pixels, in the same proportions."""
    longest = max(image.size)
    scale = min(max(longest, MIN_SIDE), MAX_SIDE) / longest
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
