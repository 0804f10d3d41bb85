"""Rules on scores: (generated [N, t], logits [N, V]) -> logits. transformers' LogitsProcessor has the same form.

Only what was generated counts, not the prompt: a question may well be answered with its own words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmx.config.schema import GenerationConfig

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
StoppingCriterion = Callable[
    [Tensor, Tensor], Tensor
]  # (generated [N, t], logits [N, V]) -> bool [N]: this text is over
MASKED_SCORE = float("-inf")


def build_logits_processors(options: GenerationConfig, eos: int) -> list[LogitsProcessor]:
    """The rules that the options switch on, in the order they are applied."""
    rules: list[LogitsProcessor] = []
    if options.suppress_tokens:
        rules.append(suppress_tokens(options.suppress_tokens))
    if options.begin_suppress_tokens:
        rules.append(begin_suppress_tokens(options.begin_suppress_tokens))
    if options.min_new_tokens:
        rules.append(min_new_tokens(options.min_new_tokens, eos))
    if options.repetition_penalty != 1.0:
        rules.append(repetition_penalty(options.repetition_penalty))
    if options.no_repeat_ngram_size:
        rules.append(no_repeat_ngram(options.no_repeat_ngram_size))
    if options.do_sample:
        rules += [temperature_(options.temperature), top_k(options.top_k), top_p(options.top_p)]
    if options.forced_eos_token_id is not None:
        rules.append(forced_eos(options.max_new_tokens, options.forced_eos_token_id))
    if options.renormalize_logits:
        rules.append(renormalize)
    return rules


def suppress_tokens(tokens: Sequence[int]) -> LogitsProcessor:
    """These tokens are never chosen."""
    index = torch.tensor(list(tokens))
    return lambda said, logits: logits.index_fill(-1, index.to(logits.device), MASKED_SCORE)


def begin_suppress_tokens(tokens: Sequence[int]) -> LogitsProcessor:
    """These tokens do not come first."""
    never = suppress_tokens(tokens)
    return lambda said, logits: logits if said.shape[1] else never(said, logits)


def forced_eos(length: int, token: int) -> LogitsProcessor:
    """Where only one token more may come, it is this one, and certain."""

    def rule(said: Tensor, logits: Tensor) -> Tensor:
        if said.shape[1] != length - 1:
            return logits
        return torch.full_like(logits, MASKED_SCORE).index_fill(-1, torch.tensor(token, device=logits.device), 0.0)

    return rule


def renormalize(said: Tensor, logits: Tensor) -> Tensor:
    """What was refused is shared out among the rest, so that beams of prompts with many refusals compare fairly."""
    return torch.where((logits == MASKED_SCORE).all(-1, keepdim=True), logits, logits.log_softmax(-1))


def min_new_tokens(length: int, eos: int) -> LogitsProcessor:
    """No end before `length` tokens."""
    endless = suppress_tokens([eos])
    return lambda said, logits: endless(said, logits) if said.shape[1] < length else logits


def eos_when_all_masked(eos: int) -> LogitsProcessor:
    """Where everything is refused, end: a text that may not go on is over."""

    def rule(said: Tensor, logits: Tensor) -> Tensor:
        dead = (logits == MASKED_SCORE).all(-1, keepdim=True)
        return logits.masked_fill(dead & (torch.arange(logits.shape[-1], device=logits.device) == eos), 0.0)

    return rule


def repetition_penalty(penalty: float) -> LogitsProcessor:
    """Make what was said less likely by a factor (Keskar et al. 2019, "CTRL", section 4.1)."""

    def rule(said: Tensor, logits: Tensor) -> Tensor:
        scores = logits.gather(-1, said)
        return logits.scatter(-1, said, torch.where(scores < 0, scores * penalty, scores / penalty))

    return rule


def no_repeat_ngram(size: int) -> LogitsProcessor:
    """Never say the same `size` tokens in a row twice (Paulus et al. 2017, section 2.5)."""

    def rule(said: Tensor, logits: Tensor) -> Tensor:
        if said.shape[1] < size:
            return logits
        grams = said.unfold(1, size, 1)
        last = said[:, said.shape[1] - size + 1 :]
        repeats = (grams[..., :-1] == last[:, None]).all(-1)
        refused = torch.zeros_like(logits, dtype=torch.bool)
        rows, places = repeats.nonzero(as_tuple=True)
        refused[rows, grams[rows, places, -1]] = True
        return logits.masked_fill(refused, MASKED_SCORE)

    return rule


def temperature_(temperature: float) -> LogitsProcessor:
    """Above 1 flatter, below 1 sharper."""
    return lambda said, logits: logits / temperature


def top_k(count: int) -> LogitsProcessor:
    """Only the `count` likeliest tokens; 0 keeps all (Fan et al. 2018, section 5.4)."""

    def rule(said: Tensor, logits: Tensor) -> Tensor:
        if not 0 < count < logits.shape[-1]:
            return logits
        return logits.masked_fill(logits < logits.topk(count).values[:, -1:], MASKED_SCORE)

    return rule


def top_p(mass: float) -> LogitsProcessor:
    """Only the likeliest tokens that together reach `mass`; 1 keeps all (Holtzman et al. 2020, section 3.1)."""

    def rule(said: Tensor, logits: Tensor) -> Tensor:
        if mass >= 1.0:
            return logits
        ordered, index = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= mass
        return logits.masked_fill(beyond.scatter(-1, index, beyond), MASKED_SCORE)

    return rule
