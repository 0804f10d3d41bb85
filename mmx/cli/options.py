"""Options that several commands share, how their values are parsed, and how a model is loaded for a command."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from os import SEEK_END
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from mmx.config.environment import DEVICE_VARIABLE, MODEL_VARIABLE
from mmx.errors import MmxError

if TYPE_CHECKING:
    from mmx.boxes import Box
    from mmx.config.schema import GenerationConfig, Precision, SpeechTask
    from mmx.inference.pipeline import Pipeline

_MODEL_HELP = "Folder or public name of a checkpoint or a published model. Default: MMX_MODEL, or the bundled model."
_DEVICE_HELP = "cpu, cuda, cuda:1, mps, ... MMX_DEVICE sets the default."
_DTYPE_HELP = "Type of the decoder's weights: float32, bfloat16, or int8 (CPU only)."
_GUIDANCE_HELP = "Classifier-free guidance: 1 is off, more follows the input more closely. Needs a second pass."
_LANGUAGE_HELP = "Language of speech, such as de or German. Default: the language of each audio is detected."
_TASK_HELP = "What is done with speech: transcribe, or translate (to English)."
_OUT_HELP = "Append JSON lines to this file. Rows that it has are skipped, so a stopped run can be continued."
_OVERWRITE_HELP = "Start the file of --out again. The old file is kept until the first row is written."
_SHARD_HELP = "Process one of N parts, counted from 0."
_BOX_HELP = "Attend to this region only: left, top, right, bottom in 0..1."
_SOURCE_HELP = "Another input for a source of the model, such as audio=b.wav."

ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="NAME", envvar=MODEL_VARIABLE, show_envvar=False, help=_MODEL_HELP)
]
DtypeOption = Annotated[str, typer.Option("--dtype", metavar="TYPE", help=_DTYPE_HELP)]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="NAME", envvar=DEVICE_VARIABLE, show_envvar=False, help=_DEVICE_HELP)
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Inputs in one batch.")]
NumBeamsOption = Annotated[int | None, typer.Option("--num-beams", metavar="N", min=1, help="Beams of the search.")]
MaxNewTokensOption = Annotated[
    int | None, typer.Option("--max-new-tokens", metavar="N", min=1, help="Maximum number of tokens in a text.")
]
GuidanceScaleOption = Annotated[float | None, typer.Option("--guidance-scale", metavar="X", min=0, help=_GUIDANCE_HELP)]
LanguageOption = Annotated[str | None, typer.Option("--language", metavar="NAME", help=_LANGUAGE_HELP)]
TaskOption = Annotated[str | None, typer.Option("--task", metavar="NAME", help=_TASK_HELP)]
BoxOption = Annotated[str | None, typer.Option("--box", metavar="X0,Y0,X1,Y1", help=_BOX_HELP)]
SourceOption = Annotated[list[str] | None, typer.Option("--source", metavar="NAME=INPUT", help=_SOURCE_HELP)]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="FILE", help=_OUT_HELP)]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help=_OVERWRITE_HELP)]
RetryErrorsOption = Annotated[
    bool, typer.Option("--retry-errors", help="Process the inputs of error rows in --out again.")
]
ShardOption = Annotated[str | None, typer.Option("--shard", metavar="I/N", help=_SHARD_HELP)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show no progress bar.")]


def load_pipeline(model: str | None, device: str, dtype: str = "float32") -> Pipeline:
    """Load a model. Raises MmxError for an unknown dtype and for a device that is not available."""
    checked = parse_dtype(dtype)
    check_device(device)
    from mmx.inference.pipeline import load

    return load(model, device, checked)


def parse_dtype(dtype: str) -> Precision:
    """Check the value of --dtype. Raises MmxError."""
    from mmx.config.schema import Precision

    known: tuple[Precision, ...] = get_args(Precision)
    for name in known:
        if name == dtype:
            return name
    message = f"--dtype was given {dtype!r}; expected one of {', '.join(known)}."
    raise MmxError(message, code="option.dtype", given=dtype)


def parse_task(task: str | None) -> SpeechTask | None:
    """Check the value of --task. Raises MmxError."""
    from mmx.config.schema import SpeechTask

    known: tuple[SpeechTask, ...] = get_args(SpeechTask)
    for name in known:
        if name == task:
            return name
    if task is None:
        return None
    message = f"--task was given {task!r}; expected one of {', '.join(known)}."
    raise MmxError(message, code="option.task", given=task)


def check_device(device: str) -> None:
    """Raise MmxError if a device is not available."""
    from mmx.inference.arguments import is_available

    if not is_available(device):
        message = f"device {device!r} is not available here; try --device cpu."
        raise MmxError(message, code="option.device", given=device)


def parse_shard(text: str | None) -> tuple[int, int]:
    """Parse --shard: 2/8 -> (2, 8); None -> (0, 1). Raises MmxError."""
    index, slash, count = ("0/1" if text is None else text).partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        message = f"--shard was given {text!r}; expected I/N with I from 0 to N - 1, such as 0/8."
        raise MmxError(message, code="option.shard", given=text)
    return int(index), int(count)


def parse_box(text: str | None) -> Box | None:
    """Parse and check --box. Raises MmxError."""
    if text is None:
        return None
    try:
        x0, y0, x1, y1 = (float(number) for number in text.split(","))
    except ValueError as error:
        message = f"--box was given {text!r}; expected four numbers in 0..1, such as 0.1,0.2,0.5,0.6."
        raise MmxError(message, code="option.box", given=text) from error
    from mmx.boxes import check_box

    box = (x0, y0, x1, y1)
    check_box(box)
    return box


def parse_sources(texts: Sequence[str] | None) -> dict[str, str]:
    """Parse the values of --source into inputs by source name. Raises MmxError."""
    sources: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            message = f"--source was given {text!r}; expected NAME=INPUT, such as audio=b.wav."
            raise MmxError(message, code="option.source", given=text)
        if name in sources:
            message = f"--source was given {name} more than once; a source takes one input."
            raise MmxError(message, code="option.source_twice", given=text)
        sources[name] = value
    return sources


def run_config(
    command: str, model: str | None, dtype: str, options: GenerationConfig, folder: Path | None = None
) -> dict[str, object]:
    """Return what all rows of a results file have in common: the command, the model and its weights, the options.

    folder: the checkpoint of the model, if it is one of mmx. That of a public name lies in the cache.
    """
    from mmx.models.checkpoint import BUNDLED, PROVENANCE, load_provenance

    place = folder or Path(BUNDLED if model is None else model)
    is_own = (place / PROVENANCE).is_file()
    weights = load_provenance(place).get("sha256") if is_own else _weights_fingerprint(place)
    return {
        "command": command,
        "model": model or "bundled",
        "weights": weights,
        "dtype": dtype,
        "options": options.model_dump(mode="json"),
    }


def _weights_fingerprint(folder: Path) -> str | None:
    """Return a hash of the sizes and last megabytes of a published model's weight files; None for a public name.

    Hashing whole files would take as long as loading them.
    """
    digest = blake2b(digest_size=16)
    files = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, SEEK_END)
            file.seek(max(0, size - 2**20))
            digest.update(f"{path.name} {size}".encode() + file.read())
    return digest.hexdigest() if files else None


def exit_with_status(succeeded: bool) -> None:
    """End with exit code 1 if some items failed."""
    if not succeeded:
        raise typer.Exit(1)
