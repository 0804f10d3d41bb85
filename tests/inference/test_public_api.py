"""The public API as a user's script sees it: typed, documented, and working on the bundled model."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import user_script

import mmx

IMAGE = Path(__file__).parents[2] / "demos" / "images" / "four-shapes.png"


def test_user_script_runs(tmp_path):
    results = user_script.main(str(IMAGE), tmp_path)
    assert results[0] == results[1]  # the best of two sequences is the caption
    assert results[-1] == "image.missing"
    assert all(isinstance(text, str) and text for text in results)
    assert (tmp_path / "look.png").stat().st_size > 1000


@pytest.mark.slow
def test_user_script_passes_mypy_strict(tmp_path):
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), user_script.__file__]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("name", [name for name in mmx.__all__ if name != "__version__"])
def test_public_names_resolve_and_are_documented(name):
    assert inspect.getdoc(getattr(mmx, name))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="load_image"):
        _ = mmx.load_picture


@pytest.mark.parametrize("method", ["caption", "ask", "generate", "rank", "captions", "look", "encode"])
def test_help_shows_arguments_and_an_example(method):
    documentation = inspect.getdoc(getattr(mmx.Pipeline, method))
    assert "Example:" in documentation
    assert "model." in documentation


def test_reprs_are_one_short_line():
    model = mmx.load()
    memory = model.encode(image=str(IMAGE))
    look = model.look(memory, "what color is the cross?")
    for value in (model, memory, look, model.generate(memory)[0], model.rank(memory, "is it red?", ["yes", "no"])[0]):
        text = repr(value)
        assert len(text) <= 160, text
        assert "\n" not in text


@pytest.mark.parametrize("device", ["nodev", "cuda:99", "meta", 5.0])
def test_an_unavailable_device_is_an_error(device):
    with pytest.raises(mmx.MmxError) as error:
        mmx.load(device=device)
    assert (error.value.code, error.value.details["given"]) == ("load.device", str(device))
