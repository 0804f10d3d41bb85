"""ENCODERS.md is true: its blocks and commands run in the order in which they stand, in an empty folder."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
GUIDE = (ROOT / "ENCODERS.md").read_text(encoding="utf-8")
# Where another process takes a core, two threads wait for each other: twenty times as long for models this small.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
BLOCK, COMMAND = r"^```\w+(?: file=(?P<file>\S+))?\n(?P<text>.*?)^```", r"^    (?P<command>mmx [^\n]*)$"
STEP = re.compile(f"{BLOCK}|{COMMAND}", re.M | re.S)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What each step printed, and the folder in which all of it happened."""
    folder, printed = tmp_path_factory.mktemp("guide"), []
    shutil.copy(ROOT / "demos" / "pictures" / "four-shapes.png", folder)
    for step in STEP.finditer(GUIDE):
        if step["file"]:
            (folder / step["file"]).write_text(step["text"])
            continue
        words = ["-m", *shlex.split(step["command"])] if step["command"] else ["-c", step["text"]]
        ran = subprocess.run(
            [sys.executable, *words], cwd=folder, capture_output=True, text=True, env=ONE_THREAD, check=False
        )
        assert ran.returncode == 0, f"{words}\n{ran.stdout}\n{ran.stderr}"
        printed.append((step["command"] or "python", ran.stdout))
    return folder, printed


def test_the_encoder_has_about_ten_lines_and_keeps_every_promise(done):
    lines = (done[0] / "pulse.py").read_text().splitlines()
    assert len([line for line in lines if line and not line.startswith(("import", "from"))]) == 10
    checked = done[1][0][1].splitlines()
    assert sum(line.startswith("passed") for line in checked) == 16
    assert {line.split()[0] for line in checked} == {"passed", "skipped"}


def test_a_package_was_begun(done):
    assert done[1][1] == ("mmx new-encoder bird-song", "mmx-bird-song\n")
    assert (done[0] / "mmx-bird-song" / "pyproject.toml").is_file()


def test_the_frozen_decoder_answers_about_the_new_modality(done):
    found = json.loads((done[0] / "metrics.json").read_text())
    print(f"pulses set aside: {found['exact match']:.3f} of {found['questions']}")
    assert found["questions"] == 200
    assert found["exact match"] > 0.9


def test_the_last_block_asks_both(done):
    command, said = done[1][-1]
    assert command == "python"
    assert said.splitlines()[0] == "yes"
    assert said.splitlines()[1].startswith("[")
