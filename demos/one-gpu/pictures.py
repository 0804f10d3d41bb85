"""What stands on the GPU: every picture as bytes, every text as a row, and the changed views of pictures.

Alphabet: B pictures, T text positions, S slots.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from io import BytesIO
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmx.data.scenes import generate_scene, render_scene
from mmx.evaluation.metrics.ptb_tokenizer import ptb_tokens
from mmx.memory import Memory, Segment
from mmx.models.checkpoint import BUNDLED, TOKENIZER
from mmx.text.tokenizer import Tokenizer

MEAN, STD = (0.45, 0.45, 0.42), (0.28, 0.27, 0.29)
NAMED_OFTEN = 15  # pictures of which a word must be said, to be among those that are named


class Changes(Protocol):
    """How much is changed; see `Phase`."""

    strength: float
    patch: float
    mixing: float


class Data:
    """Pictures as bytes and texts as rows, all on one device."""

    def __init__(self, folder: Path, device: str, pool: Pool, size: int) -> None:
        self.device = device
        self.tokenizer = Tokenizer.from_json((BUNDLED / TOKENIZER).read_text(encoding="utf-8"))
        packed = np.load(folder / "texts.npz")
        photos, easy = packed["counts"].tolist()
        blob, ends = (folder / "pictures.bin").read_bytes(), packed["ends"].tolist()
        encoded = [blob[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        numbered = [(seed, number, size) for seed, number in packed["scenes"].tolist()]
        self.photos = self._stack(pool.imap(opened, encoded[:photos], 64))
        self.easy = self._stack(pool.imap(opened, encoded[photos:], 64))
        self.scenes = self._stack(pool.imap(painted, numbered, 64))
        self.first = {"photos": 0, "easy": photos, "scenes": photos + easy}
        self.count = {"photos": photos, "easy": easy, "scenes": len(numbered)}
        rows = np.stack([packed["rows"], packed["mirrored"]], 1)
        self.rows = torch.from_numpy(rows).to(device)  # [texts, 2, T + 1]
        self.starts, self.lengths, self.pictures = (
            torch.from_numpy(packed[name].astype(np.int64)).to(device) for name in ("starts", "lengths", "pictures")
        )
        self.boxes = torch.from_numpy(packed["boxes"]).to(device)
        self.names = _names(json.loads((folder / "said.json").read_text(encoding="utf-8"))).to(device)

    def _stack(self, pictures: Iterable[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(list(pictures))).to(self.device).permute(0, 3, 1, 2).contiguous()

    def cells(self, side: int) -> Tensor:
        """bool [texts, S]: which cells of a grid each text may look at."""
        nothing = torch.zeros(1, 1, 1, side * side, 1, device=self.device)
        every = torch.ones(1, side * side, dtype=torch.bool, device=self.device)
        whole = Memory(nothing, nothing, every, (Segment("image", 0, side * side, (side, side)),))
        shown = whole.focus(self.boxes[None]).stream_mask
        assert shown is not None
        return shown[0]


def _names(said: list[list[str]]) -> Tensor:
    """bool [photographs, words]: the words that two captions of a picture have, if many pictures have them."""
    counted = [Counter(word for caption in captions for word in set(ptb_tokens(caption))) for captions in said]
    named = [{word for word, count in words.items() if count > 1} for words in counted]
    often = Counter(word for words in named for word in words)
    known = {word: place for place, word in enumerate(sorted(w for w, n in often.items() if n >= NAMED_OFTEN))}
    table = torch.zeros(len(named), max(1, len(known)), dtype=torch.bool)
    for place, words in enumerate(named):
        table[place, [known[word] for word in words if word in known]] = True
    return table


def opened(encoded: bytes) -> np.ndarray:
    """An encoded picture as bytes [rows, columns, 3]."""
    return np.asarray(Image.open(BytesIO(encoded)).convert("RGB"))


def painted(numbered: tuple[int, int, int]) -> np.ndarray:
    """A scene (seed, number, side) as bytes [side, side, 3]."""
    seed, number, size = numbered
    return np.asarray(render_scene(generate_scene(seed, number, size), size))


# ---- pictures ----------------------------------------------------------------------------------------------------


def normal(pixels: Tensor) -> Tensor:
    """[B, 3, side, side] in 0..1 -> as the encoder wants it."""
    channels = zip(pixels.unbind(1), MEAN, STD, strict=True)  # numbers, for a graph takes no tensor from outside
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], 1)


def resized(pictures: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, side, side] -> float [B, 3, size, size] in 0..1, as the encoder's own preparation does it."""
    pixels = pictures.float() / 255
    return pixels if pixels.shape[-1] == size else F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)


def views(pictures: Tensor, size: int, changes: Changes) -> tuple[Tensor, Tensor]:
    """uint8 [B, 3, side, side] -> float [B, 3, size, size] in 0..1, changed, and bool [B]: which are mirrored."""
    n, s, device = len(pictures), changes.strength, pictures.device
    draw = lambda low, high, *shape: torch.rand(n, *shape, device=device) * (high - low) + low  # noqa: E731
    area, ratio, angle = draw(1 - 0.75 * s, 1), draw(-0.29, 0.29).exp(), draw(-0.2, 0.2) * s
    whole = draw(0, 1) < 0.25  # as they will be shown later
    wide, high = ((area * r).sqrt().clamp(max=1.0) for r in (ratio, 1 / ratio))
    wide, high, angle = wide.masked_fill(whole, 1.0), high.masked_fill(whole, 1.0), angle.masked_fill(whole, 0.0)
    x, y = draw(-1, 1) * (1 - wide), draw(-1, 1) * (1 - high)
    mirrored = draw(0, 1) < 0.5
    turn = 1 - 2 * mirrored.float()
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([wide * cos * turn, -wide * sin, x, high * sin * turn, high * cos, y], -1).view(n, 2, 3)
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    pixels = F.grid_sample(pictures.float() / 255, grid, padding_mode="reflection", align_corners=False)
    light, contrast, color = (draw(-0.4, 0.4, 1, 1, 1) * s + 1 for _ in range(3))
    pixels = pixels * light
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = (pixels - mean) * contrast + mean
    gray = pixels.mean(1, keepdim=True)
    pixels = ((pixels - gray) * color + gray).clamp(0, 1)
    other = pixels.roll(1, 0)
    share = (draw(0, 0.3) * (draw(0, 1) < changes.mixing))[:, None, None, None]
    pixels = pixels * (1 - share) + other * share
    where = torch.arange(size, device=device) / size
    left, top, w, h = draw(0, 0.8, 1), draw(0, 0.8, 1), draw(0.1, 0.4, 1), draw(0.1, 0.4, 1)
    across, down = (where >= left) & (where < left + w), (where >= top) & (where < top + h)
    patched = down[:, :, None] & across[:, None] & (draw(0, 1) < changes.patch)[:, None, None]
    return torch.where(patched[:, None], pixels.roll(2, 0), pixels), mirrored
