"""Encoders that each break one promise, and the checks that must notice: these, and no others.

All read a list of numbers (or, for the grid, a picture) in twenty lines, as a stranger would write them.
"""

import os
import random

import torch
from PIL import Image
from pydantic import BaseModel
from torch import nn

from mmx.encoders.base import Encoder, Features
from mmx.testing import ToyEncoder

BROKEN = {}  # class -> names of the checks that must fail


def breaks(*names):
    def note(kind):
        BROKEN[kind] = set(names)
        return kind

    return note


class Numbers(ToyEncoder):
    """A good one, to be broken."""

    def samples(self):
        return [[1.0, -2.0, 0.5], [3.0], [0.25, 1.5, -1.0, 2.0, 1.0]]


@breaks("options")
class Careless(Numbers):
    class Options(BaseModel):  # pydantic passes over what it does not know
        features: int = 8


@breaks("options", "saved")
class Forgetful(Numbers):
    """Is built from more than its options tell."""

    class Options(Numbers.Options):
        doubled: bool = True

    def __init__(self, options):
        super().__init__(options)
        self.width = options.features * (2 if options.doubled else 1)
        self.linear = nn.Linear(1, self.width)
        self.options = options.model_copy(update={"doubled": False})


@breaks("prepare", "worker", "saved", "globals")
class Dicing(Numbers):
    def prepare(self, raw):
        return super().prepare([number + random.random() for number in raw])


@breaks("worker")
class Clinging(Numbers):
    def __init__(self, options):
        super().__init__(options)
        self.clean = lambda raw: [float(number) for number in raw]

    def prepare(self, raw):
        return super().prepare(self.clean(raw))


@breaks("form", "mask")
class OneRow(Numbers):
    """Gives a row too many where the batch is one."""

    def forward(self, batch):
        features = super().forward(batch)
        if len(features.states) > 1:
            return features
        return Features(features.states.repeat(2, 1, 1), features.mask.repeat(2, 1))


EVERYTHING_ENCODED = {
    "form", "finite", "mask", "padding", "alone", "order", "deterministic", "gradients", "saved", "globals",
    "bfloat16", "compile",
}  # fmt: skip


@breaks(*EVERYTHING_ENCODED)
class Flat(Numbers):
    """States of two axes."""

    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states.mean(1), features.mask)


@breaks(*EVERYTHING_ENCODED)
class FloatMask(Numbers):
    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states, features.mask.float())


@breaks("finite")
class Logarithmic(Numbers):
    """log of a negative number."""

    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states + batch["numbers"][..., None].log(), features.mask)


@breaks("mask", "padding", "alone", "gradients")
class Inverted(Numbers):
    """True where there is padding: what upstream libraries often mean."""

    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states, ~features.mask)


@breaks("padding")
class Summing(Numbers):
    """Adds the mean of everything, padding included."""

    def forward(self, batch):
        features = super().forward(batch)
        total = batch["numbers"].sum(1)[:, None, None]  # zeros in clean padding change no sum
        return Features(features.states + total, features.mask)


@breaks("padding", "alone")
class Averaging(Numbers):
    """Means over the length of the batch."""

    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states + batch["numbers"].mean(1)[:, None, None], features.mask)


@breaks("alone", "padding")
class Crowded(Numbers):
    """Looks at the other rows."""

    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states + batch["numbers"].mean(), features.mask)


@breaks("alone", "order")
class Numbering(Numbers):
    """Adds the number of the row."""

    def forward(self, batch):
        features = super().forward(batch)
        rows = torch.arange(len(features.states))[:, None, None]
        return Features(features.states + rows, features.mask)


@breaks("deterministic", "alone", "padding", "order", "saved", "globals", "bfloat16", "compile")
class Noisy(Numbers):
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


@breaks("saved")
class Learned(Numbers):
    """Keeps a number beside its parameters."""

    def __init__(self, options):
        super().__init__(options)
        self.seen = 0.0

    def load_state_dict(self, tensors, *more, **facts):
        self.seen = self.seen + 1.0 if not hasattr(self, "told") else 0.0
        self.told = True
        return super().load_state_dict(tensors, *more, **facts)

    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states + self.seen * len(self.state_dict()), features.mask)

    def save_files(self, folder):
        self.seen = 2.0


@breaks("globals")
class Meddling(Numbers):
    def prepare(self, raw):
        torch.manual_seed(0)
        return super().prepare(raw)


@breaks("globals")
class Wandering(Numbers):
    def prepare(self, raw):
        os.chdir("/")
        return super().prepare(raw)


@breaks("bfloat16")
class Exact(Numbers):
    """Takes the difference of large numbers."""

    def forward(self, batch):
        features = super().forward(batch)
        large = self.linear(batch["numbers"][..., None] * 0 + 300)
        near = self.linear(batch["numbers"][..., None] + 300)
        return Features(features.states + near - large, features.mask)


@breaks("compile")
class Shy(Numbers):
    """Behaves otherwise when it is traced."""

    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states * (2 if torch.compiler.is_compiling() else 1), features.mask)


class Pixels(Encoder):
    """A picture, averaged over 8 x 8 cells: the smallest encoder with a grid."""

    modality, dimensions = "image", 2

    def __init__(self, options):
        super().__init__(options)
        self.width, self.linear = 16, nn.Conv2d(3, 16, 8, 8)

    def prepare(self, raw):
        small = torch.frombuffer(bytearray(raw.resize((32, 24), Image.Resampling.BOX).tobytes()), dtype=torch.uint8)
        return {"pixels": small.view(24, 32, 3).permute(2, 0, 1).float() / 255}

    def forward(self, batch):
        cells = self.linear(batch["pixels"])
        states = self.arrange(cells).flatten(2).transpose(1, 2)
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return Features(states, mask, (cells.shape[2], cells.shape[3]))

    def arrange(self, cells):
        return cells


@breaks("grid")
class Transposed(Pixels):
    """Column by column."""

    def arrange(self, cells):
        return cells.transpose(2, 3)


@breaks("grid")
class Mirrored(Pixels):
    def arrange(self, cells):
        return cells.flip(3)


@breaks("grid")
class Shuffled(Pixels):
    def arrange(self, cells):
        return cells.flatten(2)[:, :, torch.randperm(12, generator=torch.Generator().manual_seed(1))]
