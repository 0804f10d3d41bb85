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
from mmx.data.scenes import Box, Scene, render_scene
from mmx.encoders.contract import collate, prepare
from mmx.errors import MmxError
from mmx.inference.pipeline import Pipeline
from mmx.interpret.attention_maps import attention_maps, value_weighted_attention
from mmx.interpret.grid import displacement, segment_cells
from mmx.interpret.recorder import QueryRecorder
from mmx.interpret.relevance import relevance
from mmx.memory import Memory, Segment
from mmx.models.source import find_source

BATCH = 16  # scenes encoded at a time: about a hundred cases


@dataclass(frozen=True)
class PointingCase:
    """A stretch of a text, text[start:stop], and the box of the object of scenes[scene] that it is about."""

    scene: int
    question_type: str
    question: str | None
    text: str
    start: int
    stop: int
    box: Box


@dataclass(frozen=True)
class SceneMaps:
    """What a model looked at in some cases: attention, the same weighed by what is handed over, and relevance
    [n, L, H, R, C]; touched: bool [n, R, C], the cells that touch the case's box; displacement: how far beside its cell
    the encoder looks, in cells."""

    cases: tuple[PointingCase, ...]
    attention: Tensor
    weighted: Tensor
    relevance: Tensor
    touched: Tensor
    displacement: tuple[float, float]


def pointing_cases(scenes: Sequence[Scene]) -> tuple[PointingCase, ...]:
    """What scenes offer: questions about one object that are not answered by yes or no, and the shape words of full
    captions, which name one object each."""
    cases = []
    for place, scene in enumerate(scenes):
        for asked in questions(scene):
            if asked.evidence and asked.answer not in ("yes", "no"):
                kind = "neighbour" if asked.question_type == "relation" else asked.question_type
                whole = 0, len(asked.answer)
                cases.append(PointingCase(place, kind, asked.question, asked.answer, *whole, asked.evidence))
        if full := full_caption(scene):
            spans = [(mention.start, mention.start + len(mention.word), mention.box) for mention in full.mentions]
            cases += [PointingCase(place, "caption", None, full.text, *span) for span in spans]
    return tuple(cases)


def compute_scene_maps(pipeline: Pipeline, scenes: Sequence[Scene]) -> SceneMaps:
    """Where the model looked in every case that the scenes offer, in batches."""
    cases = pointing_cases(scenes)
    if not cases:
        raise MmxError(f"{len(scenes)} scenes offer no case; give more of them.")
    found = [_look(pipeline, memory, segment, part) for memory, segment, part in batches(pipeline, scenes, cases)]
    attention, weighed, parts, touched = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    return SceneMaps(cases, attention, weighed, parts, touched, _displacement(pipeline, scenes[0]))


def batches(
    pipeline: Pipeline, scenes: Sequence[Scene], cases: Sequence[PointingCase]
) -> Iterator[tuple[Memory, Segment, list[PointingCase]]]:
    """Cases in order, with the memory of their pictures, a row for each case, and the pictures' segment in it."""
    name = find_source(pipeline.model.encoders, render_scene(scenes[0]))
    for first in range(0, len(scenes), BATCH):
        part = [case for case in cases if first <= case.scene < first + BATCH]
        memory = pipeline.encode(**{name: [render_scene(scene) for scene in scenes[first : first + BATCH]]})
        segments = [segment for segment in memory.layout if segment.source == name and segment.grid]
        if not segments:
            raise MmxError(f"source {name!r} has no grid, so its maps lie nowhere; give a model that sees by cells.")
        if part:
            yield memory.select([case.scene - first for case in part]), segments[0], part


def _look(pipeline: Pipeline, memory: Memory, segment: Segment, cases: Sequence[PointingCase]) -> tuple[Tensor, ...]:
    """The three kinds of maps [n, L, H, R, C] of some cases, and the cells that touch their boxes, bool [n, R, C]."""
    recorder, (tokens, mask, targets) = QueryRecorder(), case_tensors(pipeline, cases)
    touched = segment_cells(memory.focus(torch.tensor([case.box for case in cases])).mask, segment)
    read = memory_with_questions(pipeline, memory, cases)
    if segment not in read.layout:
        raise MmxError("the decoder does not look at the picture itself; a model with a reader has no map to judge.")
    words = torch.where(targets >= 0, 0, -1)
    parts = relevance(pipeline.model.decoder, read, tokens, targets, words, mask, recorder=recorder)[:, 0, 0]
    share = (targets[:, 0] >= 0).to(parts.dtype)[:, :, None, None]  # of every position where the word was chosen
    maps = [(attention_maps(recorder, read, 1, layer)[:, 0] * share).sum(1) for layer in recorder.layers]
    attention = torch.stack(maps, 1) / share.sum(1)[:, None]
    weighed = value_weighted_attention(pipeline.model.decoder, read, attention[:, None, None])[:, 0, 0]
    return *(segment_cells(kind, segment).cpu() for kind in (attention, weighed, parts)), touched.cpu()


def memory_with_questions(pipeline: Pipeline, memory: Memory, cases: Sequence[PointingCase]) -> Memory:
    """What the decoder looks at when each case is asked, in the decoder's type."""
    with torch.inference_mode():
        read = pipeline.with_questions(memory, [[case.question] for case in cases])
    return read.to(dtype=pipeline.model.decoder.embedding.weight.dtype)


def case_tensors(pipeline: Pipeline, cases: Sequence[PointingCase]) -> tuple[Tensor, Tensor, Tensor]:
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
    name = find_source(pipeline.model.encoders, render_scene(scene))
    encoder = pipeline.model.encoder(name)
    inputs = collate(encoder, name, [prepare(encoder, name, render_scene(scene))])
    return displacement(encoder, {key: tensor.to(pipeline.model.device) for key, tensor in inputs.items()})
