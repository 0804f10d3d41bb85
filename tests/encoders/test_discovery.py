"""The survey of encoders: nothing that a plugin does while it is imported stops it, or any other command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmx.config.schema import SourceConfig
from mmx.encoders.discovery import discover_encoders
from mmx.models.checkpoint import save_model
from mmx.testing import tiny_model

EAR = "\nfrom mmx.testing import ToyEncoder\nclass Ear(ToyEncoder):\n    modality = 'audio'\n"
PLUGINS = {  # name: (what its module does, what is said of it; None: nothing is wrong)
    "good": (EAR, None),
    "chatty": ("print('hello'); import sys; print('oh', file=sys.stderr)" + EAR, None),
    "absent": ("import nowhere_to_be_found", "cannot be imported: ModuleNotFoundError"),
    "garbled": ("def f(:", "cannot be imported: SyntaxError"),
    "leaving": ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
    "dying": ("import os; os._exit(7)", "ended the process (exit code 7) while it was imported"),
    "sleepy": ("import time; time.sleep(600)" + EAR, "did not come back within 5 s"),
    "number": ("Ear = 3", "no subclass of mmx.Encoder"),
    "silent": (EAR + "    modality = None\n", "states no modality"),
    "idle": (
        "from mmx import Encoder\nclass Ear(Encoder):\n    modality = 'audio'",
        "defines no prepare and no forward",
    ),
    "image": (EAR, "the encoder name 'image' is claimed by mmx"),
    "twin-a": (EAR, None),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """All of them on the path, as an installer would leave them."""
    folder = tmp_path_factory.mktemp("plugins")
    for name, (source, _) in PLUGINS.items():
        module = f"plugin_{name.replace('-', '_')}"
        (folder / f"{module}.py").write_text(source)
        info = folder / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[mmx.encoders]\n{name} = {module}:Ear\n")
    return folder


def run(installed: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """A command in a process that has all the plugins."""
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    environment = {name: text for name, text in os.environ.items() if name != "MMX_PLUGINS"} | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "mmx", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def test_each_plugin_is_told_of_with_its_package_and_what_is_wrong(installed, monkeypatch):
    monkeypatch.delenv("MMX_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(installed)
    found = {(d.entry.name, d.entry.package): d for d in discover_encoders(patience=5)}
    assert found["image", "mmx"].problem is None
    assert found["text", "mmx"].options["hidden_size"] == 256
    for name, (_, said) in PLUGINS.items():
        package = f"plugin_{name.replace('-', '_')}"
        description = found[name, package]
        if said is None:
            assert (description.problem, description.modality) == (None, "audio"), name
        else:
            assert said in description.problem
            assert name in description.problem
            assert package in description.problem
            assert "\n" not in description.problem


def test_every_other_command_works_beside_all_of_them(installed, tmp_path):
    """R20: not one of them is imported where nobody asks for it."""
    source = SourceConfig(encoder="image", options={"backbone": "resnet10t", "size": 32, "stage": 2})
    model = save_model(tmp_path / "model", tiny_model({"image": source}))
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    works = {
        "help": ["--help"],
        "caption": ["caption", tmp_path / "a.png", "--model", model],
        "ask": ["ask", tmp_path / "a.png", "what?", "--model", model],
        "eval": ["eval", model, "--data", "scenes", "num_examples=2", "--out", tmp_path / "out", "--max-new-tokens", "2"],
        "scenes": ["scenes", tmp_path / "scenes", "-n", "1"],
        "check": ["encoders", "check", "good", "--only", "order", *(f"--sample={tmp_path / 'a.png'}",) * 3],
    }
    ran = {name: run(installed, *words) for name, words in works.items()}
    codes = {name: done.returncode for name, done in ran.items()}
    assert codes == dict.fromkeys(works, 0) | {"check": 1}, {n: done.stderr for n, done in ran.items()}
    assert "TypeError" in ran["check"].stdout, "a picture is no list of numbers, which is the check's own finding"


def test_a_model_that_needs_a_broken_one_says_which_and_why(installed, tmp_path):
    for name in ("absent", "leaving", "number"):
        config = tmp_path / "run.yaml"
        config.write_text(f"model: {{sources: {{sound: {{encoder: {name}}}}}}}\ntrain: [{{path: scenes, count: 2}}]\n")
        done = run(installed, "train", config, f"output_dir={tmp_path / name}")
        assert done.returncode == 2
        assert done.stderr.startswith(f"mmx: encoder '{name}' (plugin_{name} 1.2) ")
        assert len(done.stderr.splitlines()) == 1
