"""The command `mmx scenes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def scenes(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    count: Annotated[int, typer.Option("-n", "--count", metavar="N", min=1, help="Number of scenes.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Random seed.")] = 0,
    size: Annotated[int, typer.Option("--size", metavar="N", min=32, max=2048, help="Side in pixels.")] = 128,
) -> None:
    """Write synthetic images with captions and questions.

    The shape, color, size and box of each object are written with them.
    """
    from mmx.data.scene_folder import write_scenes

    print(write_scenes(out, count, seed, size))
