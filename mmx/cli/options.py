"""What the commands have in common: the flags that several of them take, and how a model is loaded for them."""

from __future__ import annotations

from hashlib import blake2b
from os import SEEK_END
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from mmx.errors import MmxError

if TYPE_CHECKING:
    from mmx.inference.pipeline import Pipeline

_MODEL_HELP = "A checkpoint folder, or a published model's folder or public name; else the bundled model."
_BEAMS_HELP = "Beams; else the model's own number."
_GUIDANCE_HELP = "How much what is seen counts: above 1 more, 0 not at all; costs a second pass."
_DTYPE_HELP = "How the decoder's weights are held: float32, bfloat16, or int8 (on the CPU); the last two round."
ModelOption = Annotated[str | None, typer.Option("--model", metavar="NAME", help=_MODEL_HELP)]
DtypeOption = Annotated[str, typer.Option("--dtype", metavar="TYPE", help=_DTYPE_HELP)]
DeviceOption = Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ...")]
BatchOption = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Pictures handled at a time.")]
BeamsOption = Annotated[int | None, typer.Option("--beams", metavar="N", min=1, help=_BEAMS_HELP)]
GuidanceOption = Annotated[float | None, typer.Option("--guidance", metavar="N", min=0, help=_GUIDANCE_HELP)]
TokensOption = Annotated[int | None, typer.Option("--max-tokens", metavar="N", min=1, help="Most tokens of a text.")]
_OUT_HELP = "Append JSON lines to this file; what it holds is not said again, so a stopped run goes on."
BoxOption = Annotated[
    str | None, typer.Option("--box", metavar="X0,Y0,X1,Y1", help="Look only there; 0..1 from the top left.")
]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="FILE", help=_OUT_HELP)]
_OVERWRITE_HELP = "Start the file of --out anew; the old one stays until there is a first line."
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help=_OVERWRITE_HELP)]
RetryOption = Annotated[bool, typer.Option("--retry-errors", help="Try the errors in the file of --out again.")]
_SHARD_HELP = "Do one of N parts, counted from 0; together they are everything."
ShardOption = Annotated[str | None, typer.Option("--shard", metavar="I/N", help=_SHARD_HELP)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


def load_pipeline(model: str | None, device: str, dtype: str = "float32") -> Pipeline:
    """The model on its device; a device or a type that is not there is refused."""
    from mmx.config.schema import Precision

    if dtype not in (known := get_args(Precision)):
        raise MmxError(f"--dtype was given {dtype!r}; expected one of {', '.join(known)}.")
    check_device(device)
    from mmx.inference.pipeline import load

    return load(model, device, dtype)  # type: ignore[arg-type]


def run_options(command: str, model: str | None, dtype: str, options: Any, **more: Any) -> dict[str, Any]:
    """What rows of one file have in common: the command, the model with what its weights are known by, the options."""
    from mmx.models.checkpoint import BUNDLED, PROVENANCE, load_provenance

    folder = Path(BUNDLED if model is None else model)
    known = (folder / PROVENANCE).is_file()
    weights = load_provenance(folder).get("sha256") if known else _sizes_and_ends(folder)
    facts = {"command": command, "model": model or "bundled", "weights": weights, "dtype": dtype}
    return {**facts, **more, "options": options.model_dump(mode="json")}


def _sizes_and_ends(folder: Path) -> str | None:
    """A hash of a published model's weight files, by their sizes and last megabytes (the whole of them would take as
    long as loading them); None for a public name."""
    digest = blake2b(digest_size=16)
    files = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, SEEK_END)
            file.seek(max(0, size - 2**20))
            digest.update(f"{path.name} {size}".encode() + file.read())
    return digest.hexdigest() if files else None


def parse_shard(text: str | None) -> tuple[int, int]:
    """--shard 2/8 -> (2, 8); everything is (0, 1)."""
    index, slash, count = ("0/1" if text is None else text).partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise MmxError(f"--shard was given {text!r}; expected I/N with I from 0 to N - 1, such as 0/8.")
    return int(index), int(count)


def check_device(device: str) -> None:
    """Raise MmxError for a device that is not there."""
    import torch

    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise MmxError(f"device {device!r} is not available here; try --device cpu.") from error


def exit_with_status(all_well: bool) -> None:
    """End with exit code 1 where some items failed."""
    if not all_well:
        raise typer.Exit(1)
