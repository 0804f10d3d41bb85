"""Generate: prompts over one memory each, to texts with their scores. Greedy and sampling here, beams in `beams`.

Alphabet: B memories, K prompts of each, n texts of each prompt, N streams in all, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmx.config.schema import GenerationConfig
from mmx.generation.beam_search import beam_search
from mmx.generation.decode_step import DecodeStep
from mmx.generation.logits_processors import (
    MASKED_SCORE,
    LogitsProcessor,
    StoppingCriterion,
    build_logits_processors,
    eos_when_all_masked,
)
from mmx.generation.outputs import GenerationOutput

__all__ = ["GenerationOutput", "StoppingCriterion", "generate", "stream"]


def generate(
    step: DecodeStep,
    tokens: Tensor,
    mask: Tensor,
    options: GenerationConfig,
    eos: int,
    rules: Sequence[LogitsProcessor] = (),
    stops: Sequence[StoppingCriterion] = (),
) -> list[list[list[GenerationOutput]]]:
    """Continue the prompts tokens [B, K, T] (mask False: padding at the end); return texts as [B][K][n], best first.

    rules: (generated [N, t], logits [N, V]) -> logits, beside those of the options, as transformers' LogitsProcessor.
    stops: (generated [N, t], logits [N, V]) -> bool [N], as transformers' StoppingCriteria.
    """
    rules = [*build_logits_processors(options, eos), *rules]
    if options.num_beams > 1:
        found = beam_search(step, tokens, mask, options, eos, rules, stops)
    else:
        choice = Sampler(step, tokens, mask, options, eos, rules, stops)
        for _ in choice:
            pass
        found = choice.texts()
    streams = tokens.shape[1]
    return [found[row * streams : (row + 1) * streams] for row in range(tokens.shape[0])]


def stream(
    step: DecodeStep,
    tokens: Tensor,
    mask: Tensor,
    options: GenerationConfig,
    eos: int,
    rules: Sequence[LogitsProcessor] = (),
    stops: Sequence[StoppingCriterion] = (),
) -> Iterator[list[int]]:
    """As `generate` without beams, but yields the tokens of all N streams as they come; eos once one has ended."""
    yield from Sampler(step, tokens, mask, options, eos, [*build_logits_processors(options, eos), *rules], stops)


@dataclass
class Sampler:
    """Greedy or sampled decoding. Memories whose streams have all ended leave the batch once half of it has."""

    step: DecodeStep
    tokens: Tensor
    mask: Tensor
    options: GenerationConfig
    eos: int
    rules: Sequence[LogitsProcessor]
    stops: Sequence[StoppingCriterion]
    said: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)

    def __iter__(self) -> Iterator[list[int]]:
        logits = self._prefill()
        count = len(logits)
        self.said, self.logprobs = [[] for _ in range(count)], [[] for _ in range(count)]
        streams = torch.arange(count, device=logits.device)
        ended = torch.zeros(count, dtype=torch.bool, device=logits.device)
        history = torch.zeros(count, 0, dtype=torch.long, device=logits.device)
        chances = self._chances(count).to(logits.device)
        for place in range(self.options.max_new_tokens):
            chosen, logprobs = self._choose(history, logits, chances[streams, place])
            chosen = chosen.masked_fill(ended, self.eos)
            self._note(streams, ended, chosen, logprobs)
            history = torch.cat([history, chosen[:, None]], 1)
            ended = ended | (chosen == self.eos)
            for stop in self.stops:
                ended = ended | stop(history, logits)
            yield self._present(count, streams, chosen)
            if bool(ended.all()) or place == self.options.max_new_tokens - 1:
                return
            streams, ended, history = self._dismiss(streams, ended, history)
            logits = self.step(history[:, -1])

    def texts(self) -> list[list[GenerationOutput]]:
        """What was said, n texts a prompt, likeliest first."""
        made = [
            GenerationOutput.of(tokens, logprobs, self.eos, self.options.length_penalty)
            for tokens, logprobs in zip(self.said, self.logprobs, strict=True)
        ]
        n = self.options.num_return_sequences
        groups = [made[i : i + n] for i in range(0, len(made), n)]
        return [sorted(group, key=lambda text: -text.score) for group in groups]

    def _prefill(self) -> Tensor:
        logits = self.step.prefill(self.tokens, self.mask)
        if self.options.num_return_sequences > 1:
            index = torch.arange(len(logits), device=logits.device)
            index = index.repeat_interleave(self.options.num_return_sequences)
            self.step.reorder(index)
            logits = logits[index]
        return logits

    def _chances(self, count: int) -> Tensor:
        """Every stream's draws, uniform in [0, 1), [count, max_new_tokens]: the same on any device, and those of one
        stream the same however many follow it and whoever has left."""
        generator = torch.Generator().manual_seed(self.options.seed)
        return torch.rand(count, self.options.max_new_tokens, generator=generator)

    def _choose(self, history: Tensor, logits: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each stream, and its log-probability under the model before any rule."""
        scores = logits.float()
        for rule in self.rules:
            scores = rule(history, scores)
        if self.options.do_sample:
            scores = eos_when_all_masked(self.eos)(history, scores)
            # The first token whose share reaches beyond the draw; one that is refused reaches no further than the one
            # before it (in float64 also where a GPU adds up in another order).
            reached = scores.softmax(-1).double().cumsum(-1)
            chosen = torch.searchsorted(reached, chances[:, None] * reached[:, -1:], right=True)[:, 0]
            chosen = chosen.clamp(max=scores.shape[-1] - 1)
        else:
            best, chosen = scores.max(-1)
            chosen = chosen.masked_fill(best == MASKED_SCORE, self.eos)  # a text that may not go on is over
        return chosen, logits.float().log_softmax(-1).gather(-1, chosen[:, None])[:, 0]

    def _note(self, streams: Tensor, ended: Tensor, chosen: Tensor, logprobs: Tensor) -> None:
        facts = zip(streams.tolist(), ended.tolist(), chosen.tolist(), logprobs.tolist(), strict=True)
        for stream_, over, token, logprob in facts:
            if not over:
                self.said[stream_].append(token)
                self.logprobs[stream_].append(logprob)

    def _present(self, count: int, streams: Tensor, chosen: Tensor) -> list[int]:
        row = [self.eos] * count
        for stream_, token in zip(streams.tolist(), chosen.tolist(), strict=True):
            row[stream_] = token
        return row

    def _dismiss(self, streams: Tensor, ended: Tensor, history: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Let go of memories that have nothing left to say, when that halves the work."""
        each = self.tokens.shape[1] * self.options.num_return_sequences
        active = ~ended.view(-1, each).all(-1)
        rows = active.nonzero()[:, 0]
        if 2 * len(rows) > len(active):
            return streams, ended, history
        self.step.select(rows)
        kept = (rows[:, None] * each + torch.arange(each, device=rows.device)).flatten()
        return streams[kept], ended[kept], history[kept]
