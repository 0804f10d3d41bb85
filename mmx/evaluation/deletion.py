"""The deletion test: how much the answer changes when the slots with the largest values of a map are masked.

Axes: n cases, R rows and C columns of the image's grid. Masks: True = may be attended.

Sources: Petsiuk et al. 2018, "RISE: Randomized Input Sampling for Explanation of Black-box Models", section 4.3; Samek
et al. 2017, "Evaluating the Visualization of What a Deep Neural Network Has Learned", section III-B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, nan
from typing import NamedTuple

import torch
from torch import Tensor

from mmx.data.scenes import Scene
from mmx.errors import MmxError
from mmx.evaluation.confidence import format_proportion
from mmx.evaluation.pointing_methods import PointingMethod, all_head_methods
from mmx.evaluation.scene_maps import PointingCase, case_batches, case_texts, compute_scene_maps, memory_with_questions
from mmx.inference.pipeline import Pipeline
from mmx.memory import Memory

MAX_ANSWER_TOKENS = 8


@dataclass(frozen=True)
class DeletionOptions:
    """slots: number of slots that are masked; draws: number of random maps for chance; seed: of the random maps."""

    slots: int = 4
    draws: int = 4
    seed: int = 0


@dataclass(frozen=True)
class DeletionResult:
    """The effect of masking in n cases.

    Args:
        method: that chose the slots.
        n: number of cases.
        bits: mean decrease of log2 p(true answer).
        changed: fraction of generated answers that changed.
    """

    method: str
    n: int
    bits: float
    changed: float


@dataclass(frozen=True)
class DeletionReport:
    """Results of all methods.

    Args:
        rows: one for each method.
        chance: the same for random slots, averaged over the draws.
        slots: number of masked slots.
    """

    rows: tuple[DeletionResult, ...]
    chance: DeletionResult
    slots: int

    def ratio(self, method: str) -> float:
        """The bits lost with a method divided by those lost with random slots."""
        for row in self.rows:
            if row.method == method:
                return row.bits / self.chance.bits if self.chance.bits else nan
        known = [row.method for row in self.rows]
        raise MmxError(
            f"there is no result for {method!r}; known: {', '.join(known)}.", code="deletion.row", method=method
        )

    def table(self) -> str:
        """Lines of text: bits lost, their ratio to chance, and changed answers with a 95 % confidence interval."""
        lines = [f"{f'{self.slots} slots masked':<32}{'n':>5}  {'bits lost':>9}  {'times chance':>12}  changed"]
        for row in (*self.rows, self.chance):
            ratio = row.bits / self.chance.bits if self.chance.bits else nan
            changed = format_proportion(row.changed, row.n)
            lines.append(f"{row.method:<32}{row.n:>5}  {row.bits:9.3f}  {ratio:12.2f}  {changed}")
        return "\n".join(lines)


def deletion_test(
    pipeline: Pipeline,
    scenes: Sequence[Scene],
    methods: Sequence[PointingMethod] = (),
    options: DeletionOptions | None = None,
) -> DeletionReport:
    """Mask the slots with the largest values of each map, or random slots, and answer again. Deterministic.

    Only questions are used: every word of a short answer is about the same object.

    Args:
        pipeline: a model whose image source has a grid.
        scenes: synthetic scenes.
        methods: in addition to the maps of all layers and heads.
        options: see DeletionOptions.

    Raises:
        MmxError: the scenes have no question about one object, or the grid has fewer slots than should be masked.
    """
    options = options or DeletionOptions()
    scene_maps = compute_scene_maps(pipeline, scenes)
    cases = [case for case in scene_maps.cases if case.question is not None]
    is_question = torch.tensor([case.question is not None for case in scene_maps.cases])
    every_method = (*all_head_methods(scene_maps), *methods)
    maps = [method.maps(scene_maps).flatten(1)[is_question] for method in every_method]
    if not cases or options.slots > maps[0].shape[1]:
        raise MmxError(
            f"{options.slots} slots of {len(cases)} questions cannot be masked; give more scenes, or fewer slots.",
            code="deletion.slots",
            slots=options.slots,
            questions=len(cases),
        )
    generator = torch.Generator().manual_seed(options.seed)
    maps += [torch.rand(maps[0].shape, generator=generator) for _ in range(options.draws)]
    effects = _mask_and_answer(pipeline, scenes, cases, [_largest(each, options.slots) for each in maps])
    rows = []
    for method, effect in zip(every_method, effects, strict=False):  # the rest is random
        rows.append(DeletionResult(method.name, len(cases), effect.bits, effect.changed))
    random_effects = effects[len(every_method) :]
    bits = sum(effect.bits for effect in random_effects) / options.draws
    changed = sum(effect.changed for effect in random_effects) / options.draws
    return DeletionReport(tuple(rows), DeletionResult("random", len(cases), bits, changed), options.slots)


class _Effect(NamedTuple):
    """Mean bits lost, and fraction of answers changed."""

    bits: float
    changed: float


class _Answers(NamedTuple):
    """log p(true answer) in nats, [n], and the answers generated greedily."""

    logprobs: Tensor
    texts: list[str]


def _mask_and_answer(
    pipeline: Pipeline, scenes: Sequence[Scene], cases: Sequence[PointingCase], masked: Sequence[Tensor]
) -> list[_Effect]:
    """The effect of each choice of cells, bool [n, R*C]."""
    bits = torch.zeros(len(masked), dtype=torch.float64)
    changed = torch.zeros(len(masked), dtype=torch.float64)
    done = 0
    for batch in case_batches(pipeline, scenes, cases):
        memory = batch.memory
        before = _answer(pipeline, memory, batch.cases)
        for number, cells in enumerate(masked):
            hidden = memory.mask.new_zeros(memory.mask.shape)
            columns = slice(batch.segment.stop - cells.shape[1], batch.segment.stop)
            hidden[:, columns] = cells[done : done + len(batch.cases)].to(hidden.device)
            after = _answer(pipeline, memory.mask_out(hidden), batch.cases)
            bits[number] += (before.logprobs - after.logprobs).sum() / log(2)
            changed[number] += sum(old != new for old, new in zip(before.texts, after.texts, strict=True))
        done += len(batch.cases)
    return [_Effect(float(b) / done, float(c) / done) for b, c in zip(bits, changed, strict=True)]


def _answer(pipeline: Pipeline, memory: Memory, cases: Sequence[PointingCase]) -> _Answers:
    text = case_texts(pipeline, cases)
    with torch.inference_mode():
        focused = memory_with_questions(pipeline, memory, cases)
        logits = pipeline.model.decoder(text.tokens, focused, text.mask).float().log_softmax(-1)
        logprobs = logits.gather(-1, text.targets.clamp(min=0)[..., None])[..., 0]
    greedy = pipeline.generation_config(
        {"num_beams": 1, "num_return_sequences": 1, "do_sample": False, "max_new_tokens": MAX_ANSWER_TOKENS}
    )
    generated = pipeline.generate_batch(memory, [[case.question] for case in cases], greedy)
    by_case = torch.where(text.targets >= 0, logprobs, 0.0).sum((1, 2)).double().cpu()
    return _Answers(by_case, [row[0][0].text for row in generated])


def _largest(maps: Tensor, count: int) -> Tensor:
    """bool [n, R*C]: the `count` largest cells of each map."""
    return torch.zeros_like(maps, dtype=torch.bool).scatter(1, maps.topk(count).indices, True)
