"""A checkpoint in the format of transformers, in a folder or on the Hugging Face Hub: its JSON files and tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmx.encoders.pretrained.architecture import hf_errors
from mmx.errors import CheckpointError, convert_errors
from mmx.hub.client import download
from mmx.models.checkpoint import CHECKPOINT_FILES, PICKLED_FILES

HFConfig = dict[str, Any]  # a parsed JSON file; values are validated where our configuration is built from them
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
DOWNLOADED_FILES = ["*.json", "*.txt", "*.model", "*.spm", "*.safetensors"]


@dataclass(frozen=True)
class HFCheckpoint:
    """A folder as written by `save_pretrained`.

    name: the folder or public name that the user gave.
    allow_pickled_weights: read tensors from *.bin files too.
    """

    name: str
    folder: Path
    allow_pickled_weights: bool = False

    @cached_property
    def config(self) -> HFConfig:
        """The content of config.json."""
        return self.read_json(CONFIG)

    @cached_property
    def generation_config(self) -> HFConfig:
        """The content of generation_config.json, or {} if there is none."""
        has_file = (self.folder / GENERATION_CONFIG).exists()
        return self.read_json(GENERATION_CONFIG) if has_file else {}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their published names, in the stored dtype."""
        readers = {SAFETENSORS: self._read_safetensors, PICKLE: self._read_pickle}
        for file, read in readers.items():
            if (self.folder / f"{file}.index.json").exists():
                return self._read_shards(f"{file}.index.json", read)
            if (self.folder / file).exists():
                return read(self.folder / file)
        raise CheckpointError(
            f"{self.name!r} has no {SAFETENSORS}; expected the weights of a published model; download them.",
            code="hub.file_missing",
            name=self.name,
            file=SAFETENSORS,
        )

    def read_json(self, file: str) -> HFConfig:
        """Read a JSON file of the folder. Raises CheckpointError if it is missing or damaged."""
        path = self.folder / file
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self.name!r} has no {file}; expected the whole folder of a published model; download it again.",
                code="hub.file_missing",
                name=self.name,
                file=file,
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise _damaged(path, "cannot be read; expected JSON") from error
        if not isinstance(content, dict):
            raise _damaged(path, "holds no JSON object")
        return content

    def _read_shards(self, index_file: str, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Read weights in several files, which an index lists."""
        file_of_tensor = self.read_json(index_file).get("weight_map")
        if not isinstance(file_of_tensor, dict) or not all(isinstance(file, str) for file in file_of_tensor.values()):
            raise _damaged(self.folder / index_file, "is damaged; expected a weight_map of files")
        tensors: dict[str, Tensor] = {}
        for file in sorted(set(file_of_tensor.values())):
            tensors |= read(self.folder / Path(file).name)
        missing = sorted(file_of_tensor.keys() - tensors.keys())
        if missing:
            raise CheckpointError(
                f"{self.name!r} lacks {missing[0]}, which its index names; download it again.",
                code="hub.missing_tensors",
                name=self.name,
                tensors=missing,
            )
        return tensors

    def _read_safetensors(self, path: Path) -> dict[str, Tensor]:
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            if not path.exists():
                raise _missing(path) from error
            raise _damaged(path, "is damaged or incompletely downloaded; expected whole safetensors") from error

    def _read_pickle(self, path: Path) -> dict[str, Tensor]:
        """Read a pickle of tensors; `weights_only` refuses any other content."""
        if not self.allow_pickled_weights:
            raise CheckpointError(
                f"{self.name!r} has its weights in {path.name}, a pickle, which may run code; look for a version with "
                f"{SAFETENSORS}, or add --allow-pickle, which reads tensors only.",
                code="hub.pickle",
                name=self.name,
                file=path.name,
            )
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling raises exceptions of any class
            if not path.exists():
                raise _missing(path) from error
            problem = "is damaged, incompletely downloaded, or holds more than tensors; none of it was used"
            raise _damaged(path, problem) from error
        if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
            raise _damaged(path, "holds more than tensors by name; expected the weights of a model")
        return dict(content)


def open_hf_checkpoint(name: str, revision: str | None = None, allow_pickled_weights: bool = False) -> HFCheckpoint:
    """Open the checkpoint of a folder, or of a public name, which huggingface_hub downloads.

    Raises CheckpointError if there is none.
    """
    folder = find_folder(name, revision, allow_pickled_weights)
    checkpoint = HFCheckpoint(name, folder, allow_pickled_weights)
    checkpoint.read_json(CONFIG)
    return checkpoint


def find_folder(name: str, revision: str | None = None, allow_pickled_weights: bool = False) -> Path:
    """Return the folder of a model: the one given, or that of a public name, which is downloaded.

    A public name may be that of a published model or of a checkpoint of mmx. Raises CheckpointError if there is none.
    """
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    patterns = [*DOWNLOADED_FILES, *CHECKPOINT_FILES]
    if allow_pickled_weights:
        patterns.append("*.bin")
    return download(name, revision, patterns, PICKLED_FILES)


def conversion_errors(checkpoint: HFCheckpoint, family: str) -> AbstractContextManager[None]:
    """Convert exceptions about a missing or invalid field of config.json to CheckpointError."""

    def describe(error: BaseException) -> str:
        problem = f"has no {error.args[0]!r}" if isinstance(error, KeyError) else "has values that do not fit together"
        return f"config.json of {checkpoint.name!r} {problem}; expected that of a {family}, whole."

    return convert_errors(CheckpointError, describe, code="hub.config", name=checkpoint.name, family=family)


def read_errors(checkpoint: HFCheckpoint, what: str) -> AbstractContextManager[None]:
    """Convert exceptions raised while a library reads a file to CheckpointError."""
    return hf_errors(checkpoint.name, what, "the files of a published model", CheckpointError, "hub.unreadable")


def _missing(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is missing; download the model again.", code="hub.file_missing", path=str(path), file=path.name
    )


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path} {problem}; download it again.", code="hub.damaged", path=str(path))
