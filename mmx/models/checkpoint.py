"""The checkpoint folder: configuration, weights, tokenizer and provenance. It holds no pickle.

    config.yaml        the ModelConfig
    model.safetensors  every tensor; a missing or unexpected one is an error
    tokenizer.json     in the format of the `tokenizers` library
    provenance.json    version of this format, sha256 of the weights, data, steps, seed, versions, metrics
    generation.yaml    default generation options
    sources/NAME/      further files of an encoder, such as a vocabulary

A folder is replaced atomically (`mmx.io.atomic`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmx.config.loader import dump_config, load_config
from mmx.config.schema import GenerationConfig, ModelConfig
from mmx.encoders.base import Encoder
from mmx.errors import CheckpointError, MmxError
from mmx.io.atomic import atomic_write_folder, folder_or_backup
from mmx.models.model import Model
from mmx.text.tokenizer import Tokenizer

FORMAT_VERSION = 2  # 1 was written by mmx 0.1, with other configuration keys and tensor names
BUNDLED = Path(__file__).parent / "bundled"
HF_CONFIG = "config.json"  # a folder of transformers has it, a checkpoint of mmx does not
CONFIG = "config.yaml"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
PROVENANCE = "provenance.json"
GENERATION = "generation.yaml"
SOURCES = "sources"
CHECKPOINT_FILES = (CONFIG, WEIGHTS, TOKENIZER, PROVENANCE, GENERATION, f"{SOURCES}/*")  # patterns of paths
PICKLED_FILES = ("*.pkl", "*.pickle", "*.pt", "*.pth", "*.ckpt", "*.joblib")


# ---- saving ----------------------------------------------------------------------------------------------------


def save_model(
    folder: str | Path,
    model: Model,
    provenance: Mapping[str, object] | None = None,
    generation: GenerationConfig | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the checkpoint folder of a model, replacing an older one atomically.

    Args:
        folder: a new or empty folder, or a checkpoint to replace.
        provenance: what `provenance.json` records besides the format version and the hash of the weights.
        dtype: type in which floating-point tensors are stored, such as torch.float16.

    Raises:
        CheckpointError: the folder holds something else, cannot be written, or a tensor is not finite.
    """
    return write_folder(folder, lambda place: write_model(place, model, provenance or {}, generation, dtype))


def write_model(
    folder: Path,
    model: Model,
    provenance: Mapping[str, object],
    generation: GenerationConfig | None = None,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the files of a model into an existing folder. `weights` replace tensors of the model, by name."""
    tensors = {**unique_tensors(model.state_dict()), **(weights or {})}
    stored = {name: _for_storage(name, tensor, dtype) for name, tensor in tensors.items()}
    (folder / CONFIG).write_text(dump_config(model.config), encoding="utf-8")
    (folder / TOKENIZER).write_text(model.tokenizer.to_json(), encoding="utf-8")
    (folder / GENERATION).write_text(dump_config(generation or GenerationConfig()), encoding="utf-8")
    for name, encoder in model.encoders.items():
        _write_encoder_files(encoder, folder / SOURCES / name)
    save_file(stored, folder / WEIGHTS)
    record = {**provenance, "format_version": FORMAT_VERSION, "sha256": _sha256(folder / WEIGHTS)}
    (folder / PROVENANCE).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


def write_folder(folder: str | Path, write: Callable[[Path], None]) -> Path:
    """Replace a folder atomically by one that `write` fills. An error leaves the older folder as it was.

    Only checkpoints of mmx and empty folders are replaced, never other files of the user. Raises CheckpointError.
    """
    place = Path(folder).resolve()
    try:
        if place.exists() and not _may_replace(place):
            raise CheckpointError(
                f"{folder} exists and is not a checkpoint; give a new name or the name of an empty folder.",
                code="checkpoint.not_replaceable",
                path=str(folder),
            )
        with atomic_write_folder(place) as temporary:
            write(temporary)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} could not be written: {_write_failure(error)}; an older checkpoint there is unchanged.",
            code="checkpoint.write",
            path=str(folder),
        ) from error
    return Path(folder)


def _may_replace(folder: Path) -> bool:
    """Whether a path is an empty folder or a checkpoint of mmx; a published model has a config.json."""
    if folder.is_file():
        return False
    is_checkpoint_folder = (folder / WEIGHTS).is_file() and not (folder / HF_CONFIG).is_file()
    return is_checkpoint_folder or not any(folder.iterdir())


def _write_encoder_files(encoder: Encoder, folder: Path) -> None:
    """Let an encoder save further files; folders that stay empty are removed."""
    folder.mkdir(parents=True)
    encoder.save_files(folder)
    for path in (folder, folder.parent):
        if not any(path.iterdir()):
            path.rmdir()


def _for_storage(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a contiguous CPU copy in the type given. Raises CheckpointError for values that are not finite."""
    tensor = tensor.detach().cpu()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    tensor = tensor.contiguous()
    if not _is_finite(tensor):
        raise CheckpointError(
            f"{name} holds values that are not finite as {tensor.dtype}; nothing was saved.",
            code="checkpoint.not_finite",
            tensor=name,
        )
    is_view = tensor.untyped_storage().nbytes() != tensor.nbytes  # safetensors refuses a part of a larger storage
    return tensor.clone() if is_view else tensor


def _write_failure(error: Exception) -> str:
    """The reason of an OSError, or of a SafetensorError that wraps one."""
    text = getattr(error, "strerror", None) or str(error)
    if "No space" in text or "os error 28" in text:
        return "no space is left on the disk"
    return text.split("(")[0].strip()


# ---- loading ---------------------------------------------------------------------------------------------------


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> Model:
    """Rebuild the model of a checkpoint folder (or of `bundled`) in float32 and in eval mode.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged, or was written by an older version.
        ConfigError: its configuration is not valid.
        EncoderError: one of its encoders is not installed or cannot be built.
    """
    folder = open_checkpoint(folder)
    config = load_config(folder / CONFIG, ModelConfig)
    tokenizer = Tokenizer.from_json(_read_text(folder / TOKENIZER), str(folder / TOKENIZER), config.special_tokens)
    model = _build_model(folder, config, tokenizer)
    load_strict(model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
    if load_provenance(folder).get("sha256", None) not in (None, _sha256(folder / WEIGHTS)):
        raise CheckpointError(
            f"{folder / WEIGHTS} does not have the sha256 that {PROVENANCE} records; copy the folder again.",
            code="checkpoint.sha256",
            path=str(folder / WEIGHTS),
        )
    return model.to(device).eval()


def load_model_config(folder: str | Path) -> ModelConfig:
    """Return the configuration of the model of a checkpoint folder."""
    return load_config(open_checkpoint(folder) / CONFIG, ModelConfig)


def load_generation(folder: str | Path) -> GenerationConfig:
    """Return the default generation options of a checkpoint folder."""
    path = open_checkpoint(folder) / GENERATION
    return load_config(path, GenerationConfig) if path.exists() else GenerationConfig()


def load_provenance(folder: str | Path) -> dict[str, object]:
    """Return the content of `provenance.json`. Raises CheckpointError where it is missing or damaged."""
    path = Path(folder) / PROVENANCE
    try:
        return dict(json.loads(_read_text(path)))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged; expected one JSON object, copy it again.", code="checkpoint.damaged", path=str(path)
        ) from error


def is_checkpoint(folder: str | Path) -> bool:
    """Whether this is `bundled`, or a folder with a checkpoint of mmx.

    A published model that has a config.yaml of its own is none.
    """
    place = folder_or_backup(Path(folder))
    is_published = (place / HF_CONFIG).is_file() and not (place / PROVENANCE).is_file()
    return str(folder) == "bundled" or ((place / CONFIG).is_file() and not is_published)


def check_format(folder: Path) -> None:
    """Raise CheckpointError for a folder that another version of mmx wrote in another format."""
    version = load_provenance(folder).get("format_version", 1)
    if version == FORMAT_VERSION:
        return
    details = {"path": str(folder), "format_version": version, "expected": FORMAT_VERSION}
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {version}, which mmx 0.1 wrote, and this version reads format "
            f"{FORMAT_VERSION}; train it again with this version, or keep using mmx 0.1 for it.",
            code="checkpoint.old_format",
            **details,
        )
    raise CheckpointError(
        f"{folder} has checkpoint format {version!r:.20}, and this version reads format {FORMAT_VERSION}; "
        "install a newer version of mmx.",
        code="checkpoint.new_format",
        **details,
    )


def open_checkpoint(folder: str | Path) -> Path:
    """Return the folder to read, or its backup, once its files and its format are those of a checkpoint.

    Raises CheckpointError for any other folder.
    """
    folder = Path(folder)
    if str(folder) == "bundled" and not folder.exists():
        return BUNDLED
    folder = folder_or_backup(folder)
    if (folder / CONFIG).is_file():
        check_format(folder)
        return folder
    if (folder / HF_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} is a published model; convert it first: mmx import {folder} OUT.",
            code="checkpoint.published_model",
            path=str(folder),
        )
    problem = f"has no {CONFIG}" if folder.is_dir() else "is not a folder"
    raise CheckpointError(
        f"{folder} {problem}; expected a checkpoint folder, such as runs/NAME/best from mmx train.",
        code="checkpoint.missing",
        path=str(folder),
    )


def _build_model(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> Model:
    try:
        model = Model(config, tokenizer)
        for name, encoder in model.encoders.items():
            encoder.load_files(folder / SOURCES / name)
    except MmxError:
        raise
    except Exception as error:  # an encoder may raise any exception about its options
        raise CheckpointError(
            f"{folder / CONFIG} describes a model that cannot be built ({type(error).__name__}); "
            "copy the folder again, or see the cause with --traceback.",
            code="checkpoint.build",
            path=str(folder / CONFIG),
        ) from error
    return model


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is missing or unreadable; a checkpoint folder needs it, copy it again.",
            code="checkpoint.missing_file",
            path=str(path),
        ) from error


# ---- tensors ---------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file. Raises CheckpointError unless all values are finite."""
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing; expected the weights as safetensors in the folder of {CONFIG}.",
            code="checkpoint.missing_file",
            path=str(path),
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file; copy it again or train again.",
            code="checkpoint.damaged",
            path=str(path),
        ) from error
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise CheckpointError(
                f"{path} holds {name} with values that are not finite; copy it again or train again.",
                code="checkpoint.not_finite",
                path=str(path),
                tensor=name,
            )
    return tensors


def load_strict(model: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load tensors into a module whose names, shapes and kinds must match exactly (tied tensors occur once).

    Raises CheckpointError, whose sentence names `where` the tensors are from.
    """
    own = unique_tensors(model.state_dict())
    missing = sorted(own.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        problems = []
        if missing:
            problems.append(f"it lacks {_first_names(missing)}")
        if unexpected:
            problems.append(f"it has the unexpected {_first_names(unexpected)}")
        raise CheckpointError(
            f"{where} does not fit its {CONFIG}: {'; '.join(problems)}.",
            code="checkpoint.tensor_names",
            path=where,
            missing=missing,
            unexpected=unexpected,
        )
    for name, tensor in tensors.items():
        expected = own[name]
        if tensor.shape != expected.shape or tensor.is_floating_point() != expected.is_floating_point():
            raise CheckpointError(
                f"{where} holds {name} as {tensor.dtype} {list(tensor.shape)}; "
                f"its {CONFIG} expects {expected.dtype} {list(expected.shape)}.",
                code="checkpoint.tensor_shape",
                path=where,
                tensor=name,
                expected=list(expected.shape),
            )
    model.load_state_dict(tensors, strict=False)  # names were compared above; further names of tied tensors are absent


def unique_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by name; one that has several names (tied weights) only by its first."""
    first_names: dict[object, str] = {}
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        first_names.setdefault(identity if tensor.numel() else name, name)
    return {name: tensors[name] for name in first_names.values()}


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _first_names(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
