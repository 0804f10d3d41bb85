"""Loading by folder or public name: our own checkpoints and published models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from mmx.config.schema import GenerationConfig
from mmx.errors import CheckpointError
from mmx.hub.hf_checkpoint import HFCheckpoint, find_folder
from mmx.hub.load import convert_hf_model
from mmx.models.checkpoint import (
    BUNDLED,
    CONFIG,
    HF_CONFIG,
    is_checkpoint,
    load_generation,
    load_model,
    open_checkpoint,
    save_model,
    write_folder,
)
from mmx.models.model import Model


class PretrainedModel(NamedTuple):
    """A loaded model and its generation options. `folder`: its checkpoint; None for a published model."""

    model: Model
    generation: GenerationConfig
    folder: Path | None


def load_pretrained(
    name: str | Path, revision: str | None = None, device: str | torch.device = "cpu"
) -> PretrainedModel:
    """Load a checkpoint of mmx or a published model, in evaluation mode.

    Args:
        name: a folder, `bundled`, or a public name.
        revision: branch, tag or commit of a public name.

    Raises CheckpointError if there is none, or if it cannot be used.
    """
    folder = checkpoint_folder(name, revision)
    if is_checkpoint(folder) or not (folder / HF_CONFIG).exists():
        return PretrainedModel(load_model(folder, device), load_generation(folder), folder)
    loaded = convert_hf_model(HFCheckpoint(str(name), folder), revision, device)
    return PretrainedModel(loaded.model, loaded.generation, None)


def import_checkpoint(
    name: str, out: str | Path, revision: str | None = None, allow_pickled_weights: bool = False
) -> Path:
    """Write the checkpoint folder of a published model, or a copy of a checkpoint of mmx, and return its path.

    The arguments are those of `load_hf_model`. Raises CheckpointError.
    """
    folder = checkpoint_folder(name, revision, allow_pickled_weights)
    if not is_checkpoint(folder):
        checkpoint = HFCheckpoint(name, folder, allow_pickled_weights)
        model, generation, provenance = convert_hf_model(checkpoint, revision)
        return save_model(out, model, provenance, generation)
    source = open_checkpoint(folder)
    load_model(source)  # no damaged checkpoint is copied
    return write_folder(out, lambda place: _copy_files(source, place))


def _copy_files(source: Path, target: Path) -> None:
    """Copy a checkpoint into an empty folder. Files of the cache are links, whose content is copied."""
    shutil.copytree(source, target, dirs_exist_ok=True)


def checkpoint_folder(name: str | Path, revision: str | None = None, allow_pickled_weights: bool = False) -> Path:
    """Return the folder of a checkpoint or a published model; a public name is downloaded.

    Raises CheckpointError if there is none.
    """
    if str(name) == "bundled" and not Path(name).exists():
        return BUNDLED
    if is_checkpoint(name):
        return Path(name)
    folder = find_folder(str(name), revision, allow_pickled_weights)
    if not (folder / CONFIG).is_file() and not (folder / HF_CONFIG).is_file() and not Path(name).expanduser().is_dir():
        raise CheckpointError(
            f"{str(name)!r} has neither {CONFIG} nor {HF_CONFIG}; expected a checkpoint of mmx or a published model.",
            code="hub.file_missing",
            name=str(name),
            file=CONFIG,
        )
    return folder
