"""Rules on scores: (generated [N, t], logits [N, V]) -> logits. transformers' LogitsProcessor has the same form.

Only what was generated counts, not the prompt: a question may well be answered with its own words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmx.config.schema import GenerationConfig

Rule = Callable[[Tensor, Tensor], Tensor]
Stop = Callable[[Tensor, Tensor], Tensor]  # (generated [N, t], logits [N, V]) -> bool [N]: this text is over
REFUSED = float("-inf")


def build_rules(options: GenerationConfig, eos: int) -> list[Rule]:
    """The rules that the options switch on, in the order they are applied."""
    rules: list[Rule] = []
    if options.suppress_tokens:
        rules.append(ban(options.suppress_tokens))
    if options.begin_suppress_tokens:
        rules.append(ban_first(options.begin_suppress_tokens))
    if options.min_new_tokens:
        rules.append(at_least(options.min_new_tokens, eos))
    if options.repetition_penalty != 1.0:
        rules.append(penalise_repetition(options.repetition_penalty))
    if options.no_repeat_ngram_size:
        rules.append(no_repeated_ngram(options.no_repeat_ngram_size))
    if options.do_sample:
        rules += [temper(options.temperature), keep_best(options.top_k), keep_nucleus(options.top_p)]
    if options.forced_eos_token_id is not None:
        rules.append(force_last(options.max_new_tokens, options.forced_eos_token_id))
    if options.renormalize_logits:
        rules.append(share_out_again)
    return rules


def ban(tokens: Sequence[int]) -> Rule:
    """These tokens are never chosen."""
    index = torch.tensor(list(tokens))
    return lambda said, logits: logits.index_fill(-1, index.to(logits.device), REFUSED)


def ban_first(tokens: Sequence[int]) -> Rule:
    """These tokens do not come first."""
    never = ban(tokens)
    return lambda said, logits: logits if said.shape[1] else never(said, logits)


def force_last(length: int, token: int) -> Rule:
    """Where only one token more may come, it is this one, and certain."""

    def rule(said: Tensor, logits: Tensor) -> Tensor:
        if said.shape[1] != length - 1:
            return logits
        return torch.full_like(logits, REFUSED).index_fill(-1, torch.tensor(token, device=logits.device), 0.0)

    return rule


def share_out_again(said: Tensor, logits: Tensor) -> Tensor:
    """What was refused is shared out among the rest, so that beams of prompts with many refusals compare fairly."""
    return torch.where((logits == REFUSED).all(-1, keepdim=True), logits, logits.log_softmax(-1))


def at_least(length: int, eos: int) -> Rule:
    """No end before `length` tokens."""
    endless = ban([eos])
    return lambda said, logits: endless(said, logits) if said.shape[1] < length else logits


def end_at_dead_ends(eos: int) -> Rule:
    """Where everything is refused, end: a text that may not go on is over."""

    def rule(said: Tensor, logits: Tensor) -> Tensor:
        dead = (logits == REFUSED).all(-1, keepdim=True)
        return logits.masked_fill(dead & (torch.arange(logits.shape[-1], device=logits.device) == eos), 0.0)

    return rule


def penalise_repetition(penalty: float) -> Rule:
    """Make what was said less likely by a factor (Keskar et al. 2019, "CTRL", section 4.1)."""

    def rule(said: Tensor, logits: Tensor) -> Tensor:
        scores = logits.gather(-1, said)
        return logits.scatter(-1, said, torch.where(scores < 0, scores * penalty, scores / penalty))

    return rule


def no_repeated_ngram(size: int) -> Rule:
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
        return logits.masked_fill(refused, REFUSED)

    return rule


def temper(temperature: float) -> Rule:
    """Above 1 flatter, below 1 sharper."""
    return lambda said, logits: logits / temperature


def keep_best(count: int) -> Rule:
    """Only the `count` likeliest tokens; 0 keeps all (Fan et al. 2018, section 5.4)."""

    def rule(said: Tensor, logits: Tensor) -> Tensor:
        if not 0 < count < logits.shape[-1]:
            return logits
        return logits.masked_fill(logits < logits.topk(count).values[:, -1:], REFUSED)

    return rule


def keep_nucleus(mass: float) -> Rule:
    """Only the likeliest tokens that together reach `mass`; 1 keeps all (Holtzman et al. 2020, section 3.1)."""

    def rule(said: Tensor, logits: Tensor) -> Tensor:
        if mass >= 1.0:
            return logits
        ordered, index = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= mass
        return logits.masked_fill(beyond.scatter(-1, index, beyond), REFUSED)

    return rule
