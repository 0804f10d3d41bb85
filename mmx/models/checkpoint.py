"""Our checkpoint folder: config, weights, tokenizer, provenance. It rebuilds itself, without pickle, or says why not.

    config.yaml        the ModelConfig
    model.safetensors  every tensor, strictly: a missing or unexpected one is an error
    tokenizer.json     the `tokenizers` library's format
    provenance.json    data, steps, seed, versions, metrics, and the weights' sha256: a flipped byte is not believed
    generation.yaml    how words are chosen unless the caller says otherwise
    sources/NAME/      what an encoder needs beside options and tensors, such as a vocabulary of its own

A folder is written beside its place and renamed, so that what stands there is always whole.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmx.config.loader import dump_config, load_config
from mmx.config.schema import GenerationConfig, ModelConfig
from mmx.encoders.base import Encoder
from mmx.errors import CheckpointError, MmxError
from mmx.models.model import Model
from mmx.text.tokenizer import Tokenizer

BUNDLED = Path(__file__).parent / "bundled"
HF_CONFIG = "config.json"  # what a folder of transformers has, and none of ours
CONFIG, WEIGHTS, TOKENIZER = "config.yaml", "model.safetensors", "tokenizer.json"
PROVENANCE, GENERATION, SOURCES = "provenance.json", "generation.yaml", "sources"


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
    tensors = {**unique_tensors(model.state_dict()), **(weights or {})}
    (place / CONFIG).write_text(dump_config(model.config), encoding="utf-8")
    (place / TOKENIZER).write_text(model.tokenizer.to_json(), encoding="utf-8")
    (place / GENERATION).write_text(dump_config(generation or GenerationConfig()), encoding="utf-8")
    for name, encoder in model.encoders.items():
        _write_files(encoder, place / SOURCES / name)
    save_file({name: _stored(name, tensor, dtype) for name, tensor in tensors.items()}, place / WEIGHTS)
    facts = {**provenance, "sha256": _sha256(place / WEIGHTS)}
    (place / PROVENANCE).write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> Model:
    """Rebuild the model of a folder (or the one that is `bundled`), in float32 and ready to be asked (eval).

    Raises CheckpointError.
    """
    folder = _existing(folder)
    config = load_config(folder / CONFIG, ModelConfig)
    tokenizer = Tokenizer.from_json(_read(folder / TOKENIZER), str(folder / TOKENIZER), config.special_tokens)
    try:
        model = Model(config, tokenizer)
        for name, encoder in model.encoders.items():
            encoder.load_files(folder / SOURCES / name)
    except MmxError:
        raise
    except Exception as error:  # an encoder may raise anything about options that fit no model
        what = f"{folder / CONFIG} describes a model that cannot be built ({type(error).__name__})"
        raise CheckpointError(f"{what}; copy the folder again, or look with --traceback.") from error
    load_strict(model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
    written = load_provenance(folder).get("sha256") if (folder / PROVENANCE).exists() else None
    if written is not None and written != _sha256(folder / WEIGHTS):
        raise CheckpointError(f"{folder / WEIGHTS} is not the file that {PROVENANCE} tells of; copy the folder again.")
    return model.to(device).eval()


def load_generation(folder: str | Path) -> GenerationConfig:
    """How the model of a folder chooses words unless told otherwise."""
    path = _existing(folder) / GENERATION
    return load_config(path, GenerationConfig) if path.exists() else GenerationConfig()


def load_provenance(folder: str | Path) -> dict[str, Any]:
    """Where the model of a folder comes from."""
    path = Path(folder) / PROVENANCE
    try:
        return dict(json.loads(_read(path)))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged; expected one JSON object, copy it again.") from error


def load_strict(model: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Give a module its tensors, strictly: names, shapes and kinds must be just those it has (tied ones once)."""
    own = unique_tensors(model.state_dict())
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(
            f"{where} does not fit its config.yaml: {_named('misses', missing, 'has besides', extra)}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or tensor.is_floating_point() != own[name].is_floating_point():
            raise CheckpointError(
                f"{where} holds {name} as {tensor.dtype} {list(tensor.shape)}; "
                f"its config.yaml expects {own[name].dtype} {list(own[name].shape)}."
            )
    model.load_state_dict(tensors, strict=False)  # the names were compared above; the other names of tied ones lack


def unique_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by name; one that has several names (tied weights) by its first alone."""
    names: dict[object, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        names.setdefault(place if tensor.numel() else name, name)
    return {name: tensors[name] for name in names.values()}


def _write_files(encoder: Encoder, place: Path) -> None:
    place.mkdir(parents=True)
    encoder.save_files(place)
    for folder in (place, place.parent):
        if not any(folder.iterdir()):
            folder.rmdir()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Let `write` fill a temporary folder beside `folder`, then put it in place; an error leaves nothing behind.

    What stands there is replaced only if it is a checkpoint of ours: nobody's pictures, and no published model, go
    because of a slip of the hand.
    """
    place = Path(folder).resolve()
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not _is_ours(place) and (place.is_file() or any(place.iterdir())):
            raise CheckpointError(f"{folder} exists and is no checkpoint; give a new name, or that of an empty folder.")
        _remove_stale_temporaries(place)
        temporary.mkdir()
        write(temporary)
        _flush(temporary)
        _put_in_place(temporary, place)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} could not be written: {_reason(error)}; what stood there is untouched."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Path(folder)


def _is_ours(place: Path) -> bool:
    """Whether a folder is one of ours, by its weights; a published model's has a config.json."""
    return (place / WEIGHTS).is_file() and not (place / HF_CONFIG).is_file()


def _put_in_place(temporary: Path, place: Path) -> None:
    """Rename, or swap names with an older folder, so that at every moment the name leads to a whole one.

    Where no swap is to be had, the older one is set aside for the moment between two renames; `_existing` looks there.
    """
    aside = _backup_path(place)
    if not place.exists():
        os.rename(temporary, place)
    elif not _swap(temporary, place):
        os.rename(place, aside)
        try:
            os.rename(temporary, place)
        except OSError:
            os.rename(aside, place)
            raise
    _flush_directory(place.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system or the disk cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _backup_path(place: Path) -> Path:
    return place.with_name(f".{place.name}.old")


def _remove_stale_temporaries(place: Path) -> None:
    """Remove what a killed process left half written beside the place; the folder of one that runs stays."""
    for left in place.parent.glob(f".{glob.escape(place.name)}.*.tmp"):
        pid = left.name.split(".")[-2]
        if pid == str(os.getpid()) or (pid.isdecimal() and not _runs(int(pid))):
            shutil.rmtree(left, ignore_errors=True)


def _runs(pid: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere the question itself would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            _flush_directory(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _flush_directory(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return "no space is left on the disk" if "No space" in text or "os error 28" in text else text.split("(")[0].strip()


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """On the CPU, in the type asked for, in memory of its own. Refused where it could not be loaded again."""
    tensor = tensor.detach().cpu()
    tensor = (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous()
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name} holds values that are not finite as {tensor.dtype}; nothing was saved.")
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a name is `bundled`, or leads to a folder with a checkpoint of ours."""
    place = Path(folder)
    return str(folder) == "bundled" or (place / CONFIG).is_file() or _backup_path(place.resolve()).is_dir()


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if str(folder) == "bundled" and not folder.exists():
        return BUNDLED
    aside = _backup_path(folder.resolve())
    if not folder.exists() and aside.is_dir():
        return aside  # the process that was replacing it was killed between two renames
    if not (folder / CONFIG).is_file():
        given = "is no folder" if not folder.is_dir() else f"has no {CONFIG}"
        if (folder / HF_CONFIG).is_file():
            raise CheckpointError(f"{folder} is a published model; convert it first: mmx import {folder} OUT.")
        raise CheckpointError(f"{folder} {given}; expected a checkpoint folder, such as runs/NAME/best from mmx train.")
    return folder


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is missing or unreadable; a checkpoint folder needs it, copy it again."
        ) from error


def _named(verb: str, missing: list[str], other: str, extra: list[str]) -> str:
    parts = [
        f"it {word} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for word, names in ((verb, missing), (other, extra))
        if names
    ]
    return "; ".join(parts) + "."
