"""Training examples as tensors, and batches of them.

B examples, K streams (texts of one example), T text positions, n label positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmx.boxes import Box
from mmx.config.schema import AugmentationConfig, DataConfig, TrainingConfig
from mmx.data.augmentation import augment_image
from mmx.data.examples import Example, TextTask, check_sources
from mmx.data.image_cache import CachedImages
from mmx.data.sampling import ExampleSchedule
from mmx.encoders.contract import PreparedInput, collate, prepare
from mmx.errors import DataError, MmxError
from mmx.io.images import load_image
from mmx.models.batching import pad_texts, select_label_positions, stack_boxes
from mmx.models.model import Model
from mmx.models.source import SourceBatch, collate_inputs, prepare_inputs
from mmx.text.prompts import normalize_question
from mmx.text.tokenizer import Tokenizer

DataSets = Sequence[tuple[DataConfig, Sequence[Example]]]

MAX_SKIPS_PER_SAMPLE = 10
# Kernels are prepared anew for every new shape, which on a CPU costs more than the step: keep the shapes few.
TEXT_MULTIPLE = 8
LABEL_MULTIPLE = 256


class TextPair(NamedTuple):
    """One text to learn: the question (None for a caption), the target, and the region of the question."""

    question: str | None
    target: str
    box: Box | None = None


class EncodedTarget(NamedTuple):
    """The tokens of a target text: all of them and the end token, or the first ones of a text that was cut."""

    tokens: list[int]
    is_cut: bool


@dataclass(frozen=True)
class PreparedExample:
    """One example as tensors.

    Args:
        inputs: inputs of each source.
        questions: questions for a text source or question encoder, by stream.
        texts: K texts as (prompt, target) tokens.
        boxes: region of each text.
        references: captions for the reward of self-critical training; empty if the example is trained on its texts.
        modality_dropped: whether the sources are masked out.
        skipped: messages about examples that could not be read and were replaced by this one.
        cut: the origin of the example for each of its texts that was cut.
    """

    id: str
    inputs: Mapping[str, PreparedInput]
    questions: Mapping[int, PreparedInput]
    texts: list[tuple[list[int], list[int]]]
    boxes: list[Box | None]
    references: tuple[str, ...]
    modality_dropped: bool
    skipped: tuple[str, ...]
    cut: tuple[str, ...] = ()


@dataclass
class Batch:
    """A training batch.

    Args:
        tokens, mask: decoder inputs [B, K, T].
        label_positions: int [n], positions among B*K*T where the loss is computed.
        labels: int [n], the token expected after each of these positions, or IGNORE_INDEX.
        boxes: [B, K, 4], the region of each text (NaN for none), or None if no text has a region.
        skipped: messages about examples that could not be read.
        num_texts: number of texts, without streams that are only padding.
        cut: the origins of texts that were cut.
        references: see PreparedExample.
        advantages: [B, K], reward of a sampled text minus its baseline, NaN for a reference text; None if all texts
            are references.
    """

    ids: list[str]
    sources: dict[str, SourceBatch]
    tokens: Tensor
    mask: Tensor
    label_positions: Tensor
    labels: Tensor
    boxes: Tensor | None
    skipped: list[str]
    num_texts: int
    cut: list[str]
    references: list[tuple[str, ...]]
    advantages: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        return replace(
            self,
            sources={name: source.to(device) for name, source in self.sources.items()},
            tokens=self.tokens.to(device),
            mask=self.mask.to(device),
            label_positions=self.label_positions.to(device),
            labels=self.labels.to(device),
            boxes=None if self.boxes is None else self.boxes.to(device),
            advantages=None if self.advantages is None else self.advantages.to(device),
        )


class TrainingDataset(Dataset[PreparedExample]):
    """Maps a position of the training stream to a prepared example. Random choices depend on (seed, position) only.

    Args:
        model: gives the encoders, the tokenizer and the prompts; its weights are not used.
        sets: each data set with its configuration.
        options: uses seed, texts_per_image, max_target_length and modality_dropout.
    """

    def __init__(self, model: Model, sets: DataSets, options: TrainingConfig) -> None:
        self.encoders = model.encoders
        self.question_preparer = model.question_preparer
        self.question_input = model.config.question_input
        self.tokenizer = model.tokenizer
        self.prompt = model.prompt
        self.sets = [(config, self._cached(examples, config)) for config, examples in sets]
        self.seed = options.seed
        self.streams = options.texts_per_image
        self.max_positions = model.config.decoder.max_position_embeddings
        self.max_target_length = options.max_target_length or self.max_positions
        self.modality_dropout = options.modality_dropout
        sizes = [len(examples) for _, examples in sets]
        weights = [config.sampling_weight for config, _ in sets]
        self.schedule = ExampleSchedule(sizes, weights, options.seed)

    def __getitem__(self, position: int) -> PreparedExample:
        """Return the example at a position.

        An example that cannot be read is replaced by the next one of its data set, and noted in `skipped`. Raises
        DataError if MAX_SKIPS_PER_SAMPLE examples in a row cannot be read, or if an example has no input for any source
        of the model.
        """
        dataset, index = self.schedule[position]
        rng = Random(f"{self.seed}-sample-{position}")
        skipped: list[str] = []
        config, examples = self.sets[dataset]
        for attempt in range(MAX_SKIPS_PER_SAMPLE):
            try:
                example = examples[(index + attempt) % len(examples)]
            except MmxError as error:
                skipped.append(str(error))
                continue
            check_sources(example, self.encoders)
            try:
                return self._prepare(example, config, rng, tuple(skipped))
            except MmxError as error:
                skipped.append(str(error))
        raise DataError(
            f"{MAX_SKIPS_PER_SAMPLE} examples in a row cannot be read; the last: {skipped[-1]}",
            code="data.too_many_unreadable",
            last=skipped[-1],
        )

    def collate(self, prepared: Sequence[PreparedExample]) -> Batch:
        """Collate prepared examples. A source that no example has is left out."""
        padded = pad_texts([item.texts for item in prepared], self.streams, self.tokenizer.pad_token_id, TEXT_MULTIPLE)
        selected = select_label_positions(padded.targets, LABEL_MULTIPLE)
        return Batch(
            ids=[item.id for item in prepared],
            sources=self._collate_sources(prepared),
            tokens=padded.tokens,
            mask=padded.mask,
            label_positions=selected.positions,
            labels=selected.labels,
            boxes=stack_boxes([item.boxes for item in prepared], self.streams),
            skipped=[message for item in prepared for message in item.skipped],
            num_texts=sum(len(item.texts) for item in prepared),
            cut=[origin for item in prepared for origin in item.cut],
            references=[item.references for item in prepared],
        )

    def _cached(self, examples: Sequence[Example], config: DataConfig) -> Sequence[Example]:
        if config.image_cache_size is None:
            return examples
        names = [name for name, encoder in self.encoders.items() if encoder.modality == "image"]
        for name in names:
            fit = getattr(self.encoders[name].options, "fit", "squash")
            if fit != "squash":
                raise DataError(
                    f"image_cache_size squashes images, and source {name!r} has fit: {fit}; leave one of them out.",
                    code="data.cache_fit",
                    source=name,
                    fit=fit,
                )
        return CachedImages(examples, names, config.image_cache_size)

    def _prepare(self, example: Example, config: DataConfig, rng: Random, skipped: tuple[str, ...]) -> PreparedExample:
        texts = sample_texts(example.tasks, self.streams, rng)
        origin = example.origin or example.id
        if not texts:
            raise DataError(
                f"{origin} has no text to learn: no caption, and no answer.", code="data.no_text", origin=origin
            )
        inputs = self._prepare_inputs(example, config.augmentation, rng)
        questions: dict[int, PreparedInput] = {}
        for k, text in enumerate(texts):
            if text.question and self.question_preparer is not None:
                question = normalize_question(text.question)
                questions[k] = prepare(self.question_preparer, self.question_input, question)
        tokenized: list[tuple[list[int], list[int]]] = []
        cut: list[str] = []
        for text in texts:
            prompt, target = self._tokenize(text)
            tokenized.append((prompt, target.tokens))
            if target.is_cut:
                cut.append(origin)
        references: tuple[str, ...] = ()
        if config.reward:
            references = tuple(target for task in example.tasks for target in task.targets)
        dropped = rng.random() < self.modality_dropout and not references
        return PreparedExample(
            id=example.id,
            inputs=inputs,
            questions=questions,
            texts=tokenized,
            boxes=[text.box for text in texts],
            references=references,
            modality_dropped=dropped,
            skipped=skipped,
            cut=tuple(cut),
        )

    def _prepare_inputs(
        self, example: Example, augmentation: AugmentationConfig, rng: Random
    ) -> dict[str, PreparedInput]:
        if any(task.box for task in example.tasks):
            augmentation = augmentation.without_geometry()
        raw: dict[str, object] = {}
        for name, value in example.sources.items():
            is_image = name in self.encoders and self.encoders[name].modality == "image"
            raw[name] = augment_image(load_image(value), augmentation, rng) if is_image else value  # type: ignore[arg-type]
        return prepare_inputs(self.encoders, raw)

    def _tokenize(self, text: TextPair) -> tuple[list[int], EncodedTarget]:
        prompt = self.tokenizer.encode_prompt(self.prompt(text.question))
        if len(prompt) >= self.max_positions:
            raise DataError(
                f"the question {str(text.question)[:40]!r}… has {len(prompt)} tokens, and the model has "
                f"{self.max_positions} positions; shorten the question.",
                code="data.question_too_long",
                length=len(prompt),
                limit=self.max_positions,
            )
        limit = min(self.max_target_length, self.max_positions - len(prompt))
        target = encode_target(self.tokenizer, text.target, limit)
        if target.is_cut and not self.tokenizer.decode(target.tokens):
            raise DataError(
                f"no character of the text {text.target[:40]!r} fits into {limit} tokens; raise "
                "training.max_target_length, or shorten the question.",
                code="data.target_limit",
                limit=limit,
            )
        return prompt, target

    def _collate_sources(self, prepared: Sequence[PreparedExample]) -> dict[str, SourceBatch]:
        dropped = torch.tensor([item.modality_dropped for item in prepared])
        sources: dict[str, SourceBatch] = {}
        for name, batch in collate_inputs(self.encoders, [item.inputs for item in prepared]).items():
            sources[name] = batch._replace(dropped=dropped[batch.rows])
        questions: list[PreparedInput] = []
        rows: list[int] = []
        for b, item in enumerate(prepared):
            for k, question in item.questions.items():
                rows.append(b * self.streams + k)
                questions.append(question)
        if questions and self.question_preparer is not None:
            inputs = collate(self.question_preparer, self.question_input, questions)
            sources[self.question_input] = SourceBatch(inputs, torch.tensor(rows), streams=self.streams)
        return sources


def encode_target(tokenizer: Tokenizer, target: str, max_tokens: int) -> EncodedTarget:
    """Return the tokens of a target text and the end token.

    A text of more than `max_tokens` tokens is cut where a character ends. It has no end token, because the text goes
    on: the model would learn to break off.
    """
    tokens = tokenizer.encode(target)
    if len(tokens) > max_tokens:
        return EncodedTarget(tokenizer.truncate(tokens, max_tokens), is_cut=True)
    return EncodedTarget([*tokens, tokenizer.eos_token_id], is_cut=False)


def sample_texts(tasks: Sequence[TextTask], streams: int, rng: Random) -> list[TextPair]:
    """Draw up to K texts of one example without replacement."""
    texts = all_texts(tasks)
    return rng.sample(texts, min(streams, len(texts)))


def all_texts(tasks: Sequence[TextTask]) -> list[TextPair]:
    """Return every text of some tasks."""
    return [TextPair(task.question, target, task.box) for task in tasks for target in task.targets]
