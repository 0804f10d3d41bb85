"""The command `mmx import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A published model's folder, or its public name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint folder to write.")],
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="NAME", help="A branch or commit of a public name.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read pickled weights (*.bin), only tensors.")
    ] = False,
) -> None:
    """Convert a published model into a checkpoint folder.

    ViT-GPT2, TrOCR, BLIP (captions, questions), Marian, Whisper. Every tensor is
    mapped, or the model is refused. --model also reads such a model directly.
    """
    from mmx.hub import load_hf_model
    from mmx.models.checkpoint import save_model

    model, generation, origin = load_hf_model(name, revision, allow_pickle)
    print(save_model(out, model, origin, generation))
