"""Images of word maps: the color map, overlays, all scripts and image shapes, and the size limit."""

import pytest
import torch
from PIL import Image

from mmx.errors import MmxError
from mmx.interpret.render import colors, format_gain, overlay_heatmap, render_word_maps
from mmx.interpret.render_text import LARGE, SMALL, text_width, truncate_text, wrap_text
from mmx.interpret.word_maps import SourceView, WordInformation, WordMaps
from mmx.memory import Segment


def word_maps(words, image=None, slots=0):
    """Random maps over a grid of 2 x 2 cells and a sequence of more slots."""
    generator = torch.Generator().manual_seed(0)
    views = [SourceView(Segment("image", 0, 4, (2, 2)), "image", image)]
    if slots:
        labels = tuple(f"word{index}" for index in range(slots))
        views.append(SourceView(Segment("text", 4, 4 + slots), "text", labels=labels))
    maps = torch.rand(len(words), 4 + slots, generator=generator).softmax(-1)
    return WordMaps("title", "description", tuple(WordInformation(w, -1.0, 0.5) for w in words), maps, tuple(views))


def test_the_color_map_has_increasing_lightness():
    lightness = colors(torch.linspace(0, 1, 50)) @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (lightness.diff() > 0).all()


def test_the_peak_of_an_overlay_is_at_the_peak_of_the_map():
    heatmap = torch.zeros(40, 60)
    heatmap[10:14, 50:54] = 1.0
    overlay = overlay_heatmap(Image.new("RGB", (60, 40), (90, 90, 90)), heatmap)
    pixels = torch.frombuffer(bytearray(overlay.tobytes()), dtype=torch.uint8)
    brightness = pixels.view(40, 60, 3).float().sum(-1)
    assert brightness[12, 52] > 2 * brightness[30, 10]
    assert brightness[12, 52] == brightness.max()


def test_the_information_gain_has_no_negative_zero():
    assert format_gain(WordInformation("a", 0.0, -0.01)) == "information gain 0.0 bits"
    assert format_gain(WordInformation("a", 0.0, -1.25)) == "information gain -1.2 bits"


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (80, 48)])
def test_words_of_all_scripts_and_images_of_all_shapes(size):
    maps = word_maps(["a", "红色", "🙂", "مرحبا", "very" * 30], Image.new("RGB", size, (9, 99, 9)))
    image = render_word_maps(maps, range(4))
    assert image.width == 5 * 256 + 16
    assert image.height > 24


def test_rows_of_tiles():
    one = render_word_maps(word_maps(["a"] * 4), range(4))
    two = render_word_maps(word_maps(["a"] * 5), range(5))
    assert two.height - one.height == 240 + 48


@pytest.mark.parametrize("slots", [3, 200])
def test_a_sequence_is_drawn_as_a_matrix_below_the_tiles(slots):
    without = render_word_maps(word_maps(["a", "b"]), [0, 1])
    image = render_word_maps(word_maps(["a", "b"], slots=slots), [0, 1])
    assert image.height > without.height + 2 * 26


def test_an_image_that_would_be_too_large_is_an_error():
    with pytest.raises(MmxError) as error:
        render_word_maps(word_maps(["a"], slots=9000), [0])
    assert (error.value.code, error.value.details) == ("look.too_large", {"words": 1, "limit": 16_000})


def test_text_is_truncated_and_wrapped_to_a_width():
    assert truncate_text("short", SMALL, 200) == "short"
    truncated = truncate_text("a very long word " * 5, SMALL, 100)
    assert truncated.endswith("…")
    assert text_width(truncated, SMALL) <= 100
    lines = wrap_text("several words that need more than one line", LARGE, 150)
    assert " ".join(lines) == "several words that need more than one line"
    assert all(text_width(line, LARGE) <= 150 for line in lines)
