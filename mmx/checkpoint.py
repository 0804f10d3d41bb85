"""Our checkpoint folder: config, weights, tokenizer, provenance. It rebuilds itself, without pickle, or says why not.

    config.yaml        the ModelConfig
    model.safetensors  every tensor, strictly: a missing or unexpected one is an error
    tokenizer.json     the `tokenizers` library's format
    provenance.json    data, steps, seed, versions, metrics
    generation.yaml    how words are chosen unless the caller says otherwise

A folder is written beside its place and renamed, so that what stands there is always whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmx.config import GenerationConfig, ModelConfig
from mmx.errors import CheckpointError
from mmx.model import Model
from mmx.settings import dump_settings, read_settings
from mmx.tokenizer import Tokenizer

CONFIG, WEIGHTS, TOKENIZER = "config.yaml", "model.safetensors", "tokenizer.json"
PROVENANCE, GENERATION = "provenance.json", "generation.yaml"


def save_model(
    folder: str | Path,
    model: Model,
    provenance: Mapping[str, Any] | None = None,
    generation: GenerationConfig | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a model's folder, whole or not at all. `dtype` stores floating tensors in that type, e.g. torch.float16."""
    return write_folder(folder, lambda place: write_model(place, model, provenance or {}, generation, dtype))


def write_model(
    place: Path,
    model: Model,
    provenance: Mapping[str, Any],
    generation: GenerationConfig | None = None,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the files of a model into an existing folder; `weights` stand in for some of its own (an average)."""
    tensors = {**model.state_dict(), **(weights or {})}
    (place / CONFIG).write_text(dump_settings(_without_downloads(model.config)), encoding="utf-8")
    (place / TOKENIZER).write_text(model.tokenizer.to_json(), encoding="utf-8")
    (place / PROVENANCE).write_text(json.dumps(provenance, indent=2, default=str) + "\n", encoding="utf-8")
    (place / GENERATION).write_text(dump_settings(generation or GenerationConfig()), encoding="utf-8")
    save_file({name: _stored(tensor, dtype) for name, tensor in tensors.items()}, place / WEIGHTS)


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> Model:
    """Rebuild the model of a folder, in float32 and ready to be asked (eval). Raises CheckpointError."""
    folder = _existing(folder)
    config = read_settings(folder / CONFIG, ModelConfig)
    model = Model(config, Tokenizer.from_json(_read(folder / TOKENIZER), str(folder / TOKENIZER)))
    fill(model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
    return model.to(device).eval()


def load_generation(folder: str | Path) -> GenerationConfig:
    """How the model of a folder chooses words unless told otherwise."""
    path = Path(folder) / GENERATION
    return read_settings(path, GenerationConfig) if path.exists() else GenerationConfig()


def load_provenance(folder: str | Path) -> dict[str, Any]:
    """Where the model of a folder comes from."""
    return dict(json.loads(_read(Path(folder) / PROVENANCE)))


def fill(model: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Give a module its tensors, strictly: names, shapes and kinds must be just those it has."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(f"{where} does not fit its config.yaml: {_named('misses', missing, 'has besides', extra)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or tensor.is_floating_point() != own[name].is_floating_point():
            raise CheckpointError(
                f"{where} holds {name} as {tensor.dtype} {list(tensor.shape)}; "
                f"its config.yaml expects {own[name].dtype} {list(own[name].shape)}."
            )
    model.load_state_dict(tensors)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; only finite ones are believed."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; expected the weights as safetensors beside {CONFIG}.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file; copy or train it again.") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path} holds {name} with values that are not finite; copy or train it again.")
    return tensors


def write_folder(folder: str | Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary folder beside `folder`, then put it in place; an error leaves nothing behind."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        _flush(temporary)
        _put_in_place(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} could not be written: {_reason(error)}; what stood there is untouched.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename; an older folder of the name is set aside first and removed once the new one stands."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.rename(folder, aside)
    os.rename(temporary, folder)
    _flush_directory(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_directory(folder)


def _flush_directory(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return "no space is left on the disk" if "No space" in text or "os error 28" in text else text.split("(")[0].strip()


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous()


def _without_downloads(config: ModelConfig) -> ModelConfig:
    """The weights are in the folder: a backbone must not be fetched again when it is rebuilt."""
    sources = {
        name: source.model_copy(update={"options": source.options | ({"pretrained": False} if "pretrained" in source.options else {})})
        for name, source in config.sources.items()
    }
    return config.model_copy(update={"sources": sources})


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        given = "is no folder" if not folder.is_dir() else f"has no {CONFIG}"
        raise CheckpointError(f"{folder} {given}; expected a checkpoint folder, such as runs/NAME/best from mmx train.")
    return folder


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is missing or unreadable; a checkpoint folder needs it, copy it again.") from error


def _named(verb: str, missing: list[str], other: str, extra: list[str]) -> str:
    parts = [
        f"it {word} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for word, names in ((verb, missing), (other, extra))
        if names
    ]
    return "; ".join(parts) + "."
