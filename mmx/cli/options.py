"""What the commands have in common: the flags that several of them take, and how a model is loaded for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmx.errors import MmxError

if TYPE_CHECKING:
    from mmx.pipeline import Pipeline

_MODEL_HELP, _BEAMS_HELP = "A checkpoint folder; else the bundled model.", "Beams; else the model's own number."
ModelOption = Annotated[str | None, typer.Option("--model", metavar="FOLDER", help=_MODEL_HELP)]
DeviceOption = Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ...")]
BatchOption = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Pictures handled at a time.")]
BeamsOption = Annotated[int | None, typer.Option("--beams", metavar="N", min=1, help=_BEAMS_HELP)]
TokensOption = Annotated[int | None, typer.Option("--max-tokens", metavar="N", min=1, help="Most tokens of a text.")]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write JSON lines to this file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


def load_pipeline(model: str | None, device: str) -> Pipeline:
    """The model on its device; a device that is not there is refused."""
    import torch

    from mmx.pipeline import load

    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise MmxError(f"device {device!r} is not available here; try --device cpu.") from error
    return load(model, device)


def leave(all_well: bool) -> None:
    """End with exit code 1 where some items failed."""
    if not all_well:
        raise typer.Exit(1)
