"""Examples to batches: which example comes when (a pure function of the seed), and its tensors.

Alphabet: B examples, K streams, T text positions, n places to learn from. `targets` holds the token that should follow
each position, or IGNORED where nothing is to be learned (prompt and padding).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mmx.config import DataConfig
from mmx.data.augment import augment
from mmx.data.examples import Example, Turn
from mmx.errors import DataError, MmxError
from mmx.images import load_image
from mmx.model import Model, SourceBatch
from mmx.prompts import tidy_caption, tidy_question
from mmx.tokenizer import Tokenizer

IGNORED = -100
ATTEMPTS = 10
# Kernels are prepared anew for every new shape, which on a CPU costs more than the step itself: few shapes, then.
TEXT_MULTIPLE, WANTED_MULTIPLE = 8, 256


class Schedule:
    """Which example stands at each position of the endless training stream: mixed by weight, shuffled by epoch.

    In an epoch a data set of n examples and weight w gives w * n of them; over the epochs each of its examples comes
    equally often (to within one). With all weights 1 every epoch is a permutation of everything. Nothing is stored:
    a position is found again from the seed alone, by any number of processes, from any step.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.sizes, self.weights, self.seed = list(sizes), list(weights), seed
        self._epoch: tuple[int, list[tuple[int, int]]] = (-1, [])
        self.epoch_length = len(self.epoch(0))

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(data set, example) at a position of the stream."""
        number, offset = divmod(position, self.epoch_length)
        return self.epoch(number)[offset]

    def epoch(self, number: int) -> list[tuple[int, int]]:
        """The shuffled (data set, example) pairs of one epoch."""
        if self._epoch[0] != number:
            pairs = [(d, e) for d in range(len(self.sizes)) for e in self._drawn(d, number)]
            Random(f"{self.seed}-epoch-{number}").shuffle(pairs)
            self._epoch = number, pairs
        return self._epoch[1]

    def _drawn(self, dataset: int, number: int) -> Iterator[int]:
        """The examples an epoch takes: a stretch of fixed length out of permutation after permutation."""
        size = self.sizes[dataset]
        length = max(1, round(self.weights[dataset] * size))
        permutations: dict[int, list[int]] = {}
        for place in range(number * length, (number + 1) * length):
            pass_number, offset = divmod(place, size)
            if pass_number not in permutations:
                order = list(range(size))
                Random(f"{self.seed}-{dataset}-{pass_number}").shuffle(order)
                permutations[pass_number] = order
            yield permutations[pass_number][offset]


class Positions(Sampler[list[int]]):
    """The positions of each of this rank's `count` batches, from position `first` of the stream on.

    `first` is a number of samples, so that a run may go on with other processes or another batch size.
    """

    def __init__(self, batch: int, first: int, count: int, rank: int = 0, world: int = 1) -> None:
        self.batch, self.first, self.count, self.rank, self.world = batch, first, count, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.count):
            start = self.first + (number * self.world + self.rank) * self.batch
            yield list(range(start, start + self.batch))

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Prepared:
    """One example as tensors: inputs of each source, the questions for a text encoder by stream, K texts as (prompt,
    target) tokens, and what went wrong."""

    id: str
    inputs: Mapping[str, Mapping[str, Tensor]]
    questions: Mapping[int, Mapping[str, Tensor]]
    texts: list[tuple[list[int], list[int]]]
    withheld: bool
    bad: tuple[str, ...]


@dataclass
class Batch:
    """What the model is trained on. tokens, mask: [B, K, T]; wanted: int [n], the places among B*K*T where something
    is to be learned, and labels: int [n], the token that should follow there; bad: what was passed over, and why.
    """

    ids: list[str]
    sources: dict[str, SourceBatch]
    tokens: Tensor
    mask: Tensor
    wanted: Tensor
    labels: Tensor
    bad: list[str]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        sources = {name: _to(source, device) for name, source in self.sources.items()}
        tokens, mask, wanted, labels = (t.to(device) for t in (self.tokens, self.mask, self.wanted, self.labels))
        return Batch(self.ids, sources, tokens, mask, wanted, labels, self.bad)


class TrainingSet(Dataset[Prepared]):
    """Position in the stream -> prepared example. Every random choice is made from (seed, position)."""

    def __init__(
        self,
        model: Model,
        sets: Sequence[tuple[DataConfig, Sequence[Example]]],
        seed: int,
        streams: int,
        max_text: int,
        source_dropout: float = 0.0,
    ) -> None:
        self.encoders = {name: model.encoder(name) for name in model.sources}
        self.tokenizer, self.prompt, self.question_to = model.tokenizer, model.prompt, model.config.question_to
        self.sets, self.seed, self.streams = sets, seed, streams
        self.longest = model.config.decoder.max_positions
        self.max_text = min(max_text, self.longest)
        self.source_dropout = source_dropout
        self.schedule = Schedule([len(e) for _, e in sets], [c.weight for c, _ in sets], seed)

    def __getitem__(self, position: int) -> Prepared:
        """The example at a position; one that cannot be read is named in `bad` and its neighbour taken instead."""
        dataset, index = self.schedule[position]
        rng = Random(f"{self.seed}-sample-{position}")
        bad: list[str] = []
        config, examples = self.sets[dataset]
        for attempt in range(ATTEMPTS):
            try:
                return self._prepare(examples[(index + attempt) % len(examples)], config, rng, tuple(bad))
            except MmxError as error:
                bad.append(str(error))
        raise DataError(f"{ATTEMPTS} examples in a row cannot be read; the last: {bad[-1]}")

    def _prepare(self, example: Example, config: DataConfig, rng: Random, bad: tuple[str, ...]) -> Prepared:
        chosen = choose_texts(example.turns, self.streams, rng)
        if not chosen:
            raise DataError(f"{example.origin or example.id} has nothing to learn: no caption, and no answer.")
        inputs = {
            name: self.encoders[name].prepare(self._opened(raw, self.encoders[name].modality, config, rng))
            for name, raw in example.sources.items()
            if name in self.encoders
        }
        asked = [(k, q) for k, (q, _) in enumerate(chosen) if q and self.question_to in self.encoders]
        questions = {k: self.encoders[self.question_to].prepare(tidy_question(q)) for k, q in asked}
        texts = [self._tokens(question, target) for question, target in chosen]
        return Prepared(example.id, inputs, questions, texts, rng.random() < self.source_dropout, bad)

    def _opened(self, raw: Any, modality: str, config: DataConfig, rng: Random) -> Any:
        return augment(load_image(raw), config.augment, rng) if modality == "image" else raw

    def _tokens(self, question: str | None, target: str) -> tuple[list[int], list[int]]:
        prompt = self.tokenizer.prompt(self.prompt(question))
        if len(prompt) >= self.longest:
            raise DataError(
                f"the question {str(question)[:40]!r}… has {len(prompt)} tokens; the model reads {self.longest}."
            )
        return prompt, target_tokens(self.tokenizer, target, self.max_text - len(prompt))

    def collate(self, prepared: Sequence[Prepared]) -> Batch:
        """Prepared examples to one batch; a source that no example has is left out."""
        sources: dict[str, SourceBatch] = {}
        for name, encoder in self.encoders.items():
            rows = [row for row, item in enumerate(prepared) if name in item.inputs]
            if rows:
                inputs = encoder.collate([prepared[row].inputs[name] for row in rows])
                withheld = torch.tensor([prepared[row].withheld for row in rows])
                sources[name] = SourceBatch(inputs, torch.tensor(rows), withheld)
        asked = [(b * self.streams + k, q) for b, item in enumerate(prepared) for k, q in item.questions.items()]
        if asked:
            inputs = self.encoders[self.question_to].collate([question for _, question in asked])
            places = torch.tensor([place for place, _ in asked])
            sources[self.question_to] = SourceBatch(inputs, places, streams=self.streams)
        texts = [item.texts for item in prepared]
        tokens, mask, targets = pad_texts(texts, self.streams, self.tokenizer.pad, TEXT_MULTIPLE)
        wanted, labels = pick_wanted(targets, WANTED_MULTIPLE)
        bad = [sentence for item in prepared for sentence in item.bad]
        return Batch([item.id for item in prepared], sources, tokens, mask, wanted, labels, bad)


def target_tokens(tokenizer: Tokenizer, target: str, most: int) -> list[int]:
    """What is to be said: up to `most` tokens of the tidied text (at least one), and the end."""
    return [*tokenizer.encode(tidy_caption(target))[: max(1, most)], tokenizer.eos]


def choose_texts(turns: Sequence[Turn], streams: int, rng: Random) -> list[tuple[str | None, str]]:
    """Up to K (question, target) pairs of one example, without repeating one."""
    pairs = choose_all(turns)
    return rng.sample(pairs, min(streams, len(pairs)))


def choose_all(turns: Sequence[Turn]) -> list[tuple[str | None, str]]:
    """Every (question, target) pair of some turns."""
    return [(turn.question, target) for turn in turns for target in turn.targets]


def pad_texts(
    texts: Sequence[Sequence[tuple[list[int], list[int]]]], streams: int, pad: int, multiple: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(prompt, target) tokens -> tokens, mask, targets [B, K, T], padded at the end to a multiple of `multiple`;
    missing streams are all padding."""
    longest = max(len(prompt) + len(target) - 1 for row in texts for prompt, target in row)
    longest = -(-longest // multiple) * multiple
    tokens = torch.full((len(texts), streams, longest), pad)
    targets = torch.full_like(tokens, IGNORED)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for b, row in enumerate(texts):
        for k, (prompt, target) in enumerate(row):
            length = len(prompt) + len(target) - 1
            tokens[b, k, :length] = torch.tensor([*prompt, *target[:-1]])
            targets[b, k, len(prompt) - 1 : length] = torch.tensor(target)
            mask[b, k, :length] = True
    return tokens, mask, targets


def pick_wanted(targets: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """targets [B, K, T] -> the flat places [n] that are not IGNORED and their labels [n], n a multiple of `multiple`
    (what is added points at place 0 and is IGNORED)."""
    flat = targets.flatten()
    wanted = (flat != IGNORED).nonzero()[:, 0]
    missing = -len(wanted) % multiple
    padded = torch.nn.functional.pad
    return padded(wanted, (0, missing)), padded(flat[wanted], (0, missing), value=IGNORED)


def _to(source: SourceBatch, device: torch.device) -> SourceBatch:
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in source.inputs.items()}
    withheld = None if source.withheld is None else source.withheld.to(device)
    return SourceBatch(inputs, source.rows.to(device), withheld, source.streams)
