"""The conformance kit: every check fails for the encoder that breaks its rule, and for no other."""

import sys
from pathlib import Path

import pytest
import torch
from broken_encoders import (
    BROKEN,
    InvertedMask,
    Loudness,
    MeanOverPadding,
    Numbers,
    PilImagesOnly,
    Pixels,
    UnscaledFiles,
)
from PIL import ExifTags, Image

from mmx.encoders.base import Encoder
from mmx.errors import ConfigError, EncoderError
from mmx.io.images import load_image
from mmx.testing import ToyEncoder, check_encoder, encoder_checks
from mmx.testing.checks import CHECKS

OWN_TESTS = {"import"}  # starts a process; tested below
NAMES = [check.name for check in CHECKS if check.name not in OWN_TESTS]


def failed_checks(encoder):
    results = check_encoder(encoder, on_fail="return", only=NAMES)
    return {result.name for result in results if result.status == "failed"}


@pytest.mark.parametrize("encoder", BROKEN, ids=lambda encoder: encoder.__name__)
def test_broken_encoder_fails_exactly_its_checks(encoder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert failed_checks(encoder) == BROKEN[encoder]


def test_every_check_has_a_broken_encoder():
    untested = {check.name for check in CHECKS} - set().union(*BROKEN.values())
    assert untested == {"import", "device"}, "the first has tests below, the second needs a GPU"


@pytest.mark.parametrize("encoder", [Numbers, Pixels, Loudness])
def test_correct_encoder_passes(encoder):
    assert failed_checks(encoder) == set()


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (PilImagesOnly, "sample 0 as a path: encoder PilImagesOnly of source 'kit' failed in prepare(str)"),
        (UnscaledFiles, "'numbers' of sample 0 differs between (samples, rate) and a path"),
    ],
)
def test_input_type_that_fails_is_named(encoder, message):
    (result,) = check_encoder(encoder, only=["input_types"], on_fail="return")
    assert result.status == "failed"
    assert result.message.startswith(message)


def test_samples_that_are_files_are_read_in_every_type(tmp_path):
    """A photo that is stored rotated is upright in training, and must be when its path is given."""

    class IgnoresOrientation(Pixels):
        def prepare(self, raw):
            image = Image.open(raw) if isinstance(raw, str) else load_image(raw)
            return {"pixels": self.pixels(image)}

    paths = []
    for number in range(3):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # rotated by 90 degrees
        path = tmp_path / f"{number}.jpg"
        Image.effect_mandelbrot((40, 30), (-2, -1.2, 1, 1.2), 20 + number).convert("RGB").save(path, exif=exif)
        paths.append(str(path))
    (passed,) = check_encoder(Pixels, samples=paths, only=["input_types"])
    assert passed.status == "passed"
    (failed,) = check_encoder(IgnoresOrientation, samples=paths, only=["input_types"], on_fail="return")
    assert failed.message == "'pixels' of sample 0 differs between a PIL image and a path"


def test_error_lists_failed_checks_with_reason_and_remedy():
    with pytest.raises(EncoderError) as caught:
        check_encoder(InvertedMask, only=["mask", "order"])
    assert caught.value.code == "encoder.conformance"
    assert caught.value.details["checks"] == ["mask"]
    check = next(check for check in CHECKS if check.name == "mask")
    lines = str(caught.value).splitlines()
    assert lines[0] == "encoder InvertedMask fails 1 of 2 checks:"
    assert lines[1].startswith("FAILED   mask: ")
    assert lines[2:] == [f"         reason: {check.reason}", f"         remedy: {check.remedy}"]
    with pytest.raises(EncoderError) as caught:
        next(encoder_checks(InvertedMask, only=["mask"]))()
    assert caught.value.details["checks"] == ["mask"]


def test_expected_failures():
    reason = "a mean over the padded length"
    expected = {"batch_independence": reason, "padding": reason}
    results = check_encoder(
        MeanOverPadding, only=["batch_independence", "padding", "order"], expected_failures=expected
    )
    assert [(result.name, result.status, result.message) for result in results] == [
        ("padding", "expected", reason),
        ("batch_independence", "expected", reason),
        ("order", "passed", ""),
    ]
    with pytest.raises(EncoderError, match=r"expected to fail \(reason\), but passed") as caught:
        check_encoder(Numbers, only=["order"], expected_failures={"order": "reason"})
    assert caught.value.details["checks"] == ["order"]


def test_errors_of_arguments():
    with pytest.raises(EncoderError) as caught:
        check_encoder(Numbers, only=["oder"])
    assert caught.value.code == "encoder.unknown_check"
    assert "did you mean 'order'" in str(caught.value)
    with pytest.raises(EncoderError) as caught:
        check_encoder(ToyEncoder)
    assert caught.value.code == "encoder.samples"
    assert (caught.value.details["given"], caught.value.details["expected"]) == (0, 3)
    with pytest.raises(ConfigError, match="did you mean 'features'"):
        check_encoder(Numbers, options={"feature": 3})
    with pytest.raises(EncoderError) as caught:
        check_encoder(type("Empty", (Encoder,), {"modality": "x"}))
    assert caught.value.code == "encoder.contract"
    assert caught.value.details["problem"] == "defines no prepare and no forward"


@pytest.mark.parametrize("check", encoder_checks(Numbers, only=["output_shapes", "order"]), ids=lambda c: c.__name__)
def test_checks_can_be_test_parameters(check):
    assert check().status == "passed"


def test_random_state_is_restored():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    check_encoder(Numbers, only=["order", "gradients", "save_load"])
    assert torch.equal(before, torch.random.get_rng_state())


SIDE_EFFECTS = {  # code of a module: what the check reports
    "print('hello')": "prints 'hello'",
    "import torch; torch.manual_seed(0)": "changes torch's random state",
    "import torch; torch.set_default_dtype(torch.float64)": "changes the default dtype",
    "import logging; logging.basicConfig()": "changes the logging configuration",
    "import sys; 'pytest' in sys.modules or 1 / 0": "fails in a new process: ZeroDivisionError",
    "pass": "",
}
# Each starts a process that imports torch: one in the default run, the others in the slow one.
DEFAULT_RUN = ("print('hello')",)
PARAMS = [pytest.param(code, marks=[] if code in DEFAULT_RUN else pytest.mark.slow) for code in SIDE_EFFECTS]


@pytest.mark.parametrize("code", PARAMS)
def test_side_effects_of_an_import_are_reported(tmp_path, monkeypatch, code):
    name = f"module_{abs(hash(code))}"
    source = f"{code}\nfrom broken_encoders import Numbers\nclass Plugin(Numbers):\n    pass\n"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "support")
    with torch.random.fork_rng():
        try:
            (result,) = check_encoder(f"{name}:Plugin", only=["import"], on_fail="return")
        finally:
            torch.set_default_dtype(torch.float32)
            sys.modules.pop(name, None)
    expected = SIDE_EFFECTS[code]
    assert result.status == ("failed" if expected else "passed"), result
    if expected:
        assert f"importing {name} {expected}" in result.message
