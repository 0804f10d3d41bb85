"""The command `mmx train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mmx.cli.options import QuietOption


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as those in configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as training.max_steps=100.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in output_dir.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Train a model from a YAML file.

    On several GPUs: accelerate launch -m mmx train CONFIG [KEY=VALUE...]
    """
    from mmx.config.loader import load_config
    from mmx.config.schema import RunConfig

    run_config = load_config(config, RunConfig, overrides or [])
    from mmx.training.loop import train as run  # after the file is checked, because it imports torch

    best = run(run_config, resume=resume, quiet=quiet)
    if os.environ.get("RANK", "0") == "0":
        print(best)
