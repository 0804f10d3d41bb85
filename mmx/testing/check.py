"""A check of the conformance kit, and how it reports its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mmx.testing.encoder_under_test import EncoderUnderTest

TOLERANCE = 1e-3  # kernels add in another order if the batch has another size


class CheckFailed(Exception):
    """A check failed; the message says what was found."""


class CheckSkipped(Exception):
    """A check does not apply; the message says why."""


class Check(NamedTuple):
    """One check: its name, its function, why it exists, and how to correct a failure."""

    name: str
    run: Callable[[EncoderUnderTest], None]
    reason: str
    remedy: str
