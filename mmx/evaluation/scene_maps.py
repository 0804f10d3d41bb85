"""What a model looks at in scenes whose truth is known: cases, each with a box, and a map for every layer and head.

Alphabet: n cases, L looking layers, H heads, R rows and C columns of the picture's grid, T text positions. Boxes are
shares of the picture. Masks: True = may be attended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmx.data.batching import pad_texts
from mmx.data.scene_texts import full_caption, questions
from mmx.data.scenes import Box, Scene, picture
from mmx.encoders.contract import collate, prepare
from mmx.errors import MmxError
from mmx.inference.pipeline import Pipeline
from mmx.interpret.attention_maps import attention_maps, weighted
from mmx.interpret.grid import displacement, segment_cells
from mmx.interpret.recorder import Recorder
from mmx.interpret.relevance import relevance
from mmx.memory import Memory, Segment
from mmx.models.source import source_of

BATCH = 16  # scenes encoded at a time: about a hundred cases


@dataclass(frozen=True)
class Case:
    """A stretch of a text, text[start:stop], and the box of the object of scenes[scene] that it is about."""

    scene: int
    kind: str
    question: str | None
    text: str
    start: int
    stop: int
    box: Box


@dataclass(frozen=True)
class Seen:
    """What a model looked at in some cases: attention, the same weighed by what is handed over, and relevance
    [n, L, H, R, C]; touched: bool [n, R, C], the cells that touch the case's box; displacement: how far beside its cell
    the encoder looks, in cells."""

    cases: tuple[Case, ...]
    attention: Tensor
    weighted: Tensor
    relevance: Tensor
    touched: Tensor
    displacement: tuple[float, float]


def cases_of(scenes: Sequence[Scene]) -> tuple[Case, ...]:
    """What scenes offer: questions about one object that are not answered by yes or no, and the shape words of full
    captions, which name one object each."""
    cases = []
    for place, scene in enumerate(scenes):
        for asked in questions(scene):
            if asked.evidence and asked.answer not in ("yes", "no"):
                kind = "neighbour" if asked.kind == "relation" else asked.kind
                whole = 0, len(asked.answer)
                cases.append(Case(place, kind, asked.question, asked.answer, *whole, asked.evidence))
        if full := full_caption(scene):
            spans = [(mention.start, mention.start + len(mention.word), mention.box) for mention in full.mentions]
            cases += [Case(place, "caption", None, full.text, *span) for span in spans]
    return tuple(cases)


def look(pipeline: Pipeline, scenes: Sequence[Scene]) -> Seen:
    """Where the model looked in every case that the scenes offer, in batches."""
    cases = cases_of(scenes)
    if not cases:
        raise MmxError(f"{len(scenes)} scenes offer no case; give more of them.")
    found = [_look(pipeline, memory, segment, part) for memory, segment, part in batches(pipeline, scenes, cases)]
    attention, weighed, parts, touched = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    return Seen(cases, attention, weighed, parts, touched, _displacement(pipeline, scenes[0]))


def batches(
    pipeline: Pipeline, scenes: Sequence[Scene], cases: Sequence[Case]
) -> Iterator[tuple[Memory, Segment, list[Case]]]:
    """Cases in order, with the memory of their pictures, a row for each case, and the pictures' segment in it."""
    name = source_of(pipeline.model.encoders, picture(scenes[0]))
    for first in range(0, len(scenes), BATCH):
        part = [case for case in cases if first <= case.scene < first + BATCH]
        memory = pipeline.encode(**{name: [picture(scene) for scene in scenes[first : first + BATCH]]})
        segments = [segment for segment in memory.layout if segment.source == name and segment.grid]
        if not segments:
            raise MmxError(f"source {name!r} has no grid, so its maps lie nowhere; give a model that sees by cells.")
        if part:
            yield memory.select([case.scene - first for case in part]), segments[0], part


def _look(pipeline: Pipeline, memory: Memory, segment: Segment, cases: Sequence[Case]) -> tuple[Tensor, ...]:
    """The three kinds of maps [n, L, H, R, C] of some cases, and the cells that touch their boxes, bool [n, R, C]."""
    recorder, (tokens, mask, targets) = Recorder(), texts_of(pipeline, cases)
    touched = segment_cells(memory.focus(torch.tensor([case.box for case in cases])).mask, segment)
    read = asked_over(pipeline, memory, cases)
    if segment not in read.layout:
        raise MmxError("the decoder does not look at the picture itself; a model with a reader has no map to judge.")
    words = torch.where(targets >= 0, 0, -1)
    parts = relevance(pipeline.model.decoder, read, tokens, targets, words, mask, recorder=recorder)[:, 0, 0]
    share = (targets[:, 0] >= 0).to(parts.dtype)[:, :, None, None]  # of every position where the word was chosen
    maps = [(attention_maps(recorder, read, 1, layer)[:, 0] * share).sum(1) for layer in recorder.layers]
    attention = torch.stack(maps, 1) / share.sum(1)[:, None]
    weighed = weighted(pipeline.model.decoder, read, attention[:, None, None])[:, 0, 0]
    return *(segment_cells(kind, segment).cpu() for kind in (attention, weighed, parts)), touched.cpu()


def asked_over(pipeline: Pipeline, memory: Memory, cases: Sequence[Case]) -> Memory:
    """What the decoder looks at when each case is asked, in the decoder's type."""
    with torch.inference_mode():
        read = pipeline.with_questions(memory, [[case.question] for case in cases])
    return read.to(dtype=pipeline.model.decoder.embedding.table.dtype)


def texts_of(pipeline: Pipeline, cases: Sequence[Case]) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, mask and targets [n, 1, T] of prompts and texts; targets are negative outside of the case's stretch."""
    tokenizer, rows, chosen = pipeline.model.tokenizer, [], []
    for case in cases:
        prompt, pieces = pipeline.prompt_tokens(case.question), tokenizer.encode(case.text)
        places = tokenizer.engine.encode(case.text, add_special_tokens=False).offsets
        rows.append([(prompt, pieces)])
        chosen.append([0] * (len(prompt) - 1) + [int(low < case.stop and high > case.start) for low, high in places])
    tokens, mask, targets = pad_texts(rows, 1, tokenizer.pad)
    within = pad_sequence([torch.tensor(row) for row in chosen], batch_first=True)[:, None]
    device = pipeline.model.device
    return tokens.to(device), mask.to(device), targets.where(within.bool(), -1).to(device)


def _displacement(pipeline: Pipeline, scene: Scene) -> tuple[float, float]:
    name = source_of(pipeline.model.encoders, picture(scene))
    encoder = pipeline.model.encoder(name)
    inputs = collate(encoder, name, [prepare(encoder, name, picture(scene))])
    return displacement(encoder, {key: tensor.to(pipeline.model.device) for key, tensor in inputs.items()})
