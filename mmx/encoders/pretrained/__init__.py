"""The built-in pretrained encoder: an image, text or audio encoder of transformers, from a folder or the Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmx.encoders.base import Encoder, Features
from mmx.encoders.pretrained.adapters import create_adapter
from mmx.encoders.pretrained.architecture import PretrainedOptions
from mmx.encoders.pretrained.families import HF_FAMILIES, TOWERS
from mmx.encoders.pretrained.hf_models import build_hf_encoder, load_hf_encoder

__all__ = ["HF_FAMILIES", "TOWERS", "PretrainedEncoder"]


class PretrainedEncoder(Encoder):
    """Image, text or audio to the hidden states of a pretrained encoder. The instance has the modality of its model."""

    modality = "image, text or audio"

    class Options(PretrainedOptions):
        """Which encoder is loaded, and which of its layers are used; see PretrainedOptions."""

    options: PretrainedOptions

    def __init__(self, options: PretrainedOptions) -> None:
        super().__init__(options)
        self.model: nn.Module
        tokenizer = None
        if options.architecture is None:
            self.options, self.model, tokenizer = load_hf_encoder(options)
        else:
            self.model = build_hf_encoder(options.architecture, options.layer, options.name or "options")
        family = HF_FAMILIES[cast(Any, self.model).config.model_type]
        self.modality = family.modality
        self._float32_only = family.float32_only
        self.adapter = create_adapter(family.modality, self.options, self.model, tokenizer)
        self.dimensions = self.adapter.dimensions
        self.width = self.adapter.width
        self.max_audio_seconds = self.adapter.max_audio_seconds
        self.sampling_rate = self.adapter.sampling_rate

    def prepare(self, raw: object) -> dict[str, Tensor]:
        """Convert an input to tensors.

        An image becomes {"pixels": [3, H, W]}, a text {"tokens": [S], "mask": [S]}, audio (see `load_audio`)
        {"samples": [T], "mask": [T]} or, of Whisper, {"spectrum": [mel, frames]}.
        """
        return self.adapter.prepare(raw)

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """Encode a batch. Images have a grid; tokens for the whole image come before its cells."""
        if not self._float32_only:
            return self.adapter.features(self.model, batch)
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, enabled=False):
            return self.adapter.features(self.model, batch)

    def accepts(self, path: str) -> bool:
        """Return whether the file name has the suffix of an image or audio file. Texts are not read from files."""
        return Path(path).suffix.lower() in self.adapter.suffixes

    def labels(self, raw: object) -> list[str]:
        """Return the tokens of a text. The slots of images and audio have no names."""
        return self.adapter.labels(raw)

    def window(self, raw: object) -> tuple[float, float, float, float]:
        """Return the region of an image that the image processor keeps."""
        return self.adapter.window(raw)

    def save_files(self, folder: Path) -> None:
        """Write the tokenizer of a text encoder."""
        self.adapter.save_files(folder)

    def load_files(self, folder: Path) -> None:
        """Read the tokenizer of a text encoder."""
        self.adapter.load_files(folder)
