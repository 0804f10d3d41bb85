"""Cross-entropy of reference texts, and bits per word under several conditions.

Axes: B examples of a batch, K texts of each, T text positions, V vocabulary, n target tokens.

The bits per word of the targets are measured without image and question, with the question, with the image, and with
both. Two more conditions replace the image by that of another example and by a blank one, to separate the effect of
this image from the effect of any image. Each value is an upper estimate of a conditional entropy (Cover & Thomas 2006,
section 2.2): the divergence of the model from the truth is added (theorem 5.4.3), and it is larger for conditions that
were rare in training. All values are over the same words. The conditions:
- no image: `Model.encode` without inputs. A text source or the question encoder still reads the question.
- no question: the empty question, which is a "?" alone, and no box. A question encoder needs some question.
- another image: that of the next example of the batch, and of the first for the last. A batch of one is left out of
  this value. All sources of an example are replaced together.
- blank image: floating-point inputs are zero, which is the mean image after normalization; a text is empty; a source
  without floating-point inputs is left out.
"Image" stands for all inputs of an example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mmx.boxes import Box
from mmx.data.batching import all_texts, encode_target
from mmx.data.examples import TextTask
from mmx.encoders.contract import PreparedInput, prepare
from mmx.inference.generator import TextGenerator
from mmx.memory import Memory
from mmx.models.batching import pad_texts, select_label_positions

IMAGE = "image"
NO_IMAGE = "no image"
ANOTHER_IMAGE = "another image"
BLANK_IMAGE = "blank image"
NO_QUESTION = ""  # which users cannot ask


class LabelledText(NamedTuple):
    """A reference text and its prompt. target: as in EncodedTarget; box: as in TextTask."""

    question: str | None
    prompt: list[int]
    target: list[int]
    box: Box | None
    is_cut: bool


class WordLoss(NamedTuple):
    """Cross-entropy of some texts under one condition in nats, and their number of words."""

    nats: float
    words: int


class TextLosses(NamedTuple):
    """Cross-entropy of some texts in nats, their number of tokens, and the cross-entropy by condition.

    cut: the row of each text that was cut, because the model has too few positions for it.
    """

    nats: float
    tokens: int
    by_condition: Mapping[str, WordLoss]
    cut: Sequence[int] = ()


class BatchLoss(NamedTuple):
    """The same for all texts of a batch."""

    batch: int
    nats: float
    tokens: int
    by_condition: Mapping[str, WordLoss]


def condition_memories(
    pipeline: TextGenerator, memory: Memory, inputs: Sequence[Mapping[str, PreparedInput]]
) -> dict[str, Memory]:
    """The memory of B examples, and those that replace it, by condition."""
    count = len(inputs)
    memories = {NO_IMAGE: pipeline.model.encode({}, count), IMAGE: memory}
    if count > 1:
        memories[ANOTHER_IMAGE] = memory.select([*range(1, count), 0])
    blank = [_blank_inputs(pipeline, row) for row in inputs]
    memories[BLANK_IMAGE] = pipeline.encode_prepared(blank, allow_unconditional=True)
    return memories


def text_losses(
    pipeline: TextGenerator, memories: Mapping[str, Memory], tasks: Sequence[Sequence[TextTask]]
) -> TextLosses:
    """Cross-entropy of the targets of tasks [B][...], which all have a question or all have none.

    With more than one memory, also by condition.
    """
    texts = [_labelled_texts(pipeline, row) for row in tasks]
    rows = [row for row, labelled in enumerate(texts) if labelled]  # some questions have no answers
    if not rows:
        return TextLosses(0.0, 0, {})
    cut = [row for row in rows for text in texts[row] if text.is_cut]
    texts = [texts[row] for row in rows]
    selected = {name: select_rows(memory, rows) for name, memory in memories.items()}
    if texts[0][0].question is None:
        kind = "captions"
        usual = IMAGE
        conditions = {name: (memory, texts) for name, memory in selected.items()}
    else:
        kind = "answers"
        usual = f"question, {IMAGE}"
        conditions = _question_conditions(pipeline, selected, texts)
    losses = {name: _cross_entropy(pipeline, memory, given) for name, (memory, given) in conditions.items()}
    by_condition = {}
    if len(memories) > 1:
        words = _count_words(pipeline, texts)
        for name, loss in losses.items():
            by_condition[f"bits per word of {kind}: {name}"] = WordLoss(loss.nats, words)
    return TextLosses(losses[usual].nats, losses[usual].tokens, by_condition, cut)


def add_losses(batch: int, losses: Sequence[TextLosses]) -> BatchLoss:
    """The loss of a batch from those of its captions and its answers."""
    by_condition: dict[str, WordLoss] = {}
    for loss in losses:
        by_condition |= loss.by_condition
    return BatchLoss(batch, sum(loss.nats for loss in losses), sum(loss.tokens for loss in losses), by_condition)


def select_rows(memory: Memory, rows: Sequence[int]) -> Memory:
    """`memory.select(rows)` without a copy if all rows are selected."""
    return memory if len(rows) == memory.batch_size else memory.select(rows)


def _labelled_texts(pipeline: TextGenerator, tasks: Sequence[TextTask]) -> list[LabelledText]:
    """All targets of some tasks, as they are learned by training without `max_target_length`."""
    tokenizer = pipeline.model.tokenizer
    max_positions = pipeline.model.config.decoder.max_position_embeddings
    texts = []
    for question, target, box in all_texts(tasks):
        prompt = pipeline.prompt_tokens(question)
        encoded = encode_target(tokenizer, target, max_positions - len(prompt))
        texts.append(LabelledText(question, prompt, encoded.tokens, box, encoded.is_cut))
    return texts


class _TokenLoss(NamedTuple):
    nats: float
    tokens: int


def _cross_entropy(pipeline: TextGenerator, memory: Memory, texts: Sequence[Sequence[LabelledText]]) -> _TokenLoss:
    """Cross-entropy of texts [B][up to K] over a memory of B rows in nats, and their number of tokens."""
    model = pipeline.model
    streams = max(len(row) for row in texts)
    pairs = []
    questions: list[list[str | None]] = []
    boxes = []
    for row in texts:
        pairs.append([(text.prompt, text.target) for text in row])
        questions.append([text.question for text in row] + [None] * (streams - len(row)))
        boxes.append([text.box for text in row])
    tokens, mask, targets = (t.to(model.device) for t in pad_texts(pairs, streams, model.tokenizer.pad_token_id))
    positions, labels = select_label_positions(targets, 1)
    with torch.inference_mode():
        focused = pipeline.with_boxes(memory, boxes, streams)
        states = model.decoder.hidden_states(tokens, pipeline.with_questions(focused, questions), mask).flatten(0, 2)
        logits = model.decoder.logits(states[positions]).float()  # [n, V]; all B*K*T positions can exceed the memory
    nats = F.cross_entropy(logits, labels, reduction="none")
    return _TokenLoss(nats.double().sum().item(), len(labels))


def _question_conditions(
    pipeline: TextGenerator, memories: Mapping[str, Memory], texts: list[list[LabelledText]]
) -> dict[str, tuple[Memory, list[list[LabelledText]]]]:
    """Memory and texts by condition, for answers to questions."""
    conditions = {}
    if len(memories) > 1:
        without_question = [_without_questions(pipeline, row) for row in texts]
        for name in (NO_IMAGE, IMAGE):
            conditions[f"no question, {name}"] = (memories[name], without_question)
    for name, memory in memories.items():
        conditions[f"question, {name}"] = (memory, texts)
    return conditions


def _without_questions(pipeline: TextGenerator, texts: Sequence[LabelledText]) -> list[LabelledText]:
    model = pipeline.model
    prompt = model.tokenizer.encode_prompt(model.prompt(NO_QUESTION))
    return [text._replace(question=NO_QUESTION, prompt=prompt, box=None) for text in texts]


def _count_words(pipeline: TextGenerator, texts: Sequence[Sequence[LabelledText]]) -> int:
    """The number of words without the end tokens, whose bits count nevertheless."""
    return sum(len(pipeline.model.tokenizer.words(text.target)) for text in chain(*texts))


def _blank_inputs(pipeline: TextGenerator, inputs: Mapping[str, PreparedInput]) -> dict[str, PreparedInput]:
    """Inputs of the same sizes without information; sources without floating-point inputs are left out."""
    blank = {}
    for source, tensors in inputs.items():
        encoder = pipeline.model.encoder(source)
        if encoder.modality == "text":
            blank[source] = prepare(encoder, source, "")
        elif any(tensor.is_floating_point() for tensor in tensors.values()):
            blank[source] = {n: torch.zeros_like(t) if t.is_floating_point() else t for n, t in tensors.items()}
    return blank
