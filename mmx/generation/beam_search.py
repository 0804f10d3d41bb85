"""Beam search with length normalisation, for many prompts at once, over memories that are never copied.

Alphabet: G prompts (B memories * K streams), n beams, V vocabulary. Beams are streams: [B, K*n] over B memories.
Source: Wu et al. 2016, "Google's Neural Machine Translation System", section 7, with score = log p / length ** penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmx.config.schema import GenerationConfig
from mmx.generation.decode_step import DecodeStep
from mmx.generation.logits_processors import LogitsProcessor, StoppingCriterion
from mmx.generation.outputs import GenerationOutput


@dataclass
class BeamHypotheses:
    """The best finished texts of one prompt."""

    size: int
    texts: list[GenerationOutput] = field(default_factory=list)
    done: bool = False

    def add(self, text: GenerationOutput) -> None:
        self.texts = sorted([*self.texts, text], key=lambda t: -t.score)[: self.size]

    @property
    def full(self) -> bool:
        return len(self.texts) == self.size

    def cannot_improve(self, reachable: float) -> bool:
        return self.full and self.texts[-1].score >= reachable


def beam_search(
    step: DecodeStep,
    tokens: Tensor,
    mask: Tensor,
    options: GenerationConfig,
    eos: int,
    rules: Sequence[LogitsProcessor] = (),
    stops: Sequence[StoppingCriterion] = (),
) -> list[list[GenerationOutput]]:
    """Return the best texts [G][num_return_sequences] for the prompts tokens [B, K, T]."""
    beams = _Beams(step, options, eos, rules, stops)
    logits = beams.start(tokens, mask)
    for length in range(1, options.max_new_tokens + 1):
        beams.extend(logits, length)
        if all(pool.done for pool in beams.pools):
            break
        if length < options.max_new_tokens:
            logits = step(beams.said[:, :, -1].flatten())
    return beams.finish()


class _Beams:
    """What every beam has said, its log-probabilities, and the pools of finished texts."""

    def __init__(
        self,
        step: DecodeStep,
        options: GenerationConfig,
        eos: int,
        rules: Sequence[LogitsProcessor],
        stops: Sequence[StoppingCriterion],
    ) -> None:
        self.step, self.options, self.eos, self.rules, self.stops = step, options, eos, rules, stops
        self.n = options.num_beams

    def start(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Read the prompts; every prompt starts with one live beam, the others at minus infinity."""
        logits = self.step.prefill(tokens, mask)
        groups, device = len(logits), logits.device
        index = torch.arange(groups, device=device).repeat_interleave(self.n)
        self.step.reorder(index)
        self.pools = [BeamHypotheses(self.n) for _ in range(groups)]
        self.said = torch.zeros(groups, self.n, 0, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(groups, self.n, 0, device=device)
        self.totals = torch.full((groups, self.n), float("-inf"), device=device)
        self.totals[:, 0] = 0.0
        return logits[index]

    def extend(self, logits: Tensor, length: int) -> None:
        """One more token for every beam: 2n candidates a prompt, those that end go to the pool, n others live on."""
        raw, ruled = self._scores(logits)
        vocabulary = ruled.shape[-1]
        candidates = (self.totals[:, :, None] + ruled).flatten(1)
        best, place = candidates.topk(min(2 * self.n, candidates.shape[1]))
        origin, token = place // vocabulary, place % vocabulary
        logprob = raw.flatten(1).gather(1, place)
        ends = (token == self.eos) | self._stopped(logits, origin, token)
        self._collect(best, origin, token, logprob, ends, length)
        alive, order = best.masked_fill(ends, float("-inf")).topk(self.n)
        self._close(alive[:, 0], length)
        self._continue(alive, *(t.gather(1, order) for t in (origin, token, logprob)))

    def finish(self) -> list[list[GenerationOutput]]:
        """Beams that did not end compete with those that did."""
        for group, pool in enumerate(self.pools):
            if not pool.done:
                self._release(group)
        return [pool.texts[: self.options.num_return_sequences] for pool in self.pools]

    def _scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [G, n, V] before and after the rules."""
        raw = logits.float().log_softmax(-1)
        ruled = raw
        for rule in self.rules:
            ruled = rule(self.said.flatten(0, 1), ruled)
        return raw.unflatten(0, (-1, self.n)), ruled.unflatten(0, (-1, self.n))

    def _stopped(self, logits: Tensor, origin: Tensor, token: Tensor) -> Tensor:
        """bool [G, 2n]: which candidates a stop ends."""
        stopped = torch.zeros_like(token, dtype=torch.bool)
        rows = torch.arange(len(origin), device=origin.device)[:, None]
        for stop in self.stops:
            heard = torch.cat([self.said[rows, origin], token[:, :, None]], -1).flatten(0, 1)
            stopped |= stop(heard, logits[(rows * self.n + origin).flatten()]).view_as(token)
        return stopped

    def _collect(self, best: Tensor, origin: Tensor, token: Tensor, logprob: Tensor, ends: Tensor, length: int) -> None:
        """Ended candidates among the first n go to their prompt's pool."""
        for group, rank in ends[:, : self.n].nonzero().tolist():
            pool, total = self.pools[group], best[group, rank].item()
            if not pool.done and total > float("-inf"):
                beam = origin[group, rank]
                said, last = self.said[group, beam].tolist(), int(token[group, rank])
                logprobs = [*self.logprobs[group, beam].tolist(), logprob[group, rank].item()]
                finished = last == self.eos
                pool.add(self._text(said if finished else [*said, last], logprobs, total, length, finished))

    def _continue(self, totals: Tensor, origin: Tensor, token: Tensor, logprob: Tensor) -> None:
        rows = torch.arange(len(origin), device=origin.device)[:, None]
        self.step.reorder((rows * self.n + origin).flatten())
        self.totals = totals
        self.said = torch.cat([self.said[rows, origin], token[:, :, None]], -1)
        self.logprobs = torch.cat([self.logprobs[rows, origin], logprob[:, :, None]], -1)

    def _close(self, alive: Tensor, length: int) -> None:
        """A prompt is done when its pool is full and its best live beam, at its present length, cannot enter it (with
        early_stopping, when it is full); or when the rules refuse every way on: where nothing has ended by then, the
        beams end as they stand."""
        for group, (pool, total) in enumerate(zip(self.pools, alive.tolist(), strict=True)):
            if total == float("-inf") and not pool.texts:
                self._release(group)
            over = total == float("-inf") or pool.cannot_improve(total / length**self.options.length_penalty)
            pool.done = pool.done or over or (self.options.early_stopping and pool.full)

    def _release(self, group: int) -> None:
        """The live beams of a prompt go to its pool."""
        for beam, total in enumerate(self.totals[group].tolist()):
            if total > float("-inf"):
                said, logprobs = self.said[group, beam].tolist(), self.logprobs[group, beam].tolist()
                self.pools[group].add(self._text(said, logprobs, total, len(said), finished=False))

    def _text(
        self, said: list[int], logprobs: list[float], total: float, length: int, finished: bool
    ) -> GenerationOutput:
        score = total / max(1, length) ** self.options.length_penalty
        return GenerationOutput(tuple(said), tuple(logprobs), score, finished)
