"""Run by torchrun on two processes: everything that must hold there, each finding written to a file of its own.

python -m torch.distributed.run --standalone --nproc_per_node 2 two_ranks.py FOLDER
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from toy_runs import Watched, critical_config, number_config

from mmx.config.schema import DataConfig
from mmx.data.formats import read_examples
from mmx.errors import TrainingError
from mmx.evaluation.evaluate import EvaluationOptions, ProcessGroup, evaluate
from mmx.inference.pipeline import Pipeline
from mmx.testing import tiny_model

folder = Path(sys.argv[1])


def watched(config: Any, resume: bool = False, stop_in: int | None = None) -> dict[str, Any]:
    """What a run did on both ranks, and the error it ended with."""
    trainer, error = Watched(config, resume), None
    trainer.stop_in = stop_in
    try:
        trainer.run()
    except TrainingError as problem:
        error = str(problem)
    weights = sum(float(parameter.double().abs().sum()) for parameter in trainer.model.parameters())
    return {"taken": trainer.taken, "error": error, "world": trainer.accelerator.num_processes, "weights": weights}


def note(name: str, finding: Any) -> None:
    everyone = gather_object([finding])
    if trainer_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(everyone))


def trainer_rank() -> int:
    import torch

    return torch.distributed.get_rank()


data = str(folder / "numbers.jsonl")
parts = {"sources.numbers.encoder": {"learning_rate": 0.5}}
config = number_config(data, folder / "whole", validate=True, accumulation=2, parts=parts)
note("whole", watched(config))
for stop in (4, 7):  # 7: inside an epoch, at no save; only the second rank is asked
    resumed = number_config(data, folder / f"stopped-{stop}", validate=True, accumulation=2, parts=parts)
    first = watched(resumed, stop_in=stop if trainer_rank() == 1 else None)
    second = watched(resumed, resume=True)
    note(f"stopped-{stop}", {"first": first, "second": second})

note("half", watched(number_config(data, folder / "half", dropout=0.0, batch_size=4, steps=20, save_every=20)))
for accumulation in (1, 2):
    broken = number_config(
        str(folder / "broken.jsonl"), folder / f"broken-{accumulation}", batch_size=2, save_every=1,
        accumulation=accumulation, steps=12,
    )  # fmt: skip
    note(f"broken-{accumulation}", watched(broken))

note("rewarded", watched(critical_config(data, folder / "rewarded")))

examples = read_examples(DataConfig(path=data))
for count in (1, 2, 5, 6, 7, 8):
    pipeline = Pipeline(tiny_model())
    options = EvaluationOptions(pipeline.generation_config({"max_new_tokens": 4}), batch_size=2)
    processes = ProcessGroup(trainer_rank(), 2, gather_object)
    found = evaluate(pipeline, examples[:count], options, processes)
    note(f"evaluated-{count}", {"metrics": found.metrics, "texts": [asdict(text) for text in found.predictions]})
