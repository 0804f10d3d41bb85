"""Run by torchrun on two processes: trains and evaluates several runs, and writes what each rank found to a file.

python -m torch.distributed.run --standalone --nproc_per_node 2 two_ranks.py FOLDER
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import gather_object
from toy_runs import RecordingTrainer, number_config, scst_config

from mmx.config.schema import DataConfig, RunConfig
from mmx.data.formats import read_examples
from mmx.errors import MmxError
from mmx.evaluation.evaluate import EvaluationOptions, ProcessGroup, evaluate
from mmx.inference.pipeline import Pipeline
from mmx.testing import tiny_model

folder = Path(sys.argv[1])


def run(config: RunConfig, resume: bool = False, stop_in: int | None = None) -> dict[str, object]:
    """Train and return the recorded steps of this rank, and the error that ended the run."""
    trainer = RecordingTrainer(config, resume)
    trainer.stop_in = stop_in
    error = None
    try:
        trainer.run()
    except MmxError as problem:
        error = {"code": problem.code, "step": problem.details.get("step")}
        if "sample" in problem.details:
            error["sample"] = problem.details["sample"]
    weights = sum(float(parameter.double().abs().sum()) for parameter in trainer.model.parameters())
    return {
        "recorded": trainer.recorded,
        "error": error,
        "world_size": trainer.accelerator.num_processes,
        "weights": weights,
    }


def save_finding(name: str, finding: object) -> None:
    findings = gather_object([finding])
    if rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(findings))


def rank() -> int:
    return torch.distributed.get_rank()


data = str(folder / "numbers.jsonl")
groups = {"sources.numbers.encoder": {"lr_scale": 0.5}}


def accumulating(name: str) -> RunConfig:
    """Return a run of two micro-batches a step with validation."""
    return number_config(data, folder / name, validate=True, gradient_accumulation_steps=2, param_groups=groups)


save_finding("whole", run(accumulating("whole")))
for stop in (4, 7):  # 7 is inside an epoch and not at a save; only the second rank receives SIGTERM
    config = accumulating(f"stopped-{stop}")
    first = run(config, stop_in=stop if rank() == 1 else None)
    second = run(config, resume=True)
    save_finding(f"stopped-{stop}", {"first": first, "second": second})

half = number_config(data, folder / "half", dropout=0.0, per_device_batch_size=4, max_steps=20, save_steps=20)
save_finding("half", run(half))
for accumulation in (1, 2):
    broken = number_config(
        str(folder / "broken.jsonl"),
        folder / f"broken-{accumulation}",
        per_device_batch_size=2,
        save_steps=1,
        gradient_accumulation_steps=accumulation,
    )
    save_finding(f"broken-{accumulation}", run(broken))

save_finding("scst", run(scst_config(data, folder / "scst")))
broken = scst_config(str(folder / "broken.jsonl"), folder / "broken-scst", per_device_batch_size=2, save_steps=1)
save_finding("broken-scst", run(broken))
taught = number_config(
    str(folder / "broken.jsonl"),
    folder / "broken-taught",
    per_device_batch_size=2,
    distillation={"teachers": [str(folder / "half" / "last")]},
)
save_finding("broken-taught", run(taught))

examples = read_examples(DataConfig(path=data))
for count in (1, 2, 5, 6, 7, 8):
    pipeline = Pipeline(tiny_model())
    generation = pipeline.generation.model_copy(update={"max_new_tokens": 4})
    options = EvaluationOptions(generation, batch_size=2)
    report = evaluate(pipeline, examples[:count], options, ProcessGroup(rank(), 2, gather_object))
    predictions = [asdict(text) for text in report.predictions]
    save_finding(f"evaluated-{count}", {"metrics": report.metrics, "predictions": predictions})
