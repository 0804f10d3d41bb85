"""Wilson intervals by hand and as properties."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.evaluation.confidence import format_proportion, wilson_interval


def test_wilson_interval_by_hand():
    """Brown et al. 2001, "Interval Estimation for a Binomial Proportion": the intervals of 0 of 10 and 5 of 10."""
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert format_proportion(0.5, 10) == "0.500 (0.237-0.763)"


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.integers(1, 10_000))
def test_an_interval_contains_its_proportion_and_shrinks_with_n(proportion, n):
    low, high = wilson_interval(proportion, n)
    assert 0 <= low <= proportion + 1e-9
    assert proportion - 1e-9 <= high <= 1
    smaller = wilson_interval(proportion, 4 * n)
    assert smaller[1] - smaller[0] < high - low
