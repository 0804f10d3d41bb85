"""Benchmarks: mmx and the reference do the same work, ratios are of pairs of runs, memory is measured."""

import json
import math
import sys
from dataclasses import asdict
from importlib.util import find_spec

import pytest
import torch

from mmx.bench import SIZES, WORKLOADS, BenchResult, machine, run
from mmx.bench.decoding import NUM_TOKENS, bandwidth, bytes_read, greedy_runs, questions
from mmx.bench.hf_references import QUESTIONS, SHAPES, BenchSetting, build_pair
from mmx.bench.table import HEADER, line, notes
from mmx.bench.timing import STATM, Measurement, Quantity, ResidentMemory, TimedRuns, alternate, compare
from mmx.cli import app
from mmx.encoders.pretrained.hf_models import suppress_hf_output
from mmx.errors import MmxError

NUM_RESULTS = {
    "greedy": 3,
    "beams": 4,
    "questions": 2,
    "cache": 4,
    "attention-maps": 3,
    "training": 2,
    "images": 1,
    "constraints": 3,
    "formats": 4 if find_spec("datasets") and find_spec("pyarrow") else 2,
    "startup": 3 if STATM.exists() else 2,
}


@pytest.fixture(scope="module")
def pair():
    with suppress_hf_output():
        return build_pair("vit-gpt2", BenchSetting("micro", 1))


# ---- workloads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_mmx_and_the_reference_give_the_same_output(name):
    results = list(run([name], size="micro", repeats=1))
    assert len(results) == NUM_RESULTS[name]
    compared = [result for result in results if result.reference is not None]
    expected = None if name == "constraints" else True  # words change the text
    assert all(result.same is expected for result in compared), compared
    assert bool(compared) == (name != "startup")
    for result in results:
        assert math.isfinite(result.mmx.median) and result.mmx.median > 0
        assert json.loads(json.dumps(asdict(result)))["name"] == result.name


def test_texts_differ_from_row_to_row(pair):
    """Equal texts would make the comparison meaningless."""
    texts = greedy_runs(pair, pair.pixels(8))["mmx"].output
    assert len({tuple(text) for text in texts}) > 4
    assert min(len(set(text)) for text in texts) > 1
    assert {len(text) for text in texts} == {NUM_TOKENS}


def test_a_changed_weight_is_detected(pair, monkeypatch):
    weight = pair.reference.decoder.transformer.h[0].attn.c_attn.weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-1)
    monkeypatch.setattr("mmx.bench.decoding.build_pair", lambda kind, setting: pair)
    results = list(WORKLOADS["greedy"](BenchSetting("micro", 1)))
    with torch.no_grad():
        weight.copy_(original)
    assert [result.same for result in results] == [False, None, False]


def test_questions_have_several_lengths():
    """Else the reference would not pad, and both variants of mmx would be the same."""
    with suppress_hf_output():
        tokenizer = build_pair("blip-vqa", BenchSetting("micro", 1)).tokenizer
    batch = tokenizer(QUESTIONS, padding=True, return_tensors="pt")
    assert len(QUESTIONS) == 16
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1
    assert tokenizer.unk_token_id not in batch["input_ids"]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_other_dtypes_are_noted(dtype):
    results = [*run(["greedy"], "micro", 1, dtype), *questions(BenchSetting("micro", 1, dtype))]
    assert all(f"in {dtype}" in result.note for result in results if result.reference)


def test_bytes_read_are_those_of_the_decoder_without_positions(pair):
    size = 32
    norms = 3 * 2 * size
    self_attention = 3 * size * size + 3 * size + size * size + size
    cross_attention = 2 * (size * size + size)  # queries and outputs
    feed_forward = 8 * size * size + 5 * size
    layer = norms + self_attention + cross_attention + feed_forward
    embedding = SHAPES["micro"].vocab_size["gpt2"] * size
    assert bytes_read(pair.model, pair.setting) == 4 * (2 * layer + 2 * size + embedding)


def test_base_has_the_published_sizes():
    """nlpconnect/vit-gpt2-image-captioning and Salesforce/blip-image-captioning-base."""
    base = SHAPES["base"]
    assert (base.hidden_size, base.num_layers, base.num_heads) == (768, 12, 12)
    assert (base.num_encoder_layers, base.patch_size) == (12, 16)
    assert base.vocab_size == {"gpt2": 50257, "blip": 30524}
    assert base.image_size == {"gpt2": 224, "blip": 384}


def test_bandwidth_and_machine():
    assert bandwidth(1, "cpu") > 0
    assert set(machine()) == {"processor", "threads", "python", "torch", "transformers"}


# ---- timing ----------------------------------------------------------------------------------------------------------

MILLISECONDS = Quantity("x", "ms", lambda seconds: 1000 * seconds)


def clock_of(*durations):
    """A clock by which the runs take these seconds."""
    times = []
    for duration in durations:
        times += [0.0, duration]
    return iter(times).__next__


def test_functions_alternate_after_a_warm_up_and_run_once_more_for_memory():
    order = []

    def first():
        order.append("a")
        return len(order)

    def second():
        order.append("b")

    runs = alternate({"a": first, "b": second}, 2, clock=clock_of(1.0, 4.0, 2.0, 5.0))
    assert "".join(order) == "ab" + "abab" + "ab"
    assert (runs["a"].seconds, runs["b"].seconds) == ([1.0, 2.0], [4.0, 5.0])
    assert runs["a"].output == 1


def test_the_ratio_is_reference_to_mmx_by_pairs_of_runs():
    result = compare(MILLISECONDS, TimedRuns([1.0, 2.0, 4.0], None), TimedRuns([3.0, 2.0, 6.0], None), same=True)
    assert result.mmx == Measurement(2000.0, 1000.0, 4000.0)
    assert result.reference == Measurement(3000.0, 2000.0, 6000.0)
    assert result.ratio == Measurement(1.5, 1.0, 3.0)  # of 3, 1 and 1.5


def test_the_ratio_is_of_times_for_throughput_too():
    throughput = Quantity("x", "per second", lambda seconds: 8 / seconds)
    result = compare(throughput, TimedRuns([1.0], None), TimedRuns([2.0], None))
    assert (result.mmx.median, result.reference.median, result.ratio.median) == (8.0, 4.0, 2.0)


def test_without_a_reference_there_is_no_ratio():
    result = compare(MILLISECONDS, TimedRuns([1.0], None))
    assert (result.reference, result.ratio, result.same) == (None, None, None)


@pytest.mark.skipif(not STATM.exists(), reason="no /proc")
def test_peak_memory_is_measured():
    with ResidentMemory() as memory:
        torch.ones(16_000_000).sum()  # 64 MB, freed at once
    assert 60 < memory.peak_mb < 200
    with ResidentMemory() as memory:
        pass
    assert memory.peak_mb < 20


def test_rows_have_the_columns_of_the_header():
    measurement = Measurement(1.0, 0.5, 2.0)
    full = BenchResult("greedy, batch 1", "ms", measurement, measurement, measurement, False, 1.0, 2.0, "a note")
    single = BenchResult("startup", "s", measurement)
    assert line(full).index("NO") == line(single).index("-     -") == HEADER.index("same")
    assert line(full).endswith("1.0 / 2.0")
    assert line(single).endswith("- / -")
    assert notes([full, full, single]) == "greedy, batch 1; greedy, batch 1: a note."


# ---- names and command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "given"),
    [
        ({"names": ["gredy"]}, "bench.workload", "gredy"),
        ({"names": ["greedy", "x"]}, "bench.workload", "x"),
        ({"size": "bas"}, "bench.size", "bas"),
        ({"dtype": "float16"}, "bench.dtype", "float16"),
    ],
)
def test_an_unknown_name_is_refused_before_anything_runs(arguments, code, given):
    with pytest.raises(MmxError) as error:
        run(**arguments)
    assert error.value.code == code
    assert error.value.details["given"] == given


def test_sizes():
    assert SIZES == ("tiny", "base")


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Run `mmx bench` in this process: (exit code, stdout, stderr)."""

    def run_bench(*arguments):
        monkeypatch.setattr(sys, "argv", ["mmx", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            app.main()
        output = capsys.readouterr()
        return exit_.value.code or 0, output.out, output.err

    return run_bench


@pytest.mark.parametrize(
    "arguments", [["gredy"], ["--size", "bas"], ["--dtype", "float16"], ["--device", "cuba"]], ids=str
)
def test_a_wrong_name_is_one_line_and_exit_code_2(run_command, arguments):
    code, output, error = run_command(*arguments)
    assert (code, output) == (2, "")
    assert error.count("\n") == 1
    assert repr(arguments[-1]) in error


def test_the_command_prints_a_table_and_writes_json(run_command, monkeypatch, tmp_path):
    measurement = Measurement(1.0, 0.5, 2.0)
    result = BenchResult("fast", "ms", measurement, measurement, measurement, True, note="a note")
    monkeypatch.setitem(WORKLOADS, "greedy", lambda setting: iter([result] * setting.repeats))
    path = tmp_path / "new" / "results.json"
    code, table, error = run_command("greedy", "--repeats", 2, "--out", path)
    assert (code, error) == (0, "")
    assert table.splitlines() == [HEADER, line(result), line(result), "fast; fast: a note."]
    written = json.loads(path.read_text())
    assert (written["size"], written["repeats"], written["dtype"], written["device"]) == ("tiny", 2, "float32", "cpu")
    assert written["machine"]["torch"] == torch.__version__
    code, rows, _ = run_command("greedy", "--repeats", 2, "--json")
    assert [json.loads(row) for row in rows.splitlines()] == [json.loads(json.dumps(asdict(result)))] * 2
