"""A cache of decoded images: uint8 pixels in shared memory, filled as the images are first read.

N examples, C = 3 channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import torch
from PIL import Image
from torch import Tensor

from mmx.data.examples import Example
from mmx.io.images import load_image


class CachedImages(Sequence[Example]):
    """Examples whose images are decoded once, resized to a square and kept in memory.

    The pixels of each source are one uint8 tensor [N, size, size, C] in shared memory, so that data workers fill one
    cache together. The square distorts images as the option `fit: squash` of the image encoder does.

    Args:
        examples: examples to read from.
        sources: names of the sources that are images.
        size: side of the square in pixels.
    """

    def __init__(self, examples: Sequence[Example], sources: Sequence[str], size: int) -> None:
        count = len(examples)
        self.examples = examples
        self.size = size
        self.pixels = {name: torch.zeros(count, size, size, 3, dtype=torch.uint8).share_memory_() for name in sources}
        self.filled = {name: torch.zeros(count, dtype=torch.bool).share_memory_() for name in sources}
        self._without_images: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return the example with PIL images from the cache. Raises ImageError for an image that cannot be read."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index not in self._without_images:
            self._fill(index)
        example = self._without_images[index]
        images = {name: self._image(name, index) for name, filled in self.filled.items() if filled[index]}
        return replace(example, sources={**example.sources, **images})

    def _fill(self, index: int) -> None:
        """Read an example, decode those of its images that no process has decoded, and keep the rest of it."""
        example = self.examples[index]
        others = dict(example.sources)
        for name in self.pixels:
            raw = others.pop(name, None)
            if raw is not None and not self.filled[name][index]:
                self.pixels[name][index] = _square_pixels(load_image(raw), self.size)  # type: ignore[arg-type]
                self.filled[name][index] = True
        self._without_images[index] = replace(example, sources=others)

    def _image(self, name: str, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[name][index].numpy())


def _square_pixels(image: Image.Image, size: int) -> Tensor:
    """Return an RGB image as uint8 [size, size, C]."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3)
