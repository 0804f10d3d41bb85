"""Study of key positions: whether a decoder can reproduce the order of words, by the kind of positions of the keys.

The text encoder has no positions, so its output is a bag of words. The queries of the decoder have learned positions in
every row. Only the positions of the keys differ: none, learned (Gehring et al. 2017, section 3.1), sinusoidal (Vaswani
et al. 2017, section 3.5), or a relative bias on the distance between query and slot (Raffel et al. 2020, section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from mmx.studies.experiment import ExperimentConfig, run_experiment
from mmx.studies.synthetic_text import MAX_LENGTH, TextExample, num_permutations, ordering, split_held_out

SCHEMES = ("none", "learned", "sinusoidal", "relative")
STEPS, SEED = 300, 0
NUM_TEXTS, NUM_HELD_OUT = 4000, 200
LEARNING_RATE = 3e-3
MAX_POSITIONS = 2 * MAX_LENGTH  # one token a word, and the end token or the prompt
NOTE = "none: only the queries have positions; chance: the words are known, and their order is random."


@dataclass(frozen=True)
class PositionRow:
    """Results of one scheme on held-out texts.

    Args:
        scheme: one of SCHEMES.
        exact: fraction of texts in the correct order.
        words: fraction of words at the correct position.
        loss: nats per token.
    """

    scheme: str
    exact: float
    words: float
    loss: float


@dataclass(frozen=True)
class PositionReport:
    """Results of all schemes. chance: the expected fraction of exact texts with the correct words in random order."""

    rows: tuple[PositionRow, ...]
    chance: float
    steps: int
    seed: int

    def table(self) -> str:
        """Lines of text."""
        lines = [f"{'positions of the keys':<22}{'exact':>8}{'words':>8}{'loss':>9}"]
        lines += [f"{row.scheme:<22}{row.exact:>8.3f}{row.words:>8.3f}{row.loss:>9.4f}" for row in self.rows]
        return "\n".join([*lines, f"{'chance':<22}{self.chance:>8.3f}", NOTE])


def positions(
    steps: int = STEPS, seed: int = SEED, progress: Callable[[str], object] = lambda scheme: None
) -> PositionReport:
    """Train the same model with each scheme, from the same seed, on the same lists.

    `progress` is called with each scheme before its training. Raises MmxError as training does.
    """
    train_texts, held_out = split_held_out(ordering(NUM_TEXTS, seed), NUM_HELD_OUT)
    rows = []
    for scheme in SCHEMES:
        progress(scheme)
        config = ExperimentConfig(model_config(scheme), steps, seed, LEARNING_RATE)
        result = run_experiment(config, train_texts, held_out)
        rows.append(PositionRow(scheme, result.exact, result.words, result.loss))
    return PositionReport(tuple(rows), chance(held_out), steps, seed)


def chance(texts: Sequence[TextExample]) -> float:
    """The expected fraction of exact texts if the words of each are known and their order is random."""
    return fmean(1 / num_permutations(text.target) for text in texts)


def model_config(scheme: str) -> dict[str, object]:
    """The model section of the configuration for one of SCHEMES."""
    size = {"hidden_size": 64, "num_heads": 4, "dropout": 0.0, "max_position_embeddings": MAX_POSITIONS}
    relative = scheme == "relative"
    source = {
        "encoder": "text",
        "options": {**size, "num_layers": 1, "positions": "none"},
        "projection": {"positions": "none" if relative else scheme, "max_position_embeddings": MAX_POSITIONS},
    }
    decoder = {
        **size,
        "num_layers": 2,
        "cross_attention_positions": "relative" if relative else "none",
        "max_relative_distance": MAX_POSITIONS,
    }
    return {"sources": {"text": source}, "decoder": decoder, "vocab_size": 300}
