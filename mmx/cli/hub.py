"""The commands `mmx import` and `mmx push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A published model's folder, or its public name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint folder to write.")],
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="NAME", help="A branch, tag or commit of a public name.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read pickled weights (*.bin), only tensors.")
    ] = False,
) -> None:
    """Convert a published model into a checkpoint folder.

    ViT-GPT2, TrOCR, BLIP (captions, questions), Marian, Whisper. Every tensor is
    mapped, or the model is refused. --model of other commands reads such a model
    directly. A checkpoint of mmx is copied.
    """
    from mmx.hub.pretrained import import_checkpoint

    print(import_checkpoint(name, out, revision, allow_pickle))


def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint folder, such as runs/mine/best.")],
    name: Annotated[str, typer.Argument(metavar="USER/NAME", help="Its public name. It is created if it is new.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private repository.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="NAME", help="A branch, created if it is new. Default: main.")
    ] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", metavar="NAME", help="For the model card, such as apache-2.0.")
    ] = None,
) -> None:
    """Upload a checkpoint folder to the Hugging Face Hub.

    In one commit, with a model card if there is none. Prints the address. Load it
    by its name: mmx.load("user/name"), or --model user/name.
    """
    from mmx.hub.push import PushOptions, push_checkpoint

    print(push_checkpoint(folder, name, PushOptions(private, revision, license_name)))
