"""Words that texts must not have, and words that they must have, under greedy decoding, sampling and beam search.

Axes: N streams, t generated tokens, V vocabulary.

Avoided words: a token is masked if a word would be whole with it. Under beam search a word may go on ("art" in
"artist"), and what would end it is masked instead. One stream alone cannot go back, so there the token that completes
the word is masked even if the word could go on.

Included words: each is a group of alternatives, of which one must occur. The end of the text is masked until all groups
are met, and the tokens of a word are forced where the rest of the text is needed for them; in one stream also where
it would end. Beam search offers their tokens at every step and shares the beams between texts with different numbers
of these tokens, as in Post and Vilar 2018, "Fast lexically constrained decoding with dynamic beam allocation".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmx.generation.logits_processors import MASKED_SCORE, LogitsProcessor
from mmx.generation.phrases import MAX_CACHED_MASKS, PhraseMatcher, TextEnd, TokenTexts, fold
from mmx.text.tokenizer import Tokenizer

Tokens = tuple[int, ...]


class WordGroup(NamedTuple):
    """Alternatives of which a text must have one.

    Attributes:
        phrases: the alternatives by index.
        spellings: the tokens that spell each.
        length: the number of tokens of the shortest.
    """

    phrases: frozenset[int]
    spellings: tuple[Tokens, ...]
    length: int


class Words:
    """The words of `avoid` and `include`, for one tokenizer.

    Alternatives with an avoided word are not aimed at, nor are groups that have no other.
    """

    def __init__(self, tokenizer: Tokenizer, avoid: Sequence[str], include: Sequence[str]) -> None:
        self.avoid = tuple(avoid)
        self.include = tuple(include)
        self.eos = tokenizer.eos_token_id
        alternatives = [split_alternatives(group) for group in include]
        phrases = [*avoid, *(phrase for group in alternatives for phrase in group)]
        self.matcher = PhraseMatcher(phrases, _token_texts(tokenizer))
        self.avoided = frozenset(range(len(avoid)))
        self.groups: list[WordGroup] = []
        self._included: list[frozenset[int]] = []
        first = len(avoid)
        for group in alternatives:
            indices = frozenset(range(first, first + len(group)))
            spellings = tuple(self._spell(tokenizer, phrase) for phrase in group if not self._is_avoided(phrase))
            self._included.append(indices)
            if spellings:
                self.groups.append(WordGroup(indices, spellings, min(map(len, spellings))))
            first += len(group)
        self._masks: dict[tuple[TextEnd, bool], Tensor | None] = {}

    def unmet(self, text: str) -> tuple[str, ...]:
        """Return the words of `avoid` that a text has, and those of `include` that it does not have, as given."""
        contains = self.matcher.contains
        present = [word for index, word in enumerate(self.avoid) if contains(text, index)]
        for word, phrases in zip(self.include, self._included, strict=True):
            if not any(contains(text, phrase) for phrase in phrases):
                present.append(word)
        return tuple(present)

    def avoided_tokens(self, end: TextEnd, or_at_end: bool) -> Tensor | None:
        """Return which tokens complete an avoided word, bool [V]; None for no token."""
        key = (end, or_at_end)
        if key not in self._masks:
            mask = self.matcher.completing_tokens(end, self.avoided, or_at_end)
            mask[self.eos] = bool(self.matcher.at_end(end) & self.avoided)
            if len(self._masks) >= MAX_CACHED_MASKS:
                self._masks.clear()
            self._masks[key] = mask if bool(mask.any()) else None
        return self._masks[key]

    def _is_avoided(self, phrase: str) -> bool:
        return any(self.matcher.contains(phrase, avoided) for avoided in self.avoided)

    def _spell(self, tokenizer: Tokenizer, phrase: str) -> Tokens:
        """The tokens of a phrase in the middle of a text, where a space precedes it."""
        for spelled in (phrase, f" {phrase}"):
            tokens = tuple(tokenizer.encode(spelled))
            text = b"".join(self.matcher.tokens.pieces[token] for token in tokens).decode("utf-8", "replace")
            if fold(text) == fold(f" {phrase}"):
                return tokens
        return tuple(tokenizer.encode(phrase))


class _State(NamedTuple):
    """A text so far.

    Attributes:
        end: its end.
        met: the groups that it has, whatever follows.
        missing: the groups that it would not have if it ended here.
        needs_boundary: whether it ends with a word of another group, which a letter would change.
    """

    end: TextEnd = TextEnd()
    met: frozenset[int] = frozenset()
    missing: tuple[int, ...] = ()
    needs_boundary: bool = False


class WordConstraints:
    """The logits processor of the words in one call of `generate`, whose progress beam search uses too.

    Args:
        words: what to avoid and include.
        start: the text before the generated tokens.
        max_new_tokens: number of tokens that a text may have.
        is_beam_search: see the module.
    """

    def __init__(self, words: Words, start: str, max_new_tokens: int, is_beam_search: bool) -> None:
        self.words = words
        self.max_new_tokens = max_new_tokens
        self.is_beam_search = is_beam_search
        self._total = sum(group.length for group in words.groups)
        self._needed: dict[Tokens, int] = {}
        self._steps: dict[tuple[_State, int], _State] = {}
        self._masks: dict[tuple[TextEnd, bool, bool, bool], Tensor | None] = {}
        spellings = [spelling for group in words.groups for spelling in group.spellings]
        self._inner_tokens = {token for spelling in spellings for token in spelling[:-1]}
        self._forced: set[Tokens] = set()
        self._states: dict[Tokens, _State] = {(): self._advance(_State(), start.encode())}

    def __call__(self, generated: Tensor, logits: Tensor) -> Tensor:
        """Mask tokens [N, V]."""
        remaining = self.max_new_tokens - generated.shape[1]
        ends_now = [False] * len(logits)
        if self.words.groups and not self.is_beam_search:
            ends_now = (logits.argmax(-1) == self.words.eos).tolist()
        rows = [tuple(tokens) for tokens in generated.tolist()]
        masks = [self._mask(tokens, remaining, ends) for tokens, ends in zip(rows, ends_now, strict=True)]
        if all(mask is None for mask in masks):
            return logits
        empty = torch.zeros(len(self.words.matcher.tokens.pieces), dtype=torch.bool)
        stacked = torch.stack([empty if mask is None else mask for mask in masks])
        padded = torch.nn.functional.pad(stacked, (0, logits.shape[-1] - stacked.shape[-1]))
        return logits.masked_fill(padded.to(logits.device), MASKED_SCORE)

    def progress(self, tokens: Tokens) -> int:
        """Return how many tokens of included words a text has; `complete` if none is missing."""
        return self._total - self._num_needed(tokens)

    @property
    def complete(self) -> int:
        """The progress of a text that has all included words."""
        return self._total

    def num_unmet(self, tokens: Tokens) -> int:
        """Return how many groups of included words a text does not have."""
        return len(self._missing(tokens))

    def next_tokens(self, tokens: Tokens) -> list[int]:
        """Return the tokens that begin or continue a missing word; the end of the text if none is missing."""
        missing = self._missing(tokens)
        if not missing:
            return [self.words.eos]
        found = {spelling[0] for group in missing for spelling in group.spellings}
        return sorted(found | {spelling[count] for spelling, count in _begun(missing, tokens)})

    def _mask(self, tokens: Tokens, remaining: int, ends_now: bool) -> Tensor | None:
        """The tokens that must not follow, bool [V]; None for no token."""
        state = self._state(tokens)
        or_at_end = remaining == 1 or not self.is_beam_search
        key = (state.end, or_at_end, state.needs_boundary, bool(state.missing))
        if key not in self._masks:
            self._masks[key] = self._unforced_mask(state, or_at_end)
        mask = self._masks[key]
        if mask is None or not state.missing:
            return mask
        allowed = [token for token in self._forced_tokens(tokens, remaining, ends_now) if not mask[token]]
        if not allowed:
            return mask
        self._forced.add(tokens)
        forced = torch.ones_like(mask)
        forced[allowed] = False
        return forced

    def _unforced_mask(self, state: _State, or_at_end: bool) -> Tensor | None:
        """The tokens that must not follow a text where no word is forced."""
        words = self.words
        mask = words.avoided_tokens(state.end, or_at_end) if words.avoid else None
        if not (state.needs_boundary or state.missing):
            return mask
        size = len(words.matcher.tokens.pieces)
        combined = torch.zeros(size, dtype=torch.bool) if mask is None else mask.clone()
        if state.needs_boundary:
            combined |= words.matcher.tokens.continues_word
        if state.missing:
            combined[words.eos] = True
        return combined

    def _forced_tokens(self, tokens: Tokens, remaining: int, ends_now: bool) -> Sequence[int]:
        """The only tokens that may follow; none if any may."""
        is_due = ends_now or self._num_needed(tokens) >= remaining
        if not (is_due or tokens[:-1] in self._forced):
            return ()
        missing = self._missing(tokens)
        begun = _begun(missing, tokens)
        if begun:
            return [spelling[length] for spelling, length in begun]
        if not is_due:
            return ()
        shortest: list[int] = []
        for group in missing:
            shortest += [spelling[0] for spelling in group.spellings if len(spelling) == group.length]
        return shortest

    def _num_needed(self, tokens: Tokens) -> int:
        """The number of tokens that the missing words need."""
        if tokens in self._needed:
            return self._needed[tokens]
        missing = self._missing(tokens)
        needed = sum(group.length for group in missing)
        saved = 0
        if tokens and tokens[-1] in self._inner_tokens:
            for group in missing:
                for spelling, length in _begun([group], tokens):
                    saved = max(saved, group.length - (len(spelling) - length))
        self._needed[tokens] = needed - saved
        return needed - saved

    def _missing(self, tokens: Tokens) -> list[WordGroup]:
        """The groups that a text would not have if it ended here."""
        return [self.words.groups[index] for index in self._state(tokens).missing]

    def _state(self, tokens: Tokens) -> _State:
        state = self._states.get(tokens)
        if state is None:
            step = (self._state(tokens[:-1]), tokens[-1])
            if step not in self._steps:
                self._steps[step] = self._advance(step[0], self.words.matcher.tokens.pieces[step[1]])
            state = self._steps[step]
            self._states[tokens] = state
        return state

    def _advance(self, state: _State, piece: bytes) -> _State:
        end, whole = self.words.matcher.advance(state.end, piece)
        at_end = self.words.matcher.at_end(end)
        met = set(state.met)
        missing: list[int] = []
        needs_boundary = False
        for index, group in enumerate(self.words.groups):
            if group.phrases & whole:
                met.add(index)
            if index not in met:
                is_at_end = bool(group.phrases & at_end)
                needs_boundary = needs_boundary or is_at_end
                if not is_at_end:
                    missing.append(index)
        return _State(end, frozenset(met), tuple(missing), needs_boundary)


@lru_cache(maxsize=8)
def compile_words(tokenizer: Tokenizer, avoid: tuple[str, ...], include: tuple[str, ...]) -> Words:
    """Return the words for a tokenizer. Those of the last few calls are kept."""
    return Words(tokenizer, avoid, include)


def constraints_of(processors: Sequence[LogitsProcessor]) -> WordConstraints | None:
    """Return the word constraints among some logits processors."""
    return next((processor for processor in processors if isinstance(processor, WordConstraints)), None)


def split_alternatives(group: str) -> list[str]:
    """Return the alternatives of a group, separated by `|`."""
    return [" ".join(word.split()) for word in group.split("|")]


@lru_cache(maxsize=4)
def _token_texts(tokenizer: Tokenizer) -> TokenTexts:
    return TokenTexts(tokenizer.pieces())


class _Begun(NamedTuple):
    """A spelling of which a text ends with the first `length` tokens."""

    spelling: Tokens
    length: int


def _begun(groups: Sequence[WordGroup], tokens: Tokens) -> list[_Begun]:
    found: list[_Begun] = []
    for group in groups:
        for spelling in group.spellings:
            for count in range(min(len(spelling) - 1, len(tokens)), 0, -1):
                if tokens[-count:] == spelling[:count]:
                    found.append(_Begun(spelling, count))
                    break
    return found
