"""Text in images: fonts with a fallback for characters they lack, truncation, line breaks and rotated labels."""

from __future__ import annotations

from contextlib import suppress

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
Color = tuple[int, int, int]

SMALL, MEDIUM, LARGE = 13, 15, 19  # font sizes in pixels
BLACK: Color = (28, 28, 32)
GRAY: Color = (96, 96, 104)
WHITE: Color = (255, 255, 255)
REPLACEMENT = "·"  # for characters that no font has
UNASSIGNED = "\U0010ffff"  # a font draws it as it draws every character that it lacks
FIRST_NON_LATIN = 0x250  # Pillow's own font has the characters below; the others need a system font
SYSTEM_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")
MAX_LABEL_WIDTH = 120  # pixels


def draw_text(image: Image.Image, position: tuple[int, int], text: str, color: Color, size: int) -> None:
    """Draw one line of text with its top left corner at a position."""
    drawable, font = _drawable_text(text, size)
    ImageDraw.Draw(image).text(position, drawable, color, font)


def text_width(text: str, size: int) -> int:
    """Width of one line of text in pixels."""
    drawable, font = _drawable_text(text, size)
    return int(font.getlength(drawable)) + 1


def truncate_text(text: str, size: int, width: int) -> str:
    """The text, truncated to a width in pixels."""
    while len(text) > 1 and text_width(text, size) > width:
        text = text.rstrip("…")[:-1] + "…"
    return text


def wrap_text(text: str, size: int, width: int) -> list[str]:
    """The text in lines of at most a width in pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [truncate_text(line, size, width) for line in lines]


def vertical_label(label: str) -> Image.Image:
    """An image of a label that reads from bottom to top."""
    text = truncate_text(label or REPLACEMENT, SMALL, MAX_LABEL_WIDTH)
    image = Image.new("RGB", (text_width(text, SMALL) + 2, 18), WHITE)
    draw_text(image, (0, 1), text, BLACK, SMALL)
    return image.rotate(90, expand=True)


def _drawable_text(text: str, size: int) -> tuple[str, Font]:
    """The text with a replacement for characters that the font lacks, and the font that lacks the fewest."""
    plain = "".join(char if char.isprintable() and char != "\ufffd" else REPLACEMENT for char in text)
    non_latin = {char for char in plain if ord(char) >= FIRST_NON_LATIN}
    font: Font = ImageFont.load_default(size)
    missing = non_latin
    for name in SYSTEM_FONTS if non_latin else ():
        with suppress(OSError):
            candidate = ImageFont.truetype(name, size)
            lacking = {char for char in non_latin if _glyph(candidate, char) == _glyph(candidate, UNASSIGNED)}
            if len(lacking) < len(missing):
                font = candidate
                missing = lacking
    return "".join(REPLACEMENT if char in missing else char for char in plain), font


def _glyph(font: ImageFont.FreeTypeFont, char: str) -> bytes:
    return bytes(font.getmask(char))
