"""The pointing game: planted maps get known scores, and the relevance of the bundled model points at the objects."""

from dataclasses import replace

import pytest
import torch

from mmx.data.scenes import generate_scene
from mmx.errors import MmxError
from mmx.evaluation.pointing_game import (
    ALL_TYPES,
    BEST_HEAD_BY_TYPE,
    QUESTION_TYPES,
    pointing_game,
    score_pointing,
    select_heads,
)
from mmx.evaluation.pointing_methods import PointingMethod, standard_methods
from mmx.evaluation.scene_maps import SceneMaps, case_texts, pointing_cases
from mmx.inference.pipeline import Pipeline
from mmx.memory import Memory, Segment
from mmx.testing import tiny_model

GRID = 8


def scene_maps(maps, cases):
    """Maps [n, R, C] as those of all heads of two layers."""
    zeros = torch.zeros(1, 1, 1, GRID**2, 1)
    memory = Memory(zeros, zeros, torch.ones(1, GRID**2).bool(), (Segment("image", 0, GRID**2, (GRID, GRID)),))
    touched = torch.cat([memory.focus(case.box).mask.unflatten(1, (GRID, GRID)) for case in cases])
    by_head = maps[:, None, None].expand(-1, 2, 3, -1, -1)
    return SceneMaps(tuple(cases), by_head, by_head, by_head, touched, (0.0, 0.0))


def perfect_maps(cases):
    """All mass in the cell that holds the center of the box."""
    maps = torch.zeros(len(cases), GRID, GRID)
    for row, case in zip(maps, cases, strict=True):
        x, y = center(case)
        row[int(y * GRID), int(x * GRID)] = 1
    return maps


def center(case):
    x0, y0, x1, y1 = case.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def is_inner(case):
    """Whether the center is not in a cell at the border."""
    return all(1 / GRID < x < 1 - 1 / GRID for x in center(case))


def test_perfect_maps_are_always_accurate(scenes):
    cases = pointing_cases(scenes)
    perfect = scene_maps(perfect_maps(cases), cases)
    inner_cases = [case for case in cases if is_inner(case)]
    inner = scene_maps(perfect_maps(inner_cases), inner_cases)
    methods = standard_methods(perfect)
    report = score_pointing(perfect, methods)
    inner_report = score_pointing(inner, methods)
    for method in methods:
        row = report.row(method.name)
        assert (row.cell_accuracy, row.n) == (1.0, len(cases))
        assert row.accuracy > 0.98, "a cell at the border has a plateau that extends beyond the box"
        assert inner_report.row(method.name).accuracy == 1.0


def test_constant_maps_score_as_chance(scenes):
    cases = pointing_cases(scenes)
    constant = scene_maps(torch.ones(len(cases), GRID, GRID), cases)
    report = score_pointing(constant, standard_methods(constant)[:1])
    for question_type in (*{case.question_type for case in cases}, ALL_TYPES):
        boxes = torch.tensor([case.box for case in cases if question_type in (ALL_TYPES, case.question_type)])
        area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).mean().item()
        assert report.chance[question_type] == pytest.approx(area, abs=1e-6)
        row = report.row("both", question_type)
        assert row.accuracy == pytest.approx(area, abs=0.01)
        assert row.mass == pytest.approx(area, abs=0.01)
        assert row.cell_accuracy == pytest.approx(report.chance_cells[question_type], abs=1e-5)


def test_cells_are_drawn_at_their_displaced_centers():
    cases = [replace(pointing_cases([generate_scene(31, 0)])[0], box=(0.5, 0.5, 0.62, 0.62))]
    maps = torch.zeros(1, GRID, GRID)
    maps[0, 5, 5] = 1  # its center 0.6875 is outside of the box, and inside once it is displaced
    centered = scene_maps(maps, cases)
    displaced = replace(centered, displacement=(-0.8, -0.8))
    methods = standard_methods(centered)
    for method in methods:
        assert score_pointing(centered, [method]).row(method.name).accuracy == 0
        assert score_pointing(displaced, [method]).row(method.name).accuracy == 1


def test_the_best_layer_head_and_pair_are_selected():
    """Head 1.2 is correct in two thirds of the cases, head 0.1 in the others; all other heads are noise."""
    cases = pointing_cases([generate_scene(31, index) for index in range(20)])
    perfect = perfect_maps(cases)
    attention = 0.05 * torch.rand(len(cases), 2, 3, GRID, GRID, generator=torch.Generator().manual_seed(0))
    third = torch.arange(len(cases)) % 3 == 0
    attention[~third, 1, 2] += perfect[~third]
    attention[third, 0, 1] += perfect[third]
    planted = replace(scene_maps(torch.zeros(len(cases), GRID, GRID), cases), attention=attention)
    selected = select_heads(planted)
    names = [method.name.removeprefix("attention, best ") for method in selected]
    assert names == ["layer 1", "head 1.2", "pair 1.2+0.1"]
    report = score_pointing(planted, selected)
    assert report.row(selected[2].name).cell_accuracy == 1.0
    assert report.row(selected[1].name).cell_accuracy == pytest.approx(2 / 3, abs=0.1)


def test_methods_join_heads_by_their_definition():
    by_head = torch.tensor([[[3.0, -1.0], [-1.0, -2.0]], [[0.5, 1.0], [0.25, 1.0]]])[None, :, :, None]
    maps = SceneMaps((), by_head, 2 * by_head, by_head, torch.zeros(1, 1, 2).bool(), (0.0, 0.0))
    every = tuple((layer, head) for layer in range(2) for head in range(2))
    assert PointingMethod("", "relevance", every).maps(maps).tolist() == [[[2.75, 2.0]]]
    assert PointingMethod("", "attention", every).maps(maps).tolist() == [[[0.6875, -0.25]]]
    assert PointingMethod("", "relevance", ((0, 0),)).maps(maps).tolist() == [[[3.0, 0.0]]]
    assert PointingMethod("", "weighted", every).maps(maps).tolist() == [[[1.375, -0.5]]]
    both = PointingMethod("", "both", ((1, 0), (1, 1))).maps(maps)  # 0.75 and 2.0 by relevance and by weighted
    torch.testing.assert_close(both, torch.tensor([[[0.75, 2.0]]]) / 2.75)


def test_cases_have_the_box_of_an_object_and_targets_at_their_word(bundled, scenes):
    cases = pointing_cases(scenes)
    assert {case.question_type for case in cases} == set(QUESTION_TYPES)
    text = case_texts(bundled, cases)
    for row, case in enumerate(cases):
        tokens = text.tokens[row, 0]
        targets = text.targets[row, 0]
        assert bundled.model.tokenizer.decode(targets[targets >= 0].tolist()) == case.text[case.start : case.stop]
        assert case.box in {item.box for item in scenes[case.scene].objects}
        length = int(text.mask[row].sum())
        positions = [t for t in (targets >= 0).nonzero()[:, 0].tolist() if t + 1 < length]
        assert (tokens[[t + 1 for t in positions]] == targets[positions]).all()


def test_the_bundled_model_points_at_the_objects(report):
    """Lower bounds of the measured values (see docs/interpretation.md); a shifted map would violate them."""
    relevance = report.row("relevance")
    attention = report.row("attention")
    both = report.row("both")
    best_by_type = report.row(BEST_HEAD_BY_TYPE)
    assert relevance.n > 50
    assert relevance.cell_accuracy >= 0.85
    assert relevance.accuracy >= 0.75
    assert relevance.cell_accuracy > attention.cell_accuracy
    assert relevance.mass > attention.mass
    assert relevance.mass > 4 * report.chance[ALL_TYPES]
    assert both.accuracy >= 0.8
    assert both.cell_accuracy >= 0.88
    assert len(report.selected) == 3
    assert best_by_type.n == relevance.n
    assert best_by_type.accuracy > report.chance[ALL_TYPES]
    assert report.row(BEST_HEAD_BY_TYPE, "size").cell_accuracy > report.chance_cells["size"]


def test_the_table_has_each_question_type_and_chance(report):
    lines = report.table(["relevance"]).splitlines()
    assert len(lines) == 1 + 2 * len(report.question_types)
    assert lines[1].split()[:2] == ["color", "chance"]
    assert lines[-1].split()[0] == "relevance"
    assert report.main_methods[:4] == ("both", "relevance", "weighted", "attention")
    with pytest.raises(MmxError) as error:
        report.row("guess")
    assert error.value.code == "pointing_game.row"
    assert error.value.details == {"method": "guess", "question_type": "all"}


def test_scenes_and_models_without_cases_or_grid_are_errors(bundled):
    with pytest.raises(MmxError) as error:
        pointing_game(bundled, [])
    assert error.value.code == "scene_maps.no_case"
    with pytest.raises(MmxError):
        pointing_game(Pipeline(tiny_model()), [generate_scene(1, 1)])
