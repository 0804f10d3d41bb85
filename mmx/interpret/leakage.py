"""Leakage: whether a prediction depends on later tokens, slots or inputs, measured by perturbation.

Axes: B memories, C copies, T text positions, S slots, P input regions, V vocabulary. Masks: True = may be attended.

Masks are not inspected. One token, slot or region of the prepared input is replaced, the model runs again, and the
influence on text position t is the largest absolute change of the log-probabilities of the next token, in nats.
Perturbed and unperturbed copies run in batches of the same shape and in the same rows, so that results without a
dependence are bitwise equal: no influence is exactly zero, and no tolerance is needed.

Step i is the i-th generated token, predicted at text position t = i + prompt length - 1 (see `default_alignment`).
`wait_k` counts text positions including the prompt: a decoder with wait_k = k has a lookahead of k + prompt length - 2
slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmx.errors import MmxError
from mmx.interpret.input_regions import InputRegion, input_regions
from mmx.memory import Memory
from mmx.models.decoder import TextDecoder
from mmx.models.model import Model
from mmx.models.source import SourceBatch

LeakagePath = Literal["slots", "inputs"]
PATHS: tuple[LeakagePath, ...] = ("slots", "inputs")
MAX_COPIES = 32  # in one batch, to bound the memory for many slots
SEED = 0  # of the values that replace keys, values and inputs


@dataclass(frozen=True)
class Leakage:
    """Influences in nats, the largest over B.

    Args:
        targets: [T, T], entry [j, t] is the influence of token j on position t.
        padding: the largest influence of a padding token; 0 if padding is masked.
        without_effect: tokens that influence no position, not even their own; the audit says nothing about them.
        slots: [S, T] by source, influence of the keys and values of each slot.
        inputs: [P, T] by source, influence of each region of the prepared inputs.
        alignment: int [T], the slot (or region) that position t corresponds to; negative for none.
        grids: the sources whose slots are grid cells, which have no order.
    """

    targets: Tensor
    padding: float
    without_effect: tuple[int, ...]
    slots: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    alignment: Tensor
    grids: frozenset[str] = frozenset()

    def is_causal(self) -> bool:
        """Whether no token influences an earlier position, and no padding token influences anything, exactly."""
        return not bool(self.targets.tril(-1).any()) and self.padding == 0.0

    def influence(self, path: LeakagePath) -> Mapping[str, Tensor]:
        """`slots` or `inputs`."""
        return self.slots if path == "slots" else self.inputs

    def lookahead(self, source: str, path: LeakagePath = "slots") -> int | None:
        """The largest lookahead over all positions; None if the source has no influence.

        0 or less means that the source is causal. Raises MmxError for a source that was not measured.
        """
        found = [steps for steps in self.lookahead_by_position(source, path) if steps is not None]
        return max(found, default=None)

    def lookahead_by_position(self, source: str, path: LeakagePath = "slots") -> list[int | None]:
        """For each text position the distance from the aligned slot (or region) to the last one that influences it.

        None for positions without influence or with a negative alignment.
        """
        measured = self.influence(path)
        if source not in measured:
            known = sorted(measured)
            raise MmxError(
                f"the {path} of source {source!r} were not measured; expected one of {', '.join(known) or 'none'}.",
                code="leakage.source",
                source=source,
                known=known,
            )
        return lookahead_by_position(measured[source], self.alignment)

    def table(self) -> str:
        """A line of text for the target, and one for each source and path."""
        worst = float(self.targets.tril(-1).max())
        verdict = "causal" if self.is_causal() else "NOT CAUSAL"
        line = f"target: {verdict}, largest influence of a later token {worst:.2g} nats"
        if self.without_effect:
            line += f", tokens without effect: {', '.join(map(str, self.without_effect))}"
        lines = [line]
        for path in PATHS:
            lines += [self._source_line(source, path) for source in self.influence(path)]
        return "\n".join(lines)

    def _source_line(self, source: str, path: LeakagePath) -> str:
        influence = self.influence(path)[source]
        lookahead = self.lookahead(source, path)
        if lookahead is None:
            return f"{source}, {path}: no influence"
        extent = "whole grid" if source in self.grids else f"lookahead {lookahead}"
        largest = float(influence.max()) if influence.numel() else 0.0
        return f"{source}, {path}: {extent}, largest influence {largest:.2g} nats"


def leakage(
    model: Model | TextDecoder,
    inputs: Mapping[str, SourceBatch] | Memory,
    tokens: Tensor,
    mask: Tensor | None = None,
    visibility: Tensor | None = None,
    alignment: Tensor | None = None,
) -> Leakage:
    """Measure the influence of tokens, slots and inputs on each text position.

    Runs the decoder T + S times, and the model P times for each source, in batches of up to MAX_COPIES.
    The lookahead is meaningful for sources whose slots have an order, not for the cells of a grid.

    Args:
        model: a decoder, or a model, both in eval mode.
        inputs: a memory for a decoder; prepared sources for a model, whose inputs are then measured as well.
            Questions for a text source or the question encoder: one a row (`SourceBatch.streams` = 1).
        tokens: int [B, T], one text over each memory, prompt and text.
        mask: bool [B, T], False where a token is padding.
        visibility: bool [T, S], passed to the decoder.
        alignment: int [T], by default `default_alignment(T)`.

    Raises:
        MmxError: the model is in training mode, where dropout changes all outputs; the model does not match the type of
            the inputs; or the memory has several streams.
    """
    if model.training:
        raise MmxError(
            "leakage was given a model in training mode, whose dropout changes all outputs; call eval() first.",
            code="leakage.training_mode",
        )
    exists = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    subject = _resolve_subject(model, inputs, len(tokens))
    memory = subject.memory
    text = _Text(subject.decoder, tokens, exists, visibility)
    with torch.no_grad():
        by_token = _token_influence(text, memory)
        by_slot = _slot_influence(text, memory).amax(0)
        by_input = {}
        for name in subject.sources:
            by_input[name] = _input_influence(text, subject, name).amax(0)
    targets = by_token.where(exists[:, :, None], 0.0).amax(0)
    real = exists.any(0)
    return Leakage(
        targets=targets,
        padding=float(by_token.where(~exists[:, :, None], 0.0).max()),
        without_effect=tuple(j for j in range(len(targets)) if real[j] and not targets[j, j:].any()),
        slots={segment.source: by_slot[segment.start : segment.stop] for segment in memory.layout},
        inputs=by_input,
        alignment=default_alignment(tokens.shape[1]) if alignment is None else alignment,
        grids=frozenset(segment.source for segment in memory.layout if segment.grid),
    )


def default_alignment(length: int, prompt_length: int = 1) -> Tensor:
    """int [T]: slot i corresponds to the token predicted at text position i + prompt_length - 1.

    Earlier positions predict prompt tokens; their alignment is negative.
    """
    return torch.arange(length) - (prompt_length - 1)


def lookahead_by_position(influence: Tensor, alignment: Tensor) -> list[int | None]:
    """influence [S, T], alignment int [T] -> for each position the last slot with influence minus the aligned slot.

    None for positions without influence or with a negative alignment.
    """
    result: list[int | None] = []
    for column, aligned in zip(influence.T, alignment.tolist(), strict=True):
        slots = column.nonzero()[:, 0].tolist()
        result.append(slots[-1] - aligned if slots and aligned >= 0 else None)
    return result


class _Subject(NamedTuple):
    """What is measured: a decoder over a memory, and the model and sources if they can be encoded again."""

    decoder: TextDecoder
    memory: Memory
    model: Model | None
    sources: Mapping[str, SourceBatch]


class _Text(NamedTuple):
    """The decoder and its texts; tokens and mask are [B, T]."""

    decoder: TextDecoder
    tokens: Tensor
    mask: Tensor
    visibility: Tensor | None

    def logprobs(self, memory: Memory, tokens: Tensor) -> Tensor:
        """Log-probabilities [B, C, T, V] of C copies.

        tokens: int [B, C, T], copies as streams, or int [C*B, 1, T], copies as rows, over a memory of as many rows.
        """
        rows = len(self.mask)
        mask = self.mask.repeat(len(tokens) // rows, 1)[:, None].expand_as(tokens)
        logits = self.decoder(tokens, memory, mask, visibility=self.visibility)
        logprobs: Tensor = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if len(tokens) == rows:
            return logprobs
        return logprobs[:, 0].unflatten(0, (-1, rows)).transpose(0, 1)

    def logprobs_over(self, memory: Memory) -> Tensor:
        """Log-probabilities [B, C, T, V] of the unchanged text over a memory of C*B rows."""
        copies = memory.batch_size // len(self.tokens)
        return self.logprobs(memory, self.tokens.repeat(copies, 1)[:, None])

    def influence(self, count: int, run: Callable[[Tensor, bool], Tensor]) -> Tensor:
        """[B, count, T].

        `run(where, True)` gives the log-probabilities [B, C, T, V] of C copies, the c-th perturbed at index where[c];
        `run(where, False)` of unperturbed copies. All batches have the same shape, so one unperturbed run suffices.
        """
        if not count:
            return torch.zeros(len(self.tokens), 0, self.tokens.shape[1], device=self.tokens.device)
        size = min(count, MAX_COPIES)
        unperturbed = run(torch.arange(size), False)
        parts = []
        for start in range(0, count, size):
            first = min(start, count - size)
            perturbed = run(torch.arange(first, first + size), True)
            change = (perturbed - unperturbed).abs().amax(-1)
            parts.append(change[:, start - first :])
        return torch.cat(parts, 1).where(self.mask[:, None], 0.0)  # predictions at padding positions do not count


def _token_influence(text: _Text, memory: Memory) -> Tensor:
    """[B, T, T]: influence of each token on each position. The copies are streams over the same memory."""
    other = _perturbed(text.tokens)
    positions = torch.arange(text.tokens.shape[1])

    def run(where: Tensor, perturb: bool) -> Tensor:
        replaced = (positions == where[:, None]).to(other.device) & perturb
        return text.logprobs(memory, torch.where(replaced, other[:, None], text.tokens[:, None]))

    return text.influence(len(positions), run)


def _slot_influence(text: _Text, memory: Memory) -> Tensor:
    """[B, S, T]: influence of the keys and values of each slot, in all layers at once, on each position."""
    keys = _perturbed(memory.keys)
    values = _perturbed(memory.values)
    slots = torch.arange(memory.num_slots)

    def run(where: Tensor, perturb: bool) -> Tensor:
        rows = torch.arange(memory.batch_size).repeat(len(where))
        replaced = slots == where.repeat_interleave(memory.batch_size)[:, None]
        replaced = (replaced.to(keys.device) & perturb)[None, :, None, :, None]
        copies = memory.select(rows)
        new_keys = torch.where(replaced, keys[:, rows], copies.keys)
        new_values = torch.where(replaced, values[:, rows], copies.values)
        return text.logprobs_over(replace(copies, keys=new_keys, values=new_values))

    return text.influence(memory.num_slots, run)


def _input_influence(text: _Text, subject: _Subject, name: str) -> Tensor:
    """[B, P, T]: influence of each region of one source's inputs on each position; the source is encoded again."""
    assert subject.model is not None
    model = subject.model
    batch = len(text.tokens)
    regions = _regions(model, name, subject.sources[name])
    other = _perturbed(subject.sources[name].inputs[regions[0].tensor]) if regions else torch.empty(0)

    def run(where: Tensor, perturb: bool) -> Tensor:
        copies = {}
        for source, given in subject.sources.items():
            copies[source] = _copy_rows(given, len(where), batch)
        for copy, index in enumerate(where.tolist() if perturb else ()):
            region = regions[index]
            rows = copies[name].inputs[region.tensor].unflatten(0, (len(where), -1))[copy]  # a view: writes go through
            rows[region.slices] = other[region.slices]
        return text.logprobs_over(_encode(model, copies, batch * len(where)))

    return text.influence(len(regions), run)


def _regions(model: Model, name: str, given: SourceBatch) -> list[InputRegion]:
    """The regions of a source's inputs. The question encoder makes one slot of each token."""
    if name not in model.sources:
        return input_regions(given.inputs, next(iter(given.inputs.values())).shape[1], None)
    (segment,) = model.sources[name](given.inputs).layout
    return input_regions(given.inputs, segment.stop, segment.grid)


def _copy_rows(given: SourceBatch, copies: int, batch: int) -> SourceBatch:
    """`copies` times the rows of a source, one batch of rows after the other."""
    inputs = {}
    for name, tensor in given.inputs.items():
        inputs[name] = tensor.repeat(copies, *[1] * (tensor.ndim - 1))
    rows = torch.arange(copies, device=given.rows.device)[:, None] * batch + given.rows
    dropped = None if given.dropped is None else given.dropped.repeat(copies)
    return SourceBatch(inputs, rows.flatten(), dropped, given.streams)


def _perturbed(given: Tensor) -> Tensor:
    """A replacement for every element: the previous token of the vocabulary (1 for token 0), or random numbers with the
    mean and standard deviation of the tensor."""
    if not given.is_floating_point():
        return torch.where(given > 0, given - 1, given + 1)
    if not given.numel():
        return given
    random = torch.randn(given.shape, generator=torch.Generator().manual_seed(SEED)).to(given)
    return given.mean() + random * (given.std(correction=0) + 1e-3)  # a constant tensor must change as well


def _encode(model: Model, sources: Mapping[str, SourceBatch], batch: int) -> Memory:
    """The memory that the decoder attends to, as in Model.forward."""
    questions = sources.get(model.config.question_input)
    others = {name: source for name, source in sources.items() if source is not questions}
    return model.with_questions(model.encode(others, batch), questions)


def _resolve_subject(model: Model | TextDecoder, inputs: Mapping[str, SourceBatch] | Memory, batch: int) -> _Subject:
    """The decoder and its memory, and the sources that can be encoded again. Raises MmxError."""
    if isinstance(model, Model) and not isinstance(inputs, Memory):
        with torch.no_grad():
            subject = _Subject(model.decoder, _encode(model, inputs, batch), model, inputs)
    elif isinstance(model, TextDecoder) and isinstance(inputs, Memory):
        subject = _Subject(model, inputs, None, {})
    else:
        given = f"{type(model).__name__} with {type(inputs).__name__}"
        raise MmxError(
            f"leakage was given {given}; expected a decoder with a Memory, or a model with its sources.",
            code="leakage.arguments",
        )
    stream_mask = subject.memory.stream_mask
    if stream_mask is not None and stream_mask.shape[1] > 1:
        raise MmxError(
            f"the memory has {stream_mask.shape[1]} streams; leakage expects one text over each memory.",
            code="leakage.streams",
            streams=stream_mask.shape[1],
        )
    return subject
