"""Evaluation: model x examples x metrics -> Report. Over several processes the numbers are those of one, to the bit.

Alphabet: B examples in a batch, K questions of each, T text positions, V vocabulary, n tokens with a known truth.

With `information`, the bits that a word of the targets costs are measured as well, given nothing, the question, the
picture, both; and, so that seeing is told from seeing *this*, given the picture of another example and a blank one.
Each is an estimate of a conditional entropy (Cover & Thomas 2006, section 2.2) from above: what the model does not know
is added (theorem 5.4.3), and the more, the less it was trained under that condition. All of them are over the same
words. What each stands for:
- no picture: what `Model.encode` gives for no inputs, so that a text source or a reader still reads the question.
- no question: the empty question, which is a "?" alone, on the way that any question takes (prompt, text source, or
  reader), and no box. To leave it out altogether would leave a reader with nothing to look at.
- another picture: that of the next example of its batch, and of the first for the last. A batch of one has no other and
  is left out of this figure. All sources of an example go together.
- a blank picture: the prepared floating numbers at zero, which after normalisation is the mean of the pictures that an
  encoder was made for; a text is the empty one, and what has no floating numbers is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmx.config.schema import GenerationConfig
from mmx.data.batching import all_texts, encode_target, pad_texts, select_label_positions
from mmx.data.examples import Example, TextTask
from mmx.encoders.contract import PreparedInput, prepare
from mmx.errors import DataError, MmxError
from mmx.evaluation.metrics.answers import answer_metrics, most_frequent_answer_accuracy
from mmx.evaluation.metrics.captions import caption_metrics
from mmx.inference.pipeline import Pipeline
from mmx.io.atomic import atomic_write
from mmx.memory import Box, Memory
from mmx.models.source import prepare_inputs

PICTURE = "picture"  # in the name of a condition: the inputs of the example itself, whatever they are
Gather = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True)
class EvaluatedText:
    """One text beside what people said. `key` is the place of its turn among all turns."""

    key: tuple[int, int]
    id: str
    question: str | None
    question_type: str | None
    prediction: str
    score: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found. metrics: name -> value; texts: every text in order; bad: what could not be read."""

    metrics: dict[str, float]
    predictions: list[EvaluatedText]
    skipped: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write metrics.json and texts.jsonl, each whole or not at all. Raises DataError where that is impossible."""
        rows = (
            {"id": t.id, "question": t.question, "said": t.prediction, "score": t.score, "targets": t.targets}
            for t in self.predictions
        )
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            for name, text in {"texts.jsonl": lines, "metrics.json": json.dumps(self.metrics, indent=2) + "\n"}.items():
                with atomic_write(folder / name) as temporary:
                    temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"{folder} cannot be written: {error.strerror}; choose another folder with --out."
            ) from error


class Pending(NamedTuple):
    """An example that was read: its place among all, and the inputs of each source."""

    place: int
    example: Example
    inputs: dict[str, Any]


class LabelledText(NamedTuple):
    """A text that should be said. question: None for a caption; target: its tokens and the end; box: as in Turn."""

    question: str | None
    target: list[int]
    box: Box | None


class WordLoss(NamedTuple):
    """The cross-entropy of some texts under one condition, in nats, and the number of their words."""

    nats: float
    words: int


class BatchLoss(NamedTuple):
    """The cross-entropy of one batch, in nats over its tokens; words: the same by the name of each condition."""

    batch: int
    nats: float
    tokens: int
    words: Mapping[str, WordLoss] = {}


def evaluate(
    pipeline: Pipeline,
    examples: Sequence[Example],
    options: GenerationConfig | None = None,
    batch_size: int = 32,
    rank: int = 0,
    world: int = 1,
    gather: Gather = lambda items: items,
    progress: Callable[[int], None] = lambda done: None,
    max_skip_fraction: float = 0.001,
    stop: Callable[[], bool] = lambda: False,
    information: bool = False,
    training_captions: Collection[str] = (),
) -> EvaluationReport:
    """Caption and answer all examples; process `rank` of `world` takes every world-th batch, `gather` brings them
    together: batches hold the same examples for any number of processes, so every number comes out the same.

    Once `stop` says so no further batch is begun. `information` adds bits a word under several conditions (see above),
    for three to five more passes over the targets and a second encoding. `known` are captions, such as those trained
    on: how many of what is said are none of them is counted too. Raises DataError when more than `bad_limit` of
    the examples (and more than ten) cannot be read.
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
            judged, loss = _judge(pipeline, pending, options, batch, information)
            found += judged
            losses.append(loss)
        progress(len(places))
    found = sorted((item for part in gather([found]) for item in part), key=lambda item: item.key)
    losses = sorted(item for part in gather([losses]) for item in part)
    unread = [sentence for _, sentence in sorted(item for part in gather([bad]) for item in part)]
    if len(unread) > max(10, max_skip_fraction * len(examples)):
        raise DataError(f"{len(unread)} of {len(examples)} examples cannot be read; the first: {unread[0]}")
    return EvaluationReport(_metrics(found, losses, training_captions), found, unread)


def _prepare(pipeline: Pipeline, example: Example) -> dict[str, Any]:
    """The inputs of the sources that the model has. Raises MmxError, also for a question longer than it reads."""
    model = pipeline.model
    for turn in example.tasks:
        pipeline.prompt_tokens(turn.question)
    return prepare_inputs(model.encoders, example.sources)


def _judge(
    pipeline: Pipeline, pending: Sequence[Pending], options: GenerationConfig, batch: int, information: bool
) -> tuple[list[EvaluatedText], BatchLoss]:
    """One batch, encoded once: what is said in every turn, and the loss of every target."""
    memory = pipeline.encode_prepared([item.inputs for item in pending])
    views = _views(pipeline, memory, pending) if information else {PICTURE: memory}
    found, nats, tokens = [], 0.0, 0
    words: dict[str, WordLoss] = {}
    for asks in (False, True):  # captions and questions differ much in length: a pass for each wastes less padding
        turns = [
            [(i, t) for i, t in enumerate(item.example.tasks) if (t.question is not None) == asks] for item in pending
        ]
        rows = [row for row, said in enumerate(turns) if said]
        if rows:
            chosen = _selected(memory, rows)
            asked = [[turn.question for _, turn in turns[row]] for row in rows]
            texts = pipeline.generate(chosen, asked, options, [[turn.box for _, turn in turns[row]] for row in rows])
            for row, said in zip(rows, texts, strict=True):
                found += _judged(pending[row], turns[row], said)
        told = [_wanted(pipeline, [turn for _, turn in said]) for said in turns]
        rows = [row for row, texts in enumerate(told) if texts]  # some questions come without answers
        if rows:
            wanted = [told[row] for row in rows]
            seen = {name: _selected(view, rows) for name, view in views.items()}
            more_nats, more_tokens, more_words = _losses(pipeline, seen, wanted, information)
            nats, tokens, words = nats + more_nats, tokens + more_tokens, words | more_words
    return found, BatchLoss(batch, nats, tokens, words)


def _judged(item: Pending, turns: Sequence[tuple[int, TextTask]], said: Sequence[Sequence[Any]]) -> list[EvaluatedText]:
    """What was said in the turns of one example, the best text of each."""
    return [
        EvaluatedText(
            (item.place, i), item.example.id, t.question, t.question_type, texts[0].text, texts[0].score, t.targets
        )
        for (i, t), texts in zip(turns, said, strict=True)
    ]


def _wanted(pipeline: Pipeline, turns: Sequence[TextTask]) -> list[LabelledText]:
    """Every target of some turns, tidied and cut as in training."""
    tokenizer, longest = pipeline.model.tokenizer, pipeline.model.config.decoder.max_position_embeddings
    return [
        LabelledText(question, encode_target(tokenizer, target, longest - len(pipeline.prompt_tokens(question))), box)
        for question, target, box in all_texts(turns)
    ]


def _cross_entropy(pipeline: Pipeline, memory: Memory, wanted: Sequence[Sequence[LabelledText]]) -> tuple[float, int]:
    """The cross-entropy of texts [B][up to K] over a memory of B rows in nats, and their number of tokens."""
    model, most = pipeline.model, max(len(row) for row in wanted)
    texts = [[(pipeline.prompt_tokens(text.question), text.target) for text in row] for row in wanted]
    tokens, mask, targets = (t.to(model.device) for t in pad_texts(texts, most, model.tokenizer.pad))
    places, labels = select_label_positions(targets, 1)
    questions = [[text.question for text in row] + [None] * (most - len(row)) for row in wanted]
    with torch.inference_mode():
        pointed = pipeline.with_boxes(memory, [[text.box for text in row] for row in wanted], most)
        asked = pipeline.with_questions(pointed, questions)
        states = model.decoder.hidden_states(tokens, asked, mask).flatten(0, 2)
        logits = model.decoder.logits(states[places]).float()  # [n, V]: B*K*T of them would fill the memory
    nats = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return nats.double().sum().item(), len(labels)


def _views(pipeline: Pipeline, memory: Memory, pending: Sequence[Pending]) -> dict[str, Memory]:
    """What may be looked at, by name: the memory of B examples, and what stands for it."""
    count = len(pending)
    blank = [{name: _blank(pipeline, name, inputs) for name, inputs in item.inputs.items()} for item in pending]
    present = [{name: inputs for name, inputs in row.items() if inputs} for row in blank]
    others = {"another picture": memory.select([*range(1, count), 0])} if count > 1 else {}
    nothing, zeros = pipeline.model.encode({}, count), pipeline.encode_prepared(present)
    return {"no picture": nothing, PICTURE: memory, **others, "blank picture": zeros}


def _blank(pipeline: Pipeline, source: str, inputs: Mapping[str, torch.Tensor]) -> PreparedInput:
    """An input of the same size that says nothing; empty where there is none."""
    encoder = pipeline.model.encoder(source)
    if encoder.modality == "text":
        return prepare(encoder, source, "")
    if not any(tensor.is_floating_point() for tensor in inputs.values()):
        return {}
    return {name: torch.zeros_like(t) if t.is_floating_point() else t for name, t in inputs.items()}


def _losses(
    pipeline: Pipeline, views: Mapping[str, Memory], wanted: Sequence[Sequence[LabelledText]], information: bool
) -> tuple[float, int, dict[str, WordLoss]]:
    """The cross-entropy of texts that are all captions or all answers in nats, their number of tokens, and the former
    by the name of each condition, over their words."""
    conditions = _conditions(views, wanted)
    costs = {name: _cross_entropy(pipeline, *condition) for name, condition in conditions.items()}
    sort, usual = ("captions", PICTURE) if PICTURE in costs else ("answers", f"question, {PICTURE}")
    if not information:
        return *costs[usual], {}
    count = _count_words(pipeline, wanted)
    words = {f"bits a word of {sort}: {name}": WordLoss(nats, count) for name, (nats, _) in costs.items()}
    return *costs[usual], words


def _conditions(
    views: Mapping[str, Memory], wanted: Sequence[Sequence[LabelledText]]
) -> dict[str, tuple[Memory, Sequence[Sequence[LabelledText]]]]:
    """What is looked at and what is asked, by name, for texts that are all captions or all answers."""
    if wanted[0][0].question is None:
        return {name: (view, wanted) for name, view in views.items()}
    unasked = [[text._replace(question="", box=None) for text in row] for row in wanted]
    without = ("no picture", PICTURE) if len(views) > 1 else ()
    untold = {f"no question, {name}": (views[name], unasked) for name in without}
    return untold | {f"question, {name}": (view, wanted) for name, view in views.items()}


def _count_words(pipeline: Pipeline, wanted: Sequence[Sequence[LabelledText]]) -> int:
    """The words of some texts; the end is none of them, though its bits are theirs to bear."""
    return sum(len(pipeline.model.tokenizer.words(text.target)) for row in wanted for text in row)


def _selected(memory: Memory, rows: list[int]) -> Memory:
    return memory if len(rows) == memory.batch_size else memory.select(rows)


def _metrics(judged: Sequence[EvaluatedText], losses: Sequence[BatchLoss], known: Collection[str]) -> dict[str, float]:
    """Every metric that the texts allow: of captions, of answers, of answers by kind."""
    captions: dict[Hashable, EvaluatedText] = {
        item.key: item for item in judged if item.question is None and item.targets
    }
    answers: dict[Hashable, EvaluatedText] = {
        item.key: item for item in judged if item.question is not None and item.targets
    }
    metrics: dict[str, float] = {}
    tokens = sum(loss.tokens for loss in losses)
    if tokens:
        metrics["loss"] = math.fsum(loss.nats for loss in losses) / tokens
    if len(captions) > 1:  # CIDEr knows a rare word from a common one by comparing captions
        said = {key: item.prediction for key, item in captions.items()}
        metrics |= caption_metrics(said, {key: item.targets for key, item in captions.items()}, known)
    if answers:
        metrics |= _answer_metrics(answers)
        kinds = sorted({item.question_type for item in answers.values() if item.question_type})
        for kind in kinds:
            found = _answer_metrics({key: item for key, item in answers.items() if item.question_type == kind})
            metrics |= {f"{name}, {kind}": found[name] for name in ("exact match", "without looking")}
    metrics |= _bits(losses)
    metrics["captions"], metrics["questions"] = len(captions), len(answers)
    return metrics


def _bits(losses: Sequence[BatchLoss]) -> dict[str, float]:
    """Bits a word under each condition that was measured."""
    found: dict[str, list[WordLoss]] = {}
    for loss in losses:
        for name, words in loss.words.items():
            found.setdefault(name, []).append(words)
    counts = {name: sum(part.words for part in parts) for name, parts in found.items()}
    return {
        name: math.fsum(part.nats for part in found[name]) / (math.log(2) * count)
        for name, count in counts.items()
        if count
    }


def _answer_metrics(answers: Mapping[Hashable, EvaluatedText]) -> dict[str, float]:
    """Exact match, that of one who does not look, and VQA accuracy where it means something: it compares with what
    several people answered."""
    said = {key: item.prediction for key, item in answers.items()}
    targets = {key: item.targets for key, item in answers.items()}
    metrics = answer_metrics(said, targets)
    if all(len(item.targets) == 1 for item in answers.values()):
        del metrics["VQA accuracy"]
    asked = {key: item.question or "" for key, item in answers.items()}
    return metrics | {"without looking": most_frequent_answer_accuracy(asked, targets)}
