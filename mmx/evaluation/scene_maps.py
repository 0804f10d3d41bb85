"""Attention and relevance maps on synthetic scenes, whose objects have known boxes.

Axes: n cases, L cross-attention layers, H heads, R rows and C columns of the image's grid, T text positions.
Boxes are in fractions of the image. Masks: True = may be attended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmx.data.scene_texts import full_caption, questions
from mmx.data.scenes import Box, Scene, render_scene
from mmx.encoders.contract import collate, prepare
from mmx.errors import MmxError
from mmx.inference.pipeline import Pipeline
from mmx.interpret.attention_maps import attention_maps, value_weighted_attention
from mmx.interpret.grid import Displacement, displacement, segment_cells
from mmx.interpret.recorder import QueryRecorder
from mmx.interpret.relevance import relevance
from mmx.interpret.text_batch import TextBatch
from mmx.memory import Memory, Segment
from mmx.models.batching import pad_texts
from mmx.models.source import find_source

SCENES_PER_BATCH = 16  # about a hundred cases


@dataclass(frozen=True)
class PointingCase:
    """A part of a text, text[start:stop], about the object of scenes[scene] with a box.

    Args:
        scene: index of the scene.
        question_type: "caption" for a word of a caption.
        question: None for a caption.
        text: the answer or the caption.
        start: index of the first character.
        stop: index after the last character.
        box: of the object.
    """

    scene: int
    question_type: str
    question: str | None
    text: str
    start: int
    stop: int
    box: Box


@dataclass(frozen=True)
class SceneMaps:
    """Maps of n cases.

    Args:
        cases: the cases.
        attention: [n, L, H, R, C], attention weights.
        weighted: [n, L, H, R, C], attention weighted by the norm of the values.
        relevance: [n, L, H, R, C], attention weighted by its gradient.
        touched: bool [n, R, C], the cells that touch the box of the case.
        displacement: of the encoder's receptive field, in cells.
    """

    cases: tuple[PointingCase, ...]
    attention: Tensor
    weighted: Tensor
    relevance: Tensor
    touched: Tensor
    displacement: Displacement


class CaseBatch(NamedTuple):
    """Some cases, the memory of their images with one row for each case, and the image's segment in it."""

    memory: Memory
    segment: Segment
    cases: list[PointingCase]


def pointing_cases(scenes: Sequence[Scene]) -> tuple[PointingCase, ...]:
    """The questions about one object that are not answered by yes or no, and the shape words of full captions."""
    cases = []
    for index, scene in enumerate(scenes):
        for item in questions(scene):
            if item.evidence and item.answer not in ("yes", "no"):
                question_type = "neighbor" if item.question_type == "relation" else item.question_type
                length = len(item.answer)
                cases.append(PointingCase(index, question_type, item.question, item.answer, 0, length, item.evidence))
        full = full_caption(scene)
        if full is None:
            continue
        for mention in full.mentions:
            stop = mention.start + len(mention.word)
            cases.append(PointingCase(index, "caption", None, full.text, mention.start, stop, mention.box))
    return tuple(cases)


def compute_scene_maps(pipeline: Pipeline, scenes: Sequence[Scene]) -> SceneMaps:
    """The maps of all cases of the scenes. Raises MmxError for scenes without a case."""
    cases = pointing_cases(scenes)
    if not cases:
        raise MmxError(
            f"{len(scenes)} scenes have no question or caption about one object; give more scenes.",
            code="scene_maps.no_case",
            scenes=len(scenes),
        )
    maps = [_batch_maps(pipeline, batch) for batch in case_batches(pipeline, scenes, cases)]
    return SceneMaps(
        cases=cases,
        attention=torch.cat([batch.attention for batch in maps]),
        weighted=torch.cat([batch.weighted for batch in maps]),
        relevance=torch.cat([batch.relevance for batch in maps]),
        touched=torch.cat([batch.touched for batch in maps]),
        displacement=_image_displacement(pipeline, scenes[0]),
    )


def case_batches(pipeline: Pipeline, scenes: Sequence[Scene], cases: Sequence[PointingCase]) -> Iterator[CaseBatch]:
    """All cases in order, with memories. Raises MmxError for a model whose image source has no grid."""
    name = find_source(pipeline.model.encoders, render_scene(scenes[0]))
    for first in range(0, len(scenes), SCENES_PER_BATCH):
        part = [case for case in cases if first <= case.scene < first + SCENES_PER_BATCH]
        images = [render_scene(scene) for scene in scenes[first : first + SCENES_PER_BATCH]]
        memory = pipeline.encode(**{name: images})
        segments = [segment for segment in memory.layout if segment.source == name and segment.grid]
        if not segments:
            raise MmxError(
                f"source {name!r} has no grid; give a model whose image features have one.",
                code="scene_maps.no_grid",
                source=name,
            )
        if part:
            yield CaseBatch(memory.select([case.scene - first for case in part]), segments[0], part)


class _BatchMaps(NamedTuple):
    """As in SceneMaps, for one batch."""

    attention: Tensor
    weighted: Tensor
    relevance: Tensor
    touched: Tensor


def _batch_maps(pipeline: Pipeline, batch: CaseBatch) -> _BatchMaps:
    decoder = pipeline.model.decoder
    segment = batch.segment
    memory = memory_with_questions(pipeline, batch.memory, batch.cases)
    if segment not in memory.layout:
        raise MmxError(
            "the decoder does not attend to the image; expected a model without a question encoder.",
            code="scene_maps.question_encoder",
        )
    boxes = torch.tensor([case.box for case in batch.cases])
    touched = segment_cells(batch.memory.focus(boxes).mask, segment)
    text = case_texts(pipeline, batch.cases)
    recorder = QueryRecorder()
    word_ids = torch.where(text.targets >= 0, 0, -1)
    gradients = relevance(decoder, memory, text, word_ids, recorder)[:, 0, 0]
    measured = (text.targets[:, 0] >= 0).to(gradients.dtype)[:, :, None, None]  # [n, T, 1, 1]
    by_layer = [(attention_maps(recorder, memory, 1, layer)[:, 0] * measured).sum(1) for layer in recorder.layers]
    attention = torch.stack(by_layer, 1) / measured.sum(1)[:, None]  # mean over the positions of the word
    weighted = value_weighted_attention(decoder, memory, attention[:, None, None])[:, 0, 0]
    return _BatchMaps(
        attention=segment_cells(attention, segment).cpu(),
        weighted=segment_cells(weighted, segment).cpu(),
        relevance=segment_cells(gradients, segment).cpu(),
        touched=touched.cpu(),
    )


def memory_with_questions(pipeline: Pipeline, memory: Memory, cases: Sequence[PointingCase]) -> Memory:
    """The memory that the decoder attends to for the question of each case."""
    return pipeline.decoder_memory(memory, [[case.question] for case in cases])


def case_texts(pipeline: Pipeline, cases: Sequence[PointingCase]) -> TextBatch:
    """Prompts and texts [n, 1, T]; targets are negative outside of the part text[start:stop] of a case."""
    tokenizer = pipeline.model.tokenizer
    texts = []
    selected = []
    for case in cases:
        prompt = pipeline.prompt_tokens(case.question)
        offsets = tokenizer.backend.encode(case.text, add_special_tokens=False).offsets
        overlaps = [low < case.stop and high > case.start for low, high in offsets]
        texts.append([(prompt, tokenizer.encode(case.text))])
        selected.append(torch.tensor([False] * (len(prompt) - 1) + overlaps))
    tokens, mask, targets = pad_texts(texts, 1, tokenizer.pad_token_id)
    within = pad_sequence(selected, batch_first=True)[:, None]
    device = pipeline.model.device
    return TextBatch(tokens.to(device), targets.where(within, -1).to(device), mask.to(device))


def _image_displacement(pipeline: Pipeline, scene: Scene) -> Displacement:
    image = render_scene(scene)
    name = find_source(pipeline.model.encoders, image)
    encoder = pipeline.model.encoder(name)
    inputs = collate(encoder, name, [prepare(encoder, name, image)])
    return displacement(encoder, {key: tensor.to(pipeline.model.device) for key, tensor in inputs.items()})
