"""The built-in image encoder: any timm backbone by name, as tokens with their grid.

Plain ViTs, hierarchical transformers and CNNs are supported.

Axes: B images, S slots, F feature size, C channels.
"""

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field, PositiveInt, field_validator, model_validator
from torch import Tensor, nn

from mmx.config.schema import FrozenModel
from mmx.encoders.base import Encoder, Features
from mmx.encoders.image.backbones import Preprocessing, create_backbone, load_weights, preprocessing_of
from mmx.errors import EncoderError, convert_errors
from mmx.io.images import SUFFIXES, center_square, load_image, surrounding_square

# Arguments of timm.create_model that other options set, or that would read a file that is not part of the checkpoint.
RESERVED_ARGUMENTS = {
    "img_size",
    "num_classes",
    "in_chans",
    "features_only",
    "out_indices",
    "checkpoint_path",
    "cache_dir",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
}


class ImageEncoder(Encoder):
    """Image to one slot per cell of the backbone's last feature map, or of the map at `stage`."""

    modality = "image"
    dimensions = 2

    class Options(FrozenModel):
        """Options of the image encoder.

        backbone: name of a timm model.
        pretrained: download its weights.
        weights: .safetensors file of its weights, under timm's names.
        size: side of the square input in pixels; default: that of the backbone.
        stage: index of the feature map to use; later layers are removed. Default: the last map.
        fit: squash the image to a square, crop its center square, or pad it to a square with the mean color.
        mean, std, interpolation: preprocessing; default: that of the backbone.
        arguments: further arguments of timm.create_model.

        `pretrained` and `weights` are used once: afterwards the tensors are part of the checkpoint.
        """

        backbone: str = "vit_tiny_patch16_224"
        pretrained: bool = False
        weights: str | None = None
        size: PositiveInt | None = None
        stage: int | None = Field(None, ge=0)
        fit: Literal["squash", "crop", "pad"] = "squash"
        mean: tuple[float, float, float] | None = None
        std: tuple[float, float, float] | None = None
        interpolation: Literal["bilinear", "bicubic", "nearest"] | None = None
        arguments: dict[str, Any] = {}

        @field_validator("arguments")
        @classmethod
        def _check_reserved(cls, arguments: dict[str, Any]) -> dict[str, Any]:
            if reserved := sorted(RESERVED_ARGUMENTS & arguments.keys()):
                use = "the options size, stage, pretrained, weights"
                raise ValueError(f"arguments cannot hold {', '.join(reserved)}; use {use}")
            return arguments

        @model_validator(mode="after")
        def _check_weights(self) -> Self:
            if self.pretrained and self.weights is not None:
                raise ValueError("pretrained downloads weights, and weights names a file of them; leave out one")
            return self

    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        backbone = create_backbone(
            options.backbone, options.size, options.stage, options.pretrained, dict(options.arguments)
        )
        if options.weights is not None:
            path = Path(options.weights).expanduser()
            load_weights(backbone, path, options.backbone, options.size, dict(options.arguments))
        # Convolutions are fastest in channels_last, on CPUs and GPUs; the values are the same.
        self.backbone = backbone.to(memory_format=torch.channels_last)
        preprocessing = self._resolve_preprocessing(options)
        changes = {"pretrained": False, "weights": None}
        self.options = options.model_copy(update=preprocessing._asdict() | changes)
        self._size = preprocessing.size
        self._transform = preprocessing.transform(options.fit)
        self.width = self._measure_width()

    def prepare(self, raw: object) -> dict[str, Tensor]:
        """Image (anything that `load_image` reads) to {"pixels": [3, size, size]}, and "window" [4] unless squashed.

        The window is the region of the image that the pixels show, see `window`.
        """
        image = load_image(cast(Any, raw))
        prepared = {"pixels": self._transform(image)}
        if self.options.fit != "squash":
            prepared["window"] = torch.tensor(self._window(image.size))
        return prepared

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """Encode {"pixels": [B, 3, size, size]} to Features with the backbone's grid."""
        pixels = batch["pixels"].contiguous(memory_format=torch.channels_last)
        states, grid = self._encode(pixels)
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return Features(states, mask, grid, batch.get("window"))

    def accepts(self, path: str) -> bool:
        """Return whether the file name has the suffix of an image."""
        return Path(path).suffix.lower() in SUFFIXES

    def window(self, raw: object) -> tuple[float, float, float, float]:
        """Return the whole image, with `fit: crop` its center square, and with `fit: pad` the square around it."""
        if self.options.fit == "squash":
            return (0.0, 0.0, 1.0, 1.0)
        return self._window(load_image(cast(Any, raw)).size)

    def _window(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        return surrounding_square(size) if self.options.fit == "pad" else center_square(size)

    def _resolve_preprocessing(self, options: Options) -> Preprocessing:
        """Return the preprocessing of the options, completed by that of the backbone. It is saved with the weights."""
        default = preprocessing_of(self.backbone)
        return Preprocessing(
            options.size or default.size,
            options.mean or default.mean,
            options.std or default.std,
            options.interpolation or default.interpolation,
        )

    def _encode(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Encode [B, 3, size, size] to states [B, S, F] and the grid of their last cells."""
        if self.options.stage is None:
            features = cast(Any, self.backbone).forward_features(pixels)
        else:
            features = self.backbone(pixels)[-1]
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise EncoderError(
                f"backbone {self.options.backbone!r} does not end in one feature map; give a stage.",
                code="encoder.no_feature_map",
                backbone=self.options.backbone,
            )
        if features.ndim == 3:
            return features, _sequence_grid(self.backbone, features.shape[1], pixels.shape[-1])
        if _is_channels_last(self.backbone, features):
            features = features.permute(0, 3, 1, 2)
        rows, columns = features.shape[2:]
        return features.flatten(2).transpose(1, 2), (rows, columns)

    def _measure_width(self) -> int:
        """Return F, measured on one image, because backbones report their feature sizes in different ways."""
        name = self.options.backbone
        default_size = preprocessing_of(self.backbone).size

        def describe(error: BaseException) -> str:
            return f"backbone {name!r} cannot read images of size {self._size}; its usual size is {default_size}."

        was_training = self.backbone.training
        self.backbone.eval()  # no running mean may change
        try:
            # Some backbones draw random numbers even in eval mode.
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices=[]),
                convert_errors(EncoderError, describe, code="encoder.image_size", backbone=name, size=self._size),
            ):
                states, _ = self._encode(torch.zeros(1, 3, self._size, self._size))
        finally:
            self.backbone.train(was_training)
        return int(states.shape[-1])


def _sequence_grid(backbone: Any, num_slots: int, size: int) -> tuple[int, int]:
    """Return the grid of a backbone that returns a sequence, prefix tokens first. The input is square.

    If the number of prefix tokens is unknown, the grid is the largest square of cells, provided that it agrees with
    the stride of the backbone. Otherwise the sequence is something else, such as the class token alone.
    """
    prefix = getattr(backbone, "num_prefix_tokens", None)
    side = isqrt(num_slots - (prefix or 0))
    if prefix is None:
        stride = backbone.feature_info[-1]["reduction"]
        is_grid = abs(side - size / stride) < 1
    else:
        is_grid = side * side == num_slots - prefix
    if not is_grid:
        name = type(backbone).__name__
        raise EncoderError(
            f"backbone {name} ends in {num_slots} states that form no grid; give a stage.",
            code="encoder.no_grid",
            backbone=name,
            num_states=num_slots,
        )
    return side, side


def _is_channels_last(backbone: nn.Module, features: Tensor) -> bool:
    """Return whether a map is [B, rows, columns, C] rather than [B, C, rows, columns]."""
    output_format = getattr(backbone, "output_fmt", None)
    if output_format:
        return str(output_format).endswith("NHWC")
    return features.shape[2] != features.shape[3]  # the input is square, so rows equal columns
