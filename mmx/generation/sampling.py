"""Greedy decoding and sampling.

Axes: B memories, K prompts of each, n texts of each prompt, N = B*K*n streams, M streams still in the batch,
t generated tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmx.config.schema import GenerationConfig
from mmx.generation.decode_step import DecodeStep, PromptBatch, prefill_logits, streams_of_rows
from mmx.generation.logits_processors import MASKED_SCORE, LogitsProcessor, StoppingCriterion, eos_when_all_masked
from mmx.generation.outputs import GenerationOutput


@dataclass
class Sampler:
    """Greedy or sampled decoding.

    Iterate over it to decode: each iteration yields one token of each of the N streams, then `outputs` returns the
    texts. Memories whose streams have all ended leave the batch once they are at least half of it.

    Attributes:
        step: decoding step.
        prompts: prompts [B, K, T].
        options: generation options.
        eos: end-of-sequence token.
        logits_processors: applied in order before a token is chosen.
        stopping_criteria: a text ends as soon as one of them is true.
        generated: tokens of each of the N streams so far, the end-of-sequence token included.
        logprobs: their log-probabilities before any logits processor.
    """

    step: DecodeStep
    prompts: PromptBatch
    options: GenerationConfig
    eos: int
    logits_processors: Sequence[LogitsProcessor]
    stopping_criteria: Sequence[StoppingCriterion]
    generated: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)

    def __iter__(self) -> Iterator[list[int]]:
        logits = self._prefill()
        count = len(logits)
        self.generated = [[] for _ in range(count)]
        self.logprobs = [[] for _ in range(count)]
        active = _ActiveStreams.start(count, logits.device)
        uniform = self._uniform(count).to(logits.device)
        for position in range(self.options.max_new_tokens):
            tokens, logprobs = self._choose(active.generated, logits, uniform[active.index, position])
            tokens = tokens.masked_fill(active.ended, self.eos)
            self._record(active, tokens, logprobs)
            active.append(tokens, self.eos)
            for criterion in self.stopping_criteria:
                active.ended = active.ended | criterion(active.generated, logits)
            yield self._all_streams(active.index, tokens)
            if bool(active.ended.all()) or position == self.options.max_new_tokens - 1:
                return
            active = self._drop_finished(active)
            logits = self.step(active.generated[:, -1])

    def outputs(self) -> list[list[GenerationOutput]]:
        """Return the n texts of each prompt, best score first."""
        outputs = [
            GenerationOutput.from_tokens(tokens, logprobs, self.eos, self.options.length_penalty)
            for tokens, logprobs in zip(self.generated, self.logprobs, strict=True)
        ]
        n = self.options.num_return_sequences
        by_prompt = [outputs[start : start + n] for start in range(0, len(outputs), n)]
        return [sorted(texts, key=lambda text: -text.score) for texts in by_prompt]

    def _prefill(self) -> Tensor:
        """Process the prompts; return the logits [N, V] of the first token of each stream."""
        logits = prefill_logits(self.step, self.prompts)
        if self.options.num_return_sequences > 1:
            index = torch.arange(len(logits), device=logits.device)
            index = index.repeat_interleave(self.options.num_return_sequences)
            self.step.reorder(index)
            logits = logits[index]
        return logits

    def _uniform(self, count: int) -> Tensor:
        """Return the uniform random numbers of every stream and position, in [0, 1), [N, max_new_tokens].

        They are drawn on the CPU, so that they are the same on any device. Those of one stream do not depend on the
        number of streams after it, or on which streams have left the batch.
        """
        generator = torch.Generator().manual_seed(self.options.seed)
        return torch.rand(count, self.options.max_new_tokens, generator=generator)

    def _choose(self, generated: Tensor, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next token [M] of each stream, and its log-probability [M] before any logits processor."""
        scores = logits.float()
        for processor in self.logits_processors:
            scores = processor(generated, scores)
        tokens = self._sample(generated, scores, uniform) if self.options.do_sample else self._argmax(scores)
        logprobs = logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        return tokens, logprobs

    def _sample(self, generated: Tensor, scores: Tensor, uniform: Tensor) -> Tensor:
        """Return one token [M] of each distribution by inverting its cumulative distribution function.

        A masked token adds nothing to the cumulative sum and cannot be drawn. The sum is in float64, because a GPU may
        add in another order.
        """
        scores = eos_when_all_masked(self.eos)(generated, scores)
        cumulative = scores.softmax(-1).double().cumsum(-1)
        tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
        return tokens.clamp(max=scores.shape[-1] - 1)

    def _argmax(self, scores: Tensor) -> Tensor:
        """Return the best token [M] of each stream; end-of-sequence where every token is masked."""
        best, tokens = scores.max(-1)
        return tokens.masked_fill(best == MASKED_SCORE, self.eos)

    def _record(self, active: _ActiveStreams, tokens: Tensor, logprobs: Tensor) -> None:
        """Append tokens and log-probabilities to the streams that have not ended."""
        rows = zip(active.index.tolist(), active.ended.tolist(), tokens.tolist(), logprobs.tolist(), strict=True)
        for index, ended, token, logprob in rows:
            if not ended:
                self.generated[index].append(token)
                self.logprobs[index].append(logprob)

    def _all_streams(self, index: Tensor, tokens: Tensor) -> list[int]:
        """Return one token for each of the N streams; end-of-sequence for those that have left the batch."""
        row = [self.eos] * len(self.generated)
        for stream_index, token in zip(index.tolist(), tokens.tolist(), strict=True):
            row[stream_index] = token
        return row

    def _drop_finished(self, active: _ActiveStreams) -> _ActiveStreams:
        """Drop the memories whose streams have all ended, if that halves the batch."""
        streams = self.prompts.tokens.shape[1] * self.options.num_return_sequences
        unfinished = ~active.ended.view(-1, streams).all(-1)
        rows = unfinished.nonzero()[:, 0]
        if 2 * len(rows) > len(unfinished):
            return active
        self.step.select(rows)
        return active.select(streams_of_rows(rows, streams))


@dataclass
class _ActiveStreams:
    """The M streams that are still in the batch.

    Attributes:
        index: int [M], index of each among all N streams.
        ended: bool [M], whether its text has ended.
        generated: int [M, t].
    """

    index: Tensor
    ended: Tensor
    generated: Tensor

    @staticmethod
    def start(count: int, device: torch.device) -> _ActiveStreams:
        """Return `count` streams without tokens."""
        return _ActiveStreams(
            torch.arange(count, device=device),
            torch.zeros(count, dtype=torch.bool, device=device),
            torch.zeros(count, 0, dtype=torch.long, device=device),
        )

    def append(self, tokens: Tensor, eos: int) -> None:
        """Append one token to each stream, int [M]."""
        self.generated = torch.cat([self.generated, tokens[:, None]], 1)
        self.ended = self.ended | (tokens == eos)

    def select(self, kept: Tensor) -> _ActiveStreams:
        """Return these streams only."""
        return _ActiveStreams(self.index[kept], self.ended[kept], self.generated[kept])
