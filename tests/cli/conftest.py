"""For all journeys: the program within this process, a tiny model on disk, a few pictures."""

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
    """The program within this process: as `main` is called by the installed command."""

    def run(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["mmx", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return Ran(left.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A checkpoint folder of a tiny model that learned nothing."""
    source = SourceConfig(encoder="image", options={"backbone": "resnet10t", "size": 32, "stage": 2})
    generation = GenerationConfig(max_new_tokens=5, min_new_tokens=3)
    return save_model(tmp_path_factory.mktemp("models") / "tiny", tiny_model({"image": source}), None, generation)


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    return [draw(tmp_path / "photos" / f"{number}.png", number) for number in range(5)]
