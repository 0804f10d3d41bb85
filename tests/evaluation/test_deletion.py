"""The deletion test: masking the slots of a map costs more of the answer than masking random slots."""

import pytest

from mmx.data.scenes import generate_scene
from mmx.errors import MmxError
from mmx.evaluation.deletion import DeletionOptions, DeletionReport, DeletionResult, deletion_test
from mmx.evaluation.pointing_methods import MAP_METHODS


def test_masking_relevant_slots_costs_more_than_masking_random_slots(bundled, scenes, report):
    deletion = deletion_test(bundled, scenes[:6], report.selected[:1], DeletionOptions(draws=2))
    relevance = next(row for row in deletion.rows if row.method == "relevance")
    assert deletion.ratio("relevance") > 3
    assert relevance.bits > 0.5
    assert relevance.changed > 2 * deletion.chance.changed
    assert [row.method for row in deletion.rows] == [*MAP_METHODS, report.selected[0].name]


def test_results_are_reproducible(bundled, scenes):
    options = DeletionOptions(draws=1)
    assert deletion_test(bundled, scenes[:1], (), options) == deletion_test(bundled, scenes[:1], (), options)


def test_ratio_and_table_by_hand():
    row = DeletionResult("relevance", 50, 1.5, 0.4)
    report = DeletionReport((row,), DeletionResult("random", 50, 0.25, 0.1), 4)
    assert report.ratio("relevance") == 6.0
    assert report.table().splitlines()[1].split()[:5] == ["relevance", "50", "1.500", "6.00", "0.400"]
    with pytest.raises(MmxError) as error:
        report.ratio("guess")
    assert (error.value.code, error.value.details["method"]) == ("deletion.row", "guess")


def test_more_slots_than_the_grid_has_are_an_error(bundled):
    with pytest.raises(MmxError) as error:
        deletion_test(bundled, [generate_scene(1, 1)], (), DeletionOptions(slots=101))
    assert (error.value.code, error.value.details["slots"]) == ("deletion.slots", 101)
