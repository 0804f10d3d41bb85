"""A published checkpoint, as it lies in a folder or on the hub: its facts, its tensors, and what is wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmx.errors import CheckpointError, MmxError

CONFIG, SAFE, PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"
FETCHED = ["*.json", "*.txt", "*.model", "*.spm", "*.safetensors"]


@dataclass(frozen=True)
class HFCheckpoint:
    """A folder as `save_pretrained` of transformers writes it. `name` is what a person called it."""

    name: str
    folder: Path
    allow_pickled_weights: bool = False

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.read_json(CONFIG)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its published name, floating ones as they are stored."""
        for base, read in ((SAFE, self._read_safe), (PICKLED, self._read_pickled)):
            index = self.folder / f"{base}.index.json"
            if index.exists():
                parts = self.read_json(index.name).get("weight_map")
                if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
                    raise CheckpointError(f"{index} is damaged; expected a weight_map of files, download it again.")
                found: dict[str, Tensor] = {}
                for part in sorted(set(parts.values())):
                    found |= read(self.folder / Path(part).name)
                if lacking := sorted(parts.keys() - found.keys()):
                    raise CheckpointError(
                        f"{self.name!r} lacks {lacking[0]}, which its index names; download it again."
                    )
                return found
            if (self.folder / base).exists():
                return read(self.folder / base)
        raise CheckpointError(f"{self.name!r} has no {SAFE}; expected the weights of a published model; download them.")

    def read_json(self, file: str) -> dict[str, Any]:
        """A JSON file of the folder. Raises CheckpointError where it is missing or damaged."""
        try:
            found = json.loads((self.folder / file).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self.name!r} has no {file}; expected a folder of a published model, whole; download it again."
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.folder / file} cannot be read; expected JSON, download it again.") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.folder / file} holds no JSON object; download it again.")
        return found

    def _read_safe(self, path: Path) -> dict[str, Tensor]:
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            what = "is missing" if not path.exists() else "is damaged or only half downloaded"
            raise CheckpointError(f"{path} {what}; expected whole safetensors, download it again.") from error

    def _read_pickled(self, path: Path) -> dict[str, Tensor]:
        if not self.allow_pickled_weights:
            raise CheckpointError(
                f"{self.name!r} has its weights in {path.name}, a pickle, which may run code; look for a version with "
                f"{SAFE}, or add --allow-pickle, which reads tensors alone."
            )
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling raises anything
            what = "is missing" if not path.exists() else "is damaged, half downloaded, or holds more than tensors"
            raise CheckpointError(f"{path} {what}; nothing of it was used; download it again.") from error
        if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
            raise CheckpointError(f"{path} holds more than tensors by name; expected the weights of a model.")
        return dict(found)


def open_hf_checkpoint(name: str, revision: str | None = None, pickles: bool = False) -> HFCheckpoint:
    """The published checkpoint of a folder, or of a public name, which is downloaded by huggingface_hub.

    Raises CheckpointError where there is none.
    """
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        folder = _download(name, revision, pickles)
    found = HFCheckpoint(name, folder, pickles)
    found.read_json(CONFIG)
    return found


def _download(name: str, revision: str | None, pickles: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*FETCHED, "*.bin"] if pickles else FETCHED
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the library raises what it likes, from wrong names to broken connections
        raise CheckpointError(
            f"{name!r} is no folder here and could not be downloaded (no such name, no network, or HF_HUB_OFFLINE=1 is "
            "set); check the name, or give a folder: runs/NAME/best of mmx train, or that of a downloaded model."
        ) from error


@contextmanager
def conversion_errors(published: HFCheckpoint, family: str) -> Iterator[None]:
    """A fact that lacks in config.json, or fits no model, becomes a sentence that names it."""
    try:
        yield
    except MmxError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        lacking = f"has no {error.args[0]!r}" if isinstance(error, KeyError) else "has facts that do not fit together"
        raise CheckpointError(
            f"config.json of {published.name!r} {lacking}; expected that of a {family}, whole."
        ) from error


@contextmanager
def read_errors(published: HFCheckpoint, what: str) -> Iterator[None]:
    """Whatever goes wrong while one thing is read becomes a sentence that names it."""
    try:
        yield
    except MmxError:
        raise
    except Exception as error:  # transformers and tokenizers raise what they like
        raise CheckpointError(
            f"{published.name!r} has no {what} that can be read ({type(error).__name__}); download it again, or look "
            "with --traceback."
        ) from error
