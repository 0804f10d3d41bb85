"""Beams shared between texts with different numbers of tokens of included words.

Axes: G prompts, n beams, c candidates, t generated tokens.

Source: Post and Vilar 2018, "Fast lexically constrained decoding with dynamic beam allocation", section 4: candidates
with equal progress form a bank, and every bank keeps as many beams as the others if it has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmx.generation.logits_processors import MASKED_SCORE
from mmx.generation.word_constraints import WordConstraints


class BeamBanks:
    """The banks of one beam search."""

    def __init__(self, constraints: WordConstraints) -> None:
        self.constraints = constraints

    def add_candidates(self, index: Tensor, generated: Tensor, vocab_size: int) -> Tensor:
        """Return candidates [G, c] with those that begin, continue or end what is missing; -1 for padding.

        Args:
            index: the candidates so far as beam * vocab_size + token, int [G, c].
            generated: tokens of the beams, int [G, n, t].
            vocab_size: number of tokens.
        """
        rows: list[list[int]] = []
        for known, beams in zip(index.tolist(), generated.tolist(), strict=True):
            row = dict.fromkeys(known)
            for beam, tokens in enumerate(beams):
                for token in self.constraints.next_tokens(tuple(tokens)):
                    row[beam * vocab_size + token] = None
            rows.append(list(row))
        longest = max(map(len, rows))
        padded = [row + [-1] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, device=index.device)

    def progress(self, generated: Tensor, beam: Tensor, token: Tensor) -> Tensor:
        """Return the progress of each candidate, int [G, c], which extends a beam by a token."""
        rows: list[list[int]] = []
        for texts, beams, tokens in zip(generated.tolist(), beam.tolist(), token.tolist(), strict=True):
            prefixes = [tuple(text) for text in texts]
            extended = [(*prefixes[index], added) for index, added in zip(beams, tokens, strict=True)]
            rows.append([self.constraints.progress(text) for text in extended])
        return torch.tensor(rows, device=beam.device)

    def is_best(self, scores: Tensor, progress: Tensor, count: int) -> Tensor:
        """Return which candidates [G, c] are among the `count` best of their bank."""
        better = (scores[:, None, :] > scores[:, :, None]) & (progress[:, None, :] == progress[:, :, None])
        return better.sum(-1) < count

    def select(self, scores: Tensor, progress: Tensor, count: int) -> Tensor:
        """Return the indices [G, count] of the candidates that continue: the best of each bank in turn.

        Banks of more progress come first. A candidate of score minus infinity is chosen only where there are no others.
        """
        is_better = (scores[:, None, :] > scores[:, :, None]) | (
            (scores[:, None, :] == scores[:, :, None]) & _earlier(scores.shape[1], scores.device)
        )
        rank = (is_better & (progress[:, None, :] == progress[:, :, None])).sum(-1)  # within the bank
        order_key = rank * (self.constraints.complete + 1) + (self.constraints.complete - progress)
        order_key = order_key.masked_fill(scores == MASKED_SCORE, torch.iinfo(order_key.dtype).max)
        return order_key.sort(dim=-1, stable=True).indices[:, :count]

    def keep_places(self, order: Tensor, beam: Tensor) -> Tensor:
        """Return the same candidates, int [G, n], each in the place of the beam that it extends if that is free.

        The KV cache is then copied less often.
        """
        rows: list[list[int]] = []
        for chosen, parents in zip(order.tolist(), beam.tolist(), strict=True):
            by_place: dict[int, int] = {}
            others: list[int] = []
            for candidate in chosen:
                place = parents[candidate]
                if place in by_place:
                    others.append(candidate)
                else:
                    by_place[place] = candidate
            rows.append([by_place[place] if place in by_place else others.pop(0) for place in range(len(chosen))])
        return torch.tensor(rows, device=order.device)

    def best_score(self, scores: Tensor, progress: Tensor) -> Tensor:
        """Return the best score [G] of the beams without missing words; of all beams if there are none."""
        complete = scores.masked_fill(progress < self.constraints.complete, MASKED_SCORE).amax(-1)
        return torch.where(complete == MASKED_SCORE, scores.amax(-1), complete)


def _earlier(count: int, device: torch.device) -> Tensor:
    """Whether column j comes before row i, bool [count, count]."""
    position = torch.arange(count, device=device)
    return position[None, :] < position[:, None]
