"""The picture of a look: one tile a word over a picture, one row a word over a text or a sound.

Heat goes from black over violet and orange to pale yellow, growing lighter all the way: it reads the same for
colour-blind eyes, and in grey. It is scaled from nothing to each word's peak, over all sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmx.errors import MmxError
from mmx.memory import Segment

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
TILE, MARGIN, COLUMNS = 240, 16, 5  # pixels, and tiles in a row
CELL, SMALL, PLAIN, LARGE = 26, 13, 15, 19  # pixels
INK, PALE, PAPER = (28, 28, 32), (96, 96, 104), (255, 255, 255)
# Stops of a scale of growing lightness (CIE L* 1, 15, 33, 53, 75, 96).
HEAT = ((0, 0, 4), (51, 10, 95), (129, 37, 105), (205, 66, 71), (248, 141, 28), (252, 253, 164))
COLD, HOT = 0.25, 0.8  # how much of the heat's colour covers the picture where there is none, and at its peak
LEAST_SIDE, MOST_SIDE = 24, 16_000  # pixels: of a picture in its tile; of a sheet, which formats and viewers can hold
LEAST_WIDTH, NAME = 640, 170  # pixels: of a sheet; of the words left of a matrix
BY = {
    "attention": "attention",
    "weighted": "attention, weighed by what each slot hands over",
    "relevance": "attention, weighed by what the word gained by it",
    "both": "attention, weighed by what each slot hands over and what the word gained",
}
NO_LETTER = "\U0010ffff"  # what a font shows for it, it shows for every letter that it lacks
LATIN = 0x250  # letters below are in Pillow's own font; for others a font of the system is looked for
FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")
MOST_SLOTS = 60  # columns of a matrix; more are drawn narrower, without their names


class WordInformation(Protocol):
    """A word that was said, and the bits of it that looking saved."""

    @property
    def text(self) -> str: ...
    @property
    def gain(self) -> float: ...


class SourceView(Protocol):
    """Where a source's slots lie, the picture they lie on, and what they are called."""

    @property
    def segment(self) -> Segment: ...
    @property
    def source_name(self) -> str: ...
    @property
    def picture(self) -> Image.Image | None: ...
    @property
    def labels(self) -> Sequence[str]: ...


class Look(Protocol):
    """What is drawn: see `mmx.interpret.look.Look`."""

    @property
    def text(self) -> str: ...
    @property
    def question(self) -> str | None: ...
    @property
    def method(self) -> str: ...
    @property
    def words(self) -> Sequence[WordInformation]: ...
    @property
    def views(self) -> Sequence[SourceView]: ...
    def shares(self, layer: int | None = None, head: int | None = None) -> Mapping[str, Tensor]: ...
    def maps(self, layer: int | None = None, head: int | None = None) -> Tensor: ...
    def heatmap(
        self, word: int, height: int, width: int, layer: int | None, head: int | None, source: str | None
    ) -> Tensor: ...


def render_look(look: Look, words: Sequence[int], layer: int | None = None, head: int | None = None) -> Image.Image:
    """The sheet of some words of a look, by their places; the mean over layers and heads, or those asked for.

    Raises MmxError where it would grow beyond what a file of a picture can hold.
    """
    view, shares, parts = _View(look, layer, head), look.shares(layer, head), []
    for place in look.views:
        share = shares[place.source_name] if len(shares) > 1 else None
        parts.append((_tiles if place.segment.grid else _matrix)(view, place, words, share))
    width = max([LEAST_WIDTH, *(part.width for part in parts)])
    sheet = [_title(view, width), *parts, _legend()]
    if max(width, sum(part.height for part in sheet)) > MOST_SIDE:
        raise MmxError(f"a sheet of {len(words)} words is more than {MOST_SIDE:,} pixels long; choose fewer words.")
    return _stacked(sheet)


class _View(NamedTuple):
    """What is shown of a look."""

    look: Look
    layer: int | None
    head: int | None

    def peaks(self) -> Tensor:
        """The highest number of each word's map, [W]."""
        maps = self.look.maps(self.layer, self.head)
        return maps.amax(-1).clamp(min=1e-12) if maps.shape[-1] else maps.sum(-1)


def colors(heat: Tensor) -> Tensor:
    """Numbers of 0..1, [...], as colours [..., 3] of 0..255."""
    stops = torch.tensor(HEAT, dtype=torch.float32)
    at = heat.clamp(0, 1) * (len(HEAT) - 1)
    low = at.floor().clamp(max=len(HEAT) - 2).long()
    return stops[low] + (at - low)[..., None] * (stops[low + 1] - stops[low])


def overlay_heatmap(picture: Image.Image, heat: Tensor, peak: float | None = None) -> Image.Image:
    """A picture under the heat of a map [height, width] of its own size, from nothing to `peak` (the map's own)."""
    strength = (heat / max(float(heat.max()) if peak is None else peak, 1e-12)).clamp(0, 1)
    grey = torch.frombuffer(bytearray(picture.convert("L").tobytes()), dtype=torch.uint8).float()
    grey = grey.view(picture.height, picture.width, 1)
    cover = COLD + (HOT - COLD) * strength[..., None]
    mixed = (1 - cover) * grey + cover * colors(strength)
    return Image.fromarray(mixed.round().byte().numpy(), "RGB")


def _tiles(view: _View, place: SourceView, words: Sequence[int], share: Tensor | None) -> Image.Image:
    """One tile a word, the input itself first."""
    picture = place.picture or Image.new("RGB", (TILE, TILE), (128, 128, 128))
    scale = TILE / max(picture.size)
    width, height = (max(LEAST_SIDE, round(side * scale)) for side in picture.size)
    small = picture.resize((width, height), Image.Resampling.LANCZOS)
    tiles, peaks = [(small, place.source_name, "what was looked at")], view.peaks()
    for index in words:
        word = view.look.words[index]
        heat = view.look.heatmap(index, height, width, view.layer, view.head, place.source_name)
        below = format_gain(word) if share is None else f"{100 * float(share[index]):.0f} % of it here"
        tiles.append((overlay_heatmap(small, heat, float(peaks[index])), word.text, below))
    columns = min(COLUMNS, len(tiles))
    step, line = TILE + MARGIN, height + 48
    sheet = Image.new("RGB", (columns * step + MARGIN, -(-len(tiles) // columns) * line), PAPER)
    for number, (tile, above, below) in enumerate(tiles):
        x, y = MARGIN + number % columns * step, number // columns * line
        sheet.paste(tile, (x, y))
        _write(sheet, (x, y + height + 4), _fitted(above, PLAIN, TILE), INK, PLAIN)
        _write(sheet, (x, y + height + 24), below, PALE, SMALL)
    return sheet


def format_gain(word: WordInformation) -> str:
    """What looking saved of a word's surprise, or cost."""
    bits = round(word.gain, 1) + 0.0  # no minus before a zero
    return f"looking saved {bits:.1f} bits" if bits >= 0 else f"looking cost {-bits:.1f} bits"


def _matrix(view: _View, place: SourceView, words: Sequence[int], share: Tensor | None) -> Image.Image:
    """One row a word, one column a slot."""
    count = place.segment.stop - place.segment.start
    cell = CELL if count <= MOST_SLOTS else max(2, CELL * MOST_SLOTS // count)
    names = [_upright(label) for label in place.labels] if count <= MOST_SLOTS else []
    texts = [_fitted(view.look.words[index].text, PLAIN, NAME) for index in words]
    left = MARGIN + 20 + max((_length(text, PLAIN) for text in texts), default=0)
    top = 24 + max((name.height for name in names), default=0)
    right = MARGIN if share is None else MARGIN + 70
    sheet = Image.new("RGB", (left + count * cell + right, top + len(words) * CELL + 12), PAPER)
    pen, peaks = ImageDraw.Draw(sheet), view.peaks()
    _write(sheet, (MARGIN, 0), f"{place.source_name}: {count} slots, left to right", PALE, SMALL)
    for column, name in enumerate(names):
        sheet.paste(name, (left + column * cell + 4, top - name.height - 4))
    maps, gap = view.look.maps(view.layer, view.head), 2 if cell > 4 else 1
    for row, (index, text) in enumerate(zip(words, texts, strict=True)):
        y = top + row * CELL
        weights = maps[index, place.segment.start : place.segment.stop]
        for column, color in enumerate(colors(weights / peaks[index]).round().int().tolist()):
            x = left + column * cell
            pen.rectangle((x, y, x + cell - gap, y + CELL - 2), fill=tuple(color))
        _write(sheet, (left - 10 - _length(text, PLAIN), y + 4), text, INK, PLAIN)
        if share is not None:
            _write(sheet, (left + count * cell + 10, y + 5), f"{100 * float(share[index]):.0f} %", PALE, SMALL)
    return sheet


def _title(view: _View, width: int) -> Image.Image:
    """What was asked and said, in as many lines as it takes, and which layers and heads are shown."""
    look = view.look
    said = _wrapped(look.text if look.question is None else f"{look.question}  {look.text}", width - 2 * MARGIN)
    chosen = (("layer", view.layer), ("head", view.head))
    which = ", ".join(f"all {name}s" if number is None else f"{name} {number}" for name, number in chosen)
    strip = Image.new("RGB", (width, 36 + 26 * len(said)), PAPER)
    for number, line in enumerate(said):
        _write(strip, (MARGIN, 4 + 26 * number), line, INK, LARGE)
    _write(strip, (MARGIN, 6 + 26 * len(said)), f"{BY[look.method]}; {which}", PALE, SMALL)
    return strip


def _legend() -> Image.Image:
    """The scale of the heat, over a picture of plain grey."""
    strip = Image.new("RGB", (460, 40), PAPER)
    ramp = torch.linspace(0, 1, 160).expand(12, -1)
    strip.paste(overlay_heatmap(Image.new("RGB", (160, 12), (128, 128, 128)), ramp), (MARGIN + 70, 12))
    _write(strip, (MARGIN, 10), "nothing", PALE, SMALL)
    _write(strip, (MARGIN + 240, 10), "the word's peak", PALE, SMALL)
    return strip


def _stacked(parts: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts) + MARGIN), PAPER)
    y = MARGIN // 2
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height
    return sheet


# ---- writing -----------------------------------------------------------------------------------------------------


def _write(sheet: Image.Image, place: tuple[int, int], text: str, ink: tuple[int, int, int], size: int) -> None:
    shown, font = _written(text, size)
    ImageDraw.Draw(sheet).text(place, shown, ink, font)


def _written(text: str, size: int) -> tuple[str, Font]:
    """A text as it can be written, and the font: where no font has a letter, a dot stands for it."""
    plain = "".join(letter if letter.isprintable() and letter != "\ufffd" else "·" for letter in text)
    foreign = {letter for letter in plain if ord(letter) >= LATIN}
    font: Font = ImageFont.load_default(size)
    lacking = foreign
    for name in FONTS if foreign else ():
        with suppress(OSError):
            other = ImageFont.truetype(name, size)
            lacked = {letter for letter in foreign if _looks(other, letter) == _looks(other, NO_LETTER)}
            if len(lacked) < len(lacking):
                font, lacking = other, lacked
    return "".join("·" if letter in lacking else letter for letter in plain), font


def _looks(font: ImageFont.FreeTypeFont, letter: str) -> bytes:
    return bytes(font.getmask(letter))


def _length(text: str, size: int) -> int:
    shown, font = _written(text, size)
    return int(font.getlength(shown)) + 1


def _fitted(text: str, size: int, width: int) -> str:
    """The text, cut to a width in pixels."""
    while len(text) > 1 and _length(text, size) > width:
        text = text.rstrip("…")[:-1] + "…"
    return text


def _wrapped(text: str, width: int) -> list[str]:
    """The title in lines of a width in pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if not lines[-1] or _length(longer, LARGE) <= width else [*lines, word]
    return [_fitted(line, LARGE, width) for line in lines]


def _upright(label: str) -> Image.Image:
    """A label that reads from bottom to top."""
    text = _fitted(label or "·", SMALL, 120)
    strip = Image.new("RGB", (_length(text, SMALL) + 2, 18), PAPER)
    _write(strip, (0, 1), text, INK, SMALL)
    return strip.rotate(90, expand=True)
