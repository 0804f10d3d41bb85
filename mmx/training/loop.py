"""The training loop: accelerate's own example, plus what keeps a long run honest.

Alphabet: B pictures in a batch, K texts of each, T text positions, V vocabulary.

One step: `accumulation` micro-batches a process, their losses summed over tokens and divided by the number of tokens
of all of them on all ranks; a loss or gradient that is not finite stops every rank before the weights are touched.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from mmx.checkpoint import load_model
from mmx.config import Config, DataConfig
from mmx.data.batches import IGNORED, Batch, Positions, TrainingSet
from mmx.data.examples import Example
from mmx.data.formats import read_examples
from mmx.errors import MmxError, TrainingError
from mmx.evaluation import evaluate
from mmx.model import Model
from mmx.pipeline import Pipeline
from mmx.prompts import tidy_caption, tidy_question
from mmx.settings import dump_settings
from mmx.tokenizer import Tokenizer
from mmx.training.optim import MovingAverage, build_optimizer, learning_rate, set_mode, token_loss
from mmx.training.state import Progress, load_state, newest, save_state

TOKENIZER_SAMPLE = 20_000


def train(config: Config, resume: bool = False, quiet: bool = False) -> Path:
    """Train as configured and return the folder of the best checkpoint. With `resume`, go on where the run stopped.

    Raises TrainingError where it must stop, ConfigError and DataError before it starts.
    """
    return Trainer(config, resume, quiet).run()


class Trainer:
    """One run: its model, data, optimizer and where it stands."""

    def __init__(self, config: Config, resume: bool, quiet: bool) -> None:
        self.config, self.options, self.run_folder = config, config.training, Path(config.out)
        unused = DistributedDataParallelKwargs(find_unused_parameters=len(config.model.sources) > 1)
        self.accelerator = Accelerator(mixed_precision=self.options.mixed_precision, kwargs_handlers=[unused])
        self.quiet = quiet or not self.accelerator.is_main_process
        sets = [(data, read_examples(data)) for data in config.train]
        self.validation = {name: read_examples(data) for name, data in config.validation.items()}
        torch.manual_seed(self.options.seed)
        self.model = build_model(config, sets)
        self.data = TrainingSet(
            self.model, sets, self.options.seed, self.options.streams, self.options.max_text, self.options.source_dropout
        )
        self.model.to(self.accelerator.device)
        self.optimizer = build_optimizer(self.model, self.options)
        self.average = MovingAverage(self.model, self.options.ema)
        self.progress = self._restore(resume)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def run(self) -> Path:
        """The loop."""
        started, options = time.monotonic() - self.progress.seconds, self.options
        bar = tqdm(
            total=options.steps, initial=self.progress.step, unit="step", disable=self.quiet or not sys.stderr.isatty()
        )
        window: list[float] = []
        for batches in self._groups():
            loss = self._step(batches)
            window.append(loss)
            self.progress.seconds = time.monotonic() - started
            bar.set_postfix_str(f"loss {loss:.3f}, rate {self._rate():.1e}")
            bar.update()
            if self.progress.step % options.log_every == 0 or self.progress.step == options.steps:
                self._report({"loss": sum(window) / len(window), "rate": self._rate()})
                window = []
            self._validate_and_save()
        bar.close()
        best = self.run_folder / "best"
        return best if best.exists() else self.run_folder / "last"

    def _groups(self) -> Iterator[list[Batch]]:
        """The micro-batches of each step still to be taken, for this rank."""
        options, accelerator = self.options, self.accelerator
        positions = Positions(
            options.batch_size,
            self.progress.step * options.accumulation,
            options.steps * options.accumulation,
            accelerator.process_index,
            accelerator.num_processes,
        )
        loader = DataLoader(
            self.data,
            batch_sampler=positions,
            collate_fn=self.data.collate,
            num_workers=options.workers,
            persistent_workers=options.workers > 0,
        )
        group: list[Batch] = []
        for batch in loader:
            group.append(batch.to(accelerator.device))
            if len(group) == options.accumulation:
                yield group
                group = []

    def _step(self, batches: Sequence[Batch]) -> float:
        """One optimizer update; returns the loss in nats a token, over all ranks and micro-batches."""
        accelerator, options, step = self.accelerator, self.options, self.progress.step
        set_mode(self.model, options.parts)
        for group in self.optimizer.param_groups:
            base = group.setdefault("base", group["lr"])
            group["lr"] = base * learning_rate(step, options)
        counts = torch.tensor(float(sum(int((b.labels != IGNORED).sum()) for b in batches)), device=accelerator.device)
        tokens = accelerator.reduce(counts, "sum")
        # Dropout is a function of (seed, step, rank), so that a resumed run continues to the bit.
        torch.manual_seed(hash((options.seed, step, accelerator.process_index)) & 0x7FFFFFFF)
        total = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                logits = self.wrapped(batch.sources, batch.tokens, batch.mask, batch.wanted)
                loss = token_loss(logits, batch.labels, options.label_smoothing) / tokens
            # Ranks are averaged when their gradients meet; the loss is a sum over ranks.
            accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), options.clip)
        self._stop_unless_finite(total, norm, batches)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.average.update(self.model, self.progress.step)
        self._count(batches)
        return float(accelerator.reduce(total, "sum"))

    def _stop_unless_finite(self, loss: torch.Tensor, norm: Any, batches: Sequence[Batch]) -> None:
        """All ranks agree, before any weight is touched."""
        bad = not (torch.isfinite(loss) and torch.isfinite(torch.as_tensor(norm)))
        anywhere = self.accelerator.reduce(torch.tensor(float(bad), device=loss.device), "sum")
        if anywhere > 0:
            ids = ", ".join(gather_object([i for b in batches for i in b.ids[:2]])[:6])
            raise TrainingError(
                f"the loss or its gradient is not finite at step {self.progress.step + 1} (samples {ids}, …); the "
                f"last good state is in {self.run_folder / 'last'}: lower training.lr or training.clip and use --resume."
            )

    def _count(self, batches: Sequence[Batch]) -> None:
        """Count what could not be read, name it, and stop when it is too much."""
        progress = self.progress
        progress.seen += sum(len(batch.ids) for batch in batches) * self.accelerator.num_processes
        bad = [sentence for batch in batches for sentence in batch.bad]
        if self.accelerator.num_processes > 1:
            bad = gather_object(bad)
        for sentence in bad:
            if sentence not in progress.bad:
                progress.bad.append(sentence)
                if not self.quiet:
                    tqdm.write(f"skipped: {sentence}", file=sys.stderr)
        if len(progress.bad) > max(10, self.options.bad_limit * sum(len(e) for _, e in self.data.sets)):
            raise TrainingError(
                f"{len(progress.bad)} samples cannot be read, more than training.bad_limit {self.options.bad_limit} "
                f"allows; the first: {progress.bad[0]}"
            )

    def _validate_and_save(self) -> None:
        step, options = self.progress.step, self.options
        final = step == options.steps
        if self.validation and (step % options.validate_every == 0 or final):
            self.average.swap(self.model)
            metrics = {n: self._evaluate(examples) for n, examples in self.validation.items()}
            self.average.swap(self.model)
            self._report({f"{name}.{key}": v for name, found in metrics.items() for key, v in found.items()})
            self._note_best(metrics)
        if step % options.save_every == 0 or final or self.progress.best_step == step:
            if self.accelerator.is_main_process:
                self._save()
            self.accelerator.wait_for_everyone()

    def _evaluate(self, examples: Sequence[Example]) -> dict[str, float]:
        accelerator = self.accelerator
        pipeline = Pipeline(self.model, self.config.generation)
        gather = gather_object if accelerator.num_processes > 1 else list
        rank, world = accelerator.process_index, accelerator.num_processes
        return evaluate(pipeline, examples, rank=rank, world=world, gather=gather).metrics

    def _note_best(self, metrics: dict[str, dict[str, float]]) -> None:
        """Compare by `monitor`: "loss" (mean over the validation sets, lower is better) or "SET.METRIC" (higher is)."""
        monitor = self.options.monitor
        if monitor == "loss":
            value = -sum(found["loss"] for found in metrics.values()) / len(metrics)
        else:
            name, _, key = monitor.partition(".")
            if key not in metrics.get(name, {}):
                known = sorted(f"{n}.{k}" for n, found in metrics.items() for k in found)
                raise TrainingError(f"training.monitor is {monitor!r}; expected 'loss' or one of {', '.join(known)}.")
            value = metrics[name][key] * (-1 if key == "loss" else 1)
        if self.progress.best is None or value > self.progress.best:
            self.progress.best, self.progress.best_step = value, self.progress.step

    def _save(self) -> None:
        provenance = {
            "data": [data.path for data in self.config.train],
            "step": self.progress.step,
            "seed": self.options.seed,
            "seconds": round(self.progress.seconds),
            "versions": {"torch": torch.__version__},
            "bad samples": len(self.progress.bad),
            self.options.monitor: self.progress.best,
        }
        save_state(
            self.run_folder, self.config, self.model, self.optimizer, self.average, self.progress, provenance
        )

    def _restore(self, resume: bool) -> Progress:
        """Step 0, or where the run stopped; the resolved configuration is written beside a new run."""
        folder = newest(self.run_folder)
        if resume and folder is None:
            raise TrainingError(f"there is nothing to resume in {self.run_folder}; leave --resume out to start.")
        if not resume and folder is not None:
            raise TrainingError(f"{self.run_folder} holds a run already; add --resume to go on, or out=ANOTHER_FOLDER.")
        if folder is not None:
            return load_state(folder, self.model, self.optimizer, self.average)
        if self.accelerator.is_main_process:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            (self.run_folder / "config.yaml").write_text(dump_settings(self.config), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        return Progress()

    def _report(self, values: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        line = {"step": self.progress.step, "seconds": round(self.progress.seconds, 1), **values}
        with (self.run_folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if not self.quiet:
            numbers = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
            tqdm.write(f"step {self.progress.step}: {numbers}", file=sys.stderr)

    def _rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


def build_model(config: Config, sets: Sequence[tuple[DataConfig, Sequence[Example]]]) -> Model:
    """A new model with a tokenizer learned from the training texts, or the checkpoint that `init` names."""
    if config.init is not None:
        return load_model(config.init)
    return Model(config.model, Tokenizer.train(_texts(sets), config.model.vocabulary))


def _texts(sets: Sequence[tuple[DataConfig, Sequence[Example]]]) -> Iterator[str]:
    """The texts of the training examples, up to a number of examples of each set."""
    for _, examples in sets:
        for index in range(min(len(examples), TOKENIZER_SAMPLE)):
            try:
                turns = examples[index].turns
            except MmxError:
                continue
            for turn in turns:
                yield from (tidy_caption(target) for target in turn.targets)
                if turn.question is not None:
                    yield tidy_question(turn.question)
