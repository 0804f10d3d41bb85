"""The training loop: bit-exact resume, agreement of all ranks on every decision, and errors instead of wrong results.

One step takes `gradient_accumulation_steps` micro-batches on each rank. Their losses are summed over tokens and divided
by the number of tokens of all micro-batches on all ranks. A loss or gradient that is not finite stops every rank before
the weights change. A decision that one rank can come to alone (not finite, a signal) is reduced over all ranks;
otherwise the others would wait forever.

B images in a batch, K texts of each, T text positions.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import broadcast, gather_object
from torch import Tensor
from tqdm import tqdm

from mmx.config.schema import DataConfig, RunConfig
from mmx.data.batching import Batch, TrainingDataset
from mmx.data.examples import Example
from mmx.data.formats import read_examples
from mmx.errors import MmxError, TrainingError, one_line
from mmx.inference.pipeline import Pipeline
from mmx.models.batching import IGNORE_INDEX
from mmx.training.config_changes import check_config_changes
from mmx.training.cut_targets import count_cut, print_cut, print_cut_references
from mmx.training.distributed import any_rank, start_processes
from mmx.training.ema import ExponentialMovingAverage
from mmx.training.lr_schedule import learning_rate, set_learning_rate
from mmx.training.metrics_log import MetricsLog
from mmx.training.model_setup import (
    build_model,
    check_best_metric,
    load_initial_model,
    resolve_generation,
    source_names,
)
from mmx.training.not_finite import not_finite_error, sampling_error
from mmx.training.objective import Objective, step_seed
from mmx.training.param_groups import build_optimizer, prepare_param_groups, set_training_mode
from mmx.training.precision import resolve_precision, warn_if_emulated
from mmx.training.run_folder import RunFolderLock, find_saved_state, locked_error, open_run_folder, print_changes
from mmx.training.skipped import check_skipped, note_skipped
from mmx.training.state import TrainingProgress, TrainingState, latest_state, load_progress, load_state, save_state
from mmx.training.step_batches import step_batches
from mmx.training.stop_signals import StopSignals
from mmx.training.time_left import StepTime, StepTimer, time_left_line
from mmx.training.validation import best_metric_value, evaluate_on_all_ranks


class StepResult(NamedTuple):
    """Loss of one step in nats per token over all ranks, and whether any rank has received a signal to stop."""

    loss: float
    stopping: bool


def train(config: RunConfig, resume: bool = False, quiet: bool = False) -> Path:
    """Train as configured and return the folder of the best checkpoint.

    Args:
        config: the whole run.
        resume: continue the run in `config.output_dir` from its last state.
        quiet: print nothing to standard error.

    Raises:
        ConfigError, DataError, CheckpointError: before training starts.
        TrainingError: another process trains in the folder, the loss or a metric is not finite, too many examples are
            unreadable, or SIGTERM or SIGINT (Ctrl+C) was received. After a signal, the current step is finished and
            saved first. A second SIGINT ends at once, with KeyboardInterrupt.
    """
    return Trainer(config, resume, quiet).run()


class Trainer:
    """One run: its model, data, objective, optimizer and progress."""

    optimizer: torch.optim.Optimizer

    def __init__(self, config: RunConfig, resume: bool, quiet: bool) -> None:
        self.config = resolve_precision(resolve_generation(config), resume)
        self.run_folder = Path(config.output_dir)
        check_best_metric(config)
        self.accelerator = start_processes(self.config.training.mixed_precision)
        self.quiet = quiet or not self.accelerator.is_main_process
        if not self.quiet:
            warn_if_emulated(self.config.training.mixed_precision)
        self.stop = StopSignals()
        self.metrics_log = MetricsLog(self.run_folder, self.quiet)
        self.lock = RunFolderLock(self.run_folder)
        self._lock_run_folder(resume)
        try:
            self._set_up(resume)
        except BaseException:
            self.lock.release()
            raise

    def run(self) -> Path:
        """Train to the last step and return the folder of the best checkpoint."""
        with self.lock:
            self._train()
        best = self.run_folder / "best"
        return best if best.exists() else self.run_folder / "last"

    # ---- set-up --------------------------------------------------------------------------------------------------

    def _lock_run_folder(self, resume: bool) -> None:
        """Lock the folder on the main process. Raises TrainingError on all ranks if another process trains in it."""
        is_locked = False
        if self.accelerator.is_main_process and (self.run_folder.is_dir() or not resume):
            is_locked = not self.lock.acquire()
        if any_rank(self.accelerator, is_locked):
            raise locked_error(self.run_folder)

    def _set_up(self, resume: bool) -> None:
        saved_state = find_saved_state(self.run_folder, resume)
        num_processes = self.accelerator.num_processes
        if saved_state is not None:
            changes = check_config_changes(self.run_folder, self.config, load_progress(saved_state), num_processes)
            if not self.quiet:
                print_changes(changes)
        # Without this, a slow rank could find a state that a fast rank has just saved.
        self.accelerator.wait_for_everyone()
        self._build_model_and_data(saved_state)
        self.objective = Objective(self.model, self.config, self.options, self.data.sets, self.accelerator)
        self._build_optimizer(saved_state)
        self.progress.num_processes = num_processes
        if self.accelerator.is_main_process:
            open_run_folder(self.run_folder, self.config, self.metrics_log, self.progress.step)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def _build_model_and_data(self, saved_state: Path | None) -> None:
        config = self.config
        torch.manual_seed(config.training.seed)
        initial = load_initial_model(config)
        sources = source_names(config, initial)
        sets = [(data, self._read_examples(data, sources)) for data in config.train]
        self.validation = {name: self._read_examples(data, sources) for name, data in config.validation.items()}
        self.model = build_model(config, sets, saved_state) if initial is None else initial
        self.options = prepare_param_groups(self.model, config)
        self.data = TrainingDataset(self.model, sets, self.options)
        self.model.to(self.accelerator.device)

    def _read_examples(self, data: DataConfig, sources: Sequence[str]) -> Sequence[Example]:
        """Read a data set. The main process prints what is not used of it, also with `quiet`."""
        messages: list[str] = []
        examples = read_examples(data, sources=sources, on_skipped=messages.append)
        if self.accelerator.is_main_process:
            for message in messages:
                print(one_line(message), file=sys.stderr)
        return examples

    def _build_optimizer(self, saved_state: Path | None) -> None:
        self.optimizer = build_optimizer(self.model, self.options)
        self.average = ExponentialMovingAverage(self.model, self.options.ema_decay)
        state = TrainingState(self.model, self.optimizer, self.average)
        if saved_state is not None:
            load_state(saved_state, state)
        self.progress: TrainingProgress = state.progress
        scaler = self.accelerator.scaler
        if scaler is not None and self.progress.scaler:
            scaler.load_state_dict(self.progress.scaler)

    # ---- all steps -----------------------------------------------------------------------------------------------

    def _train(self) -> None:
        progress = self.progress
        options = self.options
        started = time.monotonic() - progress.seconds
        hide_bar = self.quiet or not sys.stderr.isatty()
        bar = tqdm(total=options.max_steps, initial=progress.step, unit="step", disable=hide_bar)
        with self.stop, bar:
            if progress.validation_pending:
                self._end_step(stopping=False)
            timer = StepTimer()
            for batches in timer.measure_data(self._steps()):
                result = self._step(batches)
                self._report_time_left(timer.end_step())
                self._record(result)
                progress.seconds = time.monotonic() - started
                bar.set_postfix_str(f"loss {result.loss:.3f}, lr {learning_rate(self.optimizer):.1e}")
                bar.update()
                if progress.step % options.logging_steps == 0 or progress.step == options.max_steps:
                    self._report_training()
                self._end_step(result.stopping)
        print_cut(progress, self.quiet)

    # ---- one step ------------------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each remaining step of this rank."""
        return step_batches(self.data, self.options, self.progress, self.accelerator)

    def _step(self, batches: Sequence[Batch]) -> StepResult:
        """Make one optimizer step."""
        accelerator = self.accelerator
        options = self.options
        seed = step_seed(options.seed, self.progress.step, accelerator.process_index)
        set_training_mode(self.model, options.param_groups)
        try:
            batches = self.objective.sample_batches(batches, seed)
        except MmxError as error:  # on all ranks
            state = latest_state(self.run_folder)
            raise sampling_error(error, self.model, batches, accelerator, self.progress.step + 1, state) from error
        set_learning_rate(self.optimizer, self.progress.step, options)
        loss = self._accumulate_gradients(batches, seed)
        norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), options.max_grad_norm)
        self._check_finite(loss, norm, batches)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.average.update(self.model, self.progress.step)
        self._count_samples(batches)
        received = torch.full_like(loss, self.stop.received)
        total, num_received = accelerator.reduce(torch.stack([loss, received]), "sum").tolist()
        return StepResult(total, num_received > 0)

    def _accumulate_gradients(self, batches: Sequence[Batch], seed: int) -> Tensor:
        """Run forward and backward over the micro-batches; return this rank's part of the loss in nats per token."""
        accelerator = self.accelerator
        num_tokens = self._count_tokens(batches)
        torch.manual_seed(seed)  # dropout
        total = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            with nullcontext() if is_last else accelerator.no_sync(self.wrapped):
                tokens = self.objective.decoder_inputs(batch, seed + number)
                logits = self.wrapped(batch.sources, tokens, batch.mask, batch.label_positions, batch.boxes)
                loss = self.objective.loss(logits, batch) / num_tokens
            # DDP averages gradients over ranks, and the loss is a sum over ranks.
            accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        return total

    def _count_tokens(self, batches: Sequence[Batch]) -> Tensor:
        """Return the number of labels in the micro-batches of all ranks."""
        count = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
        return self.accelerator.reduce(torch.tensor(float(count), device=self.accelerator.device), "sum")

    def _check_finite(self, loss: Tensor, norm: Tensor | float | None, batches: Sequence[Batch]) -> None:
        """Raise TrainingError on all ranks if the loss or the gradient of any rank is not finite."""
        is_finite = bool(torch.isfinite(loss))
        if self.accelerator.scaler is None:  # gradients of fp16 overflow at times, and its scaler skips such steps
            is_finite = is_finite and bool(torch.isfinite(torch.as_tensor(norm)))
        if any_rank(self.accelerator, not is_finite):
            state = latest_state(self.run_folder)
            raise not_finite_error(self.model, batches, self.accelerator, is_finite, self.progress.step + 1, state)

    def _count_samples(self, batches: Sequence[Batch]) -> None:
        """Count the samples of a step and report skipped ones. Raises TrainingError if too many are skipped."""
        progress = self.progress
        num_samples = sum(len(batch.ids) for batch in batches)
        progress.samples_seen += num_samples * self.accelerator.num_processes
        count_cut(batches, progress, self.quiet)
        skipped = [message for batch in batches for message in batch.skipped]
        if self.accelerator.num_processes > 1:
            skipped = gather_object(skipped)
        note_skipped(skipped, progress.skipped, self.quiet)
        num_examples = sum(len(examples) for _, examples in self.data.sets)
        check_skipped(progress.skipped, num_examples, self.options.max_skip_fraction)

    # ---- between steps -------------------------------------------------------------------------------------------

    def _record(self, result: StepResult) -> None:
        self.progress.recent_losses.append(result.loss)
        reward = self.objective.take_mean_reward()
        if reward is not None:
            self.progress.recent_rewards.append(reward)

    def _report_training(self) -> None:
        metrics = self.progress.take_metrics()
        metrics["learning_rate"] = learning_rate(self.optimizer)
        self._report(metrics)

    def _report(self, metrics: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.metrics_log.append(self.progress.step, self.progress.seconds, metrics)

    def _report_time_left(self, step_time: StepTime | None) -> None:
        """Print the time left on the main process, unless nothing is left or `step_time` is not known yet."""
        progress = self.progress
        if step_time is not None and progress.step < self.options.max_steps and not self.quiet:
            line = time_left_line(self.config, progress.step, step_time, self.accelerator.device.type)
            tqdm.write(line, file=sys.stderr)

    def _end_step(self, stopping: bool) -> None:
        """Validate and save if due. After a signal: save, leave a validation pending, and raise TrainingError."""
        progress = self.progress
        options = self.options
        was_pending = progress.validation_pending
        is_final = progress.step == options.max_steps
        validation_due = progress.step % options.eval_steps == 0 or is_final
        progress.validation_pending = bool(self.validation) and validation_due
        if progress.validation_pending and not stopping:
            try:
                metrics = self._validate()
            except TrainingError:  # on all ranks
                self._save_on_all_ranks()  # with the validation pending, so that nothing has to be trained again
                raise
            stopping = metrics is None
            progress.validation_pending = stopping
            if metrics is not None:
                self._report(metrics)
        is_best = progress.best_step == progress.step
        if progress.step % options.save_steps == 0 or is_final or stopping or was_pending or is_best:
            self._save_on_all_ranks()
        if stopping and (progress.validation_pending or not is_final):
            raise TrainingError(
                f"training received SIGTERM or Ctrl+C and stopped after step {progress.step}; its state is saved in "
                f"{self.run_folder / 'last'}: use --resume to continue.",
                code="training.stopped",
                step=progress.step,
                path=str(self.run_folder / "last"),
            )

    def _validate(self) -> dict[str, float] | None:
        """Evaluate the averaged weights; return None if a signal ended the evaluation.

        Raises:
            TrainingError: too many examples cannot be read, or the metric for the best model is missing or not finite.
        """
        if self.accelerator.num_processes > 1:
            # Running statistics differ between ranks; those of rank 0 are saved, so they are evaluated.
            for buffer in self.model.buffers():
                broadcast(buffer)
        self.average.swap(self.model)
        try:
            metrics = {name: self._evaluate(examples) for name, examples in self.validation.items()}
        finally:
            self.average.swap(self.model)
        if any_rank(self.accelerator, self.stop.received):
            return None
        flat = {f"{name}.{key}": value for name, found in metrics.items() for key, value in found.items()}
        self._update_best(flat)
        return flat

    def _evaluate(self, examples: Sequence[Example]) -> dict[str, float]:
        pipeline = Pipeline(self.model, self.config.generation)
        max_skip_fraction = self.options.max_skip_fraction
        report = evaluate_on_all_ranks(
            pipeline, examples, self.accelerator, max_skip_fraction, lambda: self.stop.received
        )
        note_skipped(report.skipped, self.progress.validation_skipped, self.quiet)
        print_cut_references(report, self.quiet)
        skipped = {"skipped": float(len(report.skipped))} if report.skipped else {}
        return report.metrics | skipped

    def _update_best(self, metrics: Mapping[str, float]) -> None:
        """Compare the value of `metric_for_best_model` with the best so far. Raises TrainingError."""
        progress = self.progress
        value = best_metric_value(self.options.metric_for_best_model, metrics, self.validation, progress.step)
        if progress.best is None or value > progress.best:
            progress.best = value
            progress.best_step = progress.step

    def _save_on_all_ranks(self) -> None:
        """Save on the main process; the others wait."""
        if self.accelerator.is_main_process:
            self._save()
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        progress = self.progress
        provenance = {
            "data": [data.path for data in self.config.train],
            "config": self.config.model_dump(mode="json"),
            "processes": progress.num_processes,
            "step": progress.step,
            "seed": self.options.seed,
            "seconds": round(progress.seconds),
            "versions": {"torch": torch.__version__},
            **progress.counts(),
            self.options.metric_for_best_model: progress.best,
        }
        if self.accelerator.scaler is not None:
            progress.scaler = self.accelerator.scaler.state_dict()
        state = TrainingState(self.model, self.optimizer, self.average, progress)
        save_state(self.run_folder, self.config, state, provenance)
