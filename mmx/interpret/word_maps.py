"""Words of a text, the sources they attend to, and one attention map for each word.

Axes: W words, S slots, R rows and C columns of a source's grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from mmx.boxes import Box
from mmx.interpret.grid import FULL_BOX, Displacement, heatmap, segment_cells
from mmx.memory import Segment

EPSILON = 1e-12  # avoids a division by zero for maps that are all zero


@dataclass(frozen=True)
class WordInformation:
    """A word of a text.

    Args:
        text: the word.
        logprob: log p(word | memory, question, preceding words), in nats.
        gain: information gain of the memory for this word, in bits. A question is part of both conditions.
    """

    text: str
    logprob: float
    gain: float


@dataclass(frozen=True)
class SourceView:
    """The slots of one source in a memory, and their position on the raw input.

    Args:
        segment: the slots in the memory.
        source_name: the source, numbered if a memory has several segments of it.
        image: the raw input, if it is an image.
        labels: one name for each slot, if the encoder has names for them.
        window: the part of the input that the grid covers, see `Encoder.window`.
        displacement: offset of the receptive field of a cell, see `mmx.interpret.grid.displacement`.
    """

    segment: Segment
    source_name: str
    image: Image.Image | None = None
    labels: tuple[str, ...] = ()
    window: Box = FULL_BOX
    displacement: Displacement = (0.0, 0.0)

    def slots(self, maps: Tensor) -> Tensor:
        """The slots of this source, taken from maps over all slots [..., S]."""
        return maps[..., self.segment.start : self.segment.stop]

    def heatmap(self, maps: Tensor, height: int, width: int) -> Tensor:
        """Maps over all slots [..., S] as heatmaps over the input [..., height, width]. MmxError without a grid."""
        return heatmap(segment_cells(maps, self.segment), height, width, self.displacement, self.window)


@dataclass(frozen=True)
class WordMaps:
    """One map for each word of a text, with everything needed to draw it.

    Args:
        title: the text, and the question if there is one.
        description: what the maps show.
        words: W words.
        maps: [W, S], each row sums to one or is all zero.
        views: the sources of the slots.
    """

    title: str
    description: str
    words: tuple[WordInformation, ...]
    maps: Tensor
    views: tuple[SourceView, ...]

    def peaks(self) -> Tensor:
        """The largest value of each map, [W]."""
        return self.maps.amax(-1).clamp(min=EPSILON) if self.maps.shape[-1] else self.maps.sum(-1)


def source_shares(maps: Tensor, views: Sequence[SourceView]) -> dict[str, Tensor]:
    """The fraction of each map [W, S] that is on each source, [W] by source name."""
    return {view.source_name: view.slots(maps).sum(-1) for view in views}
