"""The conformance kit: a list of checks, each passed or failed by an encoder.

    check_encoder("pixels", options={"size": 32})                 # a name, an address, or the class itself

    @pytest.mark.parametrize("check", encoder_checks(MyEncoder))  # or one test for each check
    def test_conformance(check):
        check()

Every check has a name, a reason and a remedy. A known failure is given by name with its reason,
`expected_failures={"order": "batch norm in the frontend"}`; if the check passes after all, that is a failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple
from unittest import SkipTest

from mmx.config.loader import parse_config
from mmx.encoders.base import Encoder
from mmx.encoders.registry import check_class, resolve
from mmx.errors import EncoderError, MmxError, one_line_error, suggest
from mmx.testing.check import Check, CheckFailed, CheckSkipped
from mmx.testing.checks import CHECKS
from mmx.testing.encoder_under_test import EncoderUnderTest, samples_of
from mmx.testing.process_state import unchanged_process_state

Status = Literal["passed", "failed", "expected", "skipped"]


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    status: "expected" is an expected failure.
    message: what was found, or why the check was skipped.
    reason: why the check exists.
    remedy: how to correct a failure.
    """

    name: str
    status: Status
    message: str = ""
    reason: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        if self.status == "failed":
            return (
                f"FAILED   {self.name}: {self.message}\n         reason: {self.reason}\n         remedy: {self.remedy}"
            )
        message = f": {self.message}" if self.message else ""
        return f"{self.status:<8} {self.name}{message}"


class _Outcome(NamedTuple):
    status: Status
    message: str


@dataclass(frozen=True)
class CheckRun:
    """One check of one encoder, which is run by calling it.

    The call raises EncoderError for a failure, and unittest.SkipTest (which pytest reports as skipped) for a check
    that does not apply or is expected to fail.
    """

    check: Check
    subject: EncoderUnderTest
    expected: str | None = None

    @property
    def __name__(self) -> str:
        """The name of the check, which pytest uses as id."""
        return self.check.name

    def __call__(self) -> CheckResult:
        result = self.result()
        if result.status == "failed":
            raise EncoderError(
                f"{self.subject.name} breaks its contract:\n{result}",
                code="encoder.conformance",
                encoder=self.subject.encoder_class.__name__,
                checks=[result.name],
            )
        if result.status in ("skipped", "expected"):
            raise SkipTest(result.message)
        return result

    def result(self) -> CheckResult:
        """Run the check and return its result without raising."""
        outcome = self._run()
        if self.expected is not None and outcome.status == "failed":
            return CheckResult(self.check.name, "expected", self.expected)
        if self.expected is not None and outcome.status == "passed":
            outcome = _Outcome("failed", f"it was expected to fail ({self.expected}), but passed")
        return CheckResult(self.check.name, outcome.status, outcome.message, self.check.reason, self.check.remedy)

    def _run(self) -> _Outcome:
        try:
            with unchanged_process_state():
                self.check.run(self.subject)
        except CheckSkipped as error:
            return _Outcome("skipped", str(error))
        except (CheckFailed, MmxError) as error:
            return _Outcome("failed", " ".join(str(error).split()))
        except (Exception, SystemExit) as error:  # a plugin may raise exceptions of any class
            return _Outcome("failed", one_line_error(error))
        return _Outcome("passed", "")


def encoder_checks(
    encoder: str | type[Encoder],
    samples: Sequence[object] | None = None,
    options: Mapping[str, object] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
) -> Iterator[CheckRun]:
    """Return the checks of an encoder, each a callable without arguments.

    Args:
        encoder: name, address or class.
        samples: three or more raw inputs. Default: those of its `samples()`, otherwise generated ones of its modality.
        options: of the encoder.
        expected_failures: name of a check to the reason.
        only: names of the checks to run. Default: all.

    Raises EncoderError for an encoder that cannot be found or built, ConfigError for invalid options.
    """
    encoder_class = resolve(encoder) if isinstance(encoder, str) else check_class(encoder)
    expected = dict(expected_failures or {})
    _check_names([*expected, *only])
    where = f"options of {encoder_class.__name__}"
    subject = EncoderUnderTest(encoder_class, parse_config(dict(options or {}), encoder_class.Options, where=where))
    subject.samples = samples_of(subject.build(), samples)
    for check in CHECKS:
        if not only or check.name in only:
            yield CheckRun(check, subject, expected.get(check.name))


def check_encoder(
    encoder: str | type[Encoder],
    samples: Sequence[object] | None = None,
    options: Mapping[str, object] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    on_fail: Literal["raise", "return"] = "raise",
) -> list[CheckResult]:
    """Run the checks of an encoder and return their results. The arguments are those of `encoder_checks`.

    With on_fail="raise", failures raise one EncoderError that lists them all.
    """
    results = [run.result() for run in encoder_checks(encoder, samples, options, expected_failures, only)]
    failed = [result for result in results if result.status == "failed"]
    if failed and on_fail == "raise":
        name = encoder if isinstance(encoder, str) else encoder.__name__
        lines = "\n".join(str(result) for result in failed)
        raise EncoderError(
            f"encoder {name} fails {len(failed)} of {len(results)} checks:\n{lines}",
            code="encoder.conformance",
            encoder=name,
            checks=[result.name for result in failed],
        )
    return results


def _check_names(names: Sequence[str]) -> None:
    known = [check.name for check in CHECKS]
    for name in names:
        if name not in known:
            raise EncoderError(
                f"there is no check {name!r}; {suggest(name, known)}",
                code="encoder.unknown_check",
                given=name,
                expected=known,
            )
