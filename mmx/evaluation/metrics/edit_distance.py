"""Edit distances: word and character error rates of transcripts, and ANLS of answers.

`word_errors` and `character_errors` return counts, because the rates are those of a corpus: all errors over all words
(or characters) of the references, not the mean over texts. They equal jiwer 4 without transformations: case and
punctuation count. `anls` equals the script of the DocVQA benchmark (Biten et al., "Scene Text Visual Question
Answering", 2019, section 4.1).
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

ANLS_THRESHOLD = 0.5


class ErrorCount(NamedTuple):
    """Substitutions, deletions and insertions together, and the length of the reference."""

    errors: int
    length: int


def word_errors(prediction: str, reference: str) -> ErrorCount:
    """Errors of the words between white space."""
    words = reference.split()
    return ErrorCount(edit_distance(prediction.split(), words), len(words))


def character_errors(prediction: str, reference: str) -> ErrorCount:
    """Errors of the characters, without white space at the ends."""
    characters = reference.strip()
    return ErrorCount(edit_distance(prediction.strip(), characters), len(characters))


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Largest normalized Levenshtein similarity to one of the answers; 0 if it is below 0.5.

    Case and the amount of white space do not count. The paper gives 0 to a similarity of exactly 0.5, the script 0.5.
    """
    if isinstance(answers, str) or not answers:
        raise ValueError(f"A question needs a list of at least one answer; got {answers!r}.")
    similarity = max(_similarity(_normalize(prediction), _normalize(answer)) for answer in answers)
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def edit_distance(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Levenshtein distance: the smallest number of items to replace, remove or add.

    A column of the table is kept as the bits of two integers, its steps up and its steps down (Hyyrö, "A bit-vector
    algorithm for computing Levenshtein and Damerau edit distances", 2003, figure 3).
    """
    if not first:
        return len(second)
    positions: dict[Hashable, int] = {}
    for index, item in enumerate(first):
        positions[item] = positions.get(item, 0) | 1 << index
    mask = (1 << len(first)) - 1
    last = 1 << (len(first) - 1)
    increases = mask
    decreases = 0
    distance = len(first)
    for item in second:
        equal = positions.get(item, 0)
        diagonal = (((equal & increases) + increases) ^ increases) | equal | decreases
        horizontal_increases = decreases | ~(diagonal | increases) & mask
        horizontal_decreases = increases & diagonal
        if horizontal_increases & last:
            distance += 1
        elif horizontal_decreases & last:
            distance -= 1
        horizontal_increases = (horizontal_increases << 1 | 1) & mask  # the first row of the table grows by one
        horizontal_decreases = horizontal_decreases << 1 & mask
        increases = horizontal_decreases | ~(diagonal | horizontal_increases) & mask
        decreases = horizontal_increases & diagonal
    return distance


def _similarity(first: str, second: str) -> float:
    length = max(len(first), len(second))
    return 1 - edit_distance(first, second) / length if length else 1.0


def _normalize(text: str) -> str:
    return " ".join(text.lower().split())
