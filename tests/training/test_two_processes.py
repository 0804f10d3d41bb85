"""Two processes, started by torchrun: equal to one process, bit-exact resume, and no rank waits forever."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import (
    COUNT,
    RecordingTrainer,
    child_environment,
    metrics_lines,
    number_config,
    state_bytes,
    write_numbers,
)

from mmx.config.schema import DataConfig
from mmx.data.formats import read_examples
from mmx.evaluation.evaluate import EvaluationOptions, evaluate
from mmx.inference.pipeline import Pipeline
from mmx.testing import tiny_model
from mmx.training.state import latest_state

SCRIPT = Path(__file__).parents[1] / "support" / "two_ranks.py"
DAMAGED = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two_ranks.py, which is started once because starting the processes takes longest."""
    folder = tmp_path_factory.mktemp("two")
    write_numbers(folder)
    write_numbers(folder, damaged=DAMAGED, name="broken.jsonl")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(folder)], env=child_environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def findings(folder: Path, name: str) -> list[Any]:
    """Return what each rank found."""
    return json.loads((folder / f"{name}.json").read_text())


def test_there_are_two_processes(folder):
    assert [found["world_size"] for found in findings(folder, "whole")] == [2, 2]


@pytest.mark.parametrize("stop", [4, 7])
def test_resumed_run_is_bit_equal_to_uninterrupted_run(folder, stop):
    whole = findings(folder, "whole")
    resumed = findings(folder, f"stopped-{stop}")
    for rank in (0, 1):
        first = resumed[rank]["first"]
        second = resumed[rank]["second"]
        assert first["error"] == {"code": "training.stopped", "step": stop}
        assert second["error"] is None
        assert first["recorded"] + second["recorded"] == whole[rank]["recorded"]
    expected = state_bytes(folder / "whole")
    assert len(expected) == 3
    assert state_bytes(folder / f"stopped-{stop}") == expected
    assert metrics_lines(folder / f"stopped-{stop}") == metrics_lines(folder / "whole")


def test_every_epoch_has_every_sample_once(folder):
    ranks = [found["recorded"] for found in findings(folder, "whole")]
    accumulation = 2
    batch_size = 4
    stream: list[str] = []
    for steps in zip(*ranks, strict=True):
        for micro in range(accumulation):
            for _, _, _, ids in steps:
                stream += ids[micro * batch_size : (micro + 1) * batch_size]
    assert len(stream) == 12 * len(ranks) * accumulation * batch_size
    for epoch in range(len(stream) // COUNT):
        assert len(set(stream[epoch * COUNT : (epoch + 1) * COUNT])) == COUNT


def test_two_processes_equal_one_with_twice_the_batch(folder, tmp_path):
    data = str(folder / "numbers.jsonl")
    config = number_config(data, tmp_path, dropout=0.0, per_device_batch_size=8, max_steps=20, save_steps=20)
    single = RecordingTrainer(config)
    single.run()
    first, second = (found["recorded"] for found in findings(folder, "half"))
    assert [step.step for step in single.recorded] == list(range(1, 21))
    for ours, (_, loss, _, _) in zip(single.recorded, first, strict=True):
        assert abs(ours.loss - loss) < 1e-4
    assert first[0][3] + second[0][3] == single.recorded[0].ids


@pytest.mark.parametrize("name", ["whole", "scst"])
def test_both_ranks_end_with_the_same_weights(folder, name):
    """With SCST, each rank samples its own captions and has its own rewards."""
    first, second = findings(folder, name)
    assert [loss for _, loss, *_ in first["recorded"]] == [loss for _, loss, *_ in second["recorded"]]
    assert len(first["recorded"]) == 12
    assert first["weights"] == second["weights"]
    assert ("reward" in metrics_lines(folder / name)[-1]) == (name == "scst")


@pytest.mark.parametrize("name", ["broken-1", "broken-2", "broken-scst"])
def test_encoder_that_is_not_finite_on_one_rank_stops_both(folder, name):
    """With SCST, sampling fails before there is a loss."""
    first, second = findings(folder, name)
    done = len(first["recorded"])
    assert first["error"] == second["error"]
    assert (first["error"]["code"], first["error"]["step"]) == ("training.encoder_not_finite", done + 1)
    assert first["error"]["sample"].startswith("[nan")
    assert len(second["recorded"]) == done
    run = folder / name
    state = latest_state(run)
    assert len(metrics_lines(run)) == done
    if state is not None:
        assert int(state.name) == done
        tensors = load_file(state / "training" / "model.safetensors")
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def test_teacher_that_fails_on_one_rank_stops_both(folder):
    first, second = findings(folder, "broken-taught")
    assert first["error"] == second["error"]
    assert first["error"]["code"] == "encoder.features"
    assert len(first["recorded"]) == len(second["recorded"])


@pytest.fixture
def one_thread():
    """Use one thread as each rank does: more threads sum in another order, which differs by more than 1e-12."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 8])
def test_evaluation_on_two_processes_equals_one(folder, count, one_thread):
    examples = read_examples(DataConfig(path=str(folder / "numbers.jsonl")))[:count]
    pipeline = Pipeline(tiny_model())
    generation = pipeline.generation.model_copy(update={"max_new_tokens": 4})
    expected = evaluate(pipeline, examples, EvaluationOptions(generation, batch_size=2))
    predictions = json.loads(json.dumps([asdict(text) for text in expected.predictions]))
    for found in findings(folder, f"evaluated-{count}"):
        assert found["metrics"].keys() == expected.metrics.keys()
        assert all(abs(found["metrics"][key] - value) <= 1e-12 for key, value in expected.metrics.items())
        assert found["predictions"] == predictions
        assert len({tuple(text["key"]) for text in found["predictions"]}) == count
