"""Logits processors and stopping criteria, with the call signature and names of transformers.

Axes: N streams, t generated tokens, V vocabulary.

Only generated tokens are passed, not the prompt: an answer may repeat words of its question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmx.config.schema import GenerationConfig

# (generated [N, t], logits [N, V]) -> logits [N, V]
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
# (generated [N, t], logits [N, V]) -> bool [N], True where the text ends
StoppingCriterion = Callable[[Tensor, Tensor], Tensor]
MASKED_SCORE = float("-inf")


def build_logits_processors(
    options: GenerationConfig, eos: int, others: Sequence[LogitsProcessor] = ()
) -> list[LogitsProcessor]:
    """Return the logits processors that the options enable, in the order in which they are applied.

    others: applied before those of sampling, as in transformers: top_k and top_p choose among what these leave.
    """
    processors: list[LogitsProcessor] = []
    if options.suppress_tokens:
        processors.append(suppress_tokens(options.suppress_tokens))
    if options.begin_suppress_tokens:
        processors.append(begin_suppress_tokens(options.begin_suppress_tokens))
    if options.min_new_tokens:
        processors.append(min_new_tokens(options.min_new_tokens, eos))
    if options.repetition_penalty != 1.0:
        processors.append(repetition_penalty(options.repetition_penalty))
    if options.no_repeat_ngram_size:
        processors.append(no_repeat_ngram_size(options.no_repeat_ngram_size))
    processors += others
    if options.do_sample:
        processors.append(temperature(options.temperature))
        processors.append(top_k(options.top_k))
        processors.append(top_p(options.top_p))
    if options.forced_eos_token_id is not None:
        processors.append(forced_eos(options.max_new_tokens, options.forced_eos_token_id))
    if options.renormalize_logits:
        processors.append(renormalize)
    return processors


def suppress_tokens(tokens: Sequence[int]) -> LogitsProcessor:
    """Mask these tokens."""
    index = torch.tensor(list(tokens))
    return lambda generated, logits: logits.index_fill(-1, index.to(logits.device), MASKED_SCORE)


def begin_suppress_tokens(tokens: Sequence[int]) -> LogitsProcessor:
    """Mask these tokens at the first position."""
    suppress = suppress_tokens(tokens)
    return lambda generated, logits: logits if generated.shape[1] else suppress(generated, logits)


def min_new_tokens(length: int, eos: int) -> LogitsProcessor:
    """Mask the end-of-sequence token until `length` tokens are generated."""
    suppress = suppress_tokens([eos])
    return lambda generated, logits: suppress(generated, logits) if generated.shape[1] < length else logits


def forced_eos(length: int, token: int) -> LogitsProcessor:
    """Force `token` as the last of `length` tokens."""

    def process(generated: Tensor, logits: Tensor) -> Tensor:
        if generated.shape[1] != length - 1:
            return logits
        masked = torch.full_like(logits, MASKED_SCORE)
        return masked.index_fill(-1, torch.tensor(token, device=logits.device), 0.0)

    return process


def eos_when_all_masked(eos: int) -> LogitsProcessor:
    """Allow the end-of-sequence token in rows where every token is masked."""

    def process(generated: Tensor, logits: Tensor) -> Tensor:
        all_masked = (logits == MASKED_SCORE).all(-1, keepdim=True)
        is_eos = torch.arange(logits.shape[-1], device=logits.device) == eos
        return logits.masked_fill(all_masked & is_eos, 0.0)

    return process


def renormalize(generated: Tensor, logits: Tensor) -> Tensor:
    """Renormalize after masking, so that the scores of beams with many masked tokens stay comparable."""
    all_masked = (logits == MASKED_SCORE).all(-1, keepdim=True)
    return torch.where(all_masked, logits, logits.log_softmax(-1))


def repetition_penalty(penalty: float) -> LogitsProcessor:
    """Divide positive logits of generated tokens by `penalty`, multiply negative ones (Keskar et al. 2019, 4.1)."""

    def process(generated: Tensor, logits: Tensor) -> Tensor:
        scores = logits.gather(-1, generated)
        penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
        return logits.scatter(-1, generated, penalized)

    return process


def no_repeat_ngram_size(size: int) -> LogitsProcessor:
    """Mask tokens that would repeat an n-gram of `size` tokens (Paulus et al. 2017, section 2.5)."""

    def process(generated: Tensor, logits: Tensor) -> Tensor:
        if generated.shape[1] < size:
            return logits
        ngrams = generated.unfold(1, size, 1)
        last = generated[:, generated.shape[1] - size + 1 :]
        repeats = (ngrams[..., :-1] == last[:, None]).all(-1)
        rows, index = repeats.nonzero(as_tuple=True)
        masked = torch.zeros_like(logits, dtype=torch.bool)
        masked[rows, ngrams[rows, index, -1]] = True
        return logits.masked_fill(masked, MASKED_SCORE)

    return process


def temperature(value: float) -> LogitsProcessor:
    """Divide the logits by the temperature."""
    return lambda generated, logits: logits / value


def top_k(k: int) -> LogitsProcessor:
    """Keep the `k` most probable tokens (Fan et al. 2018, section 5.4); 0 keeps all."""

    def process(generated: Tensor, logits: Tensor) -> Tensor:
        if not 0 < k < logits.shape[-1]:
            return logits
        return logits.masked_fill(logits < logits.topk(k).values[:, -1:], MASKED_SCORE)

    return process


def top_p(p: float) -> LogitsProcessor:
    """Keep the most probable tokens whose probabilities reach `p` (Holtzman et al. 2020, section 3.1); 1 keeps all."""

    def process(generated: Tensor, logits: Tensor) -> Tensor:
        if p >= 1.0:
            return logits
        ordered, index = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        masked = probabilities.cumsum(-1) - probabilities >= p
        return logits.masked_fill(masked.scatter(-1, index, masked), MASKED_SCORE)

    return process
