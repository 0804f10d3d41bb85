"""Small pictures whose whole truth is known: one to four plain shapes on a plain background.

`draw_scene(seed, index)` decides what is in the picture, `picture(scene)` paints it; both are pure functions.
Coordinates run from 0 to 1 across the picture, x to the right and y down; a box is (x0, y0, x1, y1).
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
# Paler than every colour above, so that no shape melts into its background.
BACKGROUNDS = {
    "white": (252, 252, 250),
    "light gray": (218, 219, 222),
    "pale blue": (206, 226, 246),
    "pale green": (212, 238, 214),
    "pale pink": (250, 220, 228),
}
# The side of a shape's box, as a share of the picture: about 24 and 42 of 128 pixels, with nothing in between.
SIZES = {"small": (0.17, 0.20), "large": (0.30, 0.35)}

RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, direction
CLEAR = 0.15  # least distance between two centres along the axis of a relation, as a share of the picture
CORNER = 0.15  # a centre at least this far from both middle lines lies in a corner region ...
CENTER = 0.08  # ... and at most this far from both, in the center; in between no place is named

MOST_OBJECTS = 4
MARGIN = 0.02  # least distance from a box to the border of the picture
GAP = 0.03  # least distance between two boxes
REPEAT = 0.35  # chance that a shape takes its form, or its colour, from an earlier one: counts above one need it
MIDDLE = 0.35  # chance that one shape sits in the middle, which chance alone would seldom give
SUPERSAMPLING = 4  # pixels drawn for one pixel kept, along each axis


@dataclass(frozen=True)
class SceneObject:
    """One shape: three words, and the box it fills to all four edges (shares of the picture)."""

    shape: str
    color: str
    size: str
    box: Box

    @property
    def center(self) -> Point:
        """The middle of the box, in shares of the picture."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Scene:
    """Everything there is to know about one picture. `pixels` is the side it is painted at unless told otherwise."""

    objects: tuple[SceneObject, ...]
    background: str
    pixels: int = 128


def generate_scene(seed: int, index: int, size: int = 128) -> Scene:
    """Scene number `index` of the endless series `seed`, to be painted at `size` pixels a side."""
    rng = Random(f"scene-{seed}-{index}")  # a text seed is hashed: neighbouring numbers give unrelated streams
    looks = _looks(rng, rng.randint(1, MOST_OBJECTS))
    background = rng.choice(tuple(BACKGROUNDS))
    sides = [rng.uniform(*SIZES[size_word]) for _, _, size_word in looks]
    boxes = None
    while boxes is None:  # ends: four large shapes always fit two by two
        boxes = _boxes(rng, sides)
    objects = tuple(SceneObject(*look, box) for look, box in zip(looks, boxes, strict=True))
    return Scene(objects, background, size)


def render_scene(scene: Scene, size: int | None = None) -> Image.Image:
    """The scene as an RGB picture of `size` pixels a side (default: `scene.pixels`), with smooth edges."""
    side = SUPERSAMPLING * (scene.pixels if size is None else size)
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for thing in scene.objects:
        _paint(pen, thing, side)
    return canvas.reduce(SUPERSAMPLING)


def offset(a: SceneObject, b: SceneObject, relation: str) -> float:
    """How far `a` lies in the direction of `relation` from `b`, centre to centre; negative on the other side."""
    axis, direction = RELATIONS[relation]
    return direction * (a.center[axis] - b.center[axis])


def relation_holds(a: SceneObject, b: SceneObject, relation: str) -> bool:
    """Whether `a` stands in `relation` to `b` beyond doubt: far enough, and no further along the other axis."""
    other = 1 - RELATIONS[relation][0]
    across = abs(a.center[other] - b.center[other])
    return offset(a, b, relation) >= max(CLEAR, across)


def corner_name(thing: SceneObject) -> str | None:
    """One of four corners ("top left") or "center", or None near a border between two regions."""
    x, y = (value - 0.5 for value in thing.center)
    if max(abs(x), abs(y)) <= CENTER:
        return "center"
    if min(abs(x), abs(y)) < CORNER:
        return None
    return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"


def _looks(rng: Random, count: int) -> list[tuple[str, str, str]]:
    """(shape, color, size) of each object."""
    looks: list[tuple[str, str, str]] = []
    for _ in range(count):
        shape, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
        if looks and rng.random() < REPEAT:
            shape = rng.choice(looks)[0]
        if looks and rng.random() < REPEAT:
            color = rng.choice(looks)[1]
        looks.append((shape, color, rng.choice(tuple(SIZES))))
    return looks


def _boxes(rng: Random, sides: list[float]) -> list[Box] | None:
    """A place for each side length, or None where this attempt left no room for one of them."""
    middle = rng.randrange(len(sides)) if rng.random() < MIDDLE else None
    boxes: list[Box] = []
    for number, side in enumerate(sides):
        low, high = (0.5 - CENTER, 0.5 + CENTER) if number == middle else (MARGIN + side / 2, 1 - MARGIN - side / 2)
        box = _box((rng.uniform(low, high), rng.uniform(low, high)), side)
        if not all(_apart(box, other) for other in boxes):
            return None
        boxes.append(box)
    return boxes


def _box(center: Point, side: float) -> Box:
    x, y = center
    # Four decimals: a hundredth of a pixel at 128, and the same digits in memory and in a file.
    return round(x - side / 2, 4), round(y - side / 2, 4), round(x + side / 2, 4), round(y + side / 2, 4)


def _apart(a: Box, b: Box) -> bool:
    return a[2] + GAP <= b[0] or b[2] + GAP <= a[0] or a[3] + GAP <= b[1] or b[3] + GAP <= a[1]


def _paint(pen: ImageDraw.ImageDraw, thing: SceneObject, side: int) -> None:
    """Fills the shape on a canvas of `side` pixels."""
    # PIL paints the last row and column named, so the far edge is one pixel nearer than the box says.
    x0, y0, x1, y1 = thing.box[0] * side, thing.box[1] * side, thing.box[2] * side - 1, thing.box[3] * side - 1
    if thing.shape == "circle":
        pen.ellipse((x0, y0, x1, y1), fill=COLORS[thing.color])
    else:
        corners = [(x0 + x * (x1 - x0), y0 + y * (y1 - y0)) for x, y in _outline(thing.shape)]
        pen.polygon(corners, fill=COLORS[thing.color])


def _outline(shape: str) -> list[Point]:
    """Corners of a shape that touches all four sides of the unit square, y down."""
    if shape == "square":
        return [(0, 0), (1, 0), (1, 1), (0, 1)]
    if shape == "triangle":
        return [(0.5, 0), (1, 1), (0, 1)]
    if shape == "cross":
        a, b = 0.33, 0.67
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    return _star()


def _star(inner: float = 0.42) -> list[Point]:
    """A five-pointed star, stretched by a few percent to fill the unit square; `inner` is the radius of its notches."""
    radii = [1.0, inner] * 5
    points = [(r * sin(pi * k / 5), -r * cos(pi * k / 5)) for k, r in enumerate(radii)]
    wide, low = sin(2 * pi / 5), cos(pi / 5)  # the outermost points: left and right at +-wide, feet at +low, tip at -1
    return [((x + wide) / (2 * wide), (y + 1) / (1 + low)) for x, y in points]
