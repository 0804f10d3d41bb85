"""Encoder packages from their folder to an answer: built and installed by pip in a new environment.

torch and mmx are taken from the environment that runs the tests, because a download takes minutes.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mmx.encoders.base import CONTRACT_VERSION
from mmx.errors import EncoderError
from mmx.testing.scaffold import write_encoder_package

ROOT = Path(__file__).parent.parent.parent
LOG_MEL = ROOT / "demos" / "mmx-log-mel"
PACKAGE_FILES = {
    "pyproject.toml",
    "README.md",
    "src/mmx_bird_song/__init__.py",
    "src/mmx_bird_song/py.typed",
    "tests/test_mmx_bird_song.py",
}


class Environment:
    """A virtual environment in which packages are installed and commands are run."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        self.python = folder / "bin" / "python"
        (site_packages,) = (folder / "lib").glob("python*/site-packages")
        # addsitedir also finds an editable install of mmx, which the bare path would not.
        code = f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n"
        (site_packages / "parent.pth").write_text(code)

    def run(self, *arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run `python ARGUMENTS...` in a folder."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MMX_PLUGINS")}
        settings = {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [self.python, *map(str, arguments)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=900,
            env=kept | settings,
            check=False,
        )

    def output(self, *arguments: object, folder: Path | None = None) -> str:
        """Run a command that must succeed; return its stdout."""
        run = self.run(*arguments, folder=folder)
        assert run.returncode == 0, f"{arguments}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
        return run.stdout

    def install(self, package: Path) -> None:
        """Install a package with pip, without network."""
        self.output("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation", package)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    pytest.importorskip("hatchling", reason='packages are built with hatchling; pip install "mmx[dev]"')
    return Environment(tmp_path_factory.mktemp("environment") / "venv")


@pytest.mark.packages
def test_new_encoder_package_is_installed_found_and_passes_its_own_tests(environment, tmp_path):
    package = tmp_path / "mmx-bird-song"
    assert environment.output("-m", "mmx", "new-encoder", "bird-song", folder=tmp_path) == "mmx-bird-song\n"
    environment.install(package)
    listed = environment.output("-m", "mmx", "encoders", folder=tmp_path)
    expected = "bird-song\tseries\tmmx-bird-song 0.1.0\tmmx_bird_song:BirdSongEncoder\n    window=4, hidden_size=64"
    assert expected in listed
    tested = environment.output("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", folder=package)
    assert "failed" not in tested
    assert "17 passed, 3 skipped" in tested, "19 checks, of which input_types, grid and device do not apply"
    command = ["encoders", "check", "bird-song", "window=3", "--only", "mask"]
    assert environment.output("-m", "mmx", *command, folder=tmp_path) == "passed   mask\n"


@pytest.mark.packages
def test_audio_encoder_package_is_installed_trained_and_answers(environment, tmp_path):
    environment.install(LOG_MEL)
    listed = environment.output("-m", "mmx", "encoders", folder=tmp_path)
    assert "log-mel\taudio\tmmx-log-mel 0.1.0\tmmx_log_mel:LogMelEncoder\n    sampling_rate=8000" in listed
    tested = environment.output("-m", "pytest", "-q", "-p", "no:cacheprovider", LOG_MEL / "tests", folder=tmp_path)
    assert "failed" not in tested
    assert "passed" in tested
    for split, count, seed in (("train", 1500, 1), ("test", 200, 2)):
        arguments = [f"beeps/{split}", "-n", count, "--seed", seed]
        environment.output("-m", "mmx_log_mel.beeps", *arguments, folder=tmp_path)
    environment.output("-m", "mmx", "train", LOG_MEL / "train.yaml", "--quiet", folder=tmp_path)
    metrics = json.loads((tmp_path / "runs/beeps/metrics.jsonl").read_text().splitlines()[-1])
    print(f"held-out questions: {metrics['beeps.exact match']:.3f} of {metrics['beeps.questions']}")
    assert metrics["beeps.exact match"] >= 0.9
    lines = (tmp_path / "beeps/test/list.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:3]]
    questions = [row["question"] for row in rows]
    model = ["--model", "runs/beeps/best"]
    answers = environment.output("-m", "mmx", "ask", "beeps/test/00000.wav", *questions, *model, folder=tmp_path)
    fields = [line.split("\t") for line in answers.splitlines()]
    assert [field[0] for field in fields] == questions
    assert sum(field[1] == row["answer"] for field, row in zip(fields, rows, strict=True)) >= 2
    (tmp_path / "damaged.wav").write_bytes(b"RIFF")
    damaged = environment.run("-m", "mmx", "ask", "damaged.wav", "how many?", *model, folder=tmp_path)
    assert (damaged.returncode, len(damaged.stderr.splitlines())) == (1, 1)
    assert "'damaged.wav'" in damaged.stderr


def test_new_encoder_package_is_complete(tmp_path):
    folder = write_encoder_package("bird-song", tmp_path / "package")
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert {str(path.relative_to(folder)) for path in paths} == PACKAGE_FILES
    assert not any("$" in path.read_text() for path in paths)
    source = (folder / "src" / "mmx_bird_song" / "__init__.py").read_text()
    assert f"    contract_version = {CONTRACT_VERSION}" in source


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("Bird", "encoder.name"),
        ("../x", "encoder.name"),
        ("a b", "encoder.name"),
        ("-x", "encoder.name"),
        ("image", "encoder.name_conflict"),
        ("used", "encoder.folder_exists"),
    ],
)
def test_invalid_name_or_used_folder_writes_nothing(tmp_path, name, code):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EncoderError) as caught:
        write_encoder_package(name, tmp_path / ("used" if name == "used" else "new"))
    assert caught.value.code == code
    assert sorted(tmp_path.rglob("*")) == before
