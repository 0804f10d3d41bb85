"""Examples to batches: which example comes when (a pure function of the seed), and its tensors.

Alphabet: B examples, K streams, T text positions, n places to learn from. `targets` holds the token that should follow
each position, or IGNORED where nothing is to be learned (prompt and padding).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mmx.config.schema import AugmentationConfig, DataConfig
from mmx.data.augmentation import augment_image
from mmx.data.examples import Example, TextTask
from mmx.encoders.contract import collate, prepare
from mmx.errors import DataError, MmxError
from mmx.io.images import load_image
from mmx.memory import NO_BOX, Box
from mmx.models.model import Model
from mmx.models.source import SourceBatch, collate_inputs, prepare_inputs
from mmx.text.prompts import normalize_caption, normalize_question
from mmx.text.tokenizer import Tokenizer

IGNORE_INDEX = -100
MAX_SKIPS_PER_SAMPLE = 10
# Kernels are prepared anew for every new shape, which on a CPU costs more than the step itself: few shapes, then.
TEXT_MULTIPLE, LABEL_MULTIPLE = 8, 256


class ExampleSchedule:
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


class PositionSampler(Sampler[list[int]]):
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
class PreparedExample:
    """One example as tensors: inputs of each source, the questions for a text encoder by stream, K texts as (prompt,
    target) tokens, where each points, the captions that what is said of it is compared with (none: it learns word by
    word), and what went wrong."""

    id: str
    inputs: Mapping[str, Mapping[str, Tensor]]
    questions: Mapping[int, Mapping[str, Tensor]]
    texts: list[tuple[list[int], list[int]]]
    boxes: list[Box | None]
    references: tuple[str, ...]
    modality_dropped: bool
    skipped: tuple[str, ...]


@dataclass
class Batch:
    """What the model is trained on. tokens, mask: [B, K, T]; wanted: int [n], the places among B*K*T where something
    is to be learned, and labels: int [n], the token that should follow there; boxes: [B, K, 4], where each text points
    (NaN: nowhere), None where none does; bad: what was passed over, and why; references: of each row, see Prepared;
    advantages: [B, K], how much better than its fellows a text is that the model said itself, NaN for one that people
    wrote, None where all are people's.
    """

    ids: list[str]
    sources: dict[str, SourceBatch]
    tokens: Tensor
    mask: Tensor
    label_positions: Tensor
    labels: Tensor
    boxes: Tensor | None
    skipped: list[str]
    references: list[tuple[str, ...]]
    advantages: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        sources = {name: source.to(device) for name, source in self.sources.items()}
        tensors = ("tokens", "mask", "label_positions", "labels", "boxes", "advantages")
        moved: dict[str, Any] = {name: None if (t := getattr(self, name)) is None else t.to(device) for name in tensors}
        return replace(self, sources=sources, **moved)


class TrainingDataset(Dataset[PreparedExample]):
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
        self.encoders, self.question_reader, self.question_input = (
            model.encoders,
            model.question_reader,
            model.config.question_input,
        )
        self.tokenizer, self.prompt = model.tokenizer, model.prompt
        self.sets, self.seed, self.streams = sets, seed, streams
        self.longest = model.config.decoder.max_position_embeddings
        self.max_text = min(max_text, self.longest)
        self.modality_dropout = source_dropout
        self.schedule = ExampleSchedule([len(e) for _, e in sets], [c.sampling_weight for c, _ in sets], seed)

    def __getitem__(self, position: int) -> PreparedExample:
        """The example at a position; one that cannot be read is named in `bad` and its neighbour taken instead."""
        dataset, index = self.schedule[position]
        rng = Random(f"{self.seed}-sample-{position}")
        bad: list[str] = []
        config, examples = self.sets[dataset]
        for attempt in range(MAX_SKIPS_PER_SAMPLE):
            try:
                return self._prepare(examples[(index + attempt) % len(examples)], config, rng, tuple(bad))
            except MmxError as error:
                bad.append(str(error))
        raise DataError(f"{MAX_SKIPS_PER_SAMPLE} examples in a row cannot be read; the last: {bad[-1]}")

    def _prepare(self, example: Example, config: DataConfig, rng: Random, bad: tuple[str, ...]) -> PreparedExample:
        chosen = sample_texts(example.tasks, self.streams, rng)
        if not chosen:
            raise DataError(f"{example.origin or example.id} has nothing to learn: no caption, and no answer.")
        changes = (
            config.augmentation.without_geometry() if any(turn.box for turn in example.tasks) else config.augmentation
        )
        inputs = prepare_inputs(
            self.encoders, {name: self._opened(raw, name, changes, rng) for name, raw in example.sources.items()}
        )
        questions = {
            k: prepare(self.question_reader, self.question_input, normalize_question(text.question))
            for k, text in enumerate(chosen)
            if text.question and self.question_reader is not None
        }
        texts = [self._tokens(text.question, text.target) for text in chosen]
        boxes = [text.box for text in chosen]
        references = tuple(target for turn in example.tasks for target in turn.targets) if config.reward else ()
        withheld = rng.random() < self.modality_dropout and not references
        return PreparedExample(example.id, inputs, questions, texts, boxes, references, withheld, bad)

    def _opened(self, raw: Any, source: str, changes: AugmentationConfig, rng: Random) -> Any:
        is_picture = source in self.encoders and self.encoders[source].modality == "image"
        return augment_image(load_image(raw), changes, rng) if is_picture else raw

    def _tokens(self, question: str | None, target: str) -> tuple[list[int], list[int]]:
        prompt = self.tokenizer.prompt(self.prompt(question))
        if len(prompt) >= self.longest:
            raise DataError(
                f"the question {str(question)[:40]!r}… has {len(prompt)} tokens; the model reads {self.longest}."
            )
        return prompt, encode_target(self.tokenizer, target, self.max_text - len(prompt))

    def collate(self, prepared: Sequence[PreparedExample]) -> Batch:
        """Prepared examples to one batch; a source that no example has is left out."""
        given = collate_inputs(self.encoders, [item.inputs for item in prepared])
        withheld = torch.tensor([item.modality_dropped for item in prepared])
        sources = {name: batch._replace(dropped=withheld[batch.rows]) for name, batch in given.items()}
        asked = [(b * self.streams + k, q) for b, item in enumerate(prepared) for k, q in item.questions.items()]
        if asked and self.question_reader is not None:
            inputs = collate(self.question_reader, self.question_input, [question for _, question in asked])
            places = torch.tensor([place for place, _ in asked])
            sources[self.question_input] = SourceBatch(inputs, places, streams=self.streams)
        texts = [item.texts for item in prepared]
        tokens, mask, targets = pad_texts(texts, self.streams, self.tokenizer.pad, TEXT_MULTIPLE)
        wanted, labels = select_label_positions(targets, LABEL_MULTIPLE)
        boxes = stack_boxes([item.boxes for item in prepared], self.streams)
        bad = [sentence for item in prepared for sentence in item.skipped]
        ids, references = [item.id for item in prepared], [item.references for item in prepared]
        return Batch(ids, sources, tokens, mask, wanted, labels, boxes, bad, references)


def encode_target(tokenizer: Tokenizer, target: str, most: int) -> list[int]:
    """What is to be said: up to `most` tokens of the tidied text (at least one), and the end."""
    return [*tokenizer.encode(normalize_caption(target))[: max(1, most)], tokenizer.eos]


class TextPair(NamedTuple):
    """One text to be learned: what is asked (None: a caption), what should be said, where the question points."""

    question: str | None
    target: str
    box: Box | None = None


def sample_texts(turns: Sequence[TextTask], streams: int, rng: Random) -> list[TextPair]:
    """Up to K texts of one example, without repeating one."""
    texts = all_texts(turns)
    return rng.sample(texts, min(streams, len(texts)))


def all_texts(turns: Sequence[TextTask]) -> list[TextPair]:
    """Every text of some turns."""
    return [TextPair(turn.question, target, turn.box) for turn in turns for target in turn.targets]


def stack_boxes(boxes: Sequence[Sequence[Box | None]], streams: int) -> Tensor | None:
    """Where each of up to K streams of each row points -> [B, K, 4], NaN for nowhere; None where no one points."""
    if not any(box for row in boxes for box in row):
        return None
    return torch.tensor([[box or NO_BOX for box in [*row, *[None] * (streams - len(row))]] for row in boxes])


def pad_texts(
    texts: Sequence[Sequence[tuple[list[int], list[int]]]], streams: int, pad: int, multiple: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(prompt, target) tokens -> tokens, mask, targets [B, K, T], padded at the end to a multiple of `multiple`;
    missing streams are all padding."""
    longest = max(len(prompt) + len(target) - 1 for row in texts for prompt, target in row)
    longest = -(-longest // multiple) * multiple
    tokens = torch.full((len(texts), streams, longest), pad)
    targets = torch.full_like(tokens, IGNORE_INDEX)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for b, row in enumerate(texts):
        for k, (prompt, target) in enumerate(row):
            length = len(prompt) + len(target) - 1
            tokens[b, k, :length] = torch.tensor([*prompt, *target[:-1]])
            targets[b, k, len(prompt) - 1 : length] = torch.tensor(target)
            mask[b, k, :length] = True
    return tokens, mask, targets


def select_label_positions(targets: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """targets [B, K, T] -> the flat places [n] that are not IGNORED and their labels [n], n a multiple of `multiple`
    (what is added points at place 0 and is IGNORED)."""
    flat = targets.flatten()
    wanted = (flat != IGNORE_INDEX).nonzero()[:, 0]
    missing = -len(wanted) % multiple
    padded = torch.nn.functional.pad
    return padded(wanted, (0, missing)), padded(flat[wanted], (0, missing), value=IGNORE_INDEX)
