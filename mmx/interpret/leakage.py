"""Leakage: does a word depend on what it must not know? Measured by changing one thing and looking at what moves.

Alphabet: B memories, C copies, T text positions, S slots, P places of an input, V vocabulary. Masks: True = may be
attended.

Masks are not asked: a token, a slot, or a place of the prepared input is replaced, everything runs again, and the
influence on text position t is the largest change of the log-probabilities of what follows it, in nats. The copies with
one change each and the copies without stand in batches of the same shape, in the same rows, so what does not depend on
the change is equal to the bit: zero means zero, and no tolerance is needed.

Step i is the i-th word that is generated, chosen at text position t = i + prompt - 1 (see `steps`). `wait_k` counts
text positions, the prompt's included: a decoder with wait_k = k is k + prompt - 2 slots ahead of its step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmx.errors import MmxError
from mmx.memory import Memory
from mmx.models.decoder import TextDecoder
from mmx.models.model import Model
from mmx.models.source import SourceBatch

LeakagePath = Literal["slots", "inputs"]
AT_ONCE = 32  # copies in one batch: a memory of 577 slots is not held 577 times
SEED = 0  # of what is put in place of keys, values and numbers


@dataclass(frozen=True)
class Leakage:
    """What moved what, in nats, the largest over B.

    targets: [T, T], entry [j, t] of token j on what follows position t; padding: the largest influence of a padded
    token, which should have none; blind: tokens that moved nothing, not even what follows them, where the audit
    shows nothing. slots: [S, T] by source, of the keys and values of a slot; inputs: [P, T] by source, of a place of
    what its encoder is given. alignment: int [T], the slot (or place) that position t speaks of; negative: of none.
    grids: the sources whose slots are cells, of which none is ahead of another.
    """

    targets: Tensor
    padding: float
    blind: tuple[int, ...]
    slots: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    alignment: Tensor
    grids: frozenset[str] = frozenset()

    def is_causal(self) -> bool:
        """Whether no token moves, by a single bit, what is said before it, and no padded token moves anything."""
        return not bool(self.targets.tril(-1).any()) and self.padding == 0.0

    def ahead(self, source: str, way: LeakagePath = "slots") -> int | None:
        """How many slots (places) of a source beyond its own a step knows of at most; 0 or less: it is causal. None
        where the source moves nothing. Raises MmxError for a source that was not measured."""
        known = [steps for steps in self.ahead_by_position(source, way) if steps is not None]
        return max(known, default=None)

    def ahead_by_position(self, source: str, way: LeakagePath = "slots") -> list[int | None]:
        """The same for each of T text positions; None where nothing moves it, or the alignment is negative."""
        influence = (self.slots if way == "slots" else self.inputs).get(source)
        if influence is None:
            known = sorted(self.slots if way == "slots" else self.inputs)
            raise MmxError(f"the {way} of {source!r} were not measured; expected one of {', '.join(known) or 'none'}.")
        return furthest(influence, self.alignment)

    def table(self) -> str:
        """A line of text for the target, and one for each source in each way."""
        worst, verdict = float(self.targets.tril(-1).max()), "honest" if self.is_causal() else "LEAKS"
        blind = f", blind at {', '.join(map(str, self.blind))}" if self.blind else ""
        lines = [f"target: {verdict}, later words move earlier ones by {worst:.2g} nats{blind}"]
        for way in ("slots", "inputs"):
            for source, influence in (self.slots if way == "slots" else self.inputs).items():
                ahead, moved = self.ahead(source, way), float(influence.max()) if influence.numel() else 0.0
                far = "everywhere" if source in self.grids else f"up to {ahead} ahead"
                reach = "moves nothing" if ahead is None else f"{far}, {moved:.2g} nats"
                lines.append(f"{source} by {way}: {reach}")
        return "\n".join(lines)


def leakage(
    model: Model | TextDecoder,
    inputs: Mapping[str, SourceBatch] | Memory,
    tokens: Tensor,
    mask: Tensor | None = None,
    visibility: Tensor | None = None,
    alignment: Tensor | None = None,
) -> Leakage:
    """Audit a decoder over a memory, or a model over its sources (which measures `inputs` as well).

    tokens: int [B, T], one text over each memory, prompt and words; mask: bool [B, T], False where a token is padding;
    visibility: bool [T, S], as for the decoder; alignment: int [T] (default: `steps(T)`). Changes are drawn with a seed
    of their own. Runs T + S forwards of the decoder, and P of the model for each source, AT_ONCE in a batch. A question
    for a text source or the reader is one a row (`SourceBatch.streams` 1). How far `ahead` a step is means something
    for sources whose slots follow each other, not for the cells of a grid. Raises MmxError in training mode, where
    dropout looks like leakage, and where listener and seen do not belong together.
    """
    if model.training:
        raise MmxError("leakage was given a model in training mode, whose dropout moves everything; call eval() first.")
    exists = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    decoder, memory, sources = _parts(model, inputs, len(tokens))
    text = _Text(decoder, tokens, exists, visibility)
    with torch.no_grad():
        moved, by_slot = _token_influence(text, memory), _slot_influence(text, memory).amax(0)
        by_input = {name: _input_influence(text, model, sources, name).amax(0) for name in sources}  # type: ignore[arg-type]
    own, real = moved.where(exists[:, :, None], 0.0).amax(0), exists.any(0)
    return Leakage(
        targets=own,
        padding=float(moved.where(~exists[:, :, None], 0.0).max()),
        blind=tuple(j for j in range(len(own)) if real[j] and not own[j, j:].any()),
        slots={part.source: by_slot[part.start : part.stop] for part in memory.layout},
        inputs=by_input,
        alignment=steps(tokens.shape[1]) if alignment is None else alignment,
        grids=frozenset(part.source for part in memory.layout if part.grid),
    )


def steps(length: int, prompt: int = 1) -> Tensor:
    """int [T], an `alignment`: slot i speaks of step i, the word chosen at text position i + prompt - 1. The positions
    before choose no word, and are negative. prompt: how many tokens the prompt has."""
    return torch.arange(length) - (prompt - 1)


def furthest(influence: Tensor, alignment: Tensor) -> list[int | None]:
    """influence: [S, T], alignment: int [T] -> by how much the last slot that moves a position lies beyond its own;
    None where nothing moves it, or its alignment is negative."""
    moving = [column.nonzero()[:, 0].tolist() for column in influence.T]
    return [found[-1] - own if found and own >= 0 else None for found, own in zip(moving, alignment.tolist())]


class InputRegion(NamedTuple):
    """A part of an input that is changed as one: the name of its tensor, and an index into its axes, rows first."""

    tensor: str
    region: tuple[Any, ...]


def input_regions(inputs: Mapping[str, Tensor], slots: int, grid: tuple[int, int] | None) -> list[InputRegion]:
    """What of a source's inputs is changed at a time: of pixels [B, C, height, width] what lies under each cell of the
    grid; else one token or number, or, where there are more of them than slots, equal stretches of them, one a slot.

    A sequence runs along the axis that is as long as the mask is, or along the last. The first tensor that is no mask
    counts. Without one there is no place.
    """
    name, given = next(((n, t) for n, t in inputs.items() if t.dtype != torch.bool and t.ndim > 1), ("", None))
    if given is None:
        return []
    if grid is not None and given.ndim > 3:
        rows, columns = (_stretches(side, count) for side, count in zip(given.shape[-2:], grid))
        return [InputRegion(name, (..., row, column)) for row in rows for column in columns]
    lengths = {t.shape[1] for t in inputs.values() if t.dtype == torch.bool and t.ndim == 2}
    axis = 1 if given.shape[1] in lengths else given.ndim - 1
    before, length = (slice(None),) * axis, given.shape[axis]
    return [InputRegion(name, (*before, part)) for part in _stretches(length, min(length, slots))]


def _stretches(length: int, count: int) -> list[slice]:
    return [slice(length * i // count, length * (i + 1) // count) for i in range(count)]


class _Text(NamedTuple):
    """Who is audited over what: tokens and mask are [B, T]."""

    decoder: TextDecoder
    tokens: Tensor
    mask: Tensor
    visibility: Tensor | None

    def logprobs(self, memory: Memory, tokens: Tensor) -> Tensor:
        """tokens: int [C*B, K, T], copies of the rows or (K = C) of the text beside each other -> [B, C, T, V]."""
        rows = len(self.mask)
        mask = self.mask.repeat(len(tokens) // rows, 1)[:, None].expand_as(tokens)
        logits = self.decoder(tokens, memory, mask, visibility=self.visibility)
        found = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return found if len(tokens) == rows else found[:, 0].unflatten(0, (-1, rows)).transpose(0, 1)

    def over_copies(self, memory: Memory) -> Tensor:
        """[B, C, T, V] of the text as it is over C*B memories."""
        return self.logprobs(memory, self.tokens.repeat(memory.batch_size // len(self.tokens), 1)[:, None])

    def influence(self, count: int, run: Callable[[Tensor, bool], Tensor]) -> Tensor:
        """[B, count, T]. run: the log-probabilities [B, C, T, V] of C copies, of which the c-th is changed at the place
        that int [C] names, or (False) none is. Every batch has the same shape, so that one unchanged one serves all."""
        together, parts = min(count, AT_ONCE), []
        if not count:
            return torch.zeros(len(self.tokens), 0, self.tokens.shape[1], device=self.tokens.device)
        plain = run(torch.arange(together), False)
        for start in range(0, count, together):
            first = min(start, count - together)
            moved = (run(torch.arange(first, first + together), True) - plain).abs().amax(-1)
            parts.append(moved[:, start - first :])
        return torch.cat(parts, 1).where(self.mask[:, None], 0.0)  # what follows padding is nobody's word


def _token_influence(text: _Text, memory: Memory) -> Tensor:
    """[B, T, T]: of each token on each position. The copies are streams over the same memory."""
    other, length = _redrawn(text.tokens), text.tokens.shape[1]

    def run(where: Tensor, change: bool) -> Tensor:
        here = (torch.arange(length) == where[:, None]).to(other.device) & change
        return text.logprobs(memory, torch.where(here, other[:, None], text.tokens[:, None]))

    return text.influence(length, run)


def _slot_influence(text: _Text, memory: Memory) -> Tensor:
    """[B, S, T]: of the keys and values of each slot, in all layers at once, on each position."""
    keys, values = _redrawn(memory.keys), _redrawn(memory.values)

    def run(where: Tensor, change: bool) -> Tensor:
        rows = torch.arange(memory.batch_size).repeat(len(where))
        here = (torch.arange(memory.num_slots) == where.repeat_interleave(memory.batch_size)[:, None]).to(
            keys.device
        ) & change
        here, copies = here[None, :, None, :, None], memory.select(rows)
        swapped = [torch.where(here, t[:, rows], old) for t, old in ((keys, copies.keys), (values, copies.values))]
        return text.over_copies(replace(copies, keys=swapped[0], values=swapped[1]))

    return text.influence(memory.num_slots, run)


def _input_influence(text: _Text, model: Model, sources: Mapping[str, SourceBatch], name: str) -> Tensor:
    """[B, P, T]: of each place of one source's inputs on each position; the source is encoded again."""
    given, batch = sources[name], len(text.tokens)
    found = input_regions(given.inputs, *_slots_and_grid(model, name, given))
    others = {place.tensor: _redrawn(given.inputs[place.tensor]) for place in found[:1]}

    def run(where: Tensor, change: bool) -> Tensor:
        copies = {other: _copied(part, len(where), batch) for other, part in sources.items()}
        for copy, index in enumerate(where.tolist() if change else ()):
            tensor, at = found[index]
            rows = copies[name].inputs[tensor].unflatten(0, (len(where), -1))[copy]  # a view of what will be encoded
            rows[at] = others[tensor][at]
        return text.over_copies(_remembered(model, copies, batch * len(where)))

    return text.influence(len(found), run)


def _slots_and_grid(model: Model, name: str, given: SourceBatch) -> tuple[int, tuple[int, int] | None]:
    """How many slots a source's inputs become, and their grid; the reader makes one of each token."""
    if name not in model.sources:
        return next(iter(given.inputs.values())).shape[1], None
    (segment,) = model.sources[name](given.inputs).layout
    return segment.stop, segment.grid


def _copied(given: SourceBatch, copies: int, batch: int) -> SourceBatch:
    """The rows of a source `copies` times, one batch of rows after the other."""
    inputs = {name: t.repeat(copies, *[1] * (t.ndim - 1)) for name, t in given.inputs.items()}
    rows = torch.arange(copies, device=given.rows.device)[:, None] * batch + given.rows
    withheld = None if given.dropped is None else given.dropped.repeat(copies)
    return SourceBatch(inputs, rows.flatten(), withheld, given.streams)


def _redrawn(given: Tensor) -> Tensor:
    """Something else of the same kind at every place: the token before it in the vocabulary (after the first, the
    second), or numbers drawn as wide as they are scattered."""
    if not given.is_floating_point():
        return torch.where(given > 0, given - 1, given + 1)
    if not given.numel():
        return given
    drawn = torch.randn(given.shape, generator=torch.Generator().manual_seed(SEED)).to(given)
    return given.mean() + drawn * (given.std(correction=0) + 1e-3)  # else a constant would be put in its own place


def _remembered(model: Model, sources: Mapping[str, SourceBatch], batch: int) -> Memory:
    """What the decoder looks at, as in Model.forward."""
    asked = sources.get(model.config.question_input)
    return model.with_questions(model.encode({n: s for n, s in sources.items() if s is not asked}, batch), asked)


def _parts(
    listener: Model | TextDecoder, seen: Mapping[str, SourceBatch] | Memory, batch: int
) -> tuple[TextDecoder, Memory, Mapping[str, SourceBatch]]:
    """The decoder, its memory, and the sources that can be encoded again. Raises MmxError where they do not fit."""
    if isinstance(listener, Model) and not isinstance(seen, Memory):
        with torch.no_grad():
            decoder, memory, sources = listener.decoder, _remembered(listener, seen, batch), seen
    elif isinstance(listener, TextDecoder) and isinstance(seen, Memory):
        decoder, memory, sources = listener, seen, {}
    else:
        given = f"{type(listener).__name__} with {type(seen).__name__}"
        raise MmxError(f"leakage was given {given}; expected a decoder with a Memory, or a model with its sources.")
    if memory.stream_mask is not None and memory.stream_mask.shape[1] > 1:
        raise MmxError(f"the memory has {memory.stream_mask.shape[1]} views; leakage wants one text over each memory.")
    return decoder, memory, sources
