"""What the commands have in common: the flags that several of them take, and how a model is loaded for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from mmx.errors import MmxError

if TYPE_CHECKING:
    from mmx.pipeline import Pipeline

_MODEL_HELP = "A checkpoint folder, or a published model's folder or public name; else the bundled model."
_BEAMS_HELP = "Beams; else the model's own number."
_DTYPE_HELP = "How the decoder's weights are held: float32, bfloat16, or int8 (on the CPU); the last two round."
ModelOption = Annotated[str | None, typer.Option("--model", metavar="NAME", help=_MODEL_HELP)]
DtypeOption = Annotated[str, typer.Option("--dtype", metavar="TYPE", help=_DTYPE_HELP)]
DeviceOption = Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ...")]
BatchOption = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Pictures handled at a time.")]
BeamsOption = Annotated[int | None, typer.Option("--beams", metavar="N", min=1, help=_BEAMS_HELP)]
TokensOption = Annotated[int | None, typer.Option("--max-tokens", metavar="N", min=1, help="Most tokens of a text.")]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write JSON lines to this file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


def load_pipeline(model: str | None, device: str, dtype: str = "float32") -> Pipeline:
    """The model on its device; a device or a type that is not there is refused."""
    from mmx.config import Precision

    if dtype not in (known := get_args(Precision)):
        raise MmxError(f"--dtype was given {dtype!r}; expected one of {', '.join(known)}.")
    check_device(device)
    from mmx.pipeline import load

    return load(model, device, dtype)  # type: ignore[arg-type]


def check_device(device: str) -> None:
    """Raise MmxError for a device that is not there."""
    import torch

    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise MmxError(f"device {device!r} is not available here; try --device cpu.") from error


def leave(all_well: bool) -> None:
    """End with exit code 1 where some items failed."""
    if not all_well:
        raise typer.Exit(1)
