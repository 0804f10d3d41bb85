"""Analysis of a given text under teacher forcing: one forward pass gives the attention of every word.

Axes: W words, T text positions, L cross-attention layers, H heads, S slots.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from mmx.encoders.base import Encoder
from mmx.encoders.contract import to_stated_type
from mmx.errors import MmxError
from mmx.interpret.attention_maps import all_attention_maps, value_weighted_attention
from mmx.interpret.attention_stats import gate_values
from mmx.interpret.grid import Displacement, displacement
from mmx.interpret.information import surprisal
from mmx.interpret.look import Look, MapMethod
from mmx.interpret.recorder import QueryRecorder
from mmx.interpret.relevance import relevance
from mmx.interpret.text_batch import TextBatch
from mmx.interpret.word_maps import SourceView, WordInformation
from mmx.io.images import load_image
from mmx.memory import Memory
from mmx.models.model import Model
from mmx.models.question_encoder import QUESTION_ENCODER


@dataclass(frozen=True)
class TargetText:
    """A text to be analyzed. prompt: tokens before it; target: its tokens; question: the question it answers."""

    prompt: Sequence[int]
    target: Sequence[int]
    question: str | None = None


def look_at_text(
    model: Model,
    memory: Memory,
    text: TargetText,
    views: Sequence[SourceView],
    method: MapMethod = "weighted",
    baseline: Memory | None = None,
) -> Look:
    """The attention, relevance, log-probability and information gain of every word of a text.

    Args:
        model: a Model.
        memory: one row, as the decoder attends to it.
        text: the text.
        views: of the segments of the memory, see `source_views`.
        method: what the maps show, see `Look`.
        baseline: the memory without the sources, for the information gain; an empty memory by default.

    Raises:
        MmxError: an unknown method.
    """
    _check_method(method)
    decoder = model.decoder
    tokenized = _tokenize(model, text)
    batch = tokenized.batch
    recorder = QueryRecorder()
    without = decoder.empty_memory(1) if baseline is None else baseline
    with torch.inference_mode():
        bits = surprisal(decoder, memory, batch, recorder)[0, 0]
        gain = surprisal(decoder, without, batch)[0, 0] - bits
        attention = all_attention_maps(recorder, memory, 1)
        weighted = value_weighted_attention(decoder, memory, attention)
    by_word = None
    if method in ("relevance", "both"):
        by_word = relevance(decoder, memory, batch, tokenized.word_ids)[0, 0].cpu()
    positions = tokenized.positions
    return Look(
        text=model.tokenizer.decode(text.target),
        question=text.question,
        words=_word_information(tokenized, bits, gain),
        attention=_mean_by_word(attention[0, 0], positions),
        weighted=_mean_by_word(weighted[0, 0], positions),
        relevance=by_word,
        method=method,
        visible=_mean_by_word(_visible_slots(recorder, memory, batch.tokens.shape[-1]), positions) > 0,
        views=tuple(views),
        gates=tuple(gate_values(decoder)),
    )


def _check_method(method: str) -> None:
    known = get_args(MapMethod)
    if method not in known:
        raise MmxError(
            f"method is {method!r}; expected one of {', '.join(known)}.",
            code="look.method",
            given=method,
            expected=known,
        )


@dataclass(frozen=True)
class _TokenizedText:
    """A batch of one text, its words, the text positions that predict each word, and the word of each position."""

    batch: TextBatch
    words: list[str]
    positions: list[list[int]]
    word_ids: Tensor


def _tokenize(model: Model, text: TargetText) -> _TokenizedText:
    """The inputs of the decoder: position `start + i` predicts token i of the target."""
    start = len(text.prompt) - 1
    length = start + max(1, len(text.target))
    tokens = torch.tensor([[[*text.prompt, *text.target]]], device=model.device)[:, :, :length]
    targets = torch.full_like(tokens, -1)
    if text.target:
        targets[0, 0, start:] = torch.tensor(list(text.target), device=model.device)
    word_ids = torch.full_like(tokens, -1)
    words = []
    positions = []
    for number, (word, indices) in enumerate(model.tokenizer.words(text.target)):
        where = [start + index for index in indices]
        word_ids[0, 0, where] = number
        words.append(word)
        positions.append(where)
    return _TokenizedText(TextBatch(tokens, targets), words, positions, word_ids)


def _word_information(text: _TokenizedText, bits: Tensor, gain: Tensor) -> tuple[WordInformation, ...]:
    """Log-probability and gain of each word, from the surprisal and the gain in bits of each position, [T]."""
    words = []
    for word, where in zip(text.words, text.positions, strict=True):
        words.append(WordInformation(word, -math.log(2) * float(bits[where].sum()), float(gain[where].sum())))
    return tuple(words)


def _visible_slots(recorder: QueryRecorder, memory: Memory, length: int) -> Tensor:
    """bool [T, S]: the slots visible at each position."""
    mask = recorder.recorded(recorder.layers[0])[0].mask
    visible = memory.mask.new_ones(length, memory.num_slots)
    return visible if mask is None else visible & mask[0, 0]


def _mean_by_word(values: Tensor, positions: Sequence[Sequence[int]]) -> Tensor:
    """[T, ...] -> [W, ...], the mean over the positions of each word."""
    rows = [values[list(where)].float().mean(0) for where in positions]
    return torch.stack(rows).cpu() if rows else values[:0].float().cpu()


def source_views(
    model: Model,
    memory: Memory,
    inputs: Mapping[str, object],
    displacements: dict[str, Displacement] | None = None,
) -> list[SourceView]:
    """A view of each segment of a memory.

    Args:
        model: the model that encoded the memory.
        memory: a Memory.
        inputs: raw inputs by source name, for images, labels and displacements. May lack any of them. A source with
            several segments is not matched to its input.
        displacements: a cache by source name. Measured displacements are added to it.
    """
    cache = {} if displacements is None else displacements
    counts = Counter(segment.source for segment in memory.layout)
    numbers: Counter[str] = Counter()
    views = []
    for segment in memory.layout:
        name = segment.source
        numbers[name] += 1
        if counts[name] > 1:
            views.append(SourceView(segment, f"{name} {numbers[name]}"))
            continue
        view = SourceView(segment, name)
        raw = inputs.get(name)
        views.append(view if raw is None else _with_input(model, view, raw, cache))
    return views


def _with_input(model: Model, view: SourceView, raw: object, cache: dict[str, Displacement]) -> SourceView:
    """The view with the properties of its raw input."""
    name = view.segment.source
    if name == QUESTION_ENCODER and model.question_encoder is not None:
        return replace(view, labels=tuple(model.question_encoder.labels(raw)))
    encoder = model.encoder(name)
    raw = to_stated_type(encoder, raw)
    if not view.segment.grid:
        return replace(view, labels=tuple(encoder.labels(raw)))
    if name not in cache:
        cache[name] = _measure_displacement(model, encoder, raw)
    image = load_image(raw) if encoder.modality == "image" else None  # type: ignore[arg-type]
    return replace(view, image=image, window=encoder.window(raw), displacement=cache[name])


def _measure_displacement(model: Model, encoder: Encoder, raw: object) -> Displacement:
    inputs = encoder.collate([encoder.prepare(raw)])
    return displacement(encoder, {name: tensor.to(model.device) for name, tensor in inputs.items()})
