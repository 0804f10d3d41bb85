"""Evaluation: model x examples x metrics -> Report. Over several processes the numbers are those of one, to the bit.

Alphabet: B examples in a batch, K questions of each, T text positions, V vocabulary, n tokens with a known truth.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmx.config import GenerationConfig
from mmx.data.batches import choose_all, pad_texts, pick_wanted, target_tokens
from mmx.data.examples import Example, Turn
from mmx.errors import DataError, MmxError
from mmx.memory import Memory
from mmx.metrics.answers import answer_metrics
from mmx.metrics.captions import caption_metrics
from mmx.pipeline import Pipeline
from mmx.sources import prepare_inputs

Gather = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True)
class Judged:
    """One text beside what people said. `key` is the place of its turn among all turns."""

    key: tuple[int, int]
    id: str
    question: str | None
    kind: str | None
    said: str
    score: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What an evaluation found. metrics: name -> value; texts: every text in order; bad: what could not be read."""

    metrics: dict[str, float]
    texts: list[Judged]
    bad: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write metrics.json and texts.jsonl, each whole or not at all. Raises DataError where that is impossible."""
        rows = (
            {"id": t.id, "question": t.question, "said": t.said, "score": t.score, "targets": t.targets}
            for t in self.texts
        )
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_whole(folder / "texts.jsonl", lines)
            _write_whole(folder / "metrics.json", json.dumps(self.metrics, indent=2) + "\n")
        except OSError as error:
            raise DataError(
                f"{folder} cannot be written: {error.strerror}; choose another folder with --out."
            ) from error


class Pending(NamedTuple):
    """An example that was read: its place among all, and the inputs of each source."""

    place: int
    example: Example
    inputs: dict[str, Any]


class Loss(NamedTuple):
    """The cross-entropy of one batch, in nats over its tokens."""

    batch: int
    nats: float
    tokens: int


def evaluate(
    pipeline: Pipeline,
    examples: Sequence[Example],
    options: GenerationConfig | None = None,
    batch_size: int = 32,
    rank: int = 0,
    world: int = 1,
    gather: Gather = lambda items: items,
    progress: Callable[[int], None] = lambda done: None,
    bad_limit: float = 0.001,
    stop: Callable[[], bool] = lambda: False,
) -> Report:
    """Caption and answer all examples; process `rank` of `world` takes every world-th batch, `gather` brings them
    together: batches hold the same examples for any number of processes, so every number comes out the same.

    Once `stop` says so no further batch is begun. Raises DataError when more than `bad_limit` of the examples (and
    more than ten) cannot be read.
    """
    options, found, losses, bad = options or pipeline.generation, [], [], []
    for batch in range(rank, math.ceil(len(examples) / batch_size), world):
        if stop():
            break
        pending, places = [], range(len(examples))[batch * batch_size :][:batch_size]
        for place in places:
            example = examples[place]
            try:
                pending.append(Pending(place, example, _prepare(pipeline, example)))
            except MmxError as error:
                bad.append((place, f"{example.origin or example.id}: {error}"))
        if pending:
            judged, nats, tokens = _judge(pipeline, pending, options)
            found += judged
            losses.append(Loss(batch, nats, tokens))
        progress(len(places))
    found = sorted((item for part in gather([found]) for item in part), key=lambda item: item.key)
    losses = sorted(item for part in gather([losses]) for item in part)
    unread = [sentence for _, sentence in sorted(item for part in gather([bad]) for item in part)]
    if len(unread) > max(10, bad_limit * len(examples)):
        raise DataError(f"{len(unread)} of {len(examples)} examples cannot be read; the first: {unread[0]}")
    return Report(_metrics(found, losses), found, unread)


def _prepare(pipeline: Pipeline, example: Example) -> dict[str, Any]:
    """The inputs of the sources that the model has. Raises MmxError, also for a question longer than it reads."""
    model = pipeline.model
    for turn in example.turns:
        pipeline.prompt_tokens(turn.question)
    return prepare_inputs(model.encoders, example.sources)


def _judge(
    pipeline: Pipeline, pending: Sequence[Pending], options: GenerationConfig
) -> tuple[list[Judged], float, int]:
    """One batch, encoded once: what is said in every turn, and the loss of every target in nats over its tokens."""
    memory = pipeline.encode_prepared([item.inputs for item in pending])
    found, nats, tokens = [], 0.0, 0
    for asks in (False, True):  # captions and questions differ much in length: a pass for each wastes less padding
        turns = [
            [(i, t) for i, t in enumerate(item.example.turns) if (t.question is not None) == asks] for item in pending
        ]
        rows = [row for row, said in enumerate(turns) if said]
        if rows:
            chosen = _selected(memory, rows)
            asked = [[turn.question for _, turn in turns[row]] for row in rows]
            texts = pipeline.say(chosen, asked, options, [[turn.box for _, turn in turns[row]] for row in rows])
            for row, said in zip(rows, texts, strict=True):
                found += _judged(pending[row], turns[row], said)
            more_nats, more_tokens = _loss(pipeline, chosen, [[turn for _, turn in turns[row]] for row in rows])
            nats, tokens = nats + more_nats, tokens + more_tokens
    return found, nats, tokens


def _judged(item: Pending, turns: Sequence[tuple[int, Turn]], said: Sequence[Sequence[Any]]) -> list[Judged]:
    """What was said in the turns of one example, the best text of each."""
    return [
        Judged((item.place, i), item.example.id, t.question, t.kind, texts[0].text, texts[0].score, t.targets)
        for (i, t), texts in zip(turns, said, strict=True)
    ]


def _loss(pipeline: Pipeline, memory: Memory, turns: Sequence[Sequence[Turn]]) -> tuple[float, int]:
    """The cross-entropy of all targets in nats, and their number of tokens; the targets are tidied as in training."""
    model, tokenizer = pipeline.model, pipeline.model.tokenizer
    rows = [row for row, given in enumerate(turns) if choose_all(given)]  # some questions come without answers
    if not rows:
        return 0.0, 0
    pairs, longest = [choose_all(turns[row]) for row in rows], model.config.decoder.max_positions
    prompts = [[pipeline.prompt_tokens(text.question) for text in row] for row in pairs]
    texts = [
        [(p, target_tokens(tokenizer, text.target, longest - len(p))) for p, text in zip(told, row, strict=True)]
        for told, row in zip(prompts, pairs, strict=True)
    ]
    most = max(len(row) for row in texts)
    tokens, mask, targets = (t.to(model.device) for t in pad_texts(texts, most, tokenizer.pad))
    wanted, labels = pick_wanted(targets, 1)
    questions = [[text.question for text in row] + [None] * (most - len(row)) for row in pairs]
    with torch.inference_mode():
        pointed = pipeline.with_boxes(_selected(memory, rows), [[text.box for text in row] for row in pairs], most)
        asked = pipeline.with_questions(pointed, questions)
        states = model.decoder.states(tokens, asked, mask).flatten(0, 2)
        logits = model.decoder.logits(states[wanted]).float()  # [n, V]: B*K*T of them would fill the memory
    nats = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return nats.double().sum().item(), len(labels)


def _selected(memory: Memory, rows: list[int]) -> Memory:
    return memory if len(rows) == memory.batch else memory.select(rows)


def _metrics(judged: Sequence[Judged], losses: Sequence[Loss]) -> dict[str, float]:
    """Every metric that the texts allow: of captions, of answers, of answers by kind."""
    captions: dict[Hashable, Judged] = {item.key: item for item in judged if item.question is None and item.targets}
    answers: dict[Hashable, Judged] = {item.key: item for item in judged if item.question is not None and item.targets}
    metrics: dict[str, float] = {}
    tokens = sum(loss.tokens for loss in losses)
    if tokens:
        metrics["loss"] = math.fsum(loss.nats for loss in losses) / tokens
    if len(captions) > 1:  # CIDEr knows a rare word from a common one by comparing captions
        said = {key: item.said for key, item in captions.items()}
        metrics |= caption_metrics(said, {key: item.targets for key, item in captions.items()})
    if answers:
        metrics |= _answer_metrics(answers)
        kinds = sorted({item.kind for item in answers.values() if item.kind})
        for kind in kinds:
            of_kind = {key: item for key, item in answers.items() if item.kind == kind}
            metrics[f"exact match, {kind}"] = _answer_metrics(of_kind)["exact match"]
    metrics["captions"], metrics["questions"] = len(captions), len(answers)
    return metrics


def _answer_metrics(answers: Mapping[Hashable, Judged]) -> dict[str, float]:
    """Exact match, and VQA accuracy where it means something: it compares with what several people answered."""
    said = {key: item.said for key, item in answers.items()}
    metrics = answer_metrics(said, {key: item.targets for key, item in answers.items()})
    if all(len(item.targets) == 1 for item in answers.values()):
        del metrics["VQA accuracy"]
    return metrics


def _write_whole(path: Path, text: str) -> None:
    """Put the file in place once it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
