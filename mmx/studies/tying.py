"""Tying: what it costs and saves to read by one W_K and W_V across the decoder's layers, or across all attention.

Alphabet: L looking layers, H heads, S slots, D head width. The task is to copy: names, dates and places, of which
training has seen some seldom and others never. Memory is counted in bytes: 2 * L * H * S * D numbers a text, and L
becomes 1 where layers share (compare Shazeer 2019, "Fast Transformer Decoding", section 2.4, on what keys cost).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmx.models.model import Model
from mmx.studies.experiment import SOURCE, Experiment, run_experiment, share_in_place, words_of
from mmx.studies.synthetic_text import TextExample, copying, split_held_out

TIE_OPTIONS = ("none", "layers", "all")
STEPS, SEED, TEXTS, HELD = 400, 0, 6000, 200
POSITIONS, SLOTS = 48, 32  # the longest text that is read or said, and that whose memory is measured, in tokens
RARE = 2  # a word that training saw so often at most
NOTE = (
    f"bytes: of the memory of a text of {SLOTS} tokens; words, unseen, seldom: the share of all words copied in their "
    f"place, of those never trained on, and of those seen once or twice."
)


@dataclass(frozen=True)
class TyingRow:
    """One way of tying. nbytes: of the memory of a text of SLOTS tokens; loss: nats a token; exact, words, unseen,
    seldom: shares of texts and of words in their place; all held out."""

    kind: str
    parameters: int
    nbytes: int
    loss: float
    exact: float
    words: float
    unseen: float
    rare: float


@dataclass(frozen=True)
class TyingReport:
    """All ways side by side. unseen, seldom: how many held-out words there are of each sort."""

    rows: tuple[TyingRow, ...]
    unseen: int
    rare: int
    steps: int
    seed: int

    def table(self) -> str:
        """Lines to read."""
        names = ("parameters", "bytes", "loss", "exact", "words", "unseen", "seldom")
        lines = [f"{'tied across':<12}" + "".join(f"{name:>11}" for name in names)]
        lines += [_line(row) for row in self.rows]
        counts = f"{self.unseen} words were never trained on, {self.rare} were seen once or twice."
        return "\n".join([*lines, NOTE, counts])


def _line(row: TyingRow) -> str:
    shares = (row.loss, row.exact, row.words, row.unseen, row.rare)
    return f"{row.kind:<12}{row.parameters:>11,}{row.nbytes:>11,}" + "".join(f"{share:>11.3f}" for share in shares)


def tying(steps: int = STEPS, seed: int = SEED, progress: Callable[[str], object] = lambda kind: None) -> TyingReport:
    """Train the same model tied in each way, from the same seed, on the same texts; `progress` is told what begins.

    Raises MmxError, as training does.
    """
    learned, held = split_held_out(copying(TEXTS, seed), HELD)
    seen = times_seen(learned)
    rows = []
    for kind in TIE_OPTIONS:
        progress(kind)
        rows.append(_row(kind, run_experiment(model_config(kind), learned, held, steps, seed, lr=4e-3), seen))
    wanted = [seen[word] for pair in held for word in words_of(pair.target)]
    return TyingReport(tuple(rows), wanted.count(0), sum(0 < n <= RARE for n in wanted), steps, seed)


def times_seen(pairs: Sequence[TextExample]) -> Counter[str]:
    """How often each word stands in the sources."""
    return Counter(word for pair in pairs for word in words_of(pair.source))


def _row(kind: str, trial: Experiment, seen: Mapping[str, int]) -> TyingRow:
    unseen, _ = share_in_place(trial.predictions, lambda word: word not in seen)
    seldom, _ = share_in_place(trial.predictions, lambda word: 0 < seen.get(word, 0) <= RARE)
    parameters = sum(parameter.numel() for parameter in trial.model.parameters())
    nbytes = memory_bytes(trial.model, SLOTS)
    return TyingRow(kind, parameters, nbytes, trial.loss, trial.exact, trial.words, unseen, seldom)


@torch.inference_mode()
def memory_bytes(model: Model, slots: int) -> int:
    """Bytes of keys and values of a text of so many tokens, its end token among them."""
    one = torch.full((1, slots), model.tokenizer.eos)
    return model.sources[SOURCE]({"tokens": one, "mask": torch.ones_like(one, dtype=torch.bool)}).nbytes


def model_config(kind: str) -> dict[str, Any]:
    """The model's configuration, tied in one of KINDS."""
    size = {"hidden_size": 64, "num_heads": 4, "dropout": 0.0, "max_position_embeddings": POSITIONS}
    projection = {"max_position_embeddings": POSITIONS}
    return {
        "sources": {"text": {"encoder": "text", "options": {**size, "num_layers": 1}, "projection": projection}},
        "decoder": {**size, "num_layers": 2},
        "vocab_size": 320,
        "tie_key_value": kind,
    }
