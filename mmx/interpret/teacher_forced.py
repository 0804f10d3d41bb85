"""Replay: a text that is there goes through the decoder once more, in one pass, and is asked what it looked at.

Alphabet: W words, T text positions, L looking layers, H heads, S slots.

Whoever chose the words, greedily, by lot or by beams: at each position the decoder asks what it asked then.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from mmx.errors import MmxError
from mmx.interpret.attention_maps import all_attention_maps, value_weighted_attention
from mmx.interpret.attention_stats import gate_values
from mmx.interpret.grid import displacement
from mmx.interpret.information import surprisal
from mmx.interpret.look import Look, MapMethod, SourceView, WordInformation
from mmx.interpret.recorder import QueryRecorder
from mmx.interpret.relevance import relevance
from mmx.io.images import load_image
from mmx.memory import Memory
from mmx.models.model import Model
from mmx.models.question_encoder import QUESTION_ENCODER


def look_at_text(
    model: Model,
    memory: Memory,
    prompt: Sequence[int],
    target: Sequence[int],
    question: str | None,
    views: Sequence[SourceView],
    method: MapMethod = "weighted",
    blind: Memory | None = None,
) -> Look:
    """What the words of a text that is there looked at: tokens of a prompt, and those that were `said` after it.

    memory: of one row, as the decoder looked at it; places: those of its segments, see `places_of`; blind: what is left
    without the sources (None: nothing). Raises MmxError for a kind of map that there is not.
    """
    if method not in (known := get_args(MapMethod)):
        raise MmxError(f"by was given {method!r}; expected one of {', '.join(known)}.")
    decoder, start = model.decoder, len(prompt) - 1
    tokens = torch.tensor([[[*prompt, *target]]], device=model.device)[:, :, : start + max(1, len(target))]
    targets = torch.full_like(tokens, -1)
    targets[0, 0, start:] = torch.tensor(list(target), device=model.device) if target else -1
    words = model.tokenizer.words(target)
    here = torch.full_like(tokens, -1)
    for number, (_, pieces) in enumerate(words):
        here[0, 0, [start + piece for piece in pieces]] = number
    recorder, nothing = QueryRecorder(), decoder.empty_memory(1) if blind is None else blind
    with torch.inference_mode():
        seeing = surprisal(decoder, memory, tokens, None, targets, recorder)[0, 0]
        without = surprisal(decoder, nothing, tokens, None, targets)[0, 0]
        attention = all_attention_maps(recorder, memory, 1)
        weighed = value_weighted_attention(decoder, memory, attention)
    steps = [[start + piece for piece in pieces] for _, pieces in words]
    facts = [
        WordInformation(text, -math.log(2) * float(seeing[s].sum()), float((without - seeing)[s].sum()))
        for (text, _), s in zip(words, steps)
    ]
    gained = relevance(decoder, memory, tokens, targets, here)[0, 0].cpu() if method in ("relevance", "both") else None
    return Look(
        text=model.tokenizer.decode(target),
        question=question,
        words=tuple(facts),
        attention=_over_steps(attention[0, 0], steps),
        weighted=_over_steps(weighed[0, 0], steps),
        relevance=gained,
        method=method,
        visible=_over_steps(_in_view(recorder, memory, tokens.shape[-1]), steps) > 0,
        views=tuple(views),
        gates=tuple(gate_values(decoder)),
    )


def _in_view(recorder: QueryRecorder, memory: Memory, length: int) -> Tensor:
    """bool [T, S]: which slots each position could see."""
    mask = recorder.recorded(recorder.layers[0])[0].mask
    whole = memory.mask.new_ones(length, memory.num_slots)
    return whole if mask is None else whole & mask[0, 0]


def _over_steps(given: Tensor, steps: Sequence[Sequence[int]]) -> Tensor:
    """[T, ...] -> [W, ...], the mean over the steps of each word."""
    rows = [given[list(step)].float().mean(0) for step in steps]
    return torch.stack(rows).cpu() if rows else given[:0].float().cpu()


def source_views(
    model: Model, memory: Memory, raw: Mapping[str, Any], displacements: dict[str, tuple[float, float]] | None = None
) -> list[SourceView]:
    """The place of each segment of a memory on its raw input, by source name; without an input, only in the memory.

    displacements: those that are known already; what is measured is put in.
    """
    known = {} if displacements is None else displacements
    again = Counter(segment.source for segment in memory.layout)
    seen: Counter[str] = Counter()
    found = []
    for segment in memory.layout:
        name = segment.source
        seen[name] += 1
        place = SourceView(segment, name if again[name] == 1 else f"{name} {seen[name]}")
        given = raw.get(name) if again[name] == 1 else None  # of several, nobody says which is which
        found.append(place if given is None else _on_its_input(model, place, given, known))
    return found


def _on_its_input(model: Model, place: SourceView, given: Any, known: dict[str, tuple[float, float]]) -> SourceView:
    name = place.segment.source
    if name == QUESTION_ENCODER and model.question_encoder is not None:
        return replace(place, labels=tuple(model.question_encoder.labels(given)))
    encoder = model.encoder(name)
    if not place.segment.grid:
        return replace(place, labels=tuple(encoder.labels(given)))
    if name not in known:
        inputs = encoder.collate([encoder.prepare(given)])
        known[name] = displacement(encoder, {key: tensor.to(model.device) for key, tensor in inputs.items()})
    picture = load_image(given) if encoder.modality == "image" else None
    return replace(place, picture=picture, window=encoder.window(given), displacement=known[name])
