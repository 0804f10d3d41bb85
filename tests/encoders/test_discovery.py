"""Discovery of encoders: nothing that a plugin does while it is imported stops it, or any other command."""

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

GOOD = "\nfrom mmx.testing import ToyEncoder\nclass Plugin(ToyEncoder):\n    modality = 'audio'\n"
PLUGINS = {  # name: (code of its module, expected problem or None)
    "good": (GOOD, None),
    "printing": ("print('hello'); import sys; print('oh', file=sys.stderr)" + GOOD, None),
    "missing-import": ("import nowhere_to_be_found", "cannot be imported: ModuleNotFoundError"),
    "syntax-error": ("def f(:", "cannot be imported: SyntaxError"),
    "system-exit": ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
    "process-exit": ("import os; os._exit(7)", "ended the process (exit code 7) while it was imported"),
    "hanging": ("import time; time.sleep(600)" + GOOD, "did not return within 3 s"),
    "no-class": ("Plugin = 3", "no subclass of mmx.Encoder"),
    "other-version": (GOOD + "    contract_version = 99\n", "states contract_version 99"),
    "no-modality": (GOOD + "    modality = None\n", "states no modality"),
    "no-methods": (
        "from mmx import Encoder\nclass Plugin(Encoder):\n    modality = 'audio'",
        "defines no prepare and no forward",
    ),
    "image": (GOOD, "the encoder name 'image' is claimed by mmx"),
    "good-2": (GOOD, None),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """All of them on the path, as installed by pip."""
    folder = tmp_path_factory.mktemp("plugins")
    for name, (source, _) in PLUGINS.items():
        module = f"plugin_{name.replace('-', '_')}"
        (folder / f"{module}.py").write_text(source)
        info = folder / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[mmx.encoders]\n{name} = {module}:Plugin\n")
    return folder


def run_mmx(installed: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process with all the plugins."""
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    environment = {name: text for name, text in os.environ.items() if name != "MMX_PLUGINS"} | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "mmx", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.mark.slow  # starts three processes that import torch, and waits for a timeout
def test_each_plugin_is_described_with_its_package_and_problem(installed, monkeypatch):
    monkeypatch.delenv("MMX_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(installed)
    found = {(d.entry.name, d.entry.package): d for d in discover_encoders(timeout=3)}
    assert found["image", "mmx"].problem is None
    assert found["text", "mmx"].options["hidden_size"] == 256
    for name, (_, problem) in PLUGINS.items():
        package = f"plugin_{name.replace('-', '_')}"
        description = found[name, package]
        if problem is None:
            assert (description.problem, description.modality) == (None, "audio"), name
        else:
            assert problem in description.problem
            assert name in description.problem
            assert package in description.problem
            assert "\n" not in description.problem


@pytest.mark.slow
def test_other_commands_work_with_broken_plugins_installed(installed, tmp_path):
    """No command imports an encoder that it does not use."""
    source = SourceConfig(encoder="image", options={"backbone": "resnet10t", "size": 32, "stage": 2})
    model = save_model(tmp_path / "model", tiny_model({"image": source}))
    image = tmp_path / "a.png"
    Image.new("RGB", (20, 20), "red").save(image)
    output = tmp_path / "out"
    commands = {
        "help": ["--help"],
        "caption": ["caption", image, "--model", model],
        "ask": ["ask", image, "what?", "--model", model],
        "eval": f"eval {model} --data scenes num_examples=2 --out-dir {output} --max-new-tokens 2".split(),
        "scenes": ["scenes", tmp_path / "scenes", "-n", "1"],
        "check": ["encoders", "check", "good", "--only", "order", *[f"--sample={image}"] * 3],
    }
    runs = {name: run_mmx(installed, *arguments) for name, arguments in commands.items()}
    codes = {name: run.returncode for name, run in runs.items()}
    assert codes == dict.fromkeys(commands, 0) | {"check": 1}, {name: run.stderr for name, run in runs.items()}
    assert "TypeError" in runs["check"].stdout, "an image is no list of numbers, which the check reports"


@pytest.mark.parametrize(
    "name", ["system-exit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("missing-import", "no-class"))]
)
def test_model_with_a_broken_encoder_names_it(installed, tmp_path, name):
    config = tmp_path / "run.yaml"
    sources = f"model: {{sources: {{audio: {{encoder: {name}}}}}}}"
    config.write_text(f"{sources}\ntrain: [{{path: scenes, num_examples: 2}}]\n")
    run = run_mmx(installed, "train", config, f"output_dir={tmp_path / name}")
    assert run.returncode == 2
    assert run.stderr.startswith(f"mmx: encoder '{name}' (plugin_{name.replace('-', '_')} 1.2) ")
    assert len(run.stderr.splitlines()) == 1
