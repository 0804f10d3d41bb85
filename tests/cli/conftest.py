"""Fixtures of the command line: the program in this process, a tiny model on disk, a few images."""

import sys
from pathlib import Path

import pytest
from cli_cases import Mmx, Ran, draw

from mmx.cli import app as cli
from mmx.config.schema import GenerationConfig, SourceConfig
from mmx.models.checkpoint import save_model
from mmx.testing import tiny_model


@pytest.fixture
def mmx(monkeypatch, capsys) -> Mmx:
    """Run the program in this process, through `main` like the installed command."""
    errors: list[Exception] = []
    error_message = cli._error_message

    def record(error: Exception) -> str | None:
        errors.append(error)
        return error_message(error)

    monkeypatch.setattr(cli, "_error_message", record)

    def run(*words: object) -> Ran:
        errors.clear()
        monkeypatch.setattr(sys, "argv", ["mmx", *map(str, words)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return Ran(exit_info.value.code or 0, *capsys.readouterr(), errors[0] if errors else None)

    return run


@pytest.fixture(scope="session")
def image_source() -> SourceConfig:
    return SourceConfig(encoder="image", options={"backbone": "resnet10t", "size": 32, "stage": 2})


@pytest.fixture(scope="session")
def model(tmp_path_factory, image_source) -> Path:
    """The checkpoint folder of a tiny untrained model."""
    generation = GenerationConfig(max_new_tokens=5, min_new_tokens=3)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_model(folder, tiny_model({"image": image_source}), None, generation)


@pytest.fixture
def images(tmp_path) -> list[Path]:
    return [draw(tmp_path / "images" / f"{number}.png", number) for number in range(5)]
