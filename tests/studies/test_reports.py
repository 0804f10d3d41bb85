"""Studies: counting by hand, reports after a few steps, and (slow) the results of whole studies."""

import json
import sys
from itertools import permutations

import pytest
import torch

from mmx.cli import app as cli
from mmx.config.schema import ModelConfig
from mmx.models.model import Model
from mmx.studies import positions, tying
from mmx.studies.experiment import Experiment, Prediction, word_accuracy
from mmx.studies.synthetic_text import TextExample
from mmx.testing.toys import toy_tokenizer


def build_model(config):
    return Model(ModelConfig.model_validate(config), toy_tokenizer()).eval()


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def few_texts(monkeypatch):
    """So few texts that a study takes seconds."""
    for study in (positions, tying):
        monkeypatch.setattr(study, "NUM_TEXTS", 24)
        monkeypatch.setattr(study, "NUM_HELD_OUT", 8)


# ---- counting --------------------------------------------------------------------------------------------------------


def test_word_accuracy_counts_words_at_their_position():
    predictions = [Prediction("a b c", "a b, c"), Prediction("b a", "a b"), Prediction("a", "a b"), Prediction("", "c")]
    assert word_accuracy(predictions) == (4 / 8, 8)
    assert word_accuracy(predictions, lambda word: word == "b") == (1 / 3, 3)
    assert word_accuracy(predictions, lambda word: word == "z") == (0.0, 0)
    experiment = Experiment(0.5, (Prediction("a b", "a b"), Prediction("a c", "a b")), None)
    assert (experiment.exact, experiment.words) == (0.5, 0.75)


def test_chance_is_the_expected_accuracy_of_a_random_order():
    texts = [TextExample("", "red red blue"), TextExample("", "red blue gold")]
    accuracies = []
    for text in texts:
        orders = [" ".join(order) for order in permutations(text.target.split())]
        accuracies.append(orders.count(text.target) / len(orders))
    assert positions.chance(texts) == pytest.approx(sum(accuracies) / 2)


def test_word_frequencies_are_those_of_the_sources():
    texts = [TextExample("a b a", "a"), TextExample("b, c", "c")]
    assert tying.word_frequencies(texts) == {"a": 2, "b": 2, "c": 1}


@pytest.mark.parametrize(("option", "layers"), [("none", 2), ("layers", 1), ("all", 1)])
def test_bytes_of_a_memory_are_those_of_its_numbers(option, layers):
    keys_and_values = 2 * layers * 20 * 64 * 4  # float32
    assert tying.memory_bytes(build_model(tying.model_config(option)), 20) == keys_and_values


def test_tied_parameters_are_counted_once():
    none, layers, all_ = (count_parameters(build_model(tying.model_config(option))) for option in tying.TIE_OPTIONS)
    key_and_value_maps = 2 * (64 * 64 + 64)
    assert none - layers == key_and_value_maps, "those of one of two layers"
    assert layers - all_ == 3 * key_and_value_maps, "those of two decoder layers and of the encoder"


@pytest.mark.parametrize("scheme", positions.SCHEMES)
@torch.no_grad()
def test_positions_come_from_the_keys_only(scheme):
    """Texts with the same words in another order have the same features; only key positions change the logits."""
    model = build_model(positions.model_config(scheme))
    if scheme == "relative":
        torch.nn.init.normal_(model.decoder.relative_position_bias.weight)  # it is initialized to zero
    tokens = torch.tensor([[[1, 3, 70]]])
    one, other = (model.encode({"text": model.collate("text", [text])}, 1) for text in ("ab", "ba"))
    assert torch.allclose(one.values[:, :, :, :4].sort(3)[0], other.values[:, :, :, :4].sort(3)[0], atol=1e-6)
    equal = torch.allclose(model.decoder(tokens, one), model.decoder(tokens, other), atol=1e-6)
    assert equal == (scheme == "none")


# ---- a few steps -----------------------------------------------------------------------------------------------------


def test_a_report_of_positions_has_a_row_for_each_scheme(few_texts):
    started = []
    report = positions.positions(steps=2, seed=1, progress=started.append)
    assert started == [row.scheme for row in report.rows] == ["none", "learned", "sinusoidal", "relative"]
    assert all(3 < row.loss < 6 for row in report.rows), "about log 284"
    assert all(0 <= row.exact <= row.words <= 1 for row in report.rows)
    assert len({row.loss for row in report.rows}) == 4
    assert (report.steps, report.seed) == (2, 1)
    lines = report.table().splitlines()
    assert len(lines) == 1 + 4 + 2
    learned = report.rows[1]
    assert lines[2].split() == ["learned", f"{learned.exact:.3f}", f"{learned.words:.3f}", f"{learned.loss:.4f}"]


def test_the_command_and_the_function_give_the_same_report(few_texts, mmx_study, tmp_path):
    code, printed = mmx_study("tying", "--steps", 2, "--json", "--out", tmp_path / "new" / "t.json")
    found = json.loads(printed)
    assert code == 0
    assert json.loads((tmp_path / "new" / "t.json").read_text()) == {"study": "tying", **found}
    report = tying.tying(steps=2)
    assert [row["loss"] for row in found["rows"]] == [row.loss for row in report.rows]
    assert [row.tie_key_value for row in report.rows] == ["none", "layers", "all"]
    assert [row.nbytes for row in report.rows] == [32768, 16384, 16384]
    assert report.unseen > report.rare > 0, "24 texts contain few of the names"
    lines = report.table().splitlines()
    assert len(lines) == 1 + 3 + 2
    assert lines[3].split()[:3] == ["all", f"{report.rows[2].parameters:,}", "16,384"]


@pytest.fixture
def mmx_study(monkeypatch, capsys):
    """The command in this process: exit code, and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mmx", "study", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        streams = capsys.readouterr()
        return exit_.value.code or 0, streams.out or streams.err

    return run


def test_an_unknown_study_is_an_error(mmx_study):
    code, message = mmx_study("position")
    assert code == 2
    assert "'position'" in message


# ---- whole studies ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_order_is_learned_with_key_positions_only():
    report = positions.positions()
    none, *others = report.rows
    assert none.exact < report.chance + 0.05
    assert none.loss > 0.5
    assert all(row.exact > 0.9 for row in others)
    assert all(row.loss < 0.1 for row in others)


@pytest.mark.slow
def test_tied_models_are_smaller_and_learn_to_copy():
    none, layers, all_ = tying.tying().rows
    assert none.parameters > layers.parameters > all_.parameters
    assert none.nbytes == 2 * layers.nbytes == 2 * all_.nbytes
    assert all(row.words > 0.8 for row in (none, layers, all_))
