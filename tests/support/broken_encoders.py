"""Encoders that each break one rule of the contract, with the names of exactly those checks that must fail.

All encode a list of numbers, an image or audio, untyped as plugins may be.
"""

import os
import random

import torch
from PIL import Image
from pydantic import BaseModel
from torch import nn

from mmx.encoders.base import Encoder, Features
from mmx.io.audio import load_audio
from mmx.io.images import load_image
from mmx.testing import ToyEncoder

BROKEN = {}  # class to the names of the checks that must fail


def breaks(*checks):
    def register(encoder_class):
        BROKEN[encoder_class] = set(checks)
        return encoder_class

    return register


class Numbers(ToyEncoder):
    """Correct; the base of the others."""

    def samples(self):
        return [[1.0, -2.0, 0.5], [3.0], [0.25, 1.5, -1.0, 2.0, 1.0]]


@breaks("options")
class UnvalidatedOptions(Numbers):
    class Options(BaseModel):  # pydantic ignores unknown fields by default
        features: int = 8


@breaks("options", "save_load")
class IncompleteOptions(Numbers):
    """Is built from more than its saved options contain."""

    class Options(Numbers.Options):
        doubled: bool = True

    def __init__(self, options):
        super().__init__(options)
        self.width = options.features * (2 if options.doubled else 1)
        self.linear = nn.Linear(1, self.width)
        self.options = options.model_copy(update={"doubled": False})


@breaks("prepare", "data_worker", "save_load", "global_state")
class RandomPrepare(Numbers):
    def prepare(self, raw):
        return super().prepare([number + random.random() for number in raw])


@breaks("data_worker")
class NotPicklable(Numbers):
    def __init__(self, options):
        super().__init__(options)
        self.clean = lambda raw: [float(number) for number in raw]

    def prepare(self, raw):
        return super().prepare(self.clean(raw))


@breaks("output_shapes", "mask")
class ExtraRow(Numbers):
    """Returns two rows for a batch of one."""

    def forward(self, batch):
        features = super().forward(batch)
        if len(features.states) > 1:
            return features
        return Features(features.states.repeat(2, 1, 1), features.mask.repeat(2, 1))


CHECKS_OF_FORWARD = {
    "output_shapes",
    "finite",
    "mask",
    "padding",
    "batch_independence",
    "order",
    "deterministic",
    "gradients",
    "save_load",
    "global_state",
    "bfloat16",
    "compile",
}


@breaks(*CHECKS_OF_FORWARD)
class TwoAxes(Numbers):
    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states.mean(1), features.mask)


@breaks(*CHECKS_OF_FORWARD)
class FloatMask(Numbers):
    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states, features.mask.float())


@breaks("finite")
class LogOfNegative(Numbers):
    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states + batch["numbers"][..., None].log(), features.mask)


@breaks("mask", "padding", "batch_independence", "gradients")
class InvertedMask(Numbers):
    """True for padding, as in many libraries."""

    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states, ~features.mask)


@breaks("padding")
class SumOverPadding(Numbers):
    """Adds the sum over all positions: zeros in padding do not change it, other values do."""

    def forward(self, batch):
        features = super().forward(batch)
        total = batch["numbers"].sum(1)[:, None, None]
        return Features(features.states + total, features.mask)


@breaks("padding", "batch_independence")
class MeanOverPadding(Numbers):
    """Adds the mean over the padded length."""

    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states + batch["numbers"].mean(1)[:, None, None], features.mask)


@breaks("batch_independence", "padding")
class MeanOverBatch(Numbers):
    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states + batch["numbers"].mean(), features.mask)


@breaks("batch_independence", "order")
class AddsRowIndex(Numbers):
    def forward(self, batch):
        features = super().forward(batch)
        rows = torch.arange(len(features.states))[:, None, None]
        return Features(features.states + rows, features.mask)


@breaks(
    "deterministic", "batch_independence", "padding", "order", "save_load", "global_state", "bfloat16", "compile"
)  # fmt: skip
class RandomForward(Numbers):
    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states + torch.randn_like(features.states), features.mask)


@breaks("gradients")
class Detached(Numbers):
    def __init__(self, options):
        super().__init__(options)
        self.deep = nn.Linear(options.features, options.features)

    def forward(self, batch):
        features = super().forward(batch)
        return Features(self.deep(features.states.detach()), features.mask)


@breaks("save_load")
class StateOutsideCheckpoint(Numbers):
    """Keeps a value in an attribute that is not saved."""

    def __init__(self, options):
        super().__init__(options)
        self.value = 0.0
        self.was_loaded = False

    def load_state_dict(self, tensors, *args, **kwargs):
        self.value = 0.0 if self.was_loaded else self.value + 1.0
        self.was_loaded = True
        return super().load_state_dict(tensors, *args, **kwargs)

    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states + self.value * len(self.state_dict()), features.mask)

    def save_files(self, folder):
        self.value = 2.0


@breaks("global_state")
class SeedsTorch(Numbers):
    def prepare(self, raw):
        torch.manual_seed(0)
        return super().prepare(raw)


@breaks("global_state")
class ChangesFolder(Numbers):
    def prepare(self, raw):
        os.chdir("/")
        return super().prepare(raw)


@breaks("bfloat16")
class Cancellation(Numbers):
    """Subtracts large numbers."""

    def forward(self, batch):
        features = super().forward(batch)
        large = self.linear(batch["numbers"][..., None] * 0 + 300)
        near = self.linear(batch["numbers"][..., None] + 300)
        return Features(features.states + near - large, features.mask)


@breaks("compile")
class BranchesOnTracing(Numbers):
    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states * (2 if torch.compiler.is_compiling() else 1), features.mask)


class Pixels(Encoder):
    """An image, averaged over 8 x 8 pixels: the smallest encoder with a grid. Correct."""

    modality = "image"
    dimensions = 2

    def __init__(self, options):
        super().__init__(options)
        self.width = 16
        self.linear = nn.Conv2d(3, 16, 8, 8)

    def prepare(self, raw):
        return {"pixels": self.pixels(load_image(raw))}

    def pixels(self, image):
        small = torch.frombuffer(bytearray(image.resize((32, 24), Image.Resampling.BOX).tobytes()), dtype=torch.uint8)
        return small.view(24, 32, 3).permute(2, 0, 1).float() / 255

    def forward(self, batch):
        cells = self.linear(batch["pixels"])
        states = self.arrange(cells).flatten(2).transpose(1, 2)
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return Features(states, mask, (cells.shape[2], cells.shape[3]))

    def arrange(self, cells):
        return cells


@breaks("grid")
class TransposedGrid(Pixels):
    """Column by column."""

    def arrange(self, cells):
        return cells.transpose(2, 3)


@breaks("grid")
class MirroredGrid(Pixels):
    def arrange(self, cells):
        return cells.flip(3)


@breaks("grid")
class ShuffledGrid(Pixels):
    def arrange(self, cells):
        return cells.flatten(2)[:, :, torch.randperm(12, generator=torch.Generator().manual_seed(1))]


@breaks("input_types")
class PilImagesOnly(Pixels):
    """Can be trained, and fails for the path that a user gives."""

    def prepare(self, raw):
        return {"pixels": self.pixels(raw)}


@breaks("input_types")
class SwappedChannelsOfFiles(Pixels):
    """Reads files as BGR, as some libraries do, and PIL images as RGB."""

    def prepare(self, raw):
        pixels = super().prepare(raw)["pixels"]
        return {"pixels": pixels if isinstance(raw, Image.Image) else pixels.flip(0)}


class Loudness(ToyEncoder):
    """Audio, one slot for every 1000 samples. Correct."""

    modality = "audio"

    def prepare(self, raw):
        samples = load_audio(raw, 16_000)
        whole = samples[: len(samples) // 1000 * 1000]
        return super().prepare(whole.view(-1, 1000).square().mean(1).sqrt().tolist())


@breaks("input_types")
class SamplesOnly(Loudness):
    """Takes (samples, rate), as the samples of the kit are, and no file."""

    def prepare(self, raw):
        samples, rate = raw
        return super().prepare((samples, rate))


@breaks("input_types")
class UnscaledFiles(Loudness):
    """Keeps the integers of a file as they are."""

    def prepare(self, raw):
        prepared = super().prepare(raw)
        scale = 1 if isinstance(raw, tuple) else 32768
        return {**prepared, "numbers": prepared["numbers"] * scale}
