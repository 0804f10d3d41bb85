"""Help, version, wrong usage, tracebacks, and how the program behaves as a process."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_cases import child_seconds, run_in_process

from mmx import __version__
from mmx.cli import app as cli

COMMANDS = (
    "caption",
    "ask",
    "look",
    "demo",
    "import",
    "push",
    "train",
    "eval",
    "score",
    "compare",
    "new-encoder",
    "scenes",
    "bench",
    "study",
    "encoders",
)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["ask"], "ask.arguments"),
        (["ask", "a.png"], "ask.no_question"),
        (["ask", "a.png", "what?", "--data", "q.jsonl"], "ask.arguments"),
        (["ask", "--data", "nowhere.jsonl"], "data.missing"),
        (["ask", "--data", "q.jsonl", "--source", "audio=a.wav"], "ask.source_with_data"),
        (["caption", "a.png", "--model", "nowhere"], "hub.not_found"),
        (["caption", "a.png", "--device", "gpu"], "option.device"),
        (["caption", "a.png", "--device", "meta"], "option.device"),
        (["caption", "a.png", "--device", "cuda:99"], "option.device"),
        (["caption", "a.png", "--dtype", "int4"], "option.dtype"),
        (["caption", "a.png", "--overwrite"], "option.needs_out"),
        (["caption", ""], "input.empty_name"),
        (["study", "position"], "study.unknown"),
        (["look", "a.png", "--method", "magic"], "option.method"),
    ],
)
def test_wrong_arguments_are_refused_with_a_code(mmx, monkeypatch, tmp_path, words, code) -> None:
    monkeypatch.chdir(tmp_path)
    assert mmx(*words).refused().code == code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["capton", "a.png"], "No such command 'capton'. Did you mean 'caption'? (see mmx --help)"),
        (["--foo"], "No such option: --foo (see mmx --help)"),
        (["caption"], "Missing argument 'IMAGE' (see mmx caption --help)"),
        (["caption", "a.png", "--foo"], "No such option: --foo"),
        (["caption", "a.png", "--num-beams", "0"], "Invalid value for '--num-beams'"),
        (["caption", "a.png", "--batch-size", "many"], "Invalid value for '--batch-size'"),
        (["caption", "a.png", "--out"], "Option '--out' requires an argument"),
        (["eval", "model"], "Missing option '--data'"),
        (["encoders", "check"], "Missing argument 'NAME' (see mmx encoders check --help)"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_help(mmx, words, message) -> None:
    ran = mmx(*words)
    ran.refused()
    assert ran.err.startswith(f"mmx: {message}")


def test_a_missing_configuration_and_an_impossible_folder_are_one_line(mmx, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    mmx("train", "nowhere.yaml").refused()
    mmx("scenes", "/dev/null/scenes").refused()


@pytest.mark.parametrize("words", [("--traceback", "ask"), ("ask", "--traceback")])
def test_traceback_is_printed_before_the_message(mmx, words) -> None:
    ran = mmx(*words)
    assert (ran.code, ran.error.code) == (2, "ask.arguments")
    assert ran.errors[0].startswith("Traceback")
    assert ran.errors[-1] == f"mmx: {ran.error}"


def test_an_unexpected_error_is_not_hidden(monkeypatch) -> None:
    monkeypatch.setattr("mmx.encoders.discovery.discover_encoders", lambda: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["mmx", "encoders"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_version(mmx) -> None:
    assert mmx("--version").outputs == (0, f"mmx {__version__}\n", "")


@pytest.mark.parametrize("words", [[], ["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help(mmx, words) -> None:
    ran = mmx(*words)
    assert (ran.code, ran.err) == (0, "")
    assert ran.lines[0].startswith(f"Usage: mmx {words[0] if len(words) > 1 else '[OPTIONS] COMMAND'}")
    assert all(len(line) <= 80 for line in ran.lines)
    if len(words) < 2:
        listed = ran.out.split("Commands:\n")[1].splitlines()
        assert [line.split()[0] for line in listed] == list(COMMANDS)
        assert all(line.endswith(".") and not line.endswith("...") for line in listed)


# ---- in a process of its own -----------------------------------------------------------------------------------


def imported(lines: Sequence[str]) -> set[str]:
    """The top-level packages in the output of -X importtime."""
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines if line.startswith("import time")}


def test_help_takes_half_a_second_and_imports_nothing_heavy() -> None:
    started = child_seconds()
    ran = run_in_process(["--help"], ["-X", "importtime"], stdout=subprocess.PIPE)
    assert child_seconds() - started < 0.5
    heavy = {"torch", "pydantic", "yaml", "numpy", "PIL", "timm", "transformers", "tqdm"}
    assert imported(ran.stderr.splitlines()).isdisjoint(heavy)


def test_an_unknown_configuration_key_is_reported_without_importing_torch(tmp_path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: {sources: {image: {encoder: image}}}\ntrain:\n  - {path: scenes, mun_examples: 4}\n")
    started = child_seconds()
    ran = run_in_process(["train", config], ["-X", "importtime"])
    assert child_seconds() - started < 1
    lines = ran.stderr.splitlines()
    messages = [line for line in lines if not line.startswith("import time")]
    assert (ran.returncode, len(messages)) == (2, 1)
    assert messages[0].startswith(f"mmx: {config}:3: ")
    assert "mun_examples" in messages[0]
    assert imported(lines).isdisjoint({"torch", "numpy", "timm", "transformers", "accelerate", "PIL"})


def test_a_closed_pipe_behind_stdout_is_not_reported(tmp_path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ran = run_in_process(["scenes", tmp_path / "s", "-n", "1"], stdout=writer)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line(tmp_path) -> None:
    with open("/dev/full", "w") as full:
        ran = run_in_process(["scenes", tmp_path / "s", "-n", "1"], stdout=full)
    assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1)
    assert ran.stderr.startswith("mmx: No space left on device; ")
