"""A part of a picture: pointed at by two clicks or four numbers, and drawn. Boxes (x0, y0, x1, y1) are in 0..1."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw

from mmx.errors import MmxError
from mmx.memory import Box

Point = tuple[float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
SHORTEST, LONGEST = 480, 768  # pixels of the longer side of the copy to draw on; the model sees the picture itself
FRAME, SHADE = (226, 27, 90), (255, 255, 255)


def box_of(x0: Any, y0: Any, x1: Any, y1: Any) -> Box | None:
    """The part that four numbers point at; None for the whole picture, and where none is typed. Raises MmxError."""
    corners = (x0, y0, x1, y1)
    if all(corner is None for corner in corners):
        return None
    if not all(isinstance(corner, int | float) for corner in corners):
        raise MmxError("the part needs four numbers in 0..1: left, top, right, bottom; fill in all, or none.")
    box = (float(x0), float(y0), float(x1), float(y1))
    if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise MmxError(f"the part is {box}; expected left before right and top before bottom, all in 0..1.")
    return None if box == WHOLE else box


def box_between(first: Point, second: Point) -> Box:
    """The box of two opposite corners, in any order, at least a hundredth wide and high."""
    (left, right), (top, bottom) = (sorted(pair) for pair in zip(first, second))
    left, top = min(left, 0.99), min(top, 0.99)
    return left, top, max(right, left + 0.01), max(bottom, top + 0.01)


def framed(picture: Image.Image, box: Box | None = None, corner: Point | None = None) -> Image.Image:
    """The picture with a box drawn on it, or the one corner there is of it."""
    shown, wide = picture.copy(), max(2, max(picture.size) // 200)
    pen = ImageDraw.Draw(shown)
    if box is not None:
        x0, y0, x1, y1 = (part * side for part, side in zip(box, shown.size * 2))
        pen.rectangle((x0, y0, x1, y1), outline=SHADE, width=2 * wide)  # light beneath: seen on any colour
        pen.rectangle((x0, y0, x1, y1), outline=FRAME, width=wide)
    if corner is not None:
        x, y = (part * side for part, side in zip(corner, shown.size))
        pen.ellipse((x - 3 * wide, y - 3 * wide, x + 3 * wide, y + 3 * wide), fill=FRAME, outline=SHADE, width=wide)
    return shown


def to_draw_on(picture: Image.Image) -> Image.Image:
    """A copy of a size to be drawn on and looked at, in the same proportions."""
    longest = max(picture.size)
    scale = min(max(longest, SHORTEST), LONGEST) / longest
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)
