"""The README is executed: its commands print what it shows, its code runs, its configuration is the file it names."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from mmx.cli.app import main
from mmx.config.loader import load_config
from mmx.config.schema import RunConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_LINES = 130


def run_command(command, monkeypatch, capsys):
    """Run `mmx ...` in this process, in the folder of the repository; return what it prints."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code in (0, None)
    return capsys.readouterr().out


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_first_screen_has_commands_and_results():
    lines = README.splitlines()
    assert len(lines) <= MAX_LINES
    assert any("mmx caption demos/" in line for line in lines[:15])
    assert any(line.startswith("    mmx ask") for line in lines[:30])
    assert "```python" in lines[:45]


def test_the_test_command_is_the_one_that_ci_extracts():
    assert re.findall(r"^    pip install \"\.\[dev\]\" && pytest.*$", README, re.M) == [
        '    pip install ".[dev]" && pytest'
    ]


@pytest.mark.parametrize("index", [0, 1], ids=["caption", "ask"])
def test_commands_print_the_results_shown(index, monkeypatch, capsys):
    commands = re.findall(r"^    (?:pip install \. && )?(mmx (?:caption|ask) demos/[^\n]*)$", README, re.M)
    assert run_command(commands[index], monkeypatch, capsys) == blocks("text")[index]


def test_the_python_block_runs(capsys, monkeypatch, tmp_path):
    (block,) = blocks("python")
    block = block.replace('"demos/', f'"{ROOT}/demos/')
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})  # noqa: S102 (our own README)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1] == "['2', 'black']"
    assert lines[2] == "red star"
    assert (tmp_path / "image.safetensors").exists()
    assert (tmp_path / "where.png").exists()


def test_the_yaml_block_is_the_file():
    (block,) = blocks("yaml")
    assert yaml.safe_load(block) == yaml.safe_load((ROOT / "configs" / "your-images.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_configurations_are_valid_and_name_their_command(path):
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith(f"# mmx train configs/{path.name}")
    assert second.startswith("# ")
    assert load_config(path, RunConfig).output_dir.startswith("runs/")
