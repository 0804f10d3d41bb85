"""Two real processes, as torchrun starts them: the same numbers as one, resumed to the bit, never left waiting."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import COUNT, Watched, child_environment, number_config, reports, state_bytes, write_numbers

from mmx.config.schema import DataConfig
from mmx.data.formats import read_examples
from mmx.evaluation.evaluate import EvaluationOptions, evaluate
from mmx.inference.pipeline import Pipeline
from mmx.testing import tiny_model
from mmx.training.state import latest_state

SCRIPT = Path(__file__).parents[1] / "support" / "two_ranks.py"
BAD = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have done all that two_ranks.py says; started once, because starting costs the most."""
    place = tmp_path_factory.mktemp("two")
    write_numbers(place)
    write_numbers(place, bad=BAD, name="broken.jsonl")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(place)], env=child_environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return place


def noted(folder: Path, name: str) -> list[Any]:
    return json.loads((folder / f"{name}.json").read_text())


def test_there_are_two_processes(folder):
    assert [found["world"] for found in noted(folder, "whole")] == [2, 2]


@pytest.mark.parametrize("stop", [4, 7])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(folder, stop):
    whole, halves = noted(folder, "whole"), noted(folder, f"stopped-{stop}")
    for rank in (0, 1):
        assert f"after step {stop}" in halves[rank]["first"]["error"]
        assert halves[rank]["second"]["error"] is None
        assert halves[rank]["first"]["taken"] + halves[rank]["second"]["taken"] == whole[rank]["taken"]
    expected, found = state_bytes(folder / "whole"), state_bytes(folder / f"stopped-{stop}")
    assert len(expected) == 3
    assert found == expected
    assert reports(folder / f"stopped-{stop}") == reports(folder / "whole")


def test_every_epoch_sees_every_sample_once(folder):
    ranks = [found["taken"] for found in noted(folder, "whole")]
    world, accumulation, batch = 2, 2, 4
    stream = []
    for steps in zip(*ranks, strict=True):
        for micro in range(accumulation):
            stream += [name for _, _, _, ids in steps for name in ids[micro * batch : (micro + 1) * batch]]
    assert len(stream) == 12 * world * accumulation * batch
    for epoch in range(len(stream) // COUNT):
        assert len(set(stream[epoch * COUNT : (epoch + 1) * COUNT])) == COUNT


def test_two_processes_with_half_the_batch_are_one_with_the_whole(folder, tmp_path):
    config = number_config(str(folder / "numbers.jsonl"), tmp_path, dropout=0.0, batch_size=8, steps=20, save_every=20)
    alone = Watched(config)
    alone.run()
    together = noted(folder, "half")
    assert [step for step, *_ in alone.taken] == list(range(1, 21))
    for mine, theirs in zip(alone.taken, together[0]["taken"], strict=True):
        assert abs(mine[1] - theirs[1]) < 1e-4
    assert together[0]["taken"][0][3] + together[1]["taken"][0][3] == alone.taken[0][3]


@pytest.mark.parametrize("name", ["whole", "rewarded"])
def test_both_have_the_same_weights_at_the_end(folder, name):
    """Also where each has said captions of its own and learned from their rewards."""
    first, second = noted(folder, name)
    assert [loss for _, loss, *_ in first["taken"]] == [loss for _, loss, *_ in second["taken"]]
    assert len(first["taken"]) == 12
    assert first["weights"] == second["weights"]
    assert ("reward" in reports(folder / name)[-1]) == (name == "rewarded")


@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2])
def test_a_loss_that_is_not_finite_on_one_rank_stops_both(folder, accumulation):
    first, second = noted(folder, f"broken-{accumulation}")
    assert first["error"] == second["error"]
    assert "not finite" in first["error"]
    assert len(first["taken"]) == len(second["taken"])
    run = folder / f"broken-{accumulation}"
    last = latest_state(run)
    assert len(reports(run)) == len(first["taken"])
    if last is not None:
        assert int(last.name) == len(first["taken"])
        tensors = load_file(last / "training" / "model.safetensors")
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


@pytest.fixture
def one_thread():
    """As each of the two ranks has: more threads add up in another order, which is more than 1e-12."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 8])
def test_evaluation_over_two_processes_equals_one(folder, count, one_thread):
    examples = read_examples(DataConfig(path=str(folder / "numbers.jsonl")))[:count]
    pipeline = Pipeline(tiny_model())
    options = EvaluationOptions(pipeline.generation_config({"max_new_tokens": 4}), batch_size=2)
    expected = evaluate(pipeline, examples, options)
    for found in noted(folder, f"evaluated-{count}"):
        assert found["metrics"].keys() == expected.metrics.keys()
        assert all(abs(found["metrics"][key] - value) <= 1e-12 for key, value in expected.metrics.items())
        assert found["texts"] == json.loads(json.dumps([asdict(text) for text in expected.predictions]))
        assert len({tuple(text["key"]) for text in found["texts"]}) == count
