"""The conformance kit: every check catches the encoder that breaks its promise, and leaves all others in peace."""

import sys
from pathlib import Path

import pytest
import torch
from broken_encoders import BROKEN, Numbers, Pixels

from mmx.errors import ConfigError, EncoderError
from mmx.testing import ToyEncoder, check_encoder, encoder_checks
from mmx.testing.checks import CHECKS

SLOW = {"import"}  # a process of its own, with tests of its own below
NAMES = [check.name for check in CHECKS if check.name not in SLOW]


def failed(kind, **facts):
    results = check_encoder(kind, on_fail="return", only=NAMES, **facts)
    return {result.name for result in results if result.status == "failed"}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_promise_is_caught_by_its_check_and_by_no_other(kind, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert failed(kind) == BROKEN[kind]


def test_every_check_has_an_encoder_that_breaks_it():
    untested = {check.name for check in CHECKS} - set().union(*BROKEN.values())
    assert untested == {"import", "device"}, "which have tests of their own, the second only where there is a GPU"


@pytest.mark.parametrize("kind", [Numbers, Pixels])
def test_a_good_encoder_keeps_every_promise(kind):
    assert failed(kind) == set()


def test_the_error_names_the_check_what_was_seen_why_and_what_to_do():
    kind = next(kind for kind in BROKEN if kind.__name__ == "Inverted")
    with pytest.raises(EncoderError) as caught:
        check_encoder(kind, only=["mask", "order"])
    sentence = str(caught.value)
    assert sentence.startswith("encoder Inverted breaks 1 of 2 promises:\nFAILED   mask: nothing of sample 0 may be")
    assert "why it matters: True means may be attended" in sentence
    assert "remedy: return True for slots that exist" in sentence
    with pytest.raises(EncoderError, match="encoder Inverted breaks its contract:\nFAILED   mask"):
        next(encoder_checks(kind, only=["mask"]))()


def test_a_failure_that_is_expected_has_its_reason_and_must_happen():
    kind = next(kind for kind in BROKEN if kind.__name__ == "Averaging")
    reason = "a mean over the batch's length"
    known = {"alone": reason, "padding": reason}
    results = check_encoder(kind, only=["alone", "padding", "order"], expected_failures=known)
    assert [(r.name, r.status, r.message) for r in results if r.status == "expected"] == [
        ("padding", "expected", reason),
        ("alone", "expected", reason),
    ]
    with pytest.raises(EncoderError, match=r"order: it was expected to fail \(a whim\), and passed"):
        check_encoder(Numbers, only=["order"], expected_failures={"order": "a whim"})


def test_what_cannot_be_checked_is_told():
    with pytest.raises(EncoderError, match="there is no check 'oder'; did you mean 'order'?"):
        check_encoder(Numbers, only=["oder"])
    with pytest.raises(EncoderError, match="the kit has 0 inputs for ToyEncoder of modality 'numbers'; give three"):
        check_encoder(ToyEncoder)
    with pytest.raises(ConfigError, match="feature is not a known key; did you mean 'features'"):
        check_encoder(Numbers, options={"feature": 3})
    with pytest.raises(EncoderError, match="encoder Bare defines no prepare and no forward"):
        check_encoder(type("Bare", (Numbers.__mro__[2],), {"modality": "x"}))


@pytest.mark.parametrize("check", encoder_checks(Numbers, only=["form", "order"]), ids=lambda call: call.__name__)
def test_checks_are_tests_of_their_own(check):
    assert check().status == "passed"


def test_it_leaves_the_dice_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    check_encoder(Numbers, only=["order", "gradients", "saved"])
    assert torch.equal(before, torch.random.get_rng_state())


LOUD = {
    "print('hello')": "prints 'hello'",
    "import torch; torch.manual_seed(0)": "changes torch's random state",
    "import random; random.seed(0)": "changes Python's random state",
    "import torch; torch.set_default_dtype(torch.float64)": "changes the default dtype",
    "import logging; logging.basicConfig()": "changes the logging set-up",
    "import sys; 'pytest' in sys.modules or 1 / 0": "fails in a new process: ZeroDivisionError",
    "pass": "",
}


@pytest.mark.parametrize("line", LOUD, ids=lambda line: LOUD[line] or "quiet")
def test_what_an_import_does_besides_is_seen(tmp_path, monkeypatch, line):
    name = f"loud_{abs(hash(line))}"
    source = f"{line}\nfrom broken_encoders import Numbers\nclass Ear(Numbers):\n    pass\n"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "support")
    with torch.random.fork_rng():
        try:
            (result,) = check_encoder(f"{name}:Ear", only=["import"], on_fail="return")
        finally:
            torch.set_default_dtype(torch.float32)
            sys.modules.pop(name, None)
    assert result.status == ("failed" if LOUD[line] else "passed"), result
    if LOUD[line]:
        assert f"importing {name} {LOUD[line]}" in result.message
