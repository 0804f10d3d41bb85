"""Packages of strangers, from their folder to an answer: built and installed by pip into an environment of their own.

The environment is new; torch and mmx are lent to it by the one that runs the tests, for a download takes minutes.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LOG_MEL = ROOT / "demos" / "mmx-log-mel"


class Environment:
    """A virtual environment in which packages can be installed and commands typed."""

    def __init__(self, place: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        self.python = place / "bin" / "python"
        (site,) = (place / "lib").glob("python*/site-packages")
        # addsitedir, and not the bare path, so that an editable install of mmx is found as well.
        (site / "lent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")

    def run(self, *words: object, at: Path | None = None) -> subprocess.CompletedProcess[str]:
        """`python WORDS...`, as typed in a folder."""
        kept = {name: text for name, text in os.environ.items() if name not in ("PYTHONPATH", "MMX_PLUGINS")}
        return subprocess.run(
            [self.python, *map(str, words)],
            cwd=at,
            capture_output=True,
            text=True,
            timeout=900,
            env=kept | {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"},
            check=False,
        )

    def well(self, *words: object, at: Path | None = None) -> str:
        """The same, which must succeed: its stdout."""
        done = self.run(*words, at=at)
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def install(self, package: Path) -> None:
        """pip install, without a network: what builds it and what it needs is there."""
        self.well("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation", package)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    pytest.importorskip("hatchling", reason='packages are built with hatchling; pip install "mmx[dev]"')
    return Environment(tmp_path_factory.mktemp("environment") / "venv")


def test_a_new_encoder_installs_is_found_and_passes_its_own_test_as_written(environment, tmp_path):
    package = tmp_path / "mmx-bird-song"
    assert environment.well("-m", "mmx", "new-encoder", "bird-song", at=tmp_path) == "mmx-bird-song\n"
    files = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    assert files == {"pyproject.toml", "README.md", "src/mmx_bird_song/__init__.py", "tests/test_mmx_bird_song.py"}
    assert not any("$" in path.read_text() for path in package.rglob("*") if path.is_file())
    environment.install(package)
    listed = environment.well("-m", "mmx", "encoders", at=tmp_path)
    assert "bird-song\tseries\tmmx-bird-song 0.1.0\tmmx_bird_song:BirdSongEncoder\n    window=4, width=64" in listed
    said = environment.well("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", at=package)
    assert "failed" not in said
    assert "17 passed, 2 skipped" in said, "18 promises, of which grid and device do not apply here, and its name"
    checked = environment.well("-m", "mmx", "encoders", "check", "bird-song", "window=3", "--only", "mask", at=tmp_path)
    assert checked == "passed   mask\n"


def test_the_sound_encoder_of_a_stranger_from_pip_to_an_answer(environment, tmp_path):
    environment.install(LOG_MEL)
    listed = environment.well("-m", "mmx", "encoders", at=tmp_path)
    assert "log-mel\taudio\tmmx-log-mel 0.1.0\tmmx_log_mel:LogMelEncoder\n    rate=8000" in listed
    said = environment.well("-m", "pytest", "-q", "-p", "no:cacheprovider", LOG_MEL / "tests", at=tmp_path)
    assert "failed" not in said
    assert "passed" in said
    for part, count, seed in (("train", 1500, 1), ("test", 200, 2)):
        environment.well("-m", "mmx_log_mel.beeps", f"beeps/{part}", "-n", count, "--seed", seed, at=tmp_path)
    environment.well("-m", "mmx", "train", LOG_MEL / "train.yaml", "--quiet", at=tmp_path)
    lines = (tmp_path / "runs" / "beeps" / "metrics.jsonl").read_text().splitlines()
    found = json.loads(lines[-1])
    print(f"beeps never heard: {found['beeps.exact match']:.3f} of {found['beeps.questions']}")
    assert found["beeps.exact match"] >= 0.9
    first = [json.loads(line) for line in (tmp_path / "beeps/test/list.jsonl").read_text().splitlines()][:3]
    asked, model = [row["question"] for row in first], ["--model", "runs/beeps/best"]
    answers = environment.well("-m", "mmx", "ask", "beeps/test/00000.wav", *asked, *model, at=tmp_path).splitlines()
    assert [line.split("\t")[0] for line in answers] == [row["question"] for row in first]
    assert sum(line.split("\t")[1] == row["answer"] for line, row in zip(answers, first, strict=True)) >= 2
    (tmp_path / "torn.wav").write_bytes(b"RIFF")
    torn = environment.run("-m", "mmx", "ask", "torn.wav", "how many?", "--model", "runs/beeps/best", at=tmp_path)
    assert (torn.returncode, len(torn.stderr.splitlines())) == (1, 1)
    assert torn.stderr.startswith("'torn.wav': no sound, or damaged at the start; expected WAV")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Bird", "'Bird' is no name for an encoder; use small letters, digits and dashes, as in bird-song."),
        ("../x", "'../x' is no name for an encoder"),
        ("a b", "'a b' is no name for an encoder"),
        ("-x", ""),
        ("image", "the encoder name 'image' is taken by mmx (mmx.encoders.image:ImageEncoder); choose another."),
        ("used", "'used' already exists; give a new or empty folder with --out."),
    ],
)
def test_a_package_that_cannot_be_begun(tmp_path, monkeypatch, name, said):
    from mmx.errors import EncoderError
    from mmx.testing.scaffold import write_encoder_package

    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EncoderError) as caught:
        write_encoder_package(name, Path("used" if name == "used" else "new"))
    assert str(caught.value).startswith(said)
    assert sorted(tmp_path.rglob("*")) == before, "nothing half-written stays"
