"""CLIP for scoring captions: one vector for an image or a text (Radford et al. 2021, section 2).

As an encoder of a model, CLIP is read by `mmx.encoders.pretrained`, which keeps one vector for each patch or token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmx.encoders.pretrained.architecture import hf_errors
from mmx.encoders.pretrained.hf_models import suppress_hf_output
from mmx.errors import CheckpointError
from mmx.hub.hf_checkpoint import HFCheckpoint, open_hf_checkpoint
from mmx.io.images import load_image

POSITION_IDS = "embeddings.position_ids"  # in older files; they are counted, not learned


class Clip:
    """The two towers of CLIP with their preprocessing."""

    def __init__(self, model: nn.Module, tokenizer: object, processor: object, device: str) -> None:
        self._model: Any = model.to(device).eval()
        self._tokenizer: Any = tokenizer
        self._processor: Any = processor
        self._device = device

    @torch.inference_mode()
    def encode_images(self, pixels: Sequence[Tensor]) -> Tensor:
        """Return a unit vector for each image of `prepare`, [images, F]."""
        states = self._model.vision_model(pixel_values=torch.stack(list(pixels)).to(self._device)).pooler_output
        return normalize(self._model.visual_projection(states), dim=-1)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return a unit vector for each text, [texts, F]. A text is cut after the last position of the model."""
        length = self._model.config.text_config.max_position_embeddings
        batch = self._tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        states = self._model.text_model(**batch.to(self._device)).pooler_output
        return normalize(self._model.text_projection(states), dim=-1)

    def prepare(self, image: str) -> Tensor:
        """Return the pixels of an image file, [3, H, W]. Raises ImageError."""
        pixels: Tensor = self._processor(load_image(image), return_tensors="pt")["pixel_values"][0]
        return pixels


def load_clip(name: str, device: str = "cpu") -> Clip:
    """Load CLIP from a folder or by its public name. Of *.bin files, only tensors are read. Raises CheckpointError."""
    import transformers

    checkpoint = open_hf_checkpoint(name, allow_pickled_weights=True)
    if checkpoint.config.get("model_type") != "clip":
        given = checkpoint.config.get("model_type")
        message = f"{name!r} is a model of type {given}; expected clip, such as openai/clip-vit-base-patch32."
        raise CheckpointError(message, code="clip.model_type", name=name, given=given)
    folder = str(checkpoint.folder)
    whole = "a whole CLIP model"
    with suppress_hf_output():
        with hf_errors(name, "config", whole, CheckpointError, "clip.unreadable"):
            model = transformers.CLIPModel(transformers.CLIPConfig(**checkpoint.config))
        with hf_errors(name, "tokenizer", whole, CheckpointError, "clip.unreadable"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        with hf_errors(name, "image processor", whole, CheckpointError, "clip.unreadable"):
            processor_class = cast(Any, transformers.AutoImageProcessor)
            processor = processor_class.from_pretrained(folder, trust_remote_code=False)
    _load_tensors(model, checkpoint)
    return Clip(model, tokenizer, processor, device)


def _load_tensors(model: nn.Module, checkpoint: HFCheckpoint) -> None:
    """Load all tensors in float32. Raises CheckpointError if one is missing or of another shape, or is not known."""
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.endswith(POSITION_IDS)}
    with hf_errors(checkpoint.name, "set of tensors", "those of CLIPModel", CheckpointError, "clip.tensors"):
        cast(Any, model).load_state_dict(tensors, strict=True)
