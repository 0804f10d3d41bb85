"""Answers to many questions, in order. Questions about the same content share one encoding.

B: inputs; K: streams (questions about each input).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from mmx.boxes import check_box
from mmx.config.schema import GenerationConfig
from mmx.encoders.contract import PreparedInput
from mmx.errors import MmxError
from mmx.inference.batch_inference.dedup import content_keys, identity_key
from mmx.inference.batch_inference.out_of_memory import AdaptiveBatchSize
from mmx.inference.batch_inference.prefetch import Prefetcher, batched
from mmx.inference.generator import TextGenerator
from mmx.inference.inputs import PreparedOrError
from mmx.inference.outputs import GeneratedText, Question, best_text
from mmx.inference.prompts import check_question
from mmx.memory import Memory

# Streams x (prompt + answer) x beams decoded at a time. For a decoder of 12 layers and hidden size 768 in float32 the
# KV cache then holds 1.2 GB; 16 images with 16 short questions each are 11,000 and stay in one piece.
MAX_TOKENS = 16_384

Indices: TypeAlias = Sequence[int]  # of questions about the same content
Results: TypeAlias = dict[int, GeneratedText | MmxError]  # by index of the question


class StreamIndex(NamedTuple):
    """One stream of a batch: a row of the memory and the index of its question."""

    row: int
    question: int


def answer_questions(
    generator: TextGenerator, questions: Sequence[Question], batch_size: int, options: GenerationConfig
) -> Iterator[GeneratedText | MmxError]:
    """See `Pipeline.answers`."""
    return BatchAnswering(generator, questions, options).run(batch_size)


class BatchAnswering:
    """One call of `Pipeline.answers`: the questions, their prompt lengths, and the batch sizes found so far."""

    def __init__(self, generator: TextGenerator, questions: Sequence[Question], options: GenerationConfig) -> None:
        self.generator = generator
        self.questions = questions
        self.options = options
        self.results: Results = {}
        self.prompt_lengths: dict[int, int] = {}
        self.encode_batches = AdaptiveBatchSize()
        self.decode_batches = AdaptiveBatchSize()

    def run(self, batch_size: int) -> Iterator[GeneratedText | MmxError]:
        """Yield the results in the order of the questions, each as soon as all before it are known."""
        self._check_questions()
        next_index = 0
        with Prefetcher(self.generator.model.device) as prefetcher:
            for groups, prepared in prefetcher.map(self._prepare_group, batched(self._groups(), batch_size)):
                self._answer_groups(groups, prepared)
                while next_index in self.results:
                    yield self.results.pop(next_index)
                    next_index += 1
        while next_index in self.results:  # questions that no input was read for
            yield self.results.pop(next_index)
            next_index += 1

    def _check_questions(self) -> None:
        """Record the error of each question that cannot be asked, and the prompt length of each that can."""
        for index, item in enumerate(self.questions):
            try:
                check_question(item.question)
                check_box(item.box)
                prompt_length = len(self.generator.prompt_tokens(item.question))
                start = self.generator.start_tokens(self._start(item), prompt_length)
                self.prompt_lengths[index] = prompt_length + len(start.tokens)
            except MmxError as error:
                self.results[index] = error

    def _start(self, question: Question) -> str:
        return self.options.start if question.start is None else question.start

    def _groups(self) -> list[list[int]]:
        """Indices of the questions about each content, in the order in which the contents first occur."""
        indices = list(self.prompt_lengths)
        images = [self.questions[index].image for index in indices]
        keys = content_keys(self.generator, images)
        groups: dict[Hashable, list[int]] = {}
        for index, image in zip(indices, images, strict=True):
            groups.setdefault(keys[identity_key(image)], []).append(index)
        return list(groups.values())

    def _prepare_group(self, group: Indices) -> PreparedOrError:
        return self.generator.prepare_or_error(self.questions[group[0]].image)

    def _answer_groups(self, groups: Sequence[Indices], prepared: Sequence[PreparedOrError]) -> None:
        """Answer the questions of some groups; each group shares one encoded input."""
        readable: list[tuple[dict[str, PreparedInput], Indices]] = []
        for item, group in zip(prepared, groups, strict=True):
            if isinstance(item, MmxError):
                for index in group:
                    self.results[index] = self._input_error(index, group[0], item)
            else:
                readable.append((item, group))
        outcomes = self.encode_batches.run(readable, self._encode_and_answer)
        for (_, group), outcome in zip(readable, outcomes, strict=True):
            if isinstance(outcome, MmxError):
                self.results.update(dict.fromkeys(group, outcome))
            else:
                self.results.update(outcome)

    def _input_error(self, index: int, first: int, error: MmxError) -> MmxError:
        """The error of an input under its own name, if it is a duplicate of the one that was read."""
        image = self.questions[index].image
        if identity_key(image) == identity_key(self.questions[first].image):
            return error
        own = self.generator.prepare_or_error(image)
        return own if isinstance(own, MmxError) else error

    def _encode_and_answer(self, rows: Sequence[tuple[dict[str, PreparedInput], Indices]]) -> list[Results]:
        memory = self.generator.encode_prepared([prepared for prepared, _ in rows])
        groups = [group for _, group in rows]
        answers: list[Results] = [{} for _ in groups]

        def decode(streams: Sequence[StreamIndex]) -> list[GeneratedText]:
            return self._decode(memory, streams)

        for streams in self._pieces(groups):
            outcomes = self.decode_batches.run(streams, decode)
            for stream, outcome in zip(streams, outcomes, strict=True):
                answers[stream.row][stream.question] = outcome
        return answers

    def _pieces(self, groups: Sequence[Indices]) -> Iterator[list[StreamIndex]]:
        """Yield streams in pieces that keep to MAX_TOKENS, questions of lower rows first."""
        longest = max(self.prompt_lengths[index] for group in groups for index in group)
        texts = max(self.options.num_beams, self.options.num_return_sequences)
        max_streams = max(1, MAX_TOKENS // ((longest + self.options.max_new_tokens) * texts))
        remaining = dict(enumerate(groups))
        while remaining:
            rows = list(remaining)[:max_streams]
            per_row = max(1, max_streams // len(rows))
            piece: list[StreamIndex] = []
            for row in rows:
                piece += [StreamIndex(row, index) for index in remaining[row][:per_row]]
                remaining[row] = remaining[row][per_row:]
                if not remaining[row]:
                    del remaining[row]
            yield piece

    def _decode(self, memory: Memory, streams: Sequence[StreamIndex]) -> list[GeneratedText]:
        """Answer the questions of some streams at once, over the rows of the memory that they belong to."""
        by_row: dict[int, list[int]] = {}
        for stream in streams:
            by_row.setdefault(stream.row, []).append(stream.question)
        selected = memory if len(by_row) == memory.batch_size else memory.select(list(by_row))
        questions = [[self.questions[index].question for index in indices] for indices in by_row.values()]
        boxes = [[self.questions[index].box for index in indices] for indices in by_row.values()]
        starts = [[self._start(self.questions[index]) for index in indices] for indices in by_row.values()]
        texts = self.generator.generate_batch(selected, questions, self.options, boxes, starts)
        answers: dict[int, GeneratedText] = {}
        for indices, row in zip(by_row.values(), texts, strict=True):
            for index, sequences in zip(indices, row, strict=True):
                answers[index] = best_text(sequences)
        return [answers[stream.question] for stream in streams]
