"""Does the answer suffer when what a map points at is hidden? A map that is true costs more than as many random slots.

Alphabet: n cases, R rows and C columns of the picture's grid. Masks: True = may be attended.

Source: Samek et al. 2017, "Evaluating the Visualization of What a Deep Neural Network Has Learned", section III-B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from mmx.data.scenes import Scene
from mmx.errors import MmxError
from mmx.evaluation.pointing_game import NAMES, PointingMethod, share_text, standard_methods
from mmx.evaluation.scene_maps import PointingCase, batches, case_tensors, compute_scene_maps, memory_with_questions
from mmx.inference.pipeline import Pipeline
from mmx.memory import Memory


@dataclass(frozen=True)
class DeletionResult:
    """What hiding did in n cases. bits: the mean loss of log2 p(answer); changed: the share of answers that changed."""

    method: str
    n: int
    bits: float
    changed: float


@dataclass(frozen=True)
class DeletionReport:
    """rows: hiding the slots that each way points at; by_chance: as many at random, over all draws; slots: how many."""

    rows: tuple[DeletionResult, ...]
    by_chance: DeletionResult
    slots: int

    def ratio(self, way: str) -> float:
        """How many times the bits that hiding as many slots at random costs."""
        return next(row.bits for row in self.rows if row.method == way) / self.by_chance.bits

    def table(self) -> str:
        """Text: for each way bits, times chance, and changed answers with their 95 % interval."""
        lines = [f"{f'{self.slots} slots hidden':<32}{'n':>5}  {'bits lost':>9}  {'times chance':>12}  changed"]
        for row in (*self.rows, self.by_chance):
            times = row.bits / self.by_chance.bits if self.by_chance.bits else float("nan")
            lines.append(
                f"{row.method:<32}{row.n:>5}  {row.bits:9.3f}  {times:12.2f}  {share_text(row.changed, row.n)}"
            )
        return "\n".join(lines)


def deletion_test(
    pipeline: Pipeline,
    scenes: Sequence[Scene],
    methods: Sequence[PointingMethod] = (),
    slots: int = 4,
    draws: int = 4,
    seed: int = 0,
) -> DeletionReport:
    """Hide the `slots` cells that a map points at, and as many at random (`draws` times, by `seed`), and ask again.

    ways: those of a pointing report that are worth it, beside the maps of all layers and heads. Questions alone:
    an answer is short, and all of it about one thing. Deterministic. Raises MmxError where there is no such question.
    """
    seen = compute_scene_maps(pipeline, scenes)
    asked = torch.tensor([case.question is not None for case in seen.cases])
    plain = [way for way in standard_methods(seen) if way.name in NAMES.values()]
    maps = [way.maps(seen).flatten(1)[asked] for way in (*plain, *methods)]
    dice = torch.Generator().manual_seed(seed)
    maps += [torch.rand(maps[0].shape, generator=dice) for _ in range(draws)]
    cases = [case for case in seen.cases if case.question is not None]
    if not cases or slots > maps[0].shape[1]:
        raise MmxError(f"{slots} slots of {len(cases)} questions cannot be hidden; give more scenes, or fewer slots.")
    bits, changed = _suffered(pipeline, scenes, cases, [_highest(each, slots) for each in maps])
    names = [way.name for way in (*plain, *methods)]
    rows = [DeletionResult(name, len(cases), *told) for name, *told in zip(names, bits, changed)]
    chance = (sum(values[len(names) :]) / draws for values in (bits, changed))
    return DeletionReport(tuple(rows), DeletionResult("at random", len(cases), *chance), slots)


def _suffered(
    pipeline: Pipeline, scenes: Sequence[Scene], cases: Sequence[PointingCase], hidden: Sequence[Tensor]
) -> tuple[list[float], list[float]]:
    """For each choice of cells, bool [n, R*C]: mean bits lost, and share of answers changed."""
    bits, changed = torch.zeros(2, len(hidden), dtype=torch.float64)
    done = 0
    for memory, segment, part in batches(pipeline, scenes, cases):
        whole, said = _answered(pipeline, memory, part)
        for number, cells in enumerate(hidden):
            gone = memory.mask.new_zeros(memory.mask.shape)
            gone[:, segment.stop - cells.shape[1] : segment.stop] = cells[done : done + len(part)].to(gone.device)
            left, now = _answered(pipeline, memory.mask_out(gone), part)
            bits[number] += (whole - left).sum() / log(2)
            changed[number] += sum(before != after for before, after in zip(said, now, strict=True))
        done += len(part)
    return (bits / done).tolist(), (changed / done).tolist()


def _answered(pipeline: Pipeline, memory: Memory, cases: Sequence[PointingCase]) -> tuple[Tensor, list[str]]:
    """log p(the true answer) [n] in nats, and what is answered greedily."""
    tokens, mask, targets = case_tensors(pipeline, cases)
    with torch.inference_mode():
        read = memory_with_questions(pipeline, memory, cases)
        logits = pipeline.model.decoder(tokens, read, mask).float().log_softmax(-1)
        logprobs = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    options = pipeline.generation_config(
        {"num_beams": 1, "num_return_sequences": 1, "do_sample": False, "max_new_tokens": 8}
    )
    said = pipeline.generate(memory, [[case.question] for case in cases], options)
    return torch.where(targets >= 0, logprobs, 0.0).sum((1, 2)).double().cpu(), [row[0][0].text for row in said]


def _highest(maps: Tensor, count: int) -> Tensor:
    """bool [n, R*C]: the `count` highest cells of each map."""
    return torch.zeros_like(maps, dtype=torch.bool).scatter(1, maps.topk(count).indices, True)
