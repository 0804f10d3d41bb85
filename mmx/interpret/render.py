"""Images of word maps: one tile a word for sources with a grid, one row a word for sequences.

The color map goes from black over violet and orange to pale yellow with increasing lightness, so it is readable with
color blindness and in grayscale. Colors are scaled from zero to the peak of each word's map over all sources.

Axes: W words, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mmx.errors import MmxError
from mmx.interpret.render_text import (
    BLACK,
    GRAY,
    LARGE,
    MEDIUM,
    SMALL,
    WHITE,
    draw_text,
    text_width,
    truncate_text,
    vertical_label,
    wrap_text,
)
from mmx.interpret.word_maps import EPSILON, SourceView, WordInformation, WordMaps

TILE_SIDE, MARGIN, COLUMNS = 240, 16, 5  # pixels, pixels, tiles in a row
MIN_TILE_SIDE = 24  # pixels, for very long or wide images
CELL_SIDE, LINE_HEIGHT = 26, 26  # pixels
MIN_WIDTH, MAX_SIDE = 640, 16_000  # pixels of the whole image; image formats and viewers have limits
MAX_ROW_LABEL_WIDTH = 170  # pixels
MAX_LABELLED_SLOTS = 60  # longer sequences are drawn narrower and without labels
NEUTRAL_GRAY = (128, 128, 128)  # stands for an image that is not known
# Stops of the color map, with CIE L* 1, 15, 33, 53, 75, 96.
COLOR_STOPS = ((0, 0, 4), (51, 10, 95), (129, 37, 105), (205, 66, 71), (248, 141, 28), (252, 253, 164))
MIN_OPACITY, MAX_OPACITY = 0.25, 0.8  # of the color over the image, at zero and at the peak


def render_word_maps(maps: WordMaps, words: Sequence[int]) -> Image.Image:
    """Draw the maps of some words, given by index. Raises MmxError for an image of more than MAX_SIDE pixels a side."""
    parts = []
    for view in maps.views:
        draw_source = _draw_tiles if view.segment.grid else _draw_matrix
        parts.append(draw_source(maps, view, words))
    width = max([MIN_WIDTH, *(part.width for part in parts)])
    parts = [_draw_title(maps, width), *parts, _draw_legend()]
    if max(width, sum(part.height for part in parts)) > MAX_SIDE:
        raise MmxError(
            f"an image of {len(words)} words is more than {MAX_SIDE:,} pixels long; choose fewer words.",
            code="look.too_large",
            words=len(words),
            limit=MAX_SIDE,
        )
    return _stack_vertically(parts)


def colors(values: Tensor) -> Tensor:
    """Colors [..., 3] in 0..255 of values [...] in 0..1."""
    stops = torch.tensor(COLOR_STOPS, dtype=torch.float32)
    position = values.clamp(0, 1) * (len(COLOR_STOPS) - 1)
    low = position.floor().clamp(max=len(COLOR_STOPS) - 2).long()
    return stops[low] + (position - low)[..., None] * (stops[low + 1] - stops[low])


def overlay_heatmap(image: Image.Image, heatmap: Tensor, peak: float | None = None) -> Image.Image:
    """A grayscale copy of the image under the colors of a heatmap [height, width] of the same size.

    Colors are scaled from zero to `peak`, by default the maximum of the heatmap.
    """
    peak = float(heatmap.max()) if peak is None else peak
    strength = (heatmap / max(peak, EPSILON)).clamp(0, 1)
    gray = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8).float()
    gray = gray.view(image.height, image.width, 1)
    opacity = MIN_OPACITY + (MAX_OPACITY - MIN_OPACITY) * strength[..., None]
    mixed = (1 - opacity) * gray + opacity * colors(strength)
    return Image.fromarray(mixed.round().byte().numpy(), "RGB")


def format_gain(word: WordInformation) -> str:
    """The information gain of a word as text."""
    bits = round(word.gain, 1) + 0.0  # no minus sign before zero
    return f"information gain {bits:.1f} bits"


def _shares(maps: WordMaps, view: SourceView) -> list[float] | None:
    """The fraction of each word's map that is on this source; None if there is no other source."""
    return view.slots(maps.maps).sum(-1).tolist() if len(maps.views) > 1 else None


def _draw_tiles(maps: WordMaps, view: SourceView, words: Sequence[int]) -> Image.Image:
    """The image itself and one tile a word, with captions."""
    image = view.image or Image.new("RGB", (TILE_SIDE, TILE_SIDE), NEUTRAL_GRAY)
    scale = TILE_SIDE / max(image.size)
    width = max(MIN_TILE_SIDE, round(image.width * scale))
    height = max(MIN_TILE_SIDE, round(image.height * scale))
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    tiles = [(small, view.source_name, "input")]
    peaks = maps.peaks()
    shares = _shares(maps, view)
    for index in words:
        word = maps.words[index]
        overlay = overlay_heatmap(small, view.heatmap(maps.maps[index], height, width), float(peaks[index]))
        below = format_gain(word) if shares is None else f"{100 * shares[index]:.0f} % of the attention"
        tiles.append((overlay, word.text, below))
    return _draw_grid_of_tiles(tiles, height)


def _draw_grid_of_tiles(tiles: Sequence[tuple[Image.Image, str, str]], height: int) -> Image.Image:
    """Tiles in rows of COLUMNS, each with two lines of text below it."""
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    column_width = TILE_SIDE + MARGIN
    row_height = height + 48
    canvas = Image.new("RGB", (columns * column_width + MARGIN, rows * row_height), WHITE)
    for number, (tile, word, below) in enumerate(tiles):
        x = MARGIN + number % columns * column_width
        y = number // columns * row_height
        canvas.paste(tile, (x, y))
        draw_text(canvas, (x, y + height + 4), truncate_text(word, MEDIUM, TILE_SIDE), BLACK, MEDIUM)
        draw_text(canvas, (x, y + height + 24), below, GRAY, SMALL)
    return canvas


def _draw_matrix(maps: WordMaps, view: SourceView, words: Sequence[int]) -> Image.Image:
    """One row a word, one column a slot."""
    slots = view.segment.stop - view.segment.start
    labelled = slots <= MAX_LABELLED_SLOTS
    cell = CELL_SIDE if labelled else max(2, CELL_SIDE * MAX_LABELLED_SLOTS // slots)
    labels = [vertical_label(label) for label in view.labels] if labelled else []
    texts = [truncate_text(maps.words[index].text, MEDIUM, MAX_ROW_LABEL_WIDTH) for index in words]
    shares = _shares(maps, view)
    left = MARGIN + 20 + max((text_width(text, MEDIUM) for text in texts), default=0)
    right = MARGIN if shares is None else MARGIN + 70
    top = 24 + max((label.height for label in labels), default=0)
    canvas = Image.new("RGB", (left + slots * cell + right, top + len(words) * CELL_SIDE + 12), WHITE)
    draw_text(canvas, (MARGIN, 0), f"{view.source_name}: {slots} slots, left to right", GRAY, SMALL)
    for column, label in enumerate(labels):
        canvas.paste(label, (left + column * cell + 4, top - label.height - 4))
    weights = view.slots(maps.maps) / maps.peaks()[:, None]
    for row, (index, text) in enumerate(zip(words, texts, strict=True)):
        y = top + row * CELL_SIDE
        _draw_cells(canvas, (left, y), weights[index], cell)
        draw_text(canvas, (left - 10 - text_width(text, MEDIUM), y + 4), text, BLACK, MEDIUM)
        if shares is not None:
            draw_text(canvas, (left + slots * cell + 10, y + 5), f"{100 * shares[index]:.0f} %", GRAY, SMALL)
    return canvas


def _draw_cells(canvas: Image.Image, position: tuple[int, int], weights: Tensor, cell: int) -> None:
    """One row of colored cells with its top left corner at a position."""
    draw = ImageDraw.Draw(canvas)
    gap = 2 if cell > 4 else 1
    left, y = position
    for column, color in enumerate(colors(weights).round().int().tolist()):
        x = left + column * cell
        draw.rectangle((x, y, x + cell - gap, y + CELL_SIDE - 2), fill=tuple(color))


def _draw_title(maps: WordMaps, width: int) -> Image.Image:
    """The question and the text in as many lines as necessary, and what the maps show."""
    lines = wrap_text(maps.title, LARGE, width - 2 * MARGIN)
    canvas = Image.new("RGB", (width, 36 + LINE_HEIGHT * len(lines)), WHITE)
    for number, line in enumerate(lines):
        draw_text(canvas, (MARGIN, 4 + LINE_HEIGHT * number), line, BLACK, LARGE)
    draw_text(canvas, (MARGIN, 6 + LINE_HEIGHT * len(lines)), maps.description, GRAY, SMALL)
    return canvas


def _draw_legend() -> Image.Image:
    """The color map over neutral gray."""
    canvas = Image.new("RGB", (460, 40), WHITE)
    ramp = torch.linspace(0, 1, 160).expand(12, -1)
    canvas.paste(overlay_heatmap(Image.new("RGB", (160, 12), NEUTRAL_GRAY), ramp), (MARGIN + 70, 12))
    draw_text(canvas, (MARGIN, 10), "zero", GRAY, SMALL)
    draw_text(canvas, (MARGIN + 240, 10), "maximum of the word", GRAY, SMALL)
    return canvas


def _stack_vertically(parts: Sequence[Image.Image]) -> Image.Image:
    canvas = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts) + MARGIN), WHITE)
    y = MARGIN // 2
    for part in parts:
        canvas.paste(part, (0, y))
        y += part.height
    return canvas
