"""`mmx import`, and published models that are read directly."""

import json
import shutil
from pathlib import Path

import pytest
from parity_cases import save_vit_gpt2

from mmx.config.schema import SourceConfig
from mmx.models.checkpoint import save_model
from mmx.testing import tiny_model

IMAGES = Path(__file__).parents[2] / "demos" / "images"


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> str:
    return str(save_vit_gpt2(tmp_path_factory.mktemp("published")))


def test_a_published_model_and_its_conversion_give_equal_captions(mmx, published, tmp_path) -> None:
    images = sorted(IMAGES.glob("*.png"))[:3]
    direct = mmx("caption", *images, "--model", published)
    assert (direct.code, len(direct.lines)) == (0, 3)
    converted = tmp_path / "converted"
    assert mmx("import", published, converted).outputs == (0, f"{converted}\n", "")
    assert mmx("caption", *images, "--model", converted).out == direct.out
    assert json.loads((converted / "provenance.json").read_text())["imported_from"] == published
    assert len(mmx("caption", *images, "--model", published, "--dtype", "bfloat16").lines) == 3


def test_an_unknown_name_and_a_folder_without_a_model_are_refused(mmx, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert mmx("import", "nobody/nothing", "out").refused().code == "hub.not_found"
    error = mmx("import", IMAGES, "out").refused()
    assert error.code == "hub.file_missing"
    assert not Path("out").exists()


def test_a_folder_with_other_files_is_not_replaced(mmx, published, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("text")
    assert mmx("import", published, tmp_path / "mine").refused().code == "checkpoint.not_replaceable"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]


def test_an_incomplete_download_writes_nothing(mmx, published, tmp_path) -> None:
    copy = Path(shutil.copytree(published, tmp_path / "copy"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert mmx("import", copy, tmp_path / "converted").refused().code == "hub.damaged"
    assert not (tmp_path / "converted").exists()


@pytest.fixture(scope="module")
def translator(tmp_path_factory) -> Path:
    """A model with only a text source."""
    options = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_position_embeddings": 64}
    model = tiny_model({"text": SourceConfig(encoder="text", options=options)})
    return save_model(tmp_path_factory.mktemp("models") / "translator", model)


def test_texts_are_given_with_their_source(mmx, translator) -> None:
    long = "guten tag " * 60
    ran = mmx("caption", "text=Guten Morgen", f"text={long}", "--model", translator, "--json", "--max-new-tokens", 4)
    assert [row["text"] for row in ran.rows] == ["Guten Morgen", long]


@pytest.mark.parametrize("name", ["text=", "letter.txt"])
def test_a_path_is_not_read_as_a_text(mmx, translator, name) -> None:
    ran = mmx("caption", name, "--model", translator)
    assert (ran.code, ran.out, len(ran.errors)) == (1, "", 1)
    assert "text=..." in ran.err
