"""Backbones of timm: creation, weights from a file, preprocessing."""

import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmx.config.environment import cache_folder
from mmx.errors import EncoderError

Arguments = dict[str, Any]  # keyword arguments of timm.create_model, which depend on the model


class Preprocessing(NamedTuple):
    """How an image becomes pixels: side in pixels, mean and standard deviation per channel, interpolation."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str

    def transform(self, fit: str) -> Callable[[Image.Image], Tensor]:
        """Return timm's evaluation transform: an image to [3, size, size], squashed, cropped or padded to a square."""
        from timm.data.transforms_factory import create_transform

        squash: Callable[[Image.Image], Tensor] = create_transform(
            (3, self.size, self.size),
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=1.0,
            crop_mode="center" if fit == "crop" else "squash",
        )
        return partial(self._pad_and_transform, squash) if fit == "pad" else squash

    def _pad_and_transform(self, transform: Callable[[Image.Image], Tensor], image: Image.Image) -> Tensor:
        """Center an image on a square of the mean color, which is zero after the normalization, and transform it."""
        side = max(image.size)
        mean = tuple(round(255 * value) for value in self.mean)
        square = Image.new("RGB", (side, side), mean)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return transform(square)


def create_backbone(
    name: str, size: int | None, stage: int | None, pretrained: bool, arguments: Arguments
) -> nn.Module:
    """Create a timm model without its classifier, or only the layers up to `stage`.

    Raises EncoderError for an unknown name or stage, and for arguments that the model refuses.
    """
    if stage is None:
        head_arguments: Arguments = {"num_classes": 0}
    else:
        head_arguments = {"features_only": True, "out_indices": (stage,)}
    return _create(name, size, stage, {**arguments, **head_arguments, "pretrained": pretrained})


def load_weights(backbone: nn.Module, path: Path, name: str, size: int | None, arguments: Arguments) -> None:
    """Load the tensors of a .safetensors file into a backbone.

    Every tensor of the backbone must be in the file. Tensors of the whole model that the backbone lacks (the
    classifier, layers after a stage) are ignored; any other tensor is an error.
    """
    with torch.device("meta"):  # only names and shapes are needed
        whole = _create(name, size, None, {**arguments, "num_classes": 1, "pretrained": False})
    file_tensors = _by_plain_name(_read_tensors(path, whole))
    own_tensors = _by_plain_name(backbone.state_dict())
    whole_tensors = _by_plain_name(whole.state_dict())
    problems = _mismatches(file_tensors, own_tensors, ignored=whole_tensors.keys() - own_tensors.keys())
    if problems:
        more = f" ({len(problems) - 1} more such)" if len(problems) > 1 else ""
        raise EncoderError(
            f"weights {path} do not fit backbone {name!r}: the file {problems[0]}{more}; "
            "expected timm's names of all its tensors; give the backbone, size and arguments they were saved with.",
            code="encoder.weights_mismatch",
            path=str(path),
            backbone=name,
            problems=problems,
        )
    backbone.load_state_dict({own_name: file_tensors[key][1] for key, (own_name, _) in own_tensors.items()})


def preprocessing_of(backbone: nn.Module) -> Preprocessing:
    """Return the default preprocessing of a backbone."""
    import timm

    config = timm.data.resolve_model_data_config(backbone)
    return Preprocessing(config["input_size"][-1], tuple(config["mean"]), tuple(config["std"]), config["interpolation"])


def _create(name: str, size: int | None, stage: int | None, arguments: Arguments) -> nn.Module:
    import timm

    if not timm.is_model(name.split(".")[0]):
        near = get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "known: what timm.list_models() lists."
        raise EncoderError(
            f"timm has no backbone {name!r}; {hint}", code="encoder.unknown_backbone", backbone=name, suggestions=near
        )
    try:
        return _create_with_size(name, size, arguments)
    except Exception as error:  # the 1,300 backbones raise exceptions of any class
        if stage is not None and isinstance(error, (IndexError, AssertionError, ValueError)):
            raise EncoderError(
                f"backbone {name!r} has no stage {stage}; use another stage, or none.",
                code="encoder.unknown_stage",
                backbone=name,
                stage=stage,
            ) from error
        raise EncoderError(
            f"timm cannot build backbone {name!r} ({type(error).__name__}) with stage={stage}, size={size}, "
            f"arguments={arguments}; change or leave out one of them.",
            code="encoder.backbone_options",
            backbone=name,
        ) from error


def _create_with_size(name: str, size: int | None, arguments: Arguments) -> nn.Module:
    """Pass the size to models that accept it (for position embeddings or windows); most CNNs do not."""
    import timm

    arguments = {**arguments, "cache_dir": cache_folder()}
    if size:
        try:
            sized: nn.Module = timm.create_model(name, img_size=size, **arguments)
            return sized
        except TypeError:
            pass
    model: nn.Module = timm.create_model(name, **arguments)
    return model


def _mismatches(
    given: Mapping[str, tuple[str, Tensor]], own: Mapping[str, tuple[str, Tensor]], ignored: set[str]
) -> list[str]:
    """Describe each missing, unexpected and differently shaped tensor."""
    missing = [f"lacks {name}" for key, (name, _) in own.items() if key not in given]
    unexpected = []
    for key, (name, _) in given.items():
        if key not in own and key not in ignored:
            unexpected.append(f"has {name}, which the backbone does not have")
    misshapen = []
    for key, (name, tensor) in own.items():
        if key in given and given[key][1].shape != tensor.shape:
            misshapen.append(f"holds {name} as {list(given[key][1].shape)}, not {list(tensor.shape)}")
    return missing + unexpected + misshapen


def _by_plain_name(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Map a plain name to (name, tensor).

    With features_only, timm wraps a model ("model.", "body.") or flattens it ("layers_0.norm").
    """
    named = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("model.").removeprefix("body.").replace("_", ".")
        named[plain] = (name, tensor)
    return named


def _read_tensors(path: Path, whole: nn.Module) -> dict[str, Tensor]:
    """Read the tensors of a file, renamed and resized as timm does for older files and other image sizes."""
    if path.suffix.lower() != ".safetensors":
        convert = f'save_file(torch.load("{path.name}", weights_only=True), "{path.stem}.safetensors")'
        raise EncoderError(
            f"weights {path} may be a pickle, which can run code; type safetensors.torch.{convert}.",
            code="encoder.weights_pickle",
            path=str(path),
        )
    if not path.is_file():
        raise EncoderError(
            f"weights {path} do not exist; expected a .safetensors file; check the path.",
            code="encoder.weights_not_found",
            path=str(path),
        )
    convert_names = getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", None)
    try:
        tensors = load_file(path)
        return dict(convert_names(tensors, whole)) if convert_names else tensors
    except (SafetensorError, OSError) as error:
        raise EncoderError(
            f"weights {path} are damaged or no safetensors file; copy the file again.",
            code="encoder.weights_damaged",
            path=str(path),
        ) from error
    except Exception as error:  # what timm expects of a file differs from model to model
        name = type(whole).__name__
        raise EncoderError(
            f"weights {path} are not those of a {name}; name the backbone they belong to.",
            code="encoder.weights_backbone",
            path=str(path),
            expected=name,
        ) from error
