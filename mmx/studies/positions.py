"""Positions: what a model that looks at a text can know of the order of its words, by where the keys' places come from.

The text encoder has no positions of its own and is a bag of words; the decoder's queries have learned ones in every
row. What differs is the key side alone: nothing, a learned vector (Gehring et al. 2017, section 3.1), sinusoidal waves
(Vaswani et al. 2017, section 3.5), or a bias on the distance between word and slot (Raffel et al. 2020, section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mmx.studies.experiment import run_experiment
from mmx.studies.synthetic_text import LONGEST, TextExample, arrangements, ordering, split_held_out

SCHEMES = ("none", "learned", "sinusoidal", "relative")
STEPS, SEED, TEXTS, HELD = 300, 0, 4000, 200
POSITIONS = 2 * LONGEST  # the longest text has one token a word, beside its end, or its prompt
NOTE = "none: the queries alone have positions; chance: the words are known, and their order is guessed."


@dataclass(frozen=True)
class PositionRow:
    """One scheme. exact, words: shares of texts and of words in their place; loss: nats a token; all held out."""

    scheme: str
    exact: float
    words: float
    loss: float


@dataclass(frozen=True)
class PositionReport:
    """All schemes side by side. chance: the best share of exact texts for one who knows the words and no places."""

    rows: tuple[PositionRow, ...]
    chance: float
    steps: int
    seed: int

    def table(self) -> str:
        """Lines to read."""
        lines = [f"{'positions of the keys':<22}{'exact':>8}{'words':>8}{'loss':>9}"]
        lines += [f"{row.scheme:<22}{row.exact:>8.3f}{row.words:>8.3f}{row.loss:>9.4f}" for row in self.rows]
        return "\n".join([*lines, f"{'chance':<22}{self.chance:>8.3f}", NOTE])


def positions(
    steps: int = STEPS, seed: int = SEED, progress: Callable[[str], object] = lambda scheme: None
) -> PositionReport:
    """Train the same model with each scheme, from the same seed, on the same lists; `progress` is told what begins.

    Raises MmxError, as training does.
    """
    learned, held = split_held_out(ordering(TEXTS, seed), HELD)
    rows = []
    for scheme in SCHEMES:
        progress(scheme)
        trial = run_experiment(model_config(scheme), learned, held, steps, seed, lr=3e-3)
        rows.append(PositionRow(scheme, trial.exact, trial.words, trial.loss))
    return PositionReport(tuple(rows), chance(held), steps, seed)


def chance(pairs: Sequence[TextExample]) -> float:
    """The expected share of exact texts of one who knows every text's words, and draws their order."""
    return fmean(1 / arrangements(pair.target) for pair in pairs)


def model_config(scheme: str) -> dict[str, Any]:
    """The model's configuration: a bag of words as source, and one of SCHEMES on the key side."""
    size = {"hidden_size": 64, "num_heads": 4, "dropout": 0.0, "max_position_embeddings": POSITIONS}
    relative = scheme == "relative"
    return {
        "sources": {
            "text": {
                "encoder": "text",
                "options": {**size, "num_layers": 1, "positions": "none"},
                "projection": {"positions": "none" if relative else scheme, "max_position_embeddings": POSITIONS},
            }
        },
        "decoder": {
            **size,
            "num_layers": 2,
            "cross_attention_positions": "relative" if relative else "none",
            "max_relative_distance": POSITIONS,
        },
        "vocab_size": 300,
    }
