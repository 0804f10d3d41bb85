"""The conformance kit: an encoder, some inputs, and a list of promises that are each kept or broken.

    check_encoder("pixels", options={"size": 32})               # a name, an address, or the class itself
    @pytest.mark.parametrize("check", encoder_checks(MyEncoder))  # or one test a check
    def test_conformance(check): check()

Every check has a name, the reason for it, and a remedy. A failure that is known and accepted is given by name with its
reason, `expected_failures={"batch": "batch norm in the frontend"}`; one that then passes is a failure as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import SkipTest

from mmx.config.loader import parse_config
from mmx.encoders.base import Encoder
from mmx.encoders.contract import one_line_error
from mmx.encoders.registry import check_class, resolve
from mmx.errors import EncoderError, MmxError, suggest
from mmx.testing.checks import CHECKS, Check, CheckFailed, CheckSkipped
from mmx.testing.encoder_under_test import EncoderUnderTest, samples_of
from mmx.testing.process_state import unchanged_process_state


@dataclass(frozen=True)
class CheckResult:
    """How one check ended. status: passed, failed, expected (to fail, and did), or skipped; said: what was seen, or
    why it was skipped; reason: why anybody cares; remedy: what to do about it."""

    name: str
    status: str
    message: str = ""
    reason: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        if self.status != "failed":
            return f"{self.status:<8} {self.name}{f': {self.message}' if self.message else ''}"
        return f"FAILED   {self.name}: {self.message}\n         why it matters: {self.reason}\n         remedy: {self.remedy}"


@dataclass(frozen=True)
class CheckRun:
    """One check of one encoder, to be called; raises EncoderError where the promise is broken, and unittest.SkipTest
    (which pytest shows as skipped) where it does not apply."""

    check: Check
    subject: EncoderUnderTest
    expected: str | None = None

    @property
    def __name__(self) -> str:
        """The name of the check, which is also pytest's id of it."""
        return self.check.name

    def __call__(self) -> CheckResult:
        result = self.result()
        if result.status == "failed":
            raise EncoderError(f"{self.subject.name} breaks its contract:\n{result}")
        if result.status in ("skipped", "expected"):
            raise SkipTest(result.message)
        return result

    def result(self) -> CheckResult:
        """How it ended, without raising."""
        status, said = self._outcome()
        if self.expected is not None:
            if status == "failed":
                return CheckResult(self.check.name, "expected", self.expected)
            if status == "passed":
                status, said = "failed", f"it was expected to fail ({self.expected}), and passed"
        return CheckResult(self.check.name, status, said, self.check.reason, self.check.remedy)

    def _outcome(self) -> tuple[str, str]:
        try:
            with unchanged_process_state():
                self.check.run(self.subject)
        except CheckSkipped as skipped:
            return "skipped", str(skipped)
        except (CheckFailed, MmxError) as broken:
            return "failed", " ".join(str(broken).split())
        except (Exception, SystemExit) as error:  # a stranger's code may raise anything
            return "failed", one_line_error(error)
        return "passed", ""


def encoder_checks(
    encoder: str | type[Encoder],
    samples: Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
) -> Iterator[CheckRun]:
    """The checks of an encoder, each a call without arguments. `samples`: three or more raw inputs (default: those of
    its `samples()`, else some of its modality); `only`: names of the checks wanted. Raises EncoderError for an encoder
    that cannot be found or built, ConfigError for its options."""
    kind = resolve(encoder) if isinstance(encoder, str) else check_class(encoder)
    expected, known = dict(expected_failures or {}), [check.name for check in CHECKS]
    for name in (*expected, *only):
        if name not in known:
            raise EncoderError(f"there is no check {name!r}; {suggest(name, known)}")
    settings = parse_config(dict(options or {}), kind.Options, where=f"options of {kind.__name__}")
    subject = EncoderUnderTest(kind, settings)
    subject.samples = samples_of(subject.build(), samples)
    for check in CHECKS:
        if not only or check.name in only:
            yield CheckRun(check, subject, expected.get(check.name))


def check_encoder(
    encoder: str | type[Encoder],
    samples: Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    on_fail: str = "raise",
) -> list[CheckResult]:
    """Run every check (arguments as in `encoder_checks`) and return how each ended.

    With on_fail="raise", raises one EncoderError that tells of all broken promises; with "return", only returns.
    """
    results = [call.result() for call in encoder_checks(encoder, samples, options, expected_failures, only)]
    failed = [str(result) for result in results if result.status == "failed"]
    if failed and on_fail == "raise":
        name = encoder if isinstance(encoder, str) else encoder.__name__
        raise EncoderError(f"encoder {name} breaks {len(failed)} of {len(results)} promises:\n" + "\n".join(failed))
    return results
