"""Beam search for many prompts at once, over memories that are never copied.

Axes: G prompts (B memories * K streams), n beams, t generated tokens, V vocabulary. Beams are streams of the decoding
step: [B, K*n] over B memories.

Source: Wu et al. 2016, "Google's Neural Machine Translation System", section 7, with the length penalty of
transformers: score = log p / length ** length_penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mmx.config.schema import GenerationConfig
from mmx.generation.beam_banks import BeamBanks
from mmx.generation.decode_step import DecodeStep, PromptBatch, prefill_logits
from mmx.generation.logits_processors import MASKED_SCORE, LogitsProcessor, StoppingCriterion
from mmx.generation.outputs import GenerationOutput
from mmx.generation.word_constraints import constraints_of


@dataclass
class BeamHypotheses:
    """The best finished texts of one prompt, at most `size`. num_unmet: how many included words each does not have."""

    size: int
    texts: list[GenerationOutput] = field(default_factory=list)
    num_unmet: list[int] = field(default_factory=list)
    done: bool = False

    def add(self, text: GenerationOutput, num_unmet: int = 0) -> None:
        """Add a text and drop the worst if there are more than `size`. Texts with fewer unmet words are better."""
        ranked = [*zip(self.num_unmet, self.texts, strict=True), (num_unmet, text)]
        ranked = sorted(ranked, key=lambda entry: (entry[0], -entry[1].score))[: self.size]
        self.num_unmet = [unmet for unmet, _ in ranked]
        self.texts = [kept for _, kept in ranked]

    @property
    def is_full(self) -> bool:
        """Whether there are `size` texts."""
        return len(self.texts) == self.size

    def cannot_improve(self, best_score: float) -> bool:
        """Whether no text with at most this score would be kept."""
        return self.is_full and not self.num_unmet[-1] and self.texts[-1].score >= best_score


def beam_search(
    step: DecodeStep,
    prompts: PromptBatch,
    options: GenerationConfig,
    eos: int,
    logits_processors: Sequence[LogitsProcessor] = (),
    stopping_criteria: Sequence[StoppingCriterion] = (),
) -> list[list[GenerationOutput]]:
    """Return the best texts [G][num_return_sequences]; the arguments are those of `generate`.

    Here `logits_processors` are all that is applied: those of the options are not added.
    """
    search = _BeamSearch(step, options, eos, logits_processors, stopping_criteria)
    logits = search.start(prompts)
    for length in range(1, options.max_new_tokens + 1):
        search.extend(logits, length)
        if all(hypotheses.done for hypotheses in search.hypotheses):
            break
        if length < options.max_new_tokens:
            logits = step(search.generated[:, :, -1].flatten())
    return search.finish()


class _Candidates(NamedTuple):
    """The best extensions of the beams of each prompt, [G, 2n], best first; with included words more, in any order."""

    score: Tensor  # sum of log-probabilities after the logits processors, minus infinity for a candidate to ignore
    beam: Tensor  # index of the beam that is extended
    token: Tensor
    logprob: Tensor  # of the token, before the logits processors
    ends: Tensor  # bool, whether the text ends with this token


class _BeamSearch:
    """The tokens, log-probabilities and scores of every beam, and the finished texts of every prompt."""

    hypotheses: list[BeamHypotheses]
    generated: Tensor  # int [G, n, t]
    logprobs: Tensor  # [G, n, t], before the logits processors
    scores: Tensor  # [G, n], sum of the log-probabilities after the logits processors

    def __init__(
        self,
        step: DecodeStep,
        options: GenerationConfig,
        eos: int,
        logits_processors: Sequence[LogitsProcessor],
        stopping_criteria: Sequence[StoppingCriterion],
    ) -> None:
        self.step = step
        self.options = options
        self.eos = eos
        self.logits_processors = logits_processors
        self.stopping_criteria = stopping_criteria
        self.num_beams = options.num_beams
        constraints = constraints_of(logits_processors)
        self.banks = BeamBanks(constraints) if constraints is not None and constraints.words.groups else None

    def start(self, prompts: PromptBatch) -> Tensor:
        """Process the prompts. Each starts with one beam of score 0; the others have minus infinity."""
        n = self.num_beams
        logits = prefill_logits(self.step, prompts)
        groups = len(logits)
        device = logits.device
        index = torch.arange(groups, device=device).repeat_interleave(n)
        self.step.reorder(index)
        self.hypotheses = [BeamHypotheses(n) for _ in range(groups)]
        self.generated = torch.zeros(groups, n, 0, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(groups, n, 0, device=device)
        self.scores = torch.full((groups, n), MASKED_SCORE, device=device)
        self.scores[:, 0] = 0.0
        return logits[index]

    def extend(self, logits: Tensor, length: int) -> None:
        """Extend every beam by one token. Of 2n candidates, those that end are collected; the n best others stay.

        With included words the candidates are those of the banks too, see `BeamBanks`.
        """
        candidates = self._candidates(logits)
        continuing = candidates.score.masked_fill(candidates.ends, MASKED_SCORE)
        if self.banks is None:
            self._collect(candidates, candidates.ends[:, : self.num_beams], length)
            scores, order = continuing.topk(self.num_beams)
            best_scores = scores[:, 0]
        else:
            progress = self.banks.progress(self.generated, candidates.beam, candidates.token)
            is_best = self.banks.is_best(candidates.score, progress, self.num_beams)
            self._collect(candidates, candidates.ends & is_best, length)
            order = self.banks.select(continuing, progress, self.num_beams)
            order = self.banks.keep_places(order, candidates.beam)
            scores = continuing.gather(1, order)
            best_scores = self.banks.best_score(scores, progress.gather(1, order))
        self._close(best_scores, length)
        self._continue(scores, candidates, order)

    def finish(self) -> list[list[GenerationOutput]]:
        """Return the best texts. Beams that did not end compete with those that did."""
        for group, hypotheses in enumerate(self.hypotheses):
            if not hypotheses.done:
                self._collect_unfinished(group)
        return [hypotheses.texts[: self.options.num_return_sequences] for hypotheses in self.hypotheses]

    def _candidates(self, logits: Tensor) -> _Candidates:
        logprobs = logits.float().log_softmax(-1)
        processed = logprobs
        for processor in self.logits_processors:
            processed = processor(self.generated.flatten(0, 1), processed)
        logprobs = logprobs.unflatten(0, (-1, self.num_beams))
        processed = processed.unflatten(0, (-1, self.num_beams))
        vocab_size = processed.shape[-1]
        scores = (self.scores[:, :, None] + processed).flatten(1)
        best, index = scores.topk(min(2 * self.num_beams, scores.shape[1]))
        if self.banks is not None:
            index = self.banks.add_candidates(index, self.generated, vocab_size)
            best = scores.gather(1, index.clamp(min=0)).masked_fill(index < 0, MASKED_SCORE)
            index = index.clamp(min=0)
        beam = index // vocab_size
        token = index % vocab_size
        ends = (token == self.eos) | self._stopped(logits, beam, token)
        return _Candidates(best, beam, token, logprobs.flatten(1).gather(1, index), ends)

    def _stopped(self, logits: Tensor, beam: Tensor, token: Tensor) -> Tensor:
        """Return which candidates a stopping criterion ends, bool [G, 2n]."""
        stopped = torch.zeros_like(token, dtype=torch.bool)
        rows = torch.arange(len(beam), device=beam.device)[:, None]
        for criterion in self.stopping_criteria:
            generated = torch.cat([self.generated[rows, beam], token[:, :, None]], -1).flatten(0, 1)
            stopped |= criterion(generated, logits[(rows * self.num_beams + beam).flatten()]).view_as(token)
        return stopped

    def _collect(self, candidates: _Candidates, collected: Tensor, length: int) -> None:
        """Add the candidates that end and are among the n best, bool [G, c], to the finished texts of their prompt."""
        for group, rank in collected.nonzero().tolist():
            hypotheses = self.hypotheses[group]
            if not hypotheses.done and candidates.score[group, rank] > MASKED_SCORE:
                output = self._candidate_output(candidates, group, rank, length)
                hypotheses.add(output, self._num_unmet(output.tokens))

    def _candidate_output(self, candidates: _Candidates, group: int, rank: int, length: int) -> GenerationOutput:
        beam = candidates.beam[group, rank]
        token = int(candidates.token[group, rank])
        tokens = self.generated[group, beam].tolist()
        finished = token == self.eos
        if not finished:
            tokens.append(token)
        logprobs = [*self.logprobs[group, beam].tolist(), candidates.logprob[group, rank].item()]
        return self._output(tokens, logprobs, candidates.score[group, rank].item(), length, finished)

    def _continue(self, scores: Tensor, candidates: _Candidates, order: Tensor) -> None:
        """Continue with the candidates of these scores, [G, n]; `order` is their index among the candidates."""
        beam = candidates.beam.gather(1, order)
        token = candidates.token.gather(1, order)
        logprob = candidates.logprob.gather(1, order)
        rows = torch.arange(len(beam), device=beam.device)[:, None]
        self.step.reorder((rows * self.num_beams + beam).flatten())
        self.scores = scores
        self.generated = torch.cat([self.generated[rows, beam], token[:, :, None]], -1)
        self.logprobs = torch.cat([self.logprobs[rows, beam], logprob[:, :, None]], -1)

    def _close(self, best_scores: Tensor, length: int) -> None:
        """Mark the prompts that are done, given the best score [G] of the beams that continue.

        A prompt is done if its hypotheses are full and the best beam, at its present length, cannot enter them; with
        early_stopping, if they are full. It is also done if every continuation is masked: if no text has ended by then,
        the beams end as they are.
        """
        for group, (hypotheses, score) in enumerate(zip(self.hypotheses, best_scores.tolist(), strict=True)):
            all_masked = score == MASKED_SCORE
            if all_masked and not hypotheses.texts:
                self._collect_unfinished(group)
            cannot_improve = hypotheses.cannot_improve(score / length**self.options.length_penalty)
            stops_early = self.options.early_stopping and hypotheses.is_full
            hypotheses.done = hypotheses.done or all_masked or cannot_improve or stops_early

    def _collect_unfinished(self, group: int) -> None:
        """Add the beams of a prompt to its finished texts."""
        for beam, score in enumerate(self.scores[group].tolist()):
            if score > MASKED_SCORE:
                tokens = self.generated[group, beam].tolist()
                logprobs = self.logprobs[group, beam].tolist()
                output = self._output(tokens, logprobs, score, len(tokens), finished=False)
                self.hypotheses[group].add(output, self._num_unmet(output.tokens))

    def _num_unmet(self, tokens: tuple[int, ...]) -> int:
        return 0 if self.banks is None else self.banks.constraints.num_unmet(tokens)

    def _output(
        self, tokens: list[int], logprobs: list[float], score: float, length: int, finished: bool
    ) -> GenerationOutput:
        score = score / max(1, length) ** self.options.length_penalty
        return GenerationOutput(tuple(tokens), tuple(logprobs), score, finished)
