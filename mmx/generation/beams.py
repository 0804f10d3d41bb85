"""Beam search with length normalisation, for many prompts at once, over memories that are never copied.

Alphabet: G prompts (B memories * K streams), n beams, V vocabulary. Beams are streams: [B, K*n] over B memories.
Source: Wu et al. 2016, "Google's Neural Machine Translation System", section 7, with score = log p / length ** penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmx.config import GenerationConfig
from mmx.generation.outcome import Generated
from mmx.generation.rules import Rule
from mmx.generation.step import Step


@dataclass
class _Pool:
    """The best finished texts of one prompt."""

    size: int
    texts: list[Generated] = field(default_factory=list)
    done: bool = False

    def add(self, text: Generated) -> None:
        self.texts = sorted([*self.texts, text], key=lambda t: -t.score)[: self.size]

    def cannot_improve(self, reachable: float) -> bool:
        return len(self.texts) == self.size and self.texts[-1].score >= reachable


def beam_search(
    step: Step, tokens: Tensor, mask: Tensor, options: GenerationConfig, eos: int, rules: Sequence[Rule]
) -> list[list[Generated]]:
    """Return the best texts [G][num_return_sequences] for the prompts tokens [B, K, T]."""
    beams = _Beams(step, options, eos, rules)
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

    def __init__(self, step: Step, options: GenerationConfig, eos: int, rules: Sequence[Rule]) -> None:
        self.step, self.options, self.eos, self.rules = step, options, eos, rules
        self.n = options.num_beams

    def start(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Read the prompts; every prompt starts with one live beam, the others at minus infinity."""
        logits = self.step.prefill(tokens, mask)
        groups, device = len(logits), logits.device
        index = torch.arange(groups, device=device).repeat_interleave(self.n)
        self.step.reorder(index)
        self.pools = [_Pool(self.n) for _ in range(groups)]
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
        ends = token == self.eos
        self._collect(best, origin, logprob, ends, length)
        alive, order = best.masked_fill(ends, float("-inf")).topk(self.n)
        self._continue(alive, *(t.gather(1, order) for t in (origin, token, logprob)))
        self._close(best[:, 0], length)

    def finish(self) -> list[list[Generated]]:
        """Beams that did not end compete with those that did."""
        for group, pool in enumerate(self.pools):
            if not pool.done:
                for beam, total in enumerate(self.totals[group].tolist()):
                    if total > float("-inf"):
                        said, logprobs = self.said[group, beam].tolist(), self.logprobs[group, beam].tolist()
                        pool.add(self._text(said, logprobs, total, len(said), finished=False))
        return [pool.texts[: self.options.num_return_sequences] for pool in self.pools]

    def _scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [G, n, V] before and after the rules."""
        raw = logits.float().log_softmax(-1)
        ruled = raw
        for rule in self.rules:
            ruled = rule(self.said.flatten(0, 1), ruled)
        return raw.unflatten(0, (-1, self.n)), ruled.unflatten(0, (-1, self.n))

    def _collect(self, best: Tensor, origin: Tensor, logprob: Tensor, ends: Tensor, length: int) -> None:
        """Ended candidates among the first n go to their prompt's pool."""
        for group, rank in ends[:, : self.n].nonzero().tolist():
            pool, total = self.pools[group], best[group, rank].item()
            if not pool.done and total > float("-inf"):
                beam = origin[group, rank]
                logprobs = [*self.logprobs[group, beam].tolist(), logprob[group, rank].item()]
                pool.add(self._text(self.said[group, beam].tolist(), logprobs, total, length, finished=True))

    def _continue(self, totals: Tensor, origin: Tensor, token: Tensor, logprob: Tensor) -> None:
        rows = torch.arange(len(origin), device=origin.device)[:, None]
        self.step.reorder((rows * self.n + origin).flatten())
        self.totals = totals
        self.said = torch.cat([self.said[rows, origin], token[:, :, None]], -1)
        self.logprobs = torch.cat([self.logprobs[rows, origin], logprob[:, :, None]], -1)

    def _close(self, best: Tensor, length: int) -> None:
        """A prompt is done when its pool is full and the best candidate, at its present length, cannot enter it."""
        for pool, total in zip(self.pools, best.tolist(), strict=True):
            pool.done = pool.done or pool.cannot_improve(total / length**self.options.length_penalty)

    def _text(self, said: list[int], logprobs: list[float], total: float, length: int, finished: bool) -> Generated:
        score = total / max(1, length) ** self.options.length_penalty
        return Generated(tuple(said), tuple(logprobs), score, finished)
