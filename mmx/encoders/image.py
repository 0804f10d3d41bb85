"""The built-in image encoder: any timm backbone by name, as tokens with their grid.

Alphabet: B pictures, S slots, F feature width, C channels. Plain ViTs, hierarchical transformers and CNNs alike.
"""

import sys
from collections.abc import Mapping
from difflib import get_close_matches
from math import isqrt
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, PositiveInt, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmx.config.schema import FrozenModel
from mmx.encoders.base import Encoder, Features
from mmx.errors import EncoderError
from mmx.io.images import SUFFIXES, center_square, load_image

# Arguments of timm's create_model that other options decide, or that would read a file which does not travel along.
DECIDED = {"img_size", "num_classes", "in_chans", "features_only", "out_indices", "checkpoint_path"}
DECIDED |= {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}


class ImageEncoder(Encoder):
    """Picture -> one slot per cell of the backbone's last map (or of the map at `stage`, which cuts the rest off)."""

    modality = "image"
    dimensions = 2
    backbone: Any  # whatever timm made

    class Options(FrozenModel):
        """`size` is the side of the square input in pixels; mean, std and interpolation default to the backbone's own.

        `fit`: squash the picture to the square, or crop its middle. `arguments` go to timm's create_model. `pretrained`
        fetches weights; `weights` is a .safetensors file of them, under timm's names. Both are done with once it is
        built: the tensors travel in the checkpoint.
        """

        backbone: str = "vit_tiny_patch16_224"
        pretrained: bool = False
        weights: str | None = None
        size: PositiveInt | None = None
        stage: int | None = Field(None, ge=0)
        fit: Literal["squash", "crop"] = "squash"
        mean: tuple[float, float, float] | None = None
        std: tuple[float, float, float] | None = None
        interpolation: Literal["bilinear", "bicubic", "nearest"] | None = None
        arguments: dict[str, Any] = {}

        @field_validator("arguments")
        @classmethod
        def _decided_elsewhere(cls, arguments: dict[str, Any]) -> dict[str, Any]:
            if taken := sorted(DECIDED & arguments.keys()):
                use = "the options size, stage, pretrained, weights"
                raise ValueError(f"arguments cannot hold {', '.join(taken)}; use {use}")
            return arguments

        @model_validator(mode="after")
        def _one_origin(self) -> Self:
            if self.pretrained and self.weights is not None:
                raise ValueError("pretrained fetches weights, and weights names a file of them; leave out one of them")
            return self

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        import timm

        backbone = _create(timm, options, _cut(options.stage))
        if options.weights is not None:
            _fill(timm, backbone, options, Path(options.weights).expanduser())
        # channels_last is what convolutions run fastest in, on CPUs and GPUs alike; the numbers are the same.
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.options = _resolve(timm, options, self.backbone)
        self._transform = _transform(self.options)
        self.width = self._probe()

    def prepare(self, raw: Any) -> dict[str, Tensor]:
        """A path, bytes or PIL picture -> {"pixels": float [3, size, size]}."""
        return {"pixels": self._transform(load_image(raw))}

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """{"pixels": [B, 3, size, size]} -> Features with the backbone's grid."""
        states, grid = self._tokens(batch["pixels"].contiguous(memory_format=torch.channels_last))
        return Features(states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device), grid)

    def accepts(self, path: str) -> bool:
        """Whether the file name is a picture's."""
        return Path(path).suffix.lower() in SUFFIXES

    def window(self, raw: Any) -> tuple[float, float, float, float]:
        """All of the picture, or the square in its middle."""
        return (0.0, 0.0, 1.0, 1.0) if self.options.fit == "squash" else center_square(load_image(raw).size)

    def _tokens(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, 3, size, size] -> states [B, S, F] and the grid of their last cells."""
        whole = self.options.stage is None
        features = self.backbone.forward_features(pixels) if whole else self.backbone(pixels)[-1]
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise EncoderError(f"backbone {self.options.backbone!r} does not end in one map; give a stage.")
        if features.ndim == 3:
            return features, _sequence_grid(self.backbone, features.shape[1], pixels.shape[-1])
        if _channels_stand_last(self.backbone, features):
            features = features.permute(0, 3, 1, 2)
        return features.flatten(2).transpose(1, 2), (features.shape[2], features.shape[3])

    def _probe(self) -> int:
        """F, by looking: backbones report their widths in different ways, the forward of one picture does not."""
        size, training = self.options.size, self.backbone.training
        try:
            # Eval, so that no running mean moves; a fork, because some backbones throw dice all the same.
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self.backbone.eval()
                return self._tokens(torch.zeros(1, 3, size, size))[0].shape[-1]
        except (AssertionError, RuntimeError, ValueError) as error:
            usual = self.backbone.pretrained_cfg["input_size"][-1]
            raise EncoderError(
                f"backbone {self.options.backbone!r} cannot read pictures of size {size}; its usual size is {usual}."
            ) from error
        finally:
            self.backbone.train(training)


def _cut(stage: int | None) -> dict[str, Any]:
    """timm's arguments for what the encoder needs of a model: no classifier, or nothing that follows the stage."""
    return {"num_classes": 0} if stage is None else {"features_only": True, "out_indices": (stage,)}


def _create(timm: Any, options: ImageEncoder.Options, cut: dict[str, Any]) -> Any:
    """The model of the options, or the part of it that `cut` asks for."""
    name, stage = options.backbone, options.stage
    if not timm.is_model(name.split(".")[0]):
        near = get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "known: what timm.list_models() lists."
        raise EncoderError(f"timm has no backbone {name!r}; {hint}")
    try:
        return _create_sized(timm, options, {**options.arguments, **cut, "pretrained": options.pretrained})
    except Exception as error:  # its 1,300 backbones raise whatever they like
        if stage is not None and isinstance(error, (IndexError, AssertionError, ValueError)):
            raise EncoderError(f"backbone {name!r} has no stage {stage}; use another stage, or none.") from error
        raise EncoderError(
            f"timm cannot build backbone {name!r} ({type(error).__name__}) with stage={stage}, size={options.size}, "
            f"pretrained={options.pretrained}, arguments={options.arguments}; change or leave out one of them."
        ) from error


def _create_sized(timm: Any, options: ImageEncoder.Options, arguments: dict[str, Any]) -> Any:
    """Built for the size where that matters (a table of positions, windows); most CNNs refuse to be told."""
    if options.size:
        try:
            return timm.create_model(options.backbone, img_size=options.size, **arguments)
        except TypeError:
            pass
    return timm.create_model(options.backbone, **arguments)


def _fill(timm: Any, backbone: nn.Module, options: ImageEncoder.Options, path: Path) -> None:
    """Give the backbone the tensors of a file, all it has; what only the whole model has is dropped on purpose."""
    with torch.device("meta"):  # its names and shapes are asked for, not its values
        whole = _create(timm, options, {"num_classes": 1})
    given, own = _by_plain_name(_tensors(path, whole)), _by_plain_name(backbone.state_dict())
    beyond = _by_plain_name(whole.state_dict()).keys() - own.keys()  # the classifier, and what follows a stage
    wrong = [f"lacks {name}" for key, (name, _) in own.items() if key not in given]
    wrong += [f"has {name}, which it knows not" for key, (name, _) in given.items() if key not in own.keys() | beyond]
    for key, (name, tensor) in own.items():
        if key in given and (shape := given[key][1].shape) != tensor.shape:
            wrong.append(f"holds {name} as {list(shape)}, not {list(tensor.shape)}")
    if wrong:
        more = f" ({len(wrong) - 1} more such)" if len(wrong) > 1 else ""
        raise EncoderError(
            f"weights {path} do not fit backbone {options.backbone!r}: the file {wrong[0]}{more}; "
            "expected timm's names of all its tensors; give the backbone, size and arguments they were saved with."
        )
    backbone.load_state_dict({name: given[key][1] for key, (name, _) in own.items()})


def _by_plain_name(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Plain name -> name and tensor. timm's cuts wrap a model ("model.", "body.") or flatten it ("layers_0.norm")."""
    plain = [name.removeprefix("model.").removeprefix("body.").replace("_", ".") for name in tensors]
    return dict(zip(plain, tensors.items()))


def _tensors(path: Path, whole: nn.Module) -> dict[str, Tensor]:
    """The tensors of a file, renamed and resized as timm does for older files and other sizes of the same model."""
    if path.suffix.lower() != ".safetensors":
        convert = f'save_file(torch.load("{path.name}", weights_only=True), "{path.stem}.safetensors")'
        raise EncoderError(f"weights {path} may be a pickle, which can run code; type safetensors.torch.{convert}.")
    if not path.is_file():
        raise EncoderError(f"weights {path} are not there; expected a .safetensors file; check the path.")
    renew = getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", None)
    try:
        return renew(load_file(path), whole) if renew else load_file(path)
    except (SafetensorError, OSError) as error:
        raise EncoderError(f"weights {path} are damaged or no safetensors file; copy the file again.") from error
    except Exception as error:  # what timm expects of a file differs from model to model
        kind = type(whole).__name__
        raise EncoderError(f"weights {path} are not those of a {kind}; name the backbone they belong to.") from error


def _resolve(timm: Any, options: ImageEncoder.Options, backbone: nn.Module) -> ImageEncoder.Options:
    """Options with every value of the preprocessing filled in, so that it travels with the weights."""
    config = timm.data.resolve_model_data_config(backbone)
    found = {
        "size": options.size or config["input_size"][-1],
        "mean": options.mean or tuple(config["mean"]),
        "std": options.std or tuple(config["std"]),
        "interpolation": options.interpolation or config["interpolation"],
    }
    return options.model_copy(update=found | {"pretrained": False, "weights": None})


def _transform(options: Any) -> Any:
    """What timm does to a picture on its way to the backbone; the options are resolved ones."""
    from timm.data.transforms_factory import create_transform

    return create_transform(
        (3, options.size, options.size),
        interpolation=options.interpolation,
        mean=options.mean,
        std=options.std,
        crop_pct=1.0,
        crop_mode="squash" if options.fit == "squash" else "center",
    )


def _sequence_grid(backbone: Any, slots: int, size: int) -> tuple[int, int]:
    """The grid of a backbone that hands over a sequence, prefix tokens first. The input is square, so the grid is.

    Where it does not say how many come first, the grid is the largest square, if that is what its stride makes of the
    input: else the sequence is something else, such as the class token alone, or cells in an order of their own.
    """
    prefix = getattr(backbone, "num_prefix_tokens", None)
    side = isqrt(slots - (prefix or 0))
    if prefix is None:
        square = abs(side - size / backbone.feature_info[-1]["reduction"]) < 1
    else:
        square = side * side == slots - prefix
    if not square:
        raise EncoderError(
            f"backbone {type(backbone).__name__} ends in {slots} states that form no grid; give a stage."
        )
    return side, side


def _channels_stand_last(backbone: nn.Module, features: Tensor) -> bool:
    """Whether a map is [B, rows, columns, C] rather than [B, C, rows, columns], by its word, or as a map is square."""
    told = getattr(backbone, "output_fmt", None)
    return str(told).endswith("NHWC") if told else features.shape[2] != features.shape[3]
