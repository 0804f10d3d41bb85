"""Evaluation: model x examples x metrics -> Report. Over several processes the numbers are those of one.

Alphabet: B examples in a batch, K questions of each.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmx.config import GenerationConfig
from mmx.data.batches import choose_all, pad_texts
from mmx.data.examples import Example
from mmx.errors import DataError, MmxError
from mmx.metrics.answers import answer_metrics
from mmx.metrics.captions import caption_metrics
from mmx.model import SourceBatch
from mmx.pipeline import Pipeline

Gather = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True)
class Judged:
    """One text beside what people said. `key` is the place of its turn among all turns; loss in nats over `tokens`."""

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
        """Write metrics.json and texts.jsonl."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(self.metrics, indent=2) + "\n", encoding="utf-8")
        rows = (
            {"id": t.id, "question": t.question, "said": t.said, "score": t.score, "targets": t.targets}
            for t in self.texts
        )
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "texts.jsonl").write_text(lines, encoding="utf-8")


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
) -> Report:
    """Caption and answer all examples; process `rank` of `world` takes every world-th, `gather` brings them together.

    Raises DataError when more than `bad_limit` of the examples (and more than ten) cannot be read.
    """
    options, pending, found, bad = options or pipeline.generation, [], [], []
    sums: dict[str, float] = defaultdict(float)
    mine = range(rank, len(examples), world)
    for place in mine:
        example = examples[place]
        try:
            pending.append((place, example, _prepare(pipeline, example)))
        except MmxError as error:
            bad.append(f"{example.origin or example.id}: {error}")
        if len(pending) == batch_size or place == mine[-1]:
            if pending:
                found += _judge(pipeline, pending, options, sums)
            progress(len(pending))
            pending = []
    judged = sorted((item for part in gather([found]) for item in part), key=lambda item: item.key)
    bad = [item for part in gather([bad]) for item in part]
    if len(bad) > max(10, bad_limit * len(examples)):
        raise DataError(f"{len(bad)} of {len(examples)} examples cannot be read; the first: {bad[0]}")
    totals = [part for part in gather([dict(sums)])]
    return Report(_metrics(judged, totals), judged, bad)


def _prepare(pipeline: Pipeline, example: Example) -> dict[str, Any]:
    model = pipeline.model
    return {n: model.encoder(n).prepare(raw) for n, raw in example.sources.items() if n in model.sources}


def _judge(
    pipeline: Pipeline,
    pending: list[tuple[int, Example, dict[str, Any]]],
    options: GenerationConfig,
    sums: dict[str, float],
) -> list[Judged]:
    """One batch: encoded once, every turn said at once, and the loss of every target over the same memory."""
    model = pipeline.model
    sources = {}
    for name in model.sources:
        rows = [row for row, (_, _, inputs) in enumerate(pending) if name in inputs]
        if rows:
            batch = model.encoder(name).collate([pending[row][2][name] for row in rows])
            moved = {key: tensor.to(model.device) for key, tensor in batch.items()}
            sources[name] = SourceBatch(moved, torch.tensor(rows, device=model.device))
    with torch.inference_mode():
        memory = model.encode(sources, len(pending))
    found = []
    for asks in (False, True):  # captions and questions differ much in length: a pass for each wastes less padding
        turns = [[(i, t) for i, t in enumerate(e.turns) if (t.question is not None) == asks] for _, e, _ in pending]
        rows = [row for row, said in enumerate(turns) if said]
        if rows:
            chosen = memory if len(rows) == memory.batch else memory.select(rows)
            questions = [[turn.question for _, turn in turns[row]] for row in rows]
            texts = pipeline.say(chosen, questions, options)
            for row, said in zip(rows, texts, strict=True):
                place, example, _ = pending[row]
                for (number, turn), best in zip(turns[row], said, strict=True):
                    key, text = (place, number), best[0]
                    found.append(
                        Judged(key, example.id, turn.question, turn.kind, text.text, text.score, turn.targets)
                    )
            _add_loss(pipeline, chosen, [[turn for _, turn in turns[row]] for row in rows], sums)
    return found


def _add_loss(pipeline: Pipeline, memory: Any, turns: list[list[Any]], sums: dict[str, float]) -> None:
    """Add the cross-entropy (nats) of all targets and their number of tokens to the sums."""
    model = pipeline.model
    pairs = [choose_all(row) for row in turns]
    texts = [
        [
            (model.tokenizer.prompt(model.prompt(q)), [*model.tokenizer.encode(target), model.tokenizer.eos])
            for q, target in row
        ]
        for row in pairs
    ]
    most = max(len(row) for row in texts)
    tokens, mask, targets = (t.to(model.device) for t in pad_texts(texts, most, model.tokenizer.pad))
    with torch.inference_mode():
        questions = [[q for q, _ in row] + [None] * (most - len(row)) for row in pairs]
        logits = model.decoder(tokens, pipeline.with_questions(memory, questions), mask).float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="sum")
    sums["loss"] += loss.item()
    sums["tokens"] += int((targets >= 0).sum())


def _metrics(judged: list[Judged], sums: list[dict[str, float]]) -> dict[str, float]:
    """Every metric that the texts allow: of captions, of answers, of answers by kind."""
    captions = {item.key: item for item in judged if item.question is None}
    answers = {item.key: item for item in judged if item.question is not None and item.targets}
    metrics: dict[str, float] = {}
    tokens = sum(part.get("tokens", 0) for part in sums)
    if tokens:
        metrics["loss"] = sum(part["loss"] for part in sums if "loss" in part) / tokens
    if len(captions) > 1:
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


def _answer_metrics(answers: dict[tuple[int, int], Judged]) -> dict[str, float]:
    said = {key: item.said for key, item in answers.items()}
    return answer_metrics(said, {key: item.targets for key, item in answers.items()})
