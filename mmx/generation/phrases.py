"""Whole words and phrases in a text that grows token by token, whatever the tokens that spell them.

A phrase occurs where its characters do and no letter or digit continues its first or last word: "art" is in "an art
class" and not in "party". Case and the kind and number of spaces make no difference.

What matters of a text is its end: the longest suffix that is the beginning of a phrase, and whether the character
before it belongs to a word. Both are one short string, the tail. Its first character stands for all that was before.
"""

from __future__ import annotations

import codecs
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

OTHER = "."  # first character of a tail after white space, punctuation, or nothing
WORD = "x"  # first character of a tail after a letter or digit
MAX_CACHED_MASKS = 512
_LAST_CHARACTER = "\U0010ffff"


class TextEnd(NamedTuple):
    """The end of a text: its tail, and the bytes of an incomplete character."""

    tail: str = OTHER
    incomplete: bytes = b""


class Occurrence(NamedTuple):
    """A phrase by its index, and the position after its last character."""

    phrase: int
    end: int


class TokenTexts:
    """The text of each token of a vocabulary.

    Args:
        pieces: the bytes that each token adds to a text, see `Tokenizer.pieces`.

    Attributes:
        texts: complete characters, folded.
        has_text: bool [V].
        continues_word: bool [V], whether the text begins with a letter or digit.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces
        self.texts = [fold(_decode(piece).text) for piece in pieces]
        self.has_text = torch.tensor([bool(text) for text in self.texts])
        self.continues_word = torch.tensor([bool(text) and _is_word(text[0]) for text in self.texts])
        self._sorted_tokens = sorted(range(len(pieces)), key=self.texts.__getitem__)
        self._sorted_texts = [self.texts[token] for token in self._sorted_tokens]

    def with_prefix(self, prefix: str) -> Sequence[int]:
        """Return the tokens whose text begins with a prefix."""
        first = bisect_left(self._sorted_texts, prefix)
        last = bisect_left(self._sorted_texts, prefix + _LAST_CHARACTER)
        return self._sorted_tokens[first:last]

    def with_phrase(self, phrase: str) -> Sequence[int]:
        """Return the tokens whose text has a phrase."""
        return [token for token, text in enumerate(self.texts) if phrase in text]


class PhraseMatcher:
    """Finds phrases in texts.

    Args:
        phrases: words or phrases.
        tokens: the texts of the vocabulary.
    """

    def __init__(self, phrases: Sequence[str], tokens: TokenTexts) -> None:
        self.phrases = [fold(phrase).strip() for phrase in phrases]
        self.tokens = tokens
        self._holders = [tokens.with_phrase(phrase) for phrase in self.phrases]
        self._prefixes = {phrase[:length] for phrase in self.phrases for length in range(1, len(phrase) + 1)}
        self._max_length = max(map(len, self.phrases), default=0)

    def advance(self, end: TextEnd, piece: bytes) -> tuple[TextEnd, frozenset[int]]:
        """Append the bytes of a token. Returns the new end, and the phrases of which it shows that they are whole."""
        decoded = _decode(end.incomplete + piece)
        if not decoded.text:
            return TextEnd(end.tail, decoded.incomplete), frozenset()
        text = _join(end.tail, fold(decoded.text))
        whole = frozenset(found.phrase for found in self._occurrences(text) if len(end.tail) <= found.end < len(text))
        return TextEnd(self._tail(text), decoded.incomplete), whole

    def at_end(self, end: TextEnd) -> frozenset[int]:
        """Return the phrases with which a text ends; the next character may still continue their last word."""
        return frozenset(found.phrase for found in self._occurrences(end.tail) if found.end == len(end.tail))

    def contains(self, text: str, phrase: int) -> bool:
        """Whether a phrase occurs in a complete text."""
        return any(found.phrase == phrase for found in self._occurrences(_join(OTHER, fold(text))))

    def completing_tokens(self, end: TextEnd, phrases: frozenset[int], or_at_end: bool) -> Tensor:
        """Return which tokens complete one of these phrases, bool [V].

        or_at_end: whether a phrase also counts where the text of the token ends, and its last word might go on.
        """
        if end.incomplete:
            return self._completing_after_bytes(end, phrases, or_at_end)
        tokens = self.tokens
        mask = torch.zeros(len(tokens.texts), dtype=torch.bool)
        open_phrases = self.at_end(end) & phrases
        for phrase in open_phrases:
            ends_in_word = _is_word(self.phrases[phrase][-1])
            mask |= tokens.has_text & ~tokens.continues_word if ends_in_word else tokens.has_text
        if open_phrases and or_at_end:
            mask |= ~tokens.has_text
        for token in self._candidates(end.tail, phrases):
            if not mask[token]:
                text = _join(end.tail, tokens.texts[token])
                mask[token] = self._completes(text, len(end.tail), phrases, or_at_end)
        return mask

    def _completing_after_bytes(self, end: TextEnd, phrases: frozenset[int], or_at_end: bool) -> Tensor:
        """The same after an incomplete character, which ASCII ends, and other tokens may go on with."""
        replaced = TextEnd(self._tail(end.tail + "\ufffd"))
        mask = self.completing_tokens(replaced, phrases, or_at_end)
        is_open = bool(self.at_end(end) & phrases)
        for token, piece in enumerate(self.tokens.pieces):
            if piece[:1] >= b"\x80":
                text = _join(end.tail, fold(_decode(end.incomplete + piece).text))
                mask[token] = self._completes(text, len(end.tail), phrases, or_at_end)
            elif is_open:
                mask[token] = bool(piece) or or_at_end
        return mask

    def _completes(self, text: str, start: int, phrases: frozenset[int], or_at_end: bool) -> bool:
        for found in self._occurrences(text):
            is_whole = found.end < len(text) or or_at_end
            if found.phrase in phrases and found.end >= start and is_whole:
                return True
        return False

    def _candidates(self, tail: str, phrases: frozenset[int]) -> Iterator[int]:
        """Yield the tokens that hold a phrase, or the rest of one that the tail begins."""
        for index in phrases:
            phrase = self.phrases[index]
            yield from self._holders[index]
            for start in range(1, len(tail)):
                if phrase.startswith(tail[start:]) and len(phrase) > len(tail) - start:
                    rest = phrase[len(tail) - start :]
                    yield from self.tokens.with_prefix(rest)
                    yield from self.tokens.with_prefix(f" {rest}")

    def _occurrences(self, text: str) -> Iterator[Occurrence]:
        """Yield the phrases in a text whose first character stands for what was before."""
        for index, phrase in enumerate(self.phrases):
            start = text.find(phrase, 1)
            while start >= 0:
                end = start + len(phrase)
                if _is_boundary(text[start - 1], phrase[0]) and _is_boundary(phrase[-1], text[end : end + 1]):
                    yield Occurrence(index, end)
                start = text.find(phrase, start + 1)

    def _tail(self, text: str) -> str:
        for start in range(max(1, len(text) - self._max_length), len(text)):
            suffix = text[start:]
            if suffix in self._prefixes and _is_boundary(text[start - 1], suffix[0]):
                return _class(text[start - 1]) + suffix
        return _class(text[-1])


class _Decoded(NamedTuple):
    """Complete characters, and the bytes of an incomplete one at the end."""

    text: str
    incomplete: bytes


def fold(text: str) -> str:
    """Return a text in lower case with single spaces. No letter depends on its neighbors, as a final sigma would."""
    lower = text.lower() if text.isascii() else "".join(map(str.lower, text))
    folded: list[str] = []
    for character in lower:
        if not character.isspace():
            folded.append(character)
        elif not folded or folded[-1] != " ":
            folded.append(" ")
    return "".join(folded)


def _decode(data: bytes) -> _Decoded:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    return _Decoded(text, decoder.getstate()[0])


def _join(tail: str, text: str) -> str:
    return tail + (text.removeprefix(" ") if tail.endswith(" ") else text)


def _class(character: str) -> str:
    return WORD if _is_word(character) else OTHER


def _is_boundary(left: str, right: str) -> bool:
    """Whether two neighbors do not belong to one word; `right` is empty at the end of a text."""
    return not right or not (_is_word(left) and _is_word(right))


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"
