"""The blocks and commands of docs/encoders.md are executed in order, in an empty folder."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent.parent
GUIDE = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")
# Two threads of a model this small wait for each other if another process uses a core.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
BLOCK = r"^```\w+(?: file=(?P<file>\S+))?\n(?P<text>.*?)^```"
COMMAND = r"^    (?P<command>mmx [^\n]*)$"
STEP = re.compile(f"{BLOCK}|{COMMAND}", re.M | re.S)

pytestmark = pytest.mark.slow  # trains a model


class Execution(NamedTuple):
    """The folder in which the guide was executed, and the output of each command or Python block."""

    folder: Path
    outputs: list[tuple[str, str]]


@pytest.fixture(scope="module")
def execution(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guide")
    shutil.copy(ROOT / "demos" / "images" / "four-shapes.png", folder)
    outputs = []
    for step in STEP.finditer(GUIDE):
        if step["file"]:
            (folder / step["file"]).write_text(step["text"])
            continue
        arguments = ["-m", *shlex.split(step["command"])] if step["command"] else ["-c", step["text"]]
        run = subprocess.run(
            [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=ENVIRONMENT, check=False
        )
        assert run.returncode == 0, f"{arguments}\n{run.stdout}\n{run.stderr}"
        outputs.append((step["command"] or "python", run.stdout))
    return Execution(folder, outputs)


def test_minimal_encoder_has_eleven_lines_and_passes_the_kit(execution):
    lines = (execution.folder / "pulse.py").read_text().splitlines()
    assert len([line for line in lines if line and not line.startswith(("import", "from"))]) == 11
    results = execution.outputs[0][1].splitlines()
    assert sum(line.startswith("passed") for line in results) == 16
    assert {line.split()[0] for line in results} == {"passed", "skipped"}


def test_package_is_written(execution):
    assert execution.outputs[1] == ("mmx new-encoder bird-song", "mmx-bird-song\n")
    assert (execution.folder / "mmx-bird-song" / "pyproject.toml").is_file()


def test_encoder_of_files_passes_the_kit(execution):
    results = execution.outputs[2][1].splitlines()
    assert any(line.split() == ["passed", "input_types"] for line in results)
    assert any(line.split() == ["passed", "grid"] for line in results)
    assert {line.split()[0] for line in results} == {"passed", "skipped"}


def test_frozen_decoder_answers_questions_about_the_new_source(execution):
    metrics = json.loads((execution.folder / "results" / "metrics.json").read_text())
    print(f"held-out questions: {metrics['exact match']:.3f} of {metrics['questions']}")
    assert metrics["questions"] == 200
    assert metrics["exact match"] > 0.9


def test_last_block_asks_about_both_sources(execution):
    command, output = execution.outputs[-1]
    assert command == "python"
    lines = output.splitlines()
    assert lines[0] == "yes"
    assert lines[1].startswith("[")


def test_encoders_of_guide_package_and_demo_pass_mypy_strict(execution):
    """The types of the Encoder base class are usable by plugin authors."""
    pytest.importorskip("mypy")
    files = [
        execution.folder / "pulse.py",
        execution.folder / "thumbnail.py",
        execution.folder / "mmx-bird-song" / "src" / "mmx_bird_song" / "__init__.py",
        ROOT / "demos" / "mmx-log-mel" / "src" / "mmx_log_mel" / "__init__.py",
        ROOT / "demos" / "mmx-log-mel" / "src" / "mmx_log_mel" / "beeps.py",
    ]
    for file in files:  # two have the same module name
        command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(file)]
        run = subprocess.run(command, cwd=execution.folder, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
