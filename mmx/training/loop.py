"""The training loop: accelerate's own example, plus what keeps a long run honest.

Alphabet: B pictures in a batch, K texts of each, T text positions, V vocabulary.

One step: `accumulation` micro-batches a process, their losses summed over tokens and divided by the number of tokens
of all of them on all ranks; a loss or gradient that is not finite stops every rank before the weights are touched.
Whatever one rank may find out alone (not finite, asked to stop) is agreed on by all, or the others would wait for ever.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate.utils import broadcast, gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from mmx.config.loader import dump_config
from mmx.config.schema import DataConfig, GenerationConfig, RunConfig
from mmx.data.batching import IGNORE_INDEX, Batch, PositionSampler, TrainingDataset
from mmx.data.examples import Example
from mmx.data.formats import read_examples
from mmx.errors import ConfigError, MmxError, TrainingError, suggest
from mmx.evaluation.evaluate import evaluate
from mmx.hub.language_model import build_from_language_model
from mmx.inference.pipeline import Pipeline
from mmx.io.atomic import atomic_write
from mmx.models.checkpoint import TOKENIZER, load_generation, load_model
from mmx.models.model import Model, mount
from mmx.text.prompts import normalize_caption, normalize_question
from mmx.text.tokenizer import Tokenizer
from mmx.training.adapters import prepare_param_groups
from mmx.training.distributed import start_processes
from mmx.training.optim import ExponentialMovingAverage, build_optimizer, lr_factor, scst_loss, set_mode, token_loss
from mmx.training.scst import SelfCriticalTrainer
from mmx.training.sigterm import SigtermHandler
from mmx.training.state import TrainingProgress, latest_state, load_state, save_state

TOKENIZER_SAMPLE = 20_000
REPORT = "metrics.jsonl"


def train(config: RunConfig, resume: bool = False, quiet: bool = False) -> Path:
    """Train as configured and return the folder of the best checkpoint. With `resume`, go on where the run stopped.

    Raises ConfigError and DataError before it starts, and TrainingError where it must stop: for a loss that is not
    finite, for too many bad samples, or for SIGTERM, after the step in progress has been finished and saved.
    """
    return Trainer(config, resume, quiet).run()


class Trainer:
    """One run: its model, data, optimizer and where it stands."""

    def __init__(self, config: RunConfig, resume: bool, quiet: bool) -> None:
        self.config, self.options, self.run_folder = _with_generation(config), config.training, Path(config.output_dir)
        _check_monitor(config)
        self.accelerator = start_processes(self.options.mixed_precision)
        self.quiet, self.stop = quiet or not self.accelerator.is_main_process, SigtermHandler()
        found = self._stopped_at(resume)
        sets = [(data, read_examples(data)) for data in config.train]
        self.validation = {name: read_examples(data) for name, data in config.validation.items()}
        options = self.options
        torch.manual_seed(options.seed)
        self.model = build_model(config, sets, found)
        self.options = options = prepare_param_groups(self.model, config)
        self.data = TrainingDataset(
            self.model, sets, options.seed, options.texts_per_image, options.max_target_length, options.modality_dropout
        )
        self.model.to(self.accelerator.device)
        rewarded = any(data.reward for data in config.train)
        self.critic = SelfCriticalTrainer(self.model, self.config, sets) if rewarded else None
        self.optimizer = build_optimizer(self.model, options)
        self.average = ExponentialMovingAverage(self.model, options.ema_decay)
        self.progress = load_state(found, self.model, self.optimizer, self.average) if found else TrainingProgress()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.progress.scaler or self.accelerator.scaler.state_dict())
        if self.accelerator.is_main_process:
            self._open_run(new=found is None)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def run(self) -> Path:
        """The loop."""
        started, options, progress = time.monotonic() - self.progress.seconds, self.options, self.progress
        bar = tqdm(
            total=options.max_steps, initial=progress.step, unit="step", disable=self.quiet or not sys.stderr.isatty()
        )
        with self.stop, bar:
            if progress.validation_pending:
                self._end_step(stopping=False)
            for batches in self._groups():
                loss, stopping = self._step(batches)
                progress.window.append(loss)
                progress.rewards += self.critic.mean_reward() if self.critic else []
                progress.seconds = time.monotonic() - started
                bar.set_postfix_str(f"loss {loss:.3f}, rate {self._rate():.1e}")
                bar.update()
                if progress.step % options.logging_steps == 0 or progress.step == options.max_steps:
                    means = {"loss": progress.window, "reward": progress.rewards}
                    found = {name: sum(part) / len(part) for name, part in means.items() if part}
                    self._report({**found, "rate": self._rate()})
                    progress.window, progress.rewards = [], []
                self._end_step(stopping)
        best = self.run_folder / "best"
        return best if best.exists() else self.run_folder / "last"

    def _groups(self) -> Iterator[list[Batch]]:
        """The micro-batches of each step still to be taken, for this rank."""
        options, accelerator = self.options, self.accelerator
        positions = PositionSampler(
            options.per_device_batch_size,
            self.progress.samples_seen,
            (options.max_steps - self.progress.step) * options.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
        )
        loader = DataLoader(
            self.data,
            batch_sampler=positions,
            collate_fn=self.data.collate,
            num_workers=options.num_workers,
            persistent_workers=options.num_workers > 0,
        )
        group: list[Batch] = []
        for batch in loader:
            group.append(batch.to(accelerator.device))
            if len(group) == options.gradient_accumulation_steps:
                yield group
                group = []

    def _step(self, batches: Sequence[Batch]) -> tuple[float, bool]:
        """One optimizer update; returns the loss in nats a token over all ranks and micro-batches, and whether any
        rank was asked to stop."""
        accelerator, options, step = self.accelerator, self.options, self.progress.step
        seed = Random(f"{options.seed}-{step}-{accelerator.process_index}").getrandbits(31)
        set_mode(self.model, options.param_groups)
        if self.critic is not None:
            batches = [self.critic.sample_batch(batch, seed + number) for number, batch in enumerate(batches)]
        for group in self.optimizer.param_groups:
            base = group.setdefault("base", group["lr"])
            group["lr"] = base * lr_factor(step, options)
        counts = torch.tensor(
            float(sum(int((b.labels != IGNORE_INDEX).sum()) for b in batches)), device=accelerator.device
        )
        tokens = accelerator.reduce(counts, "sum")
        # Dropout is a function of (seed, step, rank), so that a resumed run continues to the bit.
        torch.manual_seed(seed)
        total = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                logits = self.wrapped(batch.sources, batch.tokens, batch.mask, batch.label_positions, batch.boxes)
                loss = self._loss(logits, batch) / tokens
            # Ranks are averaged when their gradients meet; the loss is a sum over ranks.
            accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), options.max_grad_norm)
        self._stop_unless_finite(total, norm, batches)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.average.update(self.model, self.progress.step)
        self._count(batches)
        asked = torch.full_like(total, self.stop.received)
        loss, stopping = accelerator.reduce(torch.stack([total, asked]), "sum").tolist()
        return loss, stopping > 0

    def _loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        smoothing = self.options.label_smoothing
        if batch.advantages is None:
            return token_loss(logits, batch.labels, smoothing)
        text = batch.label_positions // batch.tokens.shape[-1]
        advantages, temperature = batch.advantages.flatten()[text], self.options.reward_temperature
        return scst_loss(logits, batch.labels, smoothing, advantages, temperature)

    def _stop_unless_finite(self, loss: torch.Tensor, norm: Any, batches: Sequence[Batch]) -> None:
        """All ranks agree, before any weight is touched."""
        bad = not torch.isfinite(loss)
        if self.accelerator.scaler is None:  # fp16 gradients overflow now and then: its scaler skips such a step
            bad = bad or not torch.isfinite(torch.as_tensor(norm))
        if self._any(bad):
            ids = ", ".join(gather_object([i for b in batches for i in b.ids[:2]])[:6])
            state = latest_state(self.run_folder)
            way_back = f"the last good state is {state}: use --resume and" if state else "nothing was saved yet:"
            raise TrainingError(
                f"the loss or its gradient is not finite at step {self.progress.step + 1} (samples {ids}, …); "
                f"{way_back} lower training.learning_rate or training.max_grad_norm."
            )

    def _any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        flag = torch.tensor(float(here), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _count(self, batches: Sequence[Batch]) -> None:
        """Count what could not be read, name it, and stop when it is too much."""
        progress = self.progress
        progress.samples_seen += sum(len(batch.ids) for batch in batches) * self.accelerator.num_processes
        bad = [sentence for batch in batches for sentence in batch.skipped]
        if self.accelerator.num_processes > 1:
            bad = gather_object(bad)
        for sentence in bad:
            if sentence not in progress.skipped:
                progress.skipped.append(sentence)
                if not self.quiet:
                    tqdm.write(f"skipped: {sentence}", file=sys.stderr)
        if len(progress.skipped) > max(10, self.options.max_skip_fraction * sum(len(e) for _, e in self.data.sets)):
            raise TrainingError(
                f"{len(progress.skipped)} samples cannot be read, more than training.max_skip_fraction {self.options.max_skip_fraction} "
                f"allows; the first: {progress.skipped[0]}"
            )

    def _end_step(self, stopping: bool) -> None:
        """Validate and save where they are due. When asked to stop: save, leave a validation for later, and raise."""
        progress, options = self.progress, self.options
        step, owed = progress.step, progress.validation_pending
        final = step == options.max_steps
        progress.validation_pending = bool(self.validation) and (step % options.eval_steps == 0 or final)
        if progress.validation_pending and not stopping:
            progress.validation_pending = stopping = not self._validate()
        if step % options.save_steps == 0 or final or stopping or owed or progress.best_step == step:
            if self.accelerator.is_main_process:
                self._save()
            self.accelerator.wait_for_everyone()
        if stopping and (progress.validation_pending or not final):
            raise TrainingError(
                f"training was asked to stop (SIGTERM) and did so after step {step}; all of it is saved in "
                f"{self.run_folder / 'last'}: use --resume to go on."
            )

    def _validate(self) -> bool:
        """Measure the averaged weights; False if it was broken off because some rank was asked to stop."""
        if self.accelerator.num_processes > 1:
            # Each rank's batch norms have seen pictures of their own; those of rank 0 are saved, so they are measured.
            for buffer in self.model.buffers():
                broadcast(buffer)
        self.average.swap(self.model)
        metrics = {name: self._evaluate(examples) for name, examples in self.validation.items()}
        self.average.swap(self.model)
        if self._any(self.stop.received):
            return False
        self._report({f"{name}.{key}": v for name, found in metrics.items() for key, v in found.items()})
        self._note_best(metrics)
        return True

    def _evaluate(self, examples: Sequence[Example]) -> dict[str, float]:
        accelerator = self.accelerator
        pipeline = Pipeline(self.model, self.config.generation)
        gather = gather_object if accelerator.num_processes > 1 else list
        rank, world = accelerator.process_index, accelerator.num_processes
        stop = lambda: self.stop.received  # noqa: E731
        return evaluate(pipeline, examples, rank=rank, world=world, gather=gather, stop=stop).metrics

    def _note_best(self, metrics: dict[str, dict[str, float]]) -> None:
        """Compare by `monitor`: "loss" (mean over the validation sets, lower is better) or "SET.METRIC" (higher is)."""
        monitor = self.options.metric_for_best_model
        if monitor == "loss":
            losses = [found["loss"] for found in metrics.values() if "loss" in found]
            value = -sum(losses) / len(losses) if losses else -math.inf
        else:
            name, _, key = monitor.partition(".")
            if key not in metrics.get(name, {}):
                known = sorted(f"{n}.{k}" for n, found in metrics.items() for k in found)
                raise TrainingError(
                    f"training.metric_for_best_model is {monitor!r}; expected 'loss' or one of {', '.join(known)}."
                )
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
            "bad samples": len(self.progress.skipped),
            self.options.metric_for_best_model: self.progress.best,
        }
        if self.accelerator.scaler is not None:
            self.progress.scaler = self.accelerator.scaler.state_dict()
        save_state(self.run_folder, self.config, self.model, self.optimizer, self.average, self.progress, provenance)

    def _stopped_at(self, resume: bool) -> Path | None:
        """The state to go on from; None for a new run. Raises TrainingError where `resume` and the folder disagree."""
        found = latest_state(self.run_folder)
        if resume and found is None:
            raise TrainingError(f"there is nothing to resume in {self.run_folder}; leave --resume out to start.")
        if not resume and found is not None:
            raise TrainingError(f"{self.run_folder} holds a run already; add --resume to go on, or out=ANOTHER_FOLDER.")
        # Or a slow rank would find what a fast one has saved meanwhile.
        self.accelerator.wait_for_everyone()
        return found

    def _open_run(self, new: bool) -> None:
        """Write the resolved configuration beside a new run; forget reports of steps that will be taken again."""
        try:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            if new:
                (self.run_folder / "config.yaml").write_text(dump_config(self.config), encoding="utf-8")
            _cut_report(self.run_folder / REPORT, self.progress.step)
        except OSError as error:
            raise TrainingError(
                f"{self.run_folder} cannot be written: {error.strerror}; set out to another."
            ) from error

    def _report(self, values: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        line = {"step": self.progress.step, "seconds": round(self.progress.seconds, 1), **values}
        try:
            with (self.run_folder / REPORT).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise TrainingError(
                f"{self.run_folder / REPORT} cannot be written: {error.strerror}; make room and use --resume."
            ) from error
        if not self.quiet:
            numbers = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
            tqdm.write(f"step {self.progress.step}: {numbers}", file=sys.stderr)

    def _rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


def build_model(
    config: RunConfig, sets: Sequence[tuple[DataConfig, Sequence[Example]]], stopped_at: Path | None = None
) -> Model:
    """A new model with a tokenizer learned from the training texts, or round the language model that its decoder names,
    or the checkpoint that `init` names, with what is mounted beside its sources.

    A run that goes on keeps its tokenizer, whatever has become of the data, and needs no language model again.
    """
    if config.init is not None:
        return mount(load_model(config.init), config.mount)
    assert config.model is not None, "the configuration has one or the other"
    if config.model.decoder.pretrained is not None:
        return load_model(stopped_at) if stopped_at else build_from_language_model(config.model)
    if stopped_at is not None:
        text = (stopped_at / TOKENIZER).read_text(encoding="utf-8")
        return Model(config.model, Tokenizer.from_json(text, str(stopped_at), config.model.special_tokens))
    return Model(config.model, Tokenizer.train(_texts(sets), config.model.vocab_size))


def _with_generation(config: RunConfig) -> RunConfig:
    """The configuration with a way of choosing words: its own, or that of the checkpoint it starts from."""
    if config.generation is not None:
        return config
    inherited = GenerationConfig() if config.init is None else load_generation(config.init)
    return config.model_copy(update={"generation": inherited})


def _check_monitor(config: RunConfig) -> None:
    """Now, not at the first validation hours later; which metrics a set has is only known then."""
    name, monitor = config.training.metric_for_best_model.partition(".")[0], config.training.metric_for_best_model
    if monitor != "loss" and name not in config.validation:
        near = suggest(name, ["loss", *config.validation])
        raise ConfigError(
            f"training.metric_for_best_model is {monitor!r}; expected 'loss' or VALIDATION_SET.METRIC; {near}"
        )


def _cut_report(path: Path, step: int) -> None:
    """Keep the whole lines up to a step."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    with atomic_write(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _texts(sets: Sequence[tuple[DataConfig, Sequence[Example]]]) -> Iterator[str]:
    """The texts of the training examples, up to a number of examples of each set."""
    for _, examples in sets:
        for index in range(min(len(examples), TOKENIZER_SAMPLE)):
            try:
                turns = examples[index].tasks
            except MmxError:
                continue
            for turn in turns:
                yield from (normalize_caption(target) for target in turn.targets)
                if turn.question is not None:
                    yield normalize_question(turn.question)
