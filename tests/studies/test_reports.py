"""The studies: a few steps show that they run and count rightly; the whole ones (slow) show what they are for."""

import json
import sys
from itertools import permutations

import pytest
import torch

from mmx.cli import app as cli
from mmx.config.schema import ModelConfig
from mmx.models.model import Model
from mmx.studies import positions, tying
from mmx.studies.experiment import Experiment, share_in_place
from mmx.studies.synthetic_text import TextExample
from mmx.testing.toys import toy_tokenizer


def built(facts):
    return Model(ModelConfig.model_validate(facts), toy_tokenizer()).eval()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def few_texts(monkeypatch):
    """So few that a report is made in seconds."""
    for study in (positions, tying):
        monkeypatch.setattr(study, "TEXTS", 24)
        monkeypatch.setattr(study, "HELD", 8)


# ---- how it is counted -------------------------------------------------------------------------------------------


def test_words_count_in_their_place():
    said = [("a b c", "a b, c"), ("b a", "a b"), ("a", "a b"), ("", "c")]
    assert share_in_place(said, lambda word: True) == (4 / 8, 8)
    assert share_in_place(said, lambda word: word == "b") == (1 / 3, 3)
    assert share_in_place(said, lambda word: word == "z") == (0.0, 0)
    trial = Experiment(0.5, (("a b", "a b"), ("a c", "a b")), None)
    assert (trial.exact, trial.words) == (0.5, 0.75)


def test_chance_is_what_a_guess_of_the_order_gets():
    pairs = [TextExample("", "red red blue"), TextExample("", "red blue gold")]
    hits = [
        [" ".join(order) == pair.target for order in permutations(pair.target.split())].count(True) / 6
        for pair in pairs
    ]
    assert positions.chance(pairs) == pytest.approx(sum(hits) / 2)


def test_words_are_sorted_by_how_often_they_were_read():
    assert tying.times_seen([TextExample("a b a", "a"), TextExample("b, c", "c")]) == {"a": 2, "b": 2, "c": 1}


@pytest.mark.parametrize(("kind", "layers"), [("none", 2), ("layers", 1), ("all", 1)])
def test_bytes_of_a_memory_are_those_of_its_numbers(kind, layers):
    assert tying.memory_bytes(built(tying.model_config(kind)), 20) == 2 * layers * 20 * 64 * 4  # keys, values; float32


def test_what_is_tied_is_counted_once():
    none, layers, all_ = (parameters(built(tying.model_config(kind))) for kind in tying.TIE_OPTIONS)
    maps = 2 * (64 * 64 + 64)
    assert none - layers == maps, "one of two layers' W_K and W_V"
    assert layers - all_ == 3 * maps, "those of two decoder blocks and of the encoder's"


@pytest.mark.parametrize("scheme", positions.SCHEMES)
@torch.no_grad()
def test_place_comes_from_the_keys_alone(scheme):
    """The same words in another order: their states are the same ones, and only places move what is said."""
    model = built(positions.model_config(scheme))
    if scheme == "relative":
        torch.nn.init.normal_(model.decoder.relative_position_bias.weight)  # it starts at nought
    tokens = torch.tensor([[[1, 3, 70]]])
    one, other = (model.encode({"text": model.collate("text", [text])}, 1) for text in ("ab", "ba"))
    assert torch.allclose(one.values[:, :, :, :4].sort(3)[0], other.values[:, :, :, :4].sort(3)[0], atol=1e-6)
    alike = torch.allclose(model.decoder(tokens, one), model.decoder(tokens, other), atol=1e-6)
    assert alike == (scheme == "none")


# ---- a few steps -------------------------------------------------------------------------------------------------


def test_positions_are_compared_side_by_side(few_texts):
    begun = []
    report = positions.positions(steps=2, seed=1, progress=begun.append)
    assert begun == [row.scheme for row in report.rows] == ["none", "learned", "sinusoidal", "relative"]
    assert all(3 < row.loss < 6 and 0 <= row.exact <= row.words <= 1 for row in report.rows), "about log 284"
    assert len({row.loss for row in report.rows}) == 4
    assert (report.steps, report.seed) == (2, 1)
    lines = report.table().splitlines()
    assert len(lines) == 1 + 4 + 2
    assert lines[2].split() == [
        "learned",
        *(f"{n:.3f}" for n in (0, report.rows[1].words)),
        f"{report.rows[1].loss:.4f}",
    ]


def test_the_same_seed_finds_the_same(few_texts, mmx_study, tmp_path):
    code, printed = mmx_study("tying", "--steps", 2, "--json", "--out", tmp_path / "new" / "t.json")
    found = json.loads(printed)
    assert code == 0
    assert json.loads((tmp_path / "new" / "t.json").read_text()) == {"study": "tying", **found}
    report = tying.tying(steps=2)
    assert [row["loss"] for row in found["rows"]] == [row.loss for row in report.rows]
    assert [row.kind for row in report.rows] == ["none", "layers", "all"]
    assert [row.nbytes for row in report.rows] == [32768, 16384, 16384]
    assert report.unseen > report.rare > 0, "24 texts have seen few of the names"
    lines = report.table().splitlines()
    assert len(lines) == 1 + 3 + 2
    assert lines[3].split()[:3] == ["all", f"{report.rows[2].parameters:,}", "16,384"]
    assert lines[-1].startswith(f"{report.unseen} words were never trained on")


@pytest.fixture
def mmx_study(monkeypatch, capsys):
    """The command, within this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["mmx", "study", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        streams = capsys.readouterr()
        return left.value.code or 0, streams.out or streams.err

    return run


def test_a_study_that_does_not_exist_is_refused(mmx_study):
    code, sentence = mmx_study("position")
    assert code == 2
    assert sentence.startswith("mmx: there is no study 'position'; did you mean")


# ---- the whole ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_places_order_is_a_guess_and_with_any_it_is_learned():
    report = positions.positions()
    none, *others = report.rows
    assert none.exact < report.chance + 0.05
    assert all(row.exact > 0.9 and row.loss < 0.1 < 0.5 < none.loss for row in others)


@pytest.mark.slow
def test_what_is_tied_is_smaller_and_copies_still():
    none, layers, all_ = tying.tying().rows
    assert none.parameters > layers.parameters > all_.parameters
    assert none.nbytes == 2 * layers.nbytes == 2 * all_.nbytes
    assert all(row.words > 0.8 for row in (none, layers, all_))
