"""A published model from the command line: read as it is, converted, refused; in processes of their own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from parity_cases import save_vit_gpt2

from mmx.config.schema import SourceConfig
from mmx.models.checkpoint import save_model
from mmx.testing import tiny_model

PICTURES = Path(__file__).parents[2] / "demos" / "pictures"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return str(save_vit_gpt2(tmp_path_factory.mktemp("published")))


def mmx(*words, code=0):
    ran = subprocess.run([sys.executable, "-m", "mmx", *map(str, words)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == code, ran.stderr
    return ran


def test_a_published_model_captions_as_it_is_and_converted(published, tmp_path):
    pictures = sorted(PICTURES.glob("*.png"))[:3]
    direct = mmx("caption", *pictures, "--model", published, "--quiet").stdout
    assert len(direct.splitlines()) == 3
    assert mmx("import", published, tmp_path / "ours").stdout.strip() == str(tmp_path / "ours")
    assert mmx("caption", *pictures, "--model", tmp_path / "ours", "--quiet").stdout == direct
    origin = json.loads((tmp_path / "ours" / "provenance.json").read_text())
    assert origin["imported_from"] == published
    half = mmx("caption", *pictures, "--model", published, "--dtype", "bfloat16", "--quiet").stdout
    assert len(half.splitlines()) == 3


@pytest.mark.parametrize(
    "words, expected",
    [
        (["import", "nobody/nothing", "out"], "'nobody/nothing' is no folder here and could not be downloaded"),
        (["import", str(PICTURES), "out"], "has no config.json; expected a folder of a published model"),
        (["caption", "a.png", "--dtype", "int4"], "--dtype was given 'int4'; expected one of float32, bfloat16, int8"),
    ],
)
def test_what_cannot_be_is_one_sentence(words, expected):
    ran = mmx(*words, code=2)
    assert expected in ran.stderr and len(ran.stderr.splitlines()) == 1
    assert not Path("out").exists()


def test_a_folder_that_is_something_else_is_not_written_over(published, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    assert "exists and is no checkpoint" in mmx("import", published, tmp_path / "mine", code=2).stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]


def test_half_a_download_leaves_nothing(published, tmp_path):
    copy = Path(shutil.copytree(published, tmp_path / "copy"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "half downloaded" in mmx("import", copy, tmp_path / "ours", code=2).stderr
    assert not (tmp_path / "ours").exists()


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    """A model of a text source alone."""
    options = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_position_embeddings": 64}
    model = tiny_model({"text": SourceConfig(encoder="text", options=options)})
    return save_model(tmp_path_factory.mktemp("models") / "translator", model)


def test_texts_are_typed_with_their_source(translator):
    long = "guten tag " * 60
    ran = mmx("caption", "text=Guten Morgen", f"text={long}", "--model", translator, "--json", "--max-tokens", 4)
    assert [json.loads(line)["text"] for line in ran.stdout.splitlines()] == ["Guten Morgen", long]


@pytest.mark.parametrize("typed", ["text=", "letter.txt"])
def test_what_is_no_text_is_not_read_as_one(translator, typed):
    ran = mmx("caption", typed, "--model", translator, code=1)
    assert ran.stdout == "" and "type it with its source, as text=..." in ran.stderr
