"""The built-in image encoder: any timm backbone by name, as tokens with their grid.

Alphabet: B pictures, S slots, F feature width, C channels. Plain ViTs, hierarchical transformers and CNNs alike.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mmx.config import Frozen
from mmx.encoders.base import Encoder, Features
from mmx.errors import EncoderError, suggest
from mmx.images import SUFFIXES, load_image


class ImageEncoder(Encoder):
    """Picture -> one slot per cell of the backbone's last map (or of the map at `stage`, which cuts the rest off)."""

    modality = "image"
    dimensions = 2

    class Options(Frozen):
        """`size` is the side of the square input in pixels; mean, std and interpolation default to the backbone's own.

        `fit`: squash the picture to the square, or crop its middle. `arguments` go to timm's create_model.
        """

        backbone: str = "vit_tiny_patch16_224"
        pretrained: bool = False
        size: PositiveInt | None = None
        stage: int | None = Field(None, ge=0)
        fit: Literal["squash", "crop"] = "squash"
        mean: tuple[float, float, float] | None = None
        std: tuple[float, float, float] | None = None
        interpolation: Literal["bilinear", "bicubic", "nearest"] | None = None
        arguments: dict[str, Any] = {}

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        import timm

        # channels_last is what convolutions run fastest in, on CPUs and GPUs alike; the numbers are the same.
        self.backbone = _create(timm, options).to(memory_format=torch.channels_last)
        self.options = _resolve(timm, options, self.backbone)
        self._transform = _transform(self.options)
        self.width = self._probe()

    def prepare(self, raw: Any) -> dict[str, Tensor]:
        """A path, bytes or PIL picture -> {"pixels": float [3, size, size]}."""
        picture = raw if isinstance(raw, Image) and raw.mode == "RGB" else load_image(raw)
        return {"pixels": self._transform(picture)}

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """{"pixels": [B, 3, size, size]} -> Features with the backbone's grid."""
        states, grid = self._tokens(batch["pixels"].contiguous(memory_format=torch.channels_last))
        return Features(states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device), grid)

    @classmethod
    def accepts(cls, path: str) -> bool:
        """Whether the file name is a picture's."""
        return Path(path).suffix.lower() in SUFFIXES

    def _tokens(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, 3, size, size] -> states [B, S, F] and the grid of their last cells."""
        if self.options.stage is None:
            features = self.backbone.forward_features(pixels)
        else:
            features = self.backbone(pixels)[-1]
        if features.ndim == 3:
            cells = features.shape[1] - getattr(self.backbone, "num_prefix_tokens", 0)
            return features, _sequence_grid(self.backbone, cells)
        if _channels_stand_last(self.backbone, features):
            features = features.permute(0, 3, 1, 2)
        return features.flatten(2).transpose(1, 2), (features.shape[2], features.shape[3])

    def _probe(self) -> int:
        """F, by looking: backbones report their widths in different ways, a tiny forward does not."""
        training, size = self.backbone.training, self.options.size
        state = torch.random.get_rng_state()
        with torch.no_grad():
            width = self._tokens_eval(torch.zeros(1, 3, size, size))
        torch.random.set_rng_state(state)
        self.backbone.train(training)
        return width

    def _tokens_eval(self, pixels: Tensor) -> int:
        self.backbone.eval()
        return self._tokens(pixels)[0].shape[-1]


def _create(timm: Any, options: ImageEncoder.Options) -> nn.Module:
    """The backbone without its classifier, cut at `stage` where one is given."""
    name = options.backbone
    if not timm.is_model(name.split(".")[0]):
        near = suggest(name, timm.list_models(f"*{name[:6]}*") or ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
        raise EncoderError(f"timm has no backbone {name!r}; {near[:300]}")
    arguments = dict(options.arguments, pretrained=options.pretrained)
    if options.size and _takes_image_size(name):
        arguments["img_size"] = options.size
    if options.stage is None:
        return timm.create_model(name, num_classes=0, **arguments)
    try:
        return timm.create_model(name, features_only=True, out_indices=(options.stage,), **arguments)
    except (IndexError, AssertionError, ValueError) as error:
        raise EncoderError(f"backbone {name!r} has no stage {options.stage}; use a smaller stage, or none.") from error


def _takes_image_size(name: str) -> bool:
    """Whether the backbone is built for one input size (its position table depends on it)."""
    import timm

    config = timm.get_pretrained_cfg(name)
    return bool(config and config.fixed_input_size) or name.startswith(("vit", "deit", "swin"))


def _resolve(timm: Any, options: ImageEncoder.Options, backbone: nn.Module) -> ImageEncoder.Options:
    """Options with every value of the preprocessing filled in, so that it travels with the weights."""
    config = timm.data.resolve_model_data_config(backbone)
    found = {
        "size": options.size or config["input_size"][-1],
        "mean": options.mean or tuple(config["mean"]),
        "std": options.std or tuple(config["std"]),
        "interpolation": options.interpolation or config["interpolation"],
    }
    return options.model_copy(update=found)


def _transform(options: ImageEncoder.Options) -> Any:
    from timm.data import create_transform

    return create_transform(
        (3, options.size, options.size),
        interpolation=options.interpolation,
        mean=options.mean,
        std=options.std,
        crop_pct=1.0,
        crop_mode="squash" if options.fit == "squash" else "center",
    )


def _sequence_grid(backbone: nn.Module, cells: int) -> tuple[int, int]:
    """The grid of a backbone that hands over a plain sequence: its own word for it where it has one, else square."""
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if grid and grid[0] * grid[1] == cells:
        return tuple(grid)
    side = int(cells**0.5)
    if side * side != cells:
        raise EncoderError(f"backbone {type(backbone).__name__} gave {cells} cells, which form no square grid.")
    return side, side


def _channels_stand_last(backbone: nn.Module, features: Tensor) -> bool:
    """Whether a map is [B, rows, columns, C] rather than [B, C, rows, columns]."""
    told = getattr(backbone, "output_fmt", None)
    if told is not None:
        return str(told).endswith("NHWC")
    width = getattr(backbone, "num_features", None)
    return features.shape[-1] == width and features.shape[1] != width
