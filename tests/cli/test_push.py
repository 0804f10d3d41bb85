"""`mmx push`, public names of our own checkpoints on the command line, and the environment variables of mmx."""

import json
import subprocess
from collections.abc import Iterator

import huggingface_hub.constants
import pytest
from cli_cases import run_in_process
from hub_server import HubServer, running_hub

from mmx.models.checkpoint import load_model, save_model

NAME = "anna/shapes"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[HubServer]:
    with running_hub(monkeypatch, tmp_path) as server:
        yield server


def test_a_pushed_model_captions_by_its_name(mmx, hub, model, images, tmp_path) -> None:
    pushed = mmx("push", model, NAME, "--private", "--license", "mit")
    repository = hub.repositories[NAME]
    commit = repository.branches["main"][-1]
    assert (pushed.code, pushed.out) == (0, f"{hub.endpoint}/{NAME}/commit/{commit}\n")
    assert repository.private
    assert b"license: mit\n" in repository.files()["README.md"]
    assert mmx("caption", *images, "--model", NAME).out == mmx("caption", *images, "--model", model).out
    assert mmx("push", model, NAME, "--revision", "next").code == 0
    assert set(repository.branches) == {"main", "next"}
    out = tmp_path / "imported"
    assert mmx("import", NAME, out, "--revision", "next").out == f"{out}\n"
    assert (out / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_rows_of_two_versions_of_a_name_are_not_mixed(mmx, hub, model, images, tmp_path) -> None:
    out = tmp_path / "rows.jsonl"
    mmx("push", model, NAME)
    assert mmx("caption", images[0], "--model", NAME, "--out", out).code == 0
    changed = load_model(model)
    changed.decoder.embedding.weight.data += 1.0
    mmx("push", save_model(tmp_path / "changed", changed), NAME)
    before = out.read_bytes()
    mmx("caption", *images, "--model", NAME, "--out", out).refused()
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["push", "nowhere", NAME], "checkpoint.missing"),
        (["push", "bundled", "shapes"], "hub.name"),
        (["caption", "a.png", "--model", NAME], "hub.not_found"),
        (["import", NAME, "out"], "hub.not_found"),
    ],
)
def test_what_is_refused_is_one_line(mmx, hub, monkeypatch, tmp_path, words, code) -> None:
    monkeypatch.chdir(tmp_path)
    assert mmx(*words).refused().code == code


def test_a_full_or_read_only_cache_is_named(mmx, hub, model, monkeypatch, tmp_path) -> None:
    mmx("push", model, NAME)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MMX_CACHE", str(tmp_path / "file"))
    error = mmx("caption", "a.png", "--model", NAME).refused()
    assert error.code == "hub.cache"


# ---- environment variables ---------------------------------------------------------------------------------------


def test_the_model_of_the_environment_is_the_default(mmx, model, images, monkeypatch, tmp_path) -> None:
    own = mmx("caption", images[0], "--model", model).out
    bundled = mmx("caption", images[0]).out
    monkeypatch.setenv("MMX_MODEL", str(model))
    assert mmx("caption", images[0]).out == own != bundled
    assert mmx("caption", images[0], "--model", "bundled").out == bundled
    row = mmx("caption", images[0], "--out", tmp_path / "rows.jsonl")
    assert row.code == 0
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["caption"] == own.split("\t")[1].strip()
    monkeypatch.setenv("MMX_MODEL", str(tmp_path / "nowhere"))
    assert mmx("ask", images[0], "what?").refused().code == "hub.not_found"
    monkeypatch.setenv("MMX_MODEL", "")
    assert mmx("caption", images[0]).out == bundled


def test_the_device_of_the_environment_is_the_default(mmx, images, monkeypatch) -> None:
    monkeypatch.setenv("MMX_DEVICE", "cuda:99")
    assert mmx("caption", images[0]).refused().details["given"] == "cuda:99"
    assert mmx("caption", images[0], "--device", "cpu").code == 0


def test_downloads_are_kept_in_the_cache_of_the_environment(mmx, hub, model, images, monkeypatch, tmp_path) -> None:
    mmx("push", model, NAME)
    monkeypatch.setenv("MMX_CACHE", str(tmp_path / "mine"))
    assert mmx("caption", images[0], "--model", NAME).code == 0
    assert [path.name for path in (tmp_path / "mine").glob("models--*")] == ["models--anna--shapes"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert mmx("caption", images[0], "--model", NAME).code == 0
    monkeypatch.setenv("MMX_CACHE", str(tmp_path / "empty"))
    assert mmx("caption", images[0], "--model", NAME).refused().code == "hub.not_found"


# ---- shell completion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"), [("mmx pu", ["push"]), ("mmx encoders ch", ["check"]), ("mmx push --pri", ["--private"])]
)
def test_the_shell_completes_commands_and_options(monkeypatch, words, expected) -> None:
    monkeypatch.setenv("_MMX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    ran = run_in_process([], stdout=subprocess.PIPE)
    assert (ran.returncode, ran.stdout.split()) == (0, expected)
