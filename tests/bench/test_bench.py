"""The bench measures what it says: both sides do the same work, ratios are of pairs, memory is seen. Times are free."""

import json
import math
import sys

import pytest
import torch

from mmx.bench import SIZES, WORKLOADS, BenchResult, machine, run
from mmx.bench.decoding import _greedy_runs, bandwidth, bytes_read, questions
from mmx.bench.hf_references import QUESTIONS, SHAPES, BenchSetting, build_pair
from mmx.bench.table import HEADER, line, notes
from mmx.bench.timing import STATM, ResidentMemory, Spread, TimedRuns, alternate, compare
from mmx.cli import app as cli
from mmx.encoders.pretrained.hf_models import suppress_hf_output
from mmx.errors import MmxError

FIGURES = {
    "greedy": 3,
    "beams": 4,
    "questions": 2,
    "cache": 4,
    "looking": 3,
    "training": 1,
    "pictures": 1,
    "start": 3 if STATM.exists() else 2,
}


@pytest.fixture(scope="module")
def pair():
    with suppress_hf_output():
        return build_pair("vit-gpt2", BenchSetting("micro", 1))


def clock_of(*durations):
    """A clock on which the runs take these seconds, one after the other."""
    times = iter([time for seconds in durations for time in (0.0, seconds)])
    return lambda: next(times)


# ---- the workloads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_both_sides_do_the_same(name):
    figures = list(run([name], size="micro", repeats=1))
    assert len(figures) == FIGURES[name]
    compared = [figure for figure in figures if figure.theirs is not None]
    assert all(figure.same is True for figure in compared), compared
    assert bool(compared) == (name != "start")
    for figure in figures:
        assert math.isfinite(figure.ours.median) and figure.ours.median > 0
        assert json.loads(json.dumps(figure.__dict__, default=vars))["name"] == figure.name


def test_texts_differ_from_row_to_row(pair):
    """Or that they are the same on both sides would say little."""
    said = _greedy_runs(pair, pair.pixels(8))["ours"].first
    assert len({tuple(text) for text in said}) > 4
    assert min(len(set(text)) for text in said) > 1
    assert {len(text) for text in said} == {20}


def test_other_weights_are_noticed(pair, monkeypatch):
    """The check has teeth: with one of our matrices changed, the figure says so."""
    theirs = pair.reference.decoder.transformer.h[0].attn.c_attn.weight
    kept = theirs.detach().clone()
    with torch.no_grad():
        theirs.mul_(-1)
    monkeypatch.setattr("mmx.bench.decoding.build_pair", lambda kind, setting: pair)
    found = list(WORKLOADS["greedy"](BenchSetting("micro", 1)))
    with torch.no_grad():
        theirs.copy_(kept)
    assert [figure.same for figure in found] == [False, None, False]


def test_the_questions_are_of_several_lengths():
    """Or transformers would have nothing to pad, and both of our ways would be one."""
    with suppress_hf_output():
        pair = build_pair("blip-vqa", BenchSetting("micro", 1))
    lengths = pair.tokenizer(QUESTIONS, padding=True, return_tensors="pt")["attention_mask"].sum(1)
    assert len(QUESTIONS) == 16 and len(set(lengths.tolist())) > 1
    assert pair.tokenizer.unk_token_id not in pair.tokenizer(QUESTIONS, padding=True, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_other_types_run_and_say_so(dtype):
    figures = [*run(["greedy"], "micro", 1, dtype), *questions(BenchSetting("micro", 1, dtype))]
    assert all(f"our decoder in {dtype}" in figure.note for figure in figures if figure.theirs)


def test_what_a_token_reads_is_the_decoder_without_its_positions(pair):
    width, layers, words = 32, 2, SHAPES["micro"].vocabulary["gpt2"]
    block = 3 * 2 * width  # norms
    block += 3 * width * width + 3 * width + width * width + width  # self-attention
    block += 2 * (width * width + width)  # cross-attention: queries and outputs
    block += 8 * width * width + 5 * width  # feed-forward
    assert bytes_read(pair.model, pair.setting) == 4 * (layers * block + 2 * width + words * width)


def test_the_published_sizes():
    """Facts of nlpconnect/vit-gpt2-image-captioning and of Salesforce/blip-image-captioning-base."""
    base = SHAPES["base"]
    assert (base.hidden_size, base.num_layers, base.num_heads, base.encoder_layers, base.patch) == (768, 12, 12, 12, 16)
    assert base.vocabulary == {"gpt2": 50257, "blip": 30524} and base.side == {"gpt2": 224, "blip": 384}


def test_the_bandwidth_is_positive():
    assert bandwidth(1, "cpu") > 0
    assert set(machine()) == {"processor", "threads", "python", "torch", "transformers"}


# ---- the arithmetic ----------------------------------------------------------------------------------------------


def test_contenders_take_turns_after_a_warm_up_and_are_watched_once_more():
    order: list[str] = []
    runs = alternate(
        {"a": lambda: order.append("a") or len(order), "b": lambda: order.append("b")},
        2,
        clock=clock_of(1.0, 4.0, 2.0, 5.0),
    )
    assert "".join(order) == "ab" + "abab" + "ab"
    assert (runs["a"].seconds, runs["b"].seconds) == ([1.0, 2.0], [4.0, 5.0])
    assert runs["a"].first == 1


def test_a_ratio_is_theirs_to_ours_in_pairs():
    figure = compare("x", "ms", lambda s: 1000 * s, TimedRuns([1.0, 2.0, 4.0]), TimedRuns([3.0, 2.0, 6.0]), same=True)
    assert figure.ours == Spread(2000.0, 1000.0, 4000.0)
    assert figure.theirs == Spread(3000.0, 2000.0, 6000.0)
    assert figure.ratio == Spread(1.5, 1.0, 3.0), "of 3, 1 and 1.5; that of the medians is the same here by chance"


def test_a_ratio_is_of_times_also_where_more_is_better():
    figure = compare("x", "a second", lambda s: 8 / s, TimedRuns([1.0]), TimedRuns([2.0]))
    assert (figure.ours.median, figure.theirs.median, figure.ratio.median) == (8.0, 4.0, 2.0)


def test_without_a_peer_there_is_no_ratio():
    figure = compare("x", "s", lambda s: s, TimedRuns([1.0]))
    assert (figure.theirs, figure.ratio, figure.same) == (None, None, None)


@pytest.mark.skipif(not STATM.exists(), reason="no /proc here")
def test_memory_that_was_held_for_a_while_is_seen():
    with ResidentMemory() as memory:
        torch.ones(16_000_000).sum()  # 64 MB, gone at once
    assert 60 < memory.peak_mb < 200
    with ResidentMemory() as memory:
        pass
    assert memory.peak_mb < 20


def test_a_line_has_the_columns_of_the_header():
    spread = Spread(1.0, 0.5, 2.0)
    whole = BenchResult("greedy, batch 1", "ms", spread, spread, spread, False, 1.0, 2.0, "a note")
    alone = BenchResult("start", "s", spread)
    assert line(whole).index("NO") == line(alone).index("-     -") == HEADER.index("same")
    assert line(whole).endswith("1.0 / 2.0") and line(alone).endswith("- / -")
    assert notes([whole, whole, alone]) == "greedy, batch 1; greedy, batch 1: a note."


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def mmx(monkeypatch, capsys):
    """The program within this process: (exit code, stdout, stderr)."""

    def ran(*words):
        monkeypatch.setattr(sys, "argv", ["mmx", "bench", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code or 0, *capsys.readouterr()

    return ran


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["gredy"], "mmx: there is no workload 'gredy'; did you mean 'greedy'?\n"),
        (["beams", "x"], f"mmx: there is no workload 'x'; known: {', '.join(sorted(WORKLOADS))}.\n"),
        (["--size", "bas"], "mmx: there is no size 'bas'; did you mean 'base'?\n"),
        (["--dtype", "float16"], "mmx: there is no dtype 'float16'; did you mean 'bfloat16'?\n"),
        (["--device", "cuba"], "mmx: device 'cuba' is not available here; try --device cpu.\n"),
    ],
    ids=str,
)
def test_a_wrong_name_is_one_sentence(mmx, words, sentence):
    assert mmx(*words) == (2, "", sentence)


def test_the_command_prints_a_table_and_writes_json(mmx, monkeypatch, tmp_path):
    spread = Spread(1.0, 0.5, 2.0)
    figure = BenchResult("fast", "ms", spread, spread, spread, True, note="a note")
    monkeypatch.setitem(WORKLOADS, "greedy", lambda setting: iter([figure] * setting.repeats))
    out = tmp_path / "deep" / "figures.json"
    code, table, errors = mmx("greedy", "--repeats", 2, "--out", out)
    assert (code, errors) == (0, "")
    assert table.splitlines() == [HEADER, line(figure), line(figure), "fast; fast: a note."]
    written = json.loads(out.read_text())
    assert (written["size"], written["repeats"], written["dtype"], written["device"]) == ("tiny", 2, "float32", "cpu")
    assert written["machine"]["torch"] == torch.__version__
    code, lines, _ = mmx("greedy", "--repeats", 2, "--json")
    assert [json.loads(row) for row in lines.splitlines()] == written["figures"]


def test_refused_before_anything_is_measured():
    with pytest.raises(MmxError, match="there is no workload"):
        run(["greedy", "nothing"])
    assert SIZES == ("tiny", "base")
