"""The README is true: its code runs, its commands exist, its map shows the house as it stands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import mmx
from mmx.config.loader import load_config
from mmx.config.schema import RunConfig
from mmx.testing import check_encoder

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = sorted(set(re.findall(r"^    mmx ([a-z-]+)", README, re.M)))


def test_a_first_result_within_25_lines():
    assert any("mmx caption demos/pictures" in line for line in README.splitlines()[:25])


def test_python_block_runs(capsys, monkeypatch, tmp_path):
    block = PYTHON[0].replace('"demos/', f'"{ROOT}/demos/')
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})  # noqa: S102 (our own README)
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert (tmp_path / "picture.safetensors").exists()


def test_the_look_inside_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {"model": mmx.load(), "picture": f"{ROOT}/demos/pictures/four-shapes.png"}
    exec(compile(PYTHON[1], "README.md", "exec"), names)  # noqa: S102 (our own README)
    printed = capsys.readouterr().out.splitlines()
    assert float(printed[0]) > 1 and len(printed) == 2
    assert (tmp_path / "where.png").exists()


def test_the_encoder_keeps_every_promise():
    names = {"mmx": mmx, "torch": torch, "__name__": "__main__"}
    exec(compile(PYTHON[2], "README.md", "exec"), names)  # noqa: S102 (our own README)
    results = check_encoder(names["Pulse"], [[1.0, 2.0], [3.0], [0.5, -1.0, 4.0]], on_fail="return")
    kept = {result.name for result in results if result.status == "passed"}
    assert {result.name for result in results} - kept == {"grid", "device", "worker", "import"}, "it lies in no module"
    assert len(PYTHON) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_their_flags_exist(command):
    shown = subprocess.run([sys.executable, "-m", "mmx", command, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    for line in re.findall(rf"^    mmx {command} .*$", README, re.M):
        for flag in (word for word in shlex.split(line, comments=False) if word.startswith("--")):
            assert flag in shown.stdout, f"{line.strip()}: {flag}"


def test_yaml_block_is_the_file():
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    assert yaml.safe_load(block) == yaml.safe_load((ROOT / "configs" / "your-pictures.yaml").read_text())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_configs_are_valid_and_name_their_command(path):
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith(f"# mmx train configs/{path.name}")
    assert second.startswith("# ")
    assert load_config(path, RunConfig).output_dir.startswith("runs/")


def test_the_map_names_every_room():
    files = {path.relative_to(ROOT) for path in (ROOT / "mmx").rglob("*.py")} | {Path("mmx/bundled/README.md")}
    rooms = {str(f) if len(f.parts) == 2 else f"mmx/{f.parts[1]}/" for f in files if not f.name.startswith("__main")}
    rooms.discard("mmx/__init__.py")
    named = set(re.findall(r"\bmmx/[a-z_]+(?:\.py|/)", README.split("## The house")[1]))
    assert named == rooms


def test_no_placeholder_is_left():
    assert "@@" not in README
