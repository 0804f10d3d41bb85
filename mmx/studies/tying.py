"""Study of weight tying: one W_K and W_V for all cross-attention layers, or for all attention of the model.

The task is to copy names, dates and places, some of which are rare or absent in training. A memory has
2 * L * H * S * D numbers; tying across layers makes L = 1 (compare Shazeer 2019, "Fast Transformer Decoding", section
2.4, for the cost of keys and values).

Axes: L cross-attention layers, H heads, S slots, D head dimension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mmx.models.model import Model
from mmx.studies.experiment import SOURCE, Experiment, ExperimentConfig, run_experiment, split_words, word_accuracy
from mmx.studies.synthetic_text import TextExample, copying, split_held_out

TIE_OPTIONS = ("none", "layers", "all")
STEPS, SEED = 400, 0
NUM_TEXTS, NUM_HELD_OUT = 6000, 200
LEARNING_RATE = 4e-3
MAX_POSITIONS = 48  # tokens of the longest text
NUM_SLOTS = 32  # tokens of the text whose memory is measured
MAX_RARE_COUNT = 2  # a word is rare if it occurs at most this often in training
NOTE = (
    f"bytes: of the memory of a text of {NUM_SLOTS} tokens; words, unseen, rare: fraction of words copied to the "
    f"correct position, of all, of those absent from training, and of those that occur once or twice."
)


@dataclass(frozen=True)
class TyingRow:
    """Results of one option on held-out texts.

    Args:
        tie_key_value: one of TIE_OPTIONS.
        parameters: of the model.
        nbytes: of the memory of a text of NUM_SLOTS tokens.
        loss: nats per token.
        exact: fraction of texts that are entirely correct.
        words: fraction of words at the correct position.
        unseen: the same of words that do not occur in training.
        rare: the same of words that occur once or twice in training.
    """

    tie_key_value: str
    parameters: int
    nbytes: int
    loss: float
    exact: float
    words: float
    unseen: float
    rare: float


@dataclass(frozen=True)
class TyingReport:
    """Results of all options. unseen, rare: the number of such words in the held-out texts."""

    rows: tuple[TyingRow, ...]
    unseen: int
    rare: int
    steps: int
    seed: int

    def table(self) -> str:
        """Lines of text."""
        names = ("parameters", "bytes", "loss", "exact", "words", "unseen", "rare")
        lines = [f"{'tied across':<12}" + "".join(f"{name:>11}" for name in names)]
        lines += [_table_line(row) for row in self.rows]
        counts = f"{self.unseen} words do not occur in training, {self.rare} occur once or twice."
        return "\n".join([*lines, NOTE, counts])


def tying(steps: int = STEPS, seed: int = SEED, progress: Callable[[str], object] = lambda option: None) -> TyingReport:
    """Train the same model with each option, from the same seed, on the same texts.

    `progress` is called with each option before its training. Raises MmxError as training does.
    """
    train_texts, held_out = split_held_out(copying(NUM_TEXTS, seed), NUM_HELD_OUT)
    frequencies = word_frequencies(train_texts)
    rows = []
    for option in TIE_OPTIONS:
        progress(option)
        config = ExperimentConfig(model_config(option), steps, seed, LEARNING_RATE)
        rows.append(_row(option, run_experiment(config, train_texts, held_out), frequencies))
    counts = []
    for text in held_out:
        counts += [frequencies[word] for word in split_words(text.target)]
    rare = sum(0 < count <= MAX_RARE_COUNT for count in counts)
    return TyingReport(tuple(rows), counts.count(0), rare, steps, seed)


def word_frequencies(texts: Sequence[TextExample]) -> Counter[str]:
    """How often each word occurs in the sources."""
    return Counter(word for text in texts for word in split_words(text.source))


@torch.inference_mode()
def memory_bytes(model: Model, slots: int) -> int:
    """Bytes of the keys and values of a text of so many tokens."""
    tokens = torch.full((1, slots), model.tokenizer.eos_token_id)
    return model.sources[SOURCE]({"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}).nbytes


def model_config(tie_key_value: str) -> dict[str, object]:
    """The model section of the configuration for one of TIE_OPTIONS."""
    size = {"hidden_size": 64, "num_heads": 4, "dropout": 0.0, "max_position_embeddings": MAX_POSITIONS}
    source = {
        "encoder": "text",
        "options": {**size, "num_layers": 1},
        "projection": {"max_position_embeddings": MAX_POSITIONS},
    }
    return {
        "sources": {"text": source},
        "decoder": {**size, "num_layers": 2},
        "vocab_size": 320,
        "tie_key_value": tie_key_value,
    }


def _row(option: str, result: Experiment, frequencies: Mapping[str, int]) -> TyingRow:
    def is_rare(word: str) -> bool:
        return 0 < frequencies.get(word, 0) <= MAX_RARE_COUNT

    return TyingRow(
        tie_key_value=option,
        parameters=sum(parameter.numel() for parameter in result.model.parameters()),
        nbytes=memory_bytes(result.model, NUM_SLOTS),
        loss=result.loss,
        exact=result.exact,
        words=result.words,
        unseen=word_accuracy(result.predictions, lambda word: word not in frequencies).accuracy,
        rare=word_accuracy(result.predictions, is_rare).accuracy,
    )


def _table_line(row: TyingRow) -> str:
    values = (row.loss, row.exact, row.words, row.unseen, row.rare)
    line = f"{row.tie_key_value:<12}{row.parameters:>11,}{row.nbytes:>11,}"
    return line + "".join(f"{value:>11.3f}" for value in values)
