"""Synthetic scenes of one to four plain shapes on a plain background, with complete ground truth.

`generate_scene(seed, index)` decides what a scene holds and `render_scene(scene)` draws it; both are pure functions.
Coordinates run from 0 to 1 across the image, x to the right and y down; a box is (x0, y0, x1, y1).
"""

from dataclasses import dataclass
from math import cos, pi, sin
from random import Random

from PIL import Image, ImageDraw

Point = tuple[float, float]
Box = tuple[float, float, float, float]

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = {
    "red": (214, 30, 38),
    "green": (28, 150, 62),
    "blue": (34, 84, 214),
    "yellow": (246, 206, 16),
    "black": (22, 22, 24),
    "purple": (132, 48, 172),
    "orange": (242, 124, 18),
}
# Paler than every color above, so that every shape stands out from its background.
BACKGROUNDS = {
    "white": (252, 252, 250),
    "light gray": (218, 219, 222),
    "pale blue": (206, 226, 246),
    "pale green": (212, 238, 214),
    "pale pink": (250, 220, 228),
}
# Range of the side of a shape's box as a fraction of the image: about 24 and 42 of 128 pixels, nothing in between.
SIZES = {"small": (0.17, 0.20), "large": (0.30, 0.35)}

RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, direction
# Distances are fractions of the image.
MIN_RELATION_DISTANCE = 0.15  # between two centers along the axis of a relation
MIN_CORNER_OFFSET = 0.15  # a center at least this far from both middle lines is in a corner region
MAX_CENTER_OFFSET = 0.08  # a center at most this far from both is in the center; others have no named position

MAX_OBJECTS = 4
MARGIN = 0.02  # smallest distance from a box to the border of the image
GAP = 0.03  # smallest distance between two boxes
REPEAT_PROBABILITY = 0.35  # that an object repeats the shape, or the color, of an earlier one: for counts above one
CENTER_PROBABILITY = 0.35  # that one object is placed in the center, which is rare otherwise
SUPERSAMPLING = 4  # pixels drawn for one pixel of the result, along each axis


@dataclass(frozen=True)
class SceneObject:
    """One shape with its color, its size and its box (0..1), whose four edges it touches."""

    shape: str
    color: str
    size: str
    box: Box

    @property
    def center(self) -> Point:
        """Center of the box, 0..1."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Scene:
    """Ground truth of one image. `pixels` is the default side of the rendered image."""

    objects: tuple[SceneObject, ...]
    background: str
    pixels: int = 128


def generate_scene(seed: int, index: int, size: int = 128) -> Scene:
    """Return scene number `index` of the endless series `seed`, rendered at `size` pixels a side by default."""
    rng = Random(f"scene-{seed}-{index}")  # text seeds are hashed: neighboring numbers give unrelated generators
    attributes = _random_attributes(rng, rng.randint(1, MAX_OBJECTS))
    background = rng.choice(tuple(BACKGROUNDS))
    sides = [rng.uniform(*SIZES[size_word]) for _, _, size_word in attributes]
    boxes = None
    while boxes is None:  # terminates: four large shapes always fit two by two
        boxes = _random_boxes(rng, sides)
    objects = tuple(SceneObject(*words, box) for words, box in zip(attributes, boxes, strict=True))
    return Scene(objects, background, size)


def render_scene(scene: Scene, size: int | None = None) -> Image.Image:
    """Render the scene as an antialiased RGB image of `size` pixels a side (default: `scene.pixels`)."""
    side = SUPERSAMPLING * (scene.pixels if size is None else size)
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for item in scene.objects:
        _draw(pen, item, side)
    return canvas.reduce(SUPERSAMPLING)


def offset(a: SceneObject, b: SceneObject, relation: str) -> float:
    """Return the distance of centers from `b` to `a` along the direction of `relation`, negative against it."""
    axis, direction = RELATIONS[relation]
    return direction * (a.center[axis] - b.center[axis])


def relation_holds(a: SceneObject, b: SceneObject, relation: str) -> bool:
    """Return whether a relation clearly holds: the distance is large enough, and no larger along the other axis."""
    other = 1 - RELATIONS[relation][0]
    across = abs(a.center[other] - b.center[other])
    return offset(a, b, relation) >= max(MIN_RELATION_DISTANCE, across)


def position_name(item: SceneObject) -> str | None:
    """Return the region of an object: one of four corners ("top left"), "center", or None between two regions."""
    x, y = (value - 0.5 for value in item.center)
    if max(abs(x), abs(y)) <= MAX_CENTER_OFFSET:
        return "center"
    if min(abs(x), abs(y)) < MIN_CORNER_OFFSET:
        return None
    return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"


def _random_attributes(rng: Random, count: int) -> list[tuple[str, str, str]]:
    """Return (shape, color, size) of each object."""
    found: list[tuple[str, str, str]] = []
    for _ in range(count):
        shape = rng.choice(SHAPES)
        color = rng.choice(tuple(COLORS))
        if found and rng.random() < REPEAT_PROBABILITY:
            shape = rng.choice(found)[0]
        if found and rng.random() < REPEAT_PROBABILITY:
            color = rng.choice(found)[1]
        found.append((shape, color, rng.choice(tuple(SIZES))))
    return found


def _random_boxes(rng: Random, sides: list[float]) -> list[Box] | None:
    """Return a random box for each side length, or None if this attempt has two boxes too close to each other."""
    centered = rng.randrange(len(sides)) if rng.random() < CENTER_PROBABILITY else None
    boxes: list[Box] = []
    for number, side in enumerate(sides):
        low = MARGIN + side / 2
        high = 1 - MARGIN - side / 2
        if number == centered:
            low = 0.5 - MAX_CENTER_OFFSET
            high = 0.5 + MAX_CENTER_OFFSET
        box = _box((rng.uniform(low, high), rng.uniform(low, high)), side)
        if not all(_has_gap(box, other) for other in boxes):
            return None
        boxes.append(box)
    return boxes


def _box(center: Point, side: float) -> Box:
    x, y = center
    # Four decimals: 1/80 of a pixel at 128, and the same digits in memory and in a file.
    return round(x - side / 2, 4), round(y - side / 2, 4), round(x + side / 2, 4), round(y + side / 2, 4)


def _has_gap(a: Box, b: Box) -> bool:
    return a[2] + GAP <= b[0] or b[2] + GAP <= a[0] or a[3] + GAP <= b[1] or b[3] + GAP <= a[1]


def _draw(pen: ImageDraw.ImageDraw, item: SceneObject, side: int) -> None:
    """Fill the shape on a canvas of `side` pixels."""
    # PIL includes the last row and column, so the far edges are moved by one pixel.
    x0 = item.box[0] * side
    y0 = item.box[1] * side
    x1 = item.box[2] * side - 1
    y1 = item.box[3] * side - 1
    if item.shape == "circle":
        pen.ellipse((x0, y0, x1, y1), fill=COLORS[item.color])
    else:
        corners = [(x0 + x * (x1 - x0), y0 + y * (y1 - y0)) for x, y in _outline(item.shape)]
        pen.polygon(corners, fill=COLORS[item.color])


def _outline(shape: str) -> list[Point]:
    """Return the corners of a shape that touches all four sides of the unit square, y down."""
    if shape == "square":
        return [(0, 0), (1, 0), (1, 1), (0, 1)]
    if shape == "triangle":
        return [(0.5, 0), (1, 1), (0, 1)]
    if shape == "cross":
        a = 0.33
        b = 0.67
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    return _star()


def _star(inner_radius: float = 0.42) -> list[Point]:
    """Return a five-pointed star, stretched by a few percent to fill the unit square."""
    radii = [1.0, inner_radius] * 5
    points = [(r * sin(pi * k / 5), -r * cos(pi * k / 5)) for k, r in enumerate(radii)]
    # Extreme points of the unit star: x = -width and width, y = -1 (tip) and height (feet).
    width = sin(2 * pi / 5)
    height = cos(pi / 5)
    return [((x + width) / (2 * width), (y + 1) / (1 + height)) for x, y in points]
